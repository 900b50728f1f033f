"""Processes under measurement: start, wait until they answer, read their CPU time, stop. Linux only."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_STOP_GRACE_S = 10.0
_POLL_S = 0.01
_LOG_TAIL_BYTES = 2000


class StartFailed(RuntimeError):
    """A process did not become ready; the message holds the end of its output."""


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_block(count: int) -> int:
    """The first of `count` TCP ports in a row that were free a moment ago."""
    while True:
        # Below the ports that the system gives to outgoing connections.
        first = random.randrange(20_000, 32_000 - count)
        with contextlib.suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A process whose CPU is read, alone or with all its descendants."""

    pid: int
    with_children: bool = True


def _processes(part: Part) -> list[psutil.Process]:
    process = psutil.Process(part.pid)
    return [process, *(process.children(recursive=True) if part.with_children else [])]


def resident_bytes(part: Part) -> int:
    """Memory of the part: of a page that several processes share, each has its share (PSS)."""
    return sum(int(process.memory_full_info().pss) for process in _processes(part))


def cpu_s(part: Part) -> float:
    """CPU time of all threads of the part so far, user and system, in seconds.

    Read from the kernel's per-process clock, which counts nanoseconds; /proc/PID/stat counts ticks of 10 ms,
    which is as much as one stream costs in a second.
    """
    return sum(_cpu_of(process.pid) for process in _processes(part))


def _cpu_of(pid: int) -> float:
    with contextlib.suppress(OSError):
        # CPUCLOCK_SCHED of another process, as clock_getcpuclockid(3) makes it.
        return time.clock_gettime((~pid << 3) | 2)
    return 0.0


def environment_with(env: Mapping[str, str]) -> dict[str, str]:
    """This process's environment and `env`, without the user's variables of our programs, and with bytecode.

    One of them may name a real database. A program that is compiled at each start begins later, and what the compiler
    leaves behind is room for its first thousand streams.
    """
    stray = ("XEROTIER_", "PYTHONDONTWRITEBYTECODE")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(stray)}
    return {**inherited, **env}


async def compile_bytecode(python: str, *folders: Path) -> None:
    """Write the bytecode of everything in `folders`; what is no Python there (templates) is passed over."""
    child = await asyncio.create_subprocess_exec(
        *(python, "-m", "compileall", "-q", "-j", "0", *map(str, folders)),
        env=environment_with({}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await child.wait()


@asynccontextmanager
async def running(command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> AsyncIterator[psutil.Process]:
    """`command` as a child that leads its own process group; the whole group is gone when the block ends.

    It sees `environment_with(env)`.
    """
    with log.open("ab") as output:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment_with(env),
            start_new_session=True,
        )
    try:
        yield psutil.Process(child.pid)
    finally:
        await _stop(child)


async def _stop(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_GRACE_S):
            await child.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    await child.wait()


async def wait_until_ready(
    process: psutil.Process, port: int, path: str, *, log: Path, timeout_s: float, needs: Sequence[psutil.Process] = ()
) -> float:
    """Wait until GET `path` on 127.0.0.1:`port` is answered with 200; returns when that was, by the monotonic clock.

    Raises: StartFailed if the process, or one that it needs, ends first, or the time is over.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(_has_ended(each) for each in (process, *needs)):
            raise StartFailed(f"{log.stem}, or what it needs, ended while starting:\n{tail_of(log)}")
        if await _status_of(port, path) == 200:
            return time.monotonic()
        await asyncio.sleep(_POLL_S)
    raise StartFailed(f"{log.stem} is not ready after {timeout_s:.0f} s:\n{tail_of(log)}")


def _has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def _status_of(port: int, path: str) -> int | None:
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
                line = await reader.readline()
                return int(line.split()[1])
            finally:
                writer.close()
    except (OSError, TimeoutError, IndexError, ValueError):
        return None


def tail_of(log: Path) -> str:
    """The end of a process's output."""
    return log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
