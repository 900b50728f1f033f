"""The engine's single owner: starts vLLM, waits until it serves, watches it, starts it again, stops it.

Callers state wishes (`run`, `stop`) and are told states; nobody else starts or ends the process.
"""

import asyncio
import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from xim_agent.engine.child import EngineChild
from xim_agent.engine.client import EngineClient
from xim_agent.engine.diagnosis import Diagnosis, diagnose
from xim_agent.engine.oom import oom_kills
from xim_agent.engine.restart import FATAL_EXIT_CODES, RestartBackoff, RestartPolicy
from xim_agent.engine.startup import Progress, ProgressTold, Startup, StartupWatch, is_milestone
from xim_agent.planning.command import EngineCommand

log = logging.getLogger(__name__)

READINESS_PROBE_S = 0.2
READINESS_TIMEOUT_S = 2.0
STARTING_STOP_GRACE_S = 2.0
"""SIGTERM while vLLM 0.32 starts hangs, so a start is given this little before the kill."""

NOT_MADE_REMEDY = (
    "Look at the machine's free memory and at what this user may have (`ulimit -a`: processes, open files), and at the "
    "length of XEROTIER_AGENT_VLLM_ARGS and XEROTIER_AGENT_VLLM_ENV"
)


class EngineState(StrEnum):
    """What the engine is doing, as its owner sees it."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    """It runs, but its health check fails."""
    RESTARTING = "restarting"
    """It ended by itself; the next start waits."""
    STOPPING = "stopping"
    FAILED = "failed"
    """It is not started again."""


OnState = Callable[[EngineState, str], None]
"""Told every change, with the reason in words; runs in the loop and must not block."""


class EngineFailed(Exception):
    """The engine was given up. `tail` holds its last lines, `remedy` what to do."""

    def __init__(self, reason: str, remedy: str, tail: list[str], *, lasting: bool = False) -> None:
        """`lasting`: another start of the agent would end the same way."""
        super().__init__(f"{reason}. {remedy}")
        self.reason, self.remedy, self.tail, self.lasting = reason, remedy, tail, lasting


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePolicy:
    """Limits of the supervision, in seconds; the defaults are those of the settings."""

    startup_timeout_s: float = 600.0
    inactivity_grace_s: float = 300.0
    degraded_to_failed_s: float = 300.0
    health_check: bool = True
    """Whether the engine is probed once it is ready."""
    health_interval_s: float = 5.0
    health_timeout_s: float = 10.0
    health_failures: int = 5
    """Failed probes in a row that make it degraded."""
    restart: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass(frozen=True, kw_only=True, slots=True)
class _End:
    """How one life of the engine ended."""

    reason: str
    status: int | None = None
    served_s: float = 0.0
    diagnosis: Diagnosis | None = None
    remedy: str = "See its last lines"
    """Where nothing was recognised."""

    @property
    def whole_reason(self) -> str:
        """With what was recognised."""
        return self.reason if self.diagnosis is None else f"{self.reason}: {self.diagnosis.reason}"


class Engine:
    """One engine: `run` in a task of its own, `stop` from anywhere."""

    def __init__(self, command: EngineCommand, client: EngineClient, policy: EnginePolicy, on_state: OnState) -> None:
        self._command = command
        self._client = client
        self._policy = policy
        self._on_state = on_state
        self._state = EngineState.STOPPED
        self._stop_asked = asyncio.Event()
        self._stopped = asyncio.Event()
        self._stopped.set()
        self._child: EngineChild | None = None
        self._watch: StartupWatch | None = None
        self._tail: list[str] = []
        self._progress = ProgressTold()
        self.restarts = 0
        """Starts after the first one."""
        self.fingerprint: str | None = None
        """The running engine's `system_fingerprint`, known once it is ready; None where it gives none."""

    @property
    def state(self) -> EngineState:
        """What it is doing now."""
        return self._state

    @property
    def process_group(self) -> int | None:
        """Of the running engine, or None."""
        return None if self._child is None else self._child.pid

    @property
    def progress(self) -> Progress | None:
        """How far the start is, where vLLM has said so; None when it does not start."""
        return None if self._watch is None else self._progress.latest

    async def run(self) -> None:
        """Keep the engine serving until `stop`; cancelling kills it.

        Raises:
            EngineFailed: it ends again and again, or in a way that another start would only repeat.
        """
        backoff = RestartBackoff(self._policy.restart)
        self._stopped.clear()
        try:
            while not self._stop_asked.is_set():
                end = await self._live()
                if self._stop_asked.is_set():
                    break
                delay_s = self._delay_after(end, backoff)
                self._enter(EngineState.RESTARTING, f"{end.whole_reason}; next start in {delay_s:g} s")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop_asked.wait(), delay_s)
                self.restarts += 1
        except EngineFailed as failure:
            self._enter(EngineState.FAILED, f"{failure.reason}. {failure.remedy}")
            raise
        finally:
            self._stopped.set()
        self._enter(EngineState.STOPPED, "stopped")

    async def stop(self, grace_s: float) -> None:
        """Ask the engine to stop, kill its process group after `grace_s`, and wait until nothing of it is left.

        May be called again with a shorter grace. A start is killed after two seconds, whatever the grace.
        """
        self._stop_asked.set()
        if self._stopped.is_set():
            return
        if self._state in (EngineState.STARTING, EngineState.RESTARTING):
            grace_s = min(grace_s, STARTING_STOP_GRACE_S)
        self._enter(EngineState.STOPPING, "asked to stop")
        if self._child is not None and grace_s > 0:
            self._child.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), grace_s)
        if self._child is not None:
            await self._child.end()
        await self._stopped.wait()  # `run` has nothing left to wait for

    def _delay_after(self, end: _End, backoff: RestartBackoff) -> float:
        found = end.diagnosis
        if found is not None and found.final and not end.served_s:
            raise EngineFailed(end.whole_reason, found.remedy, self._tail, lasting=found.lasting)
        if end.status in FATAL_EXIT_CODES and not end.served_s:
            raise EngineFailed(end.reason, FATAL_EXIT_CODES[end.status] + "; see its last lines", self._tail)
        delay_s = backoff.ended(served_s=end.served_s)
        if delay_s is None:
            remedy = end.remedy if found is None else found.remedy
            reason = f"it ended {self._policy.restart.attempts} times in a row; the last time: {end.whole_reason}"
            raise EngineFailed(reason, remedy, self._tail)
        return delay_s

    async def _live(self) -> _End:
        """One life of the engine, from the start of the process until nothing of it is left."""
        self._enter(EngineState.STARTING, "starting vLLM")
        policy = self._policy
        self._watch = StartupWatch(
            now=time.monotonic(), ceiling_s=policy.startup_timeout_s, inactivity_grace_s=policy.inactivity_grace_s
        )
        remove_socket(self._command.socket_path)
        self._progress, kills_before = ProgressTold(), oom_kills()
        try:
            self._child = child = await EngineChild.spawn(self._command, self._heard, self._wrote)
        except OSError as error:
            return self._not_made(error)
        ready_at: float | None = None
        try:
            # A stop that came while the process was made found no child to end.
            reason = "stopped" if self._stop_asked.is_set() else await self._start(child.exited)
            if reason is None:
                ready_at = time.monotonic()
                reason = await self._tend(child.exited)
        finally:  # nothing to do after an end of its own; kills when stuck, degraded or cancelled
            by_itself = child.exited.done()
            status = await asyncio.shield(child.end())
            self._child, self._watch, self._tail = None, None, list(child.tail)
        served_s = 0.0 if ready_at is None else time.monotonic() - ready_at
        # Our own SIGKILL says nothing of what was wrong.
        diagnosis = None if self._stop_asked.is_set() else self._diagnose(status if by_itself else None, kills_before)
        end = _End(reason=reason, status=status, served_s=served_s, diagnosis=diagnosis)
        self._report_end(end, started=ready_at is not None)
        return end

    def _not_made(self, error: OSError) -> _End:
        """The end of a life that had no process: memory, processes or descriptors were used up, which passes."""
        self._watch, self._tail = None, []
        end = _End(reason=f"no process could be made for vLLM: {error.strerror or error}", remedy=NOT_MADE_REMEDY)
        self._report_end(end, started=False)
        return end

    def _diagnose(self, status: int | None, kills_before: int | None) -> Diagnosis | None:
        kills_now = oom_kills()
        kills = 0 if kills_before is None or kills_now is None else kills_now - kills_before
        return diagnose(self._tail, status, oom_kills=kills, owner=f"{os.getuid()}:{os.getgid()}")

    async def _start(self, exit_status: asyncio.Task[int]) -> str | None:
        """Wait until `/health` answers; None then, or why it never did."""
        assert self._watch is not None
        while not exit_status.done():
            if await self._client.health(READINESS_TIMEOUT_S):
                self._watch = None
                self.fingerprint = await self._client.fingerprint(self._command.served_name)
                if not self._stop_asked.is_set():
                    self._enter(EngineState.READY, "vLLM answers")
                return None
            match self._watch.verdict(time.monotonic()):
                case Startup.STUCK:
                    return f"no output for {self._policy.inactivity_grace_s:g} s while starting"
                case Startup.TIMED_OUT:
                    return f"not ready within {self._policy.startup_timeout_s:g} s"
                case Startup.WAITING:
                    await asyncio.wait({exit_status}, timeout=READINESS_PROBE_S)
        return f"vLLM ended with status {exit_status.result()} before it was ready"

    async def _tend(self, exit_status: asyncio.Task[int]) -> str:
        """Watch a ready engine until it ends or has been degraded too long; the reason."""
        policy = self._policy
        failures, degraded_at = 0, 0.0
        while not exit_status.done():
            await asyncio.wait({exit_status}, timeout=policy.health_interval_s if policy.health_check else None)
            if exit_status.done() or self._stop_asked.is_set():
                continue
            healthy = await self._client.health(policy.health_timeout_s)
            now = time.monotonic()
            failures = 0 if healthy else failures + 1
            if healthy and self._state is EngineState.DEGRADED:
                self._enter(EngineState.READY, "vLLM answers again")
            elif failures >= policy.health_failures and self._state is EngineState.READY:
                degraded_at = now
                self._enter(EngineState.DEGRADED, f"{failures} health checks failed in a row")
            elif self._state is EngineState.DEGRADED and now >= degraded_at + policy.degraded_to_failed_s:
                self._enter(EngineState.FAILED, f"degraded for {policy.degraded_to_failed_s:g} s")
                return f"degraded for {policy.degraded_to_failed_s:g} s"
        return f"vLLM ended with status {exit_status.result()}"

    def _wrote(self) -> None:
        """A line without its end counts as well: some draw dots."""
        if self._watch is not None:
            self._watch.heard(time.monotonic())

    def _heard(self, line: str) -> None:
        if self._watch is None:
            log.debug("engine output", extra={"line": line})
            return
        if told := self._progress.heard(line):
            log.info("engine start", extra={"stage": told.stage.value, "percent": told.percent})
        log.log(logging.INFO if is_milestone(line) else logging.DEBUG, "engine output", extra={"line": line})

    def _report_end(self, end: _End, *, started: bool) -> None:
        if self._stop_asked.is_set():
            log.info("engine stopped", extra={"status": end.status})
            return
        facts = {"reason": end.whole_reason, "status": end.status, "was_ready": started}
        if end.diagnosis is not None:
            facts |= {"trouble": end.diagnosis.trouble.value, "remedy": end.diagnosis.remedy}
        log.error("engine ended", extra={**facts, "output_tail": "\n".join(self._tail)})

    def _enter(self, state: EngineState, reason: str) -> None:
        if state is not self._state:
            self._state = state
            self._on_state(state, reason)


