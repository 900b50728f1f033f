"""Several router processes on one machine: started, started again when they end, and ended together.

The parent serves nothing. Each worker is `xerotier-router serve` once more, in a process group of its own, so that a
terminal's Ctrl-C reaches the parent alone and each worker hears of it once. A worker whose parent is gone sees its
standard input end, and stops in order.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass

import click

from xim_router.listening import CannotStart, listen
from xim_router.settings import RouterSettings
from xim_router.signals import HURRY, on_stop_signals

log = logging.getLogger(__name__)

UNUSABLE_STATUS = os.EX_CONFIG
"""How a worker ends that cannot start for a reason that an operator can mend."""
STEADY_S = 10.0
"""A worker that ran for so long is no part of a crash loop."""
CRASHES = 5
"""So many ends in a row, each before that time, are one."""
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
KILL_AFTER_S = 10.0
"""Beyond the grace for requests, a worker that was told to stop gets this long."""


class GivenUp(Exception):
    """The workers cannot be kept running; the message says why and what to do."""


@dataclass(slots=True)
class Restarts:
    """When a worker is started again, and when no more. Pure."""

    lives: int = 0
    """Starts so far that came to an end."""
    ends: int = 0
    """Ends in a row, each soon after the start; those that an operator can mend are not among them."""
    failures: int = 0
    """Starts in a row that came to nothing."""

    def after(self, status: int, ran_s: float) -> float | None:
        """Seconds until the next start after an end with `status`; None when it is of no use."""
        self.lives += 1
        self.failures = 0
        if status == UNUSABLE_STATUS:
            # At first it is a setting that is wrong. Later it is a database that is away: the other workers serve.
            return None if self.lives == 1 else LONGEST_DELAY_S
        self.ends = 1 if ran_s >= STEADY_S else self.ends + 1
        if self.ends > CRASHES:
            return None
        return _growing(self.ends)

    def not_started(self) -> float:
        """Seconds until the next try after the system had no process to give: never in vain, as this passes."""
        self.failures += 1
        return _growing(self.failures)


def _growing(times: int) -> float:
    """The delay after so many failures in a row, from one on."""
    return min(FIRST_DELAY_S * 2.0 ** min(times - 1, 10), LONGEST_DELAY_S)


def supervise(settings: RouterSettings) -> None:
    """Keep `settings.workers` workers running until SIGTERM, SIGINT or SIGHUP, of which they are told.

    Raises:
        SystemExit: with 1 when they cannot be kept running; the reason is printed.
    """
    try:
        _require_free_port(settings)
        # Not uvloop: it cannot make process groups, and the parent has nothing to do in a hurry.
        asyncio.run(Supervisor(settings).run())
    except GivenUp as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from None


class Supervisor:
    """The parent of the workers."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._stopping = asyncio.Event()
        self._workers: dict[int, asyncio.subprocess.Process] = {}

    async def run(self) -> None:
        """Start the workers; return when all have ended after a signal.

        Raises:
            GivenUp: one of them cannot be kept running; the others were stopped.
        """
        loop = asyncio.get_running_loop()
        on_stop_signals(loop, self._on_signal)
        log.info("starting workers", extra={"workers": self._settings.workers})
        outcomes = await asyncio.gather(*map(self._keep, range(self._settings.workers)), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        log.info("stopped")

    async def _keep(self, number: int) -> None:
        """Run worker `number` again and again, until the end is asked for."""
        restarts = Restarts()
        try:
            while not self._stopping.is_set():
                delay_s = await self._one_life(number, restarts)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay_s):
                        await self._stopping.wait()
        except BaseException:
            self._tell(signal.SIGTERM)
            raise

    async def _one_life(self, number: int, restarts: Restarts) -> float:
        """Start a worker and wait for its end; returns the seconds until the next start."""
        started = time.monotonic()
        try:
            process = await self._start(number)
        except (OSError, RuntimeError) as error:
            # No process, memory or descriptor to be had, or no thread to wait in for its end (the RuntimeError).
            delay_s = restarts.not_started()
            log.error("worker cannot be started", extra={"worker": number, "why": str(error), "restart_s": delay_s})
            return delay_s
        status = await self._run_out(number, process)
        if self._stopping.is_set():
            return 0.0
        again_s = restarts.after(status, time.monotonic() - started)
        if again_s is None:
            raise GivenUp(_why(number, status))
        facts = {"worker": number, "status": status, "restart_s": again_s}
        log.log(logging.WARNING if status else logging.INFO, "worker ended", extra=facts)
        return again_s

    async def _start(self, number: int) -> asyncio.subprocess.Process:
        """A new process of this worker.

        Raises:
            OSError, RuntimeError: the system has none to give.
        """
        words = ("-m", "xim_router", "serve", "--workers", str(self._settings.workers), "--worker", str(number))
        return await asyncio.create_subprocess_exec(
            sys.executable, *words, stdin=asyncio.subprocess.PIPE, process_group=0
        )

    async def _run_out(self, number: int, process: asyncio.subprocess.Process) -> int:
        """The exit status of a worker once it has ended, minus n when signal n ended it."""
        self._workers[number] = process
        log.info("worker started", extra={"worker": number, "worker_pid": process.pid})
        if self._stopping.is_set():
            process.send_signal(signal.SIGTERM)
        ended = asyncio.create_task(process.wait())
        try:
            stopped = asyncio.create_task(self._stopping.wait())
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            return await self._within_grace(number, process, ended)
        finally:
            del self._workers[number]

    async def _within_grace(self, number: int, process: asyncio.subprocess.Process, ended: "asyncio.Task[int]") -> int:
        """The status of a worker that ended, or is ending; one that does not is killed."""
        limit_s = self._settings.shutdown_grace_s + KILL_AFTER_S
        done, _ = await asyncio.wait({ended}, timeout=limit_s)
        if not done:
            log.error("worker does not end, killing it", extra={"worker": number, "waited_s": limit_s})
            process.kill()
        return await ended

    def _on_signal(self, signum: signal.Signals) -> None:
        """Tell every worker; a second signal hurries them."""
        log.info("stopping workers", extra={"signal": signum.name, "workers": sorted(self._workers)})
        self._tell(HURRY if self._stopping.is_set() else signal.SIGTERM)

    def _tell(self, signum: signal.Signals) -> None:
        self._stopping.set()
        for process in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)


def _why(number: int, status: int) -> str:
    if status == UNUSABLE_STATUS:
        return f"Worker {number} cannot start; the reason is printed above. The others were stopped."
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return (
        f"Worker {number} ended {CRASHES + 1} times in a row within {STEADY_S:g} s of its start, the last time with "
        f"{how}. The others were stopped. The lines above this one say what happened to it."
    )


def _require_free_port(settings: RouterSettings) -> None:
    """Sharing a port shares it with strangers too: a second router of the same user would take every other client."""
    host, port = settings.http_host, settings.http_port
    try:
        listen(host, port, "XEROTIER_ROUTER_HTTP_HOST", "XEROTIER_ROUTER_HTTP_PORT").close()
    except CannotStart as error:
        raise GivenUp(str(error)) from None
