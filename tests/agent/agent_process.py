"""Builders: the agent as a process of its own, enrolled by a real HTTP answer, against a router stub."""

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import psutil
from aiohttp import web

from tests.agent.engine.engines import FAKE_VLLM
from tests.agent.link.enrollments import GRANTED, FakeRouter
from tests.support.ports import free_ports
from tests.support.programs import PATIENCE_S
from tests.support.router_stub import RouterStub
from xim_protocol.enrollment import AssignedEndpoint
from xim_protocol.ids import EndpointId

TINY_MODEL = Path(__file__).parents[2] / "demo" / "model" / "xim-tiny"


def assigned(name: str) -> AssignedEndpoint:
    return AssignedEndpoint(endpoint_id=EndpointId("e1"), served_name=name, model="model", task_mode="generate")


def granted(router: RouterStub, *, served_name: str | None = "tiny") -> web.Response:
    """The answer to an enrollment at this router."""
    router.admit_all = True
    assignment = None if served_name is None else assigned(served_name)
    return web.json_response(replace(GRANTED, mesh=(router.address,), assignment=assignment).to_json())


class AgentProcess:
    """A running `xerotier-xim-agent run`."""

    def __init__(self, process: asyncio.subprocess.Process, metrics_port: int) -> None:
        self.process = process
        self.metrics_port = metrics_port
        self.lines: list[str] = []
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode().rstrip())
            self._changed.set()
        self._changed.set()

    def said(self, message: str, **facts: object) -> bool:
        """True when a log line with this message and these facts was written."""
        for line in self.lines:
            if line.startswith("{"):
                entry = json.loads(line)
                if entry["message"].startswith(message) and all(entry.get(k) == v for k, v in facts.items()):
                    return True
        return False

    async def says(self, message: str, **facts: object) -> None:
        """Return when it was logged."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.said(message, **facts):
                self._changed.clear()
                await self._changed.wait()

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Its exit status, once all it wrote was read."""
        async with asyncio.timeout(PATIENCE_S):
            status = await self.process.wait()
            await self._reading
        return status

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    async def metrics(self) -> str:
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return await response.text()


@asynccontextmanager
async def agent_process(
    tmp_path: Path, enroll: FakeRouter | None, *, without_input: bool = False, **settings: str
) -> AsyncIterator[AgentProcess]:
    """The agent with these settings (without their prefix); killed at the end if it still runs. `without_input`: its
    standard input is closed."""
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    shutil.copy(TINY_MODEL / "config.json", model)
    (port,) = free_ports(1)
    given = {
        "CONFIG_DIR": str(tmp_path / "config"),
        "ALLOW_INSECURE": "1",
        "VLLM_PATH": FAKE_VLLM,
        "INITIAL_MODEL_PATH": str(model),
        "MODEL_CACHE_PATH": str(tmp_path / "cache" / "models"),
        "VLLM_SOCKET_PATH": str(tmp_path / "e.sock"),
        "METRICS_PORT": str(port),
        "JOIN_KEY": "" if enroll is None else enroll.key().encode(),
    } | settings
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("XEROTIER_")}
    process = await asyncio.create_subprocess_exec(
        *(("/bin/sh", "-c", 'exec "$@" <&-', "sh") if without_input else ()),
        *(sys.executable, "-m", "xim_agent", "run"),
        env={**inherited, **{f"XEROTIER_AGENT_{name}": value for name, value in given.items()}},
        stderr=asyncio.subprocess.PIPE,
    )
    agent = AgentProcess(process, port)
    try:
        yield agent
    finally:
        if process.returncode is None:
            process.kill()
        await agent.ended()
