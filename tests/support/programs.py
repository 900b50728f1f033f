"""Programs under test as real processes: each with a log file, a session of its own and a mark to find it by."""

import asyncio
import inspect
import json
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import psutil

MARK = "XIM_TEST_MARK"
"""A variable that every process of one topology inherits."""
POLL_S = 0.01
PATIENCE_S = 60.0
"""How long a test waits for what must come: a ceiling for a crowded machine, and no word on how long it takes."""
TAIL_LINES = 60

T = TypeVar("T")
Beside = Collection["asyncio.Task[Any]"]


class NeverHappened(AssertionError):
    """What a test waited for did not come true in time."""


@overload
async def eventually(
    condition: Callable[[], Awaitable[T | None]], *, within_s: float = ..., what: str = ..., beside: Beside = ...
) -> T: ...
@overload
async def eventually(
    condition: Callable[[], T | None], *, within_s: float = ..., what: str = ..., beside: Beside = ...
) -> T: ...
async def eventually(
    condition: Callable[[], Any], *, within_s: float = PATIENCE_S, what: str = "", beside: Beside = ()
) -> Any:
    """The first true result of `condition`, which may be a coroutine function; asked anew every 10 ms.

    Without the tasks `beside`, which are to go on meanwhile, it will not come true.

    Raises:
        NeverHappened: after `within_s`, or when one of `beside` is over; it repeats `what`.
        Exception: what one of `beside` raised.
    """
    deadline = time.monotonic() + within_s
    while True:
        result = condition()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return result
        for task in beside:
            if task.done():
                raise NeverHappened(f"{what or condition}: what it takes is over with {task.result()!r}")
        if time.monotonic() > deadline:
            raise NeverHappened(f"not within {within_s:g} s: {what or condition}; last seen: {result!r}")
        await asyncio.sleep(POLL_S)


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without any setting of the programs under test, and `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XEROTIER_", "FAKE_VLLM"))}
    return {**kept, **more}


def marked(mark: str) -> list[psutil.Process]:
    """Every process that carries `mark` and is no zombie."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie has ended and waits for whoever is to reap it."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def described(processes: Sequence[psutil.Process]) -> list[str]:
    """Pid and command line of each, for a message."""
    shown = []
    for process in processes:
        try:
            shown.append(f"{process.pid}: {' '.join(process.cmdline())[:160]}")
        except psutil.NoSuchProcess:
            continue
    return shown


@dataclass
class Program:
    """One program: started, signalled, waited for and started again under the same name and log."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    starts: int = 0
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def start(self, **more: str) -> None:
        """Start it; `more` are further variables of this start alone."""
        assert self.process is None or self.process.poll() is not None, f"{self.name} still runs"
        self.starts += 1
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env={**self.environment, **more},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """It was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Signal it."""
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self, within_s: float = PATIENCE_S) -> int:
        """Its exit status, minus n when signal n ended it, once it has ended."""
        process = self.process
        assert process is not None
        await eventually(lambda: process.poll() is not None, within_s=within_s, what=f"{self.name} ends")
        return process.returncode

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.running:
            self.send(signal.SIGKILL)
        await self.ended()

    async def terminate(self, within_s: float = PATIENCE_S) -> int:
        """SIGTERM; its exit status."""
        if self.running:
            self.send(signal.SIGTERM)
        return await self.ended(within_s)

    def reap(self) -> None:
        """Take note that it has ended, however that came about."""
        if self.process is not None:
            self.process.wait(timeout=PATIENCE_S)

    def written(self) -> str:
        """All it has logged so far, over all starts."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def lines(self, message: str | None = None, **facts: object) -> list[dict[str, Any]]:
        """Its log lines as objects: those with this `message`, and these facts."""
        found = []
        for line in self.written().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if message not in (None, entry.get("message")):
                continue
            if all(entry.get(name) == value for name, value in facts.items()):
                found.append(entry)
        return found

    def tail(self) -> str:
        """The end of its log, for a failed test."""
        return "\n".join(line[:500] for line in self.written().splitlines()[-TAIL_LINES:])
