"""Child processes of the demo: started with a log of their own, stopped in order, none left behind."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from demo.progress import say

_POLL_S = 0.1
_ORPHAN_S = 2.0  # what a program started below may take to end after its parent


class DemoFailed(Exception):
    """The demo cannot go on; the message says why and what to do."""


class StopRequested(KeyboardInterrupt):
    """Ctrl-C, or a signal that asks this program to end; no failure, so nothing that handles one takes it."""


class Signals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into StopRequested, and remembers that there was a second one."""

    def __init__(self) -> None:
        self._asked = False
        self._held = False
        self.hurried = threading.Event()

    def install(self) -> None:
        """From here on; the main thread only."""
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, self.receive)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raise at the block's end at the earliest: a program started in it is not lost sight of."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._asked:
            raise StopRequested

    def shield(self) -> None:
        """Raise no more, because the end has begun: a signal from now on only hurries it."""
        self._asked = True

    def receive(self, _number: int, _frame: FrameType | None) -> None:
        """What a signal does; the first one stops, the second one hurries."""
        if self._asked:
            self.hurried.set()
            return
        self._asked = True
        if not self._held:
            raise StopRequested


class Child:
    """One program with its log file. In a session of its own, so that a terminal's Ctrl-C reaches only the demo."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it.

        Raises: DemoFailed when there is no such program.
        """
        self.name, self.log = name, log
        with open(log, "wb") as output:
            try:
                self._process = subprocess.Popen(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise DemoFailed(f"The {name} cannot be started: {error}") from error

    def require_alive(self) -> None:
        """Raises: DemoFailed, with the end of its log, when the program has ended."""
        status = self._process.poll()
        if status is not None:
            raise DemoFailed(f"The {self.name} has ended by itself ({_ending(status)}). {self.log_tail()}")

    def log_tail(self, lines: int = 20) -> str:
        """The end of its log, as a paragraph of a message."""
        written = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        shown = "\n".join(f"    {line[:400]}" for line in written[-lines:])
        return f"The end of {self.log}:\n{shown}"

    def stop(self, grace_s: float, hurried: threading.Event) -> None:
        """Ask it to end, wait, and after `grace_s` (or once `hurried`) kill what is left of it and below it."""
        descendants = self._descendants()
        if self._process.poll() is None:
            self._process.terminate()
        deadline = time.monotonic() + grace_s
        while self._process.poll() is None and time.monotonic() < deadline and not hurried.is_set():
            # It may still start a program of its own; the list taken at the end is the one that counts.
            descendants |= self._descendants()
            time.sleep(_POLL_S)
        if self._process.poll() is None:
            say(f"The {self.name} did not end in time and is killed.")
            self._process.kill()
        self._process.wait()
        _, left = psutil.wait_procs(descendants, timeout=0 if hurried.is_set() else _ORPHAN_S)
        for process in left:
            _kill(process)
        psutil.wait_procs(left, timeout=_ORPHAN_S)

    def _descendants(self) -> set[psutil.Process]:
        if self._process.poll() is not None:
            return set()  # its number may belong to somebody else by now
        try:
            return set(psutil.Process(self._process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return set()


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _ending(status: int) -> str:
    return f"exit code {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


def without(prefixes: Sequence[str]) -> dict[str, str]:
    """This process's environment, less empty variables and those that begin with one of `prefixes`."""
    return {name: value for name, value in os.environ.items() if value and not name.startswith(tuple(prefixes))}
