"""The engine as the assignment wants it: started when there is one, started anew when it changes."""

import asyncio
import logging
import time
from collections.abc import Callable

from xim_agent.engine.client import EngineClient
from xim_agent.engine.process import Engine, EngineFailed, EnginePolicy, EngineState
from xim_agent.engine.startup import Progress
from xim_agent.planning.command import EngineCommand
from xim_agent.planning.decision import Wanted
from xim_agent.planning.render import as_text, command_of
from xim_agent.settings import AgentSettings
from xim_agent.surroundings import PlaceUnusable, Surroundings, write_files

log = logging.getLogger(__name__)

STOP_S = 10.0
"""What a stop may take before the engine is killed; vLLM needs a second or two to leave its devices in order."""


def policy_of(settings: AgentSettings) -> EnginePolicy:
    """The limits of the supervision as the operator set them."""
    return EnginePolicy(
        startup_timeout_s=settings.vllm_startup_timeout_s,
        inactivity_grace_s=float(settings.vllm_startup_inactivity_grace_seconds),
        degraded_to_failed_s=float(settings.degraded_to_failed_timeout_seconds),
        health_check=not settings.disable_health_check,
        health_interval_s=settings.health_check_interval,
        health_timeout_s=settings.health_check_timeout,
        health_failures=settings.health_check_failure_threshold,
    )


class AssignedEngine:
    """One engine at a time. `run` in a task of its own; `assign` and `stop` from anywhere in the loop."""

    def __init__(
        self,
        settings: AgentSettings,
        surroundings: Surroundings,
        client: EngineClient,
        on_state: Callable[[EngineState, str], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._settings = settings
        self._surroundings = surroundings
        self._client = client
        self._on_state = on_state
        self._tasks = tasks
        self._wanted: Wanted | None = None
        self._changed = asyncio.Event()
        self._leaving = False
        self._engine: Engine | None = None
        self._started_at = 0.0
        self.start_s = 0.0
        """How long the last start took."""

    @property
    def wanted(self) -> Wanted | None:
        """What it serves, or is to serve."""
        return self._wanted

    @property
    def progress(self) -> Progress | None:
        """How far the engine's start is, where vLLM has said so."""
        return None if self._engine is None else self._engine.progress

    @property
    def ready(self) -> bool:
        """Whether the engine answers."""
        return self._engine is not None and self._engine.state is EngineState.READY

    @property
    def fingerprint(self) -> str | None:
        """The ready engine's `system_fingerprint`, None where it gives none."""
        return None if self._engine is None else self._engine.fingerprint

    def assign(self, wanted: Wanted | None) -> None:
        """Serve this from now on; the engine is started anew when it serves something else."""
        if wanted == self._wanted:
            return
        log.info("assignment", extra={"served_name": None if wanted is None else wanted.served_name})
        self._wanted = wanted
        self._changed.set()
        if self._engine is not None:
            self._tasks.create_task(self._engine.stop(STOP_S), name="engine stop")

    async def run(self) -> None:
        """Keep an engine running for what is wanted, until `stop`; cancelling kills it.

        Raises:
            EngineFailed: it ends again and again, or in a way that another start would only repeat.
            PlaceUnusable: it cannot be started on this machine as it is.
        """
        while not self._leaving:
            self._changed.clear()
            wanted = self._wanted
            if wanted is None:
                log.info("waiting for an assignment: no endpoint of the project names this agent's model yet")
                await self._changed.wait()  # by `assign` or `stop`
                continue
            self._engine = Engine(self._command(wanted), self._client, policy_of(self._settings), self._told)
            try:
                await self._engine.run()
            except EngineFailed as failure:
                log.error("engine given up", extra={"reason": failure.reason, "output_tail": "\n".join(failure.tail)})
                raise
            finally:
                self._engine = None

    async def stop(self, grace_s: float = STOP_S) -> None:
        """Stop the engine for good; `run` returns."""
        self._leaving = True
        self._changed.set()
        if self._engine is not None:
            await self._engine.stop(grace_s)

    def _command(self, wanted: Wanted) -> EngineCommand:
        """Plan for `wanted`, tell the plan, write what the engine will read."""
        plan = write_files(self._surroundings.plan(wanted), self._surroundings, wanted)
        log.info("engine plan", extra={"plan": as_text(plan)})
        for sentence in plan.warnings:
            log.warning(sentence)
        if plan.problems:
            raise PlaceUnusable("The engine cannot be started like this.", " ".join(plan.problems))
        return command_of(plan)

    def _told(self, state: EngineState, reason: str) -> None:
        now = time.monotonic()
        if state is EngineState.STARTING:
            self._started_at = now
        elif state is EngineState.READY and self._started_at:
            self.start_s, self._started_at = now - self._started_at, 0.0
        self._on_state(state, reason)
