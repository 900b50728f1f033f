"""Builders: commands that start the fake engine, and a record of the states it went through."""

import asyncio
import os
import sys
from pathlib import Path

from tests.support.programs import PATIENCE_S
from xim_agent.engine.process import EnginePolicy, EngineState
from xim_agent.engine.restart import RestartPolicy
from xim_agent.planning.command import EngineCommand

ROOT = Path(__file__).parents[3]
FAKE_VLLM = str(ROOT / "tests" / "support" / "bin" / "fake-vllm")
QUICK = RestartPolicy(base_s=0.01, cap_s=0.01, attempts=3)
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


def fake_vllm(socket_path: Path, *flags: str) -> EngineCommand:
    """The fake engine as `served`, on `socket_path`."""
    return EngineCommand(
        argv=(FAKE_VLLM, "serve", "model", "--served-model-name", "served", "--uds", str(socket_path), *flags),
        environment=ENVIRONMENT,
        socket_path=socket_path,
        served_name="served",
    )


def python(socket_path: Path, code: str) -> EngineCommand:
    """A program in the engine's place."""
    return EngineCommand(
        argv=(sys.executable, "-c", code), environment=ENVIRONMENT, socket_path=socket_path, served_name="m"
    )


def policy(**changes: object) -> EnginePolicy:
    """Quick restarts, frequent probes; an engine that answers late, as on a crowded machine, is healthy."""
    settings: dict[str, object] = {"restart": QUICK, "health_interval_s": 0.05, "health_timeout_s": 30.0} | changes
    return EnginePolicy(**settings)  # type: ignore[arg-type]


class States:
    """What `on_state` was told, and a way to wait for a state."""

    def __init__(self) -> None:
        self.seen: list[EngineState] = []
        self.reasons: list[str] = []
        self._changed = asyncio.Event()

    def __call__(self, state: EngineState, reason: str) -> None:
        self.seen.append(state)
        self.reasons.append(reason)
        self._changed.set()

    async def reach(self, state: EngineState, times: int = 1) -> None:
        """Return when `state` was entered `times` times."""
        async with asyncio.timeout(PATIENCE_S):
            while self.seen.count(state) < times:
                self._changed.clear()
                await self._changed.wait()
