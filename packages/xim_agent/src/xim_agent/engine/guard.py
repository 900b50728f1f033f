"""Leads the engine's process group and ends it when the agent is gone.

A program of its own, standard library only, started by path as `python -I -S guard.py GRACE_S -- COMMAND...` in a new
session. The agent holds the other end of its standard input: while that is open the engine runs; `T` on it asks the
engine's main process to stop, `K` kills everything now, and its end (the agent stopped, crashed, or was killed with
SIGKILL, which no handler sees) stops everything within GRACE_S seconds.

On Linux the guard is a child subreaper, so processes that left the group by `setsid` or by a double fork come back to
it and are ended too; it leaves only when it has no child left. Its exit status is the engine's, or 128 + n when signal
n ended the engine, 127 when the program was not found and 126 when it could not be started.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

LEFTOVER_GRACE_S = 2.0
"""What remains after the main process ended gets this long: multiprocessing's resource tracker removes shared memory
files in it."""
KILL_WAIT_S = 10.0
"""A process that SIGKILL does not end in this time hangs in a driver; the guard says so and leaves."""
KILL_ROUND_S = 0.05

Member = tuple[int, int, int, int]
"""pid, parent, process group, session."""


def prctl(option: int, value: int) -> None:
    """Set one process attribute on Linux; elsewhere, and where the kernel refuses, nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def processes() -> list[Member]:
    """Every process that is not a zombie; empty where there is no /proc."""
    found: list[Member] = []
    try:
        entries = os.listdir("/proc")
    except OSError:
        return found
    for entry in entries:
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as stat:
                fields = stat.read().rpartition(b")")[2].split()
        except OSError:  # ended between the listing and the look
            continue
        if fields[0] not in (b"Z", b"X"):
            found.append((int(entry), int(fields[1]), int(fields[2]), int(fields[3])))
    return found


def members_of(leader: int, everyone: list[Member]) -> list[int]:
    """Pids of the leader's descendants and of its process group and session, the leader excluded."""
    children: dict[int, list[int]] = {}
    for pid, parent, _, _ in everyone:
        children.setdefault(parent, []).append(pid)
    wanted = {pid for pid, _, group, session in everyone if leader in (group, session)}
    open_ends = [leader]
    while open_ends:
        for child in children.get(open_ends.pop(), ()):
            if child not in wanted:
                wanted.add(child)
            open_ends.append(child)
    return sorted(wanted - {leader})


class Guard:
    """One engine and everything it started."""

    def __init__(self, command: list[str], grace_s: float) -> None:
        self._command = command
        self._grace_s = grace_s
        self._main = 0
        self._status: int | None = None
        self._kill_at: float | None = None
        self._kill_tries_until: float | None = None
        self._watched = select.poll()

    def run(self) -> int:
        """Start the engine, tend it until nothing of it is left, and give its status."""
        wake = self._catch_signals()
        try:
            self._main = self._start()
        except FileNotFoundError:
            return self._refuse(127, "no such program")
        except OSError as error:
            return self._refuse(126, os.strerror(error.errno or 0))
        self._watched.register(0, select.POLLIN | select.POLLHUP)
        self._watched.register(wake, select.POLLIN)
        while True:
            self._listen(wake)
            if self._reap():
                return 1 if self._status is None else self._status
            if self._kill_at is not None and time.monotonic() >= self._kill_at and not self._kill_round():
                return self._refuse(1, "processes do not end on SIGKILL; a device driver may hang")

    def _catch_signals(self) -> int:
        """Turn signals into bytes on a pipe. By handlers: a signal set to SIG_IGN would stay ignored in the engine."""
        receive, send = os.pipe()
        os.set_blocking(receive, False)
        os.set_blocking(send, False)
        signal.set_wakeup_fd(send, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _noted)
        return receive

    def _start(self) -> int:
        """The engine's pid. The engine dies with the guard, should somebody kill that one."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        child = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        child.returncode = 0  # the guard reaps by itself; Popen must not
        return child.pid

    def _listen(self, wake: int) -> None:
        for fd, _ in self._watched.poll(self._timeout_ms()):
            heard = os.read(fd, 4096)
            if fd == wake:
                if set(heard) & {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
                    self._end(self._grace_s)
            elif not heard:  # the agent is gone
                self._watched.unregister(fd)
                self._end(self._grace_s)
            elif b"K" in heard:
                self._kill_at = time.monotonic()
            elif b"T" in heard and self._status is None:
                _send(self._main, signal.SIGTERM)

    def _timeout_ms(self) -> float | None:
        if self._kill_at is None:
            return None
        return max(KILL_ROUND_S, self._kill_at - time.monotonic()) * 1000.0

    def _end(self, grace_s: float) -> None:
        """Ask everything to stop; what has not after `grace_s` is killed."""
        if self._kill_at is not None:
            return
        self._kill_at = time.monotonic() + grace_s
        for pid in members_of(os.getpid(), processes()):
            _send(pid, signal.SIGTERM)

    def _reap(self) -> bool:
        """Collect the ended; True when no child is left, which on Linux means no descendant either."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self._main:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code
                self._end(LEFTOVER_GRACE_S)

    def _kill_round(self) -> bool:
        """SIGKILL to all that is left; False when that has been tried for too long."""
        now = time.monotonic()
        if self._kill_tries_until is None:
            self._kill_tries_until = now + KILL_WAIT_S
        left = members_of(os.getpid(), processes())
        for pid in left or ([self._main] if self._status is None else []):
            _send(pid, signal.SIGKILL)
        return now < self._kill_tries_until

    def _refuse(self, status: int, reason: str) -> int:
        sys.stderr.write(f"{self._command[0]}: {reason}\n")
        return status


def _noted(number: int, frame: FrameType | None) -> None:
    """The number is already on the wake-up pipe."""


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:  # it changed its user; nothing more can be done from here
        sys.stderr.write(f"process {pid} may not be signalled\n")


if __name__ == "__main__":
    sys.exit(Guard(sys.argv[3:], float(sys.argv[1])).run())
