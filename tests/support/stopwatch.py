"""How long something takes that is to take less than so many seconds, on a machine that others use as well.

A bound such as "within a second" is one of the programs: of what they wait for and what they compute. How long they
stand ready and no processor takes them is the machine's doing, and the kernel counts it for each thread
(`/proc/PID/task/TID/schedstat`, the second figure). A stopwatch leaves that time out. On a machine with room it is next
to nothing, so the bound is the bare one; and no crowd of others makes a timer, a poll or a retry in the programs
shorter.
"""

import os
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.programs import eventually


class Stopwatch:
    """Runs from its making on."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        """`pids` are the processes that the matter takes, beside this one."""
        self._pids = {os.getpid(), *pids}
        self._waits_s: dict[Path, float] = {}
        """Of each thread at its last reading: a thread that has ended keeps what it had."""
        self._before_s = self._read_waits()
        self._started = time.monotonic()

    @property
    def wall_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def crowded_s(self) -> float:
        """Seconds since the start for which the threads stood in line for a processor, summed up."""
        return self._read_waits() - self._before_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start without those of the crowd."""
        # In this order: what comes between the two readings counts as elapsed.
        crowded_s = self.crowded_s
        return max(0.0, self.wall_s - crowded_s)

    async def within(self, seconds: float, condition: Callable[[], Awaitable[object]], *, what: str) -> None:
        """Return when `condition` holds, which is to be before `seconds` have elapsed.

        Raises: AssertionError when it was later, NeverHappened when it did not come at all.
        """

        async def holds() -> bool:
            self._read_waits()
            return bool(await condition())

        await eventually(holds, what=what)
        self.check(seconds, what)

    def check(self, seconds: float, what: str) -> None:
        """Assert that not so many seconds have elapsed."""
        crowded_s = self.crowded_s
        elapsed_s = max(0.0, self.wall_s - crowded_s)
        assert elapsed_s < seconds, f"{what}: after {elapsed_s:.3f} s, beside {crowded_s:.3f} s of waiting in line"

    def _read_waits(self) -> float:
        for pid in self._pids:
            with suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    with suppress(OSError):
                        self._waits_s[task] = int((task / "schedstat").read_bytes().split()[1]) / 1e9
        # Beside them what the host of a virtual machine took from it.
        return sum(self._waits_s.values()) + float(getattr(psutil.cpu_times(), "steal", 0.0))