def remove_socket(path: Path) -> None:
    """Make the socket's directory and remove what an earlier engine left there.

    Raises:
        EngineFailed: the directory is another user's, or cannot be written, or something else is in the socket's place.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _changed_by_others(path.parent):
            found = path.parent.stat()
            raise EngineFailed(
                f"{path.parent} can be changed by other users: its owner is uid {found.st_uid}, its mode "
                f"{stat.S_IMODE(found.st_mode):o}",
                f"Make it a directory of uid {os.getuid()} alone (mode 700), or set XEROTIER_AGENT_VLLM_SOCKET_PATH to "
                "one that is",
                [],
            )
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise EngineFailed(
                f"{path} is there and is no socket, so it is left alone",
                "Set XEROTIER_AGENT_VLLM_SOCKET_PATH to a path where nothing is, or take away what is there",
                [],
            )
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # nothing is left there
    except OSError as error:
        raise EngineFailed(
            f"the engine's socket {path} cannot be made: {error.strerror}",
            f"Give uid {os.getuid()} write access to {path.parent}, or set XEROTIER_AGENT_VLLM_SOCKET_PATH",
            [],
        ) from error


def _changed_by_others(directory: Path) -> bool:
    """Whether another user but root can put a socket of his own into `directory`. Its owner can whatever its mode: in
    /tmp somebody may have made it before us. Of a link both ends count."""
    ends = (directory.lstat(), directory.stat())
    mode = ends[1].st_mode
    strange = any(end.st_uid not in (0, os.getuid()) for end in ends)
    return strange or bool(mode & stat.S_IWOTH and not mode & stat.S_ISVTX)
