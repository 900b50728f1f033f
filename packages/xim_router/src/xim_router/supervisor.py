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

    def after(self, status: int, ran_s: float) -> float | None:
        """Seconds until the next start after an end with `status`; None when it is of no use."""
        self.lives += 1
        if status == UNUSABLE_STATUS:
            # At first it is a setting that is wrong. Later it is a database that is away: the other workers serve.
            return None if self.lives == 1 else LONGEST_DELAY_S
        self.ends = 1 if ran_s >= STEADY_S else self.ends + 1
        if self.ends > CRASHES:
            return None
        return float(min(FIRST_DELAY_S * 2.0 ** (self.ends - 1), LONGEST_DELAY_S))


def supervise(settings: RouterSettings) -> None:
    """Keep `settings.workers` workers running until SIGTERM or SIGINT, which they are told.

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
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal, signum)
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
                started = time.monotonic()
                status = await self._one_run(number)
                if self._stopping.is_set():
                    return
                delay_s = restarts.after(status, time.monotonic() - started)
                if delay_s is None:
                    raise GivenUp(_why(number, status))
                facts = {"worker": number, "status": status, "restart_s": delay_s}
                log.log(logging.WARNING if status else logging.INFO, "worker ended", extra=facts)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay_s):
                        await self._stopping.wait()
        except BaseException:
            self._on_signal(signal.SIGTERM)
            raise

    async def _one_run(self, number: int) -> int:
        """One life of a worker; its exit status, minus n when signal n ended it."""
        words = ("-m", "xim_router", "serve", "--workers", str(self._settings.workers), "--worker", str(number))
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdin=asyncio.subprocess.PIPE, process_group=0
        )
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
        """Tell every worker; a second signal reaches them as their second."""
        log.info("stopping workers", extra={"signal": signum.name, "workers": sorted(self._workers)})
        self._stopping.set()
        for process in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)


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
