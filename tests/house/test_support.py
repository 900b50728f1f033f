"""What the tests stand on: a stopwatch that leaves out the crowd and nothing else, and ports that are one's own."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.ports import HOST, LOWEST, free_block, free_ports
from tests.support.programs import eventually
from tests.support.stopwatch import Stopwatch

BUSY = "while True: pass"


@pytest.fixture
def busy_pair() -> Iterator[list[psutil.Process]]:
    """Two processes that compute without end, on one processor between them."""
    cpu = min(os.sched_getaffinity(0))
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    for process in started:
        os.sched_setaffinity(process.pid, {cpu})
    yield [psutil.Process(process.pid) for process in started]
    for process in started:
        process.kill()
        process.wait()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not count who stands in line")
async def test_a_stopwatch_leaves_out_the_time_that_a_process_stood_in_line(busy_pair: list[psutil.Process]) -> None:
    watch = Stopwatch(each.pid for each in busy_pair)
    before_s = sum(map(cpu_s, busy_pair))
    await eventually(lambda: sum(map(cpu_s, busy_pair)) - before_s > 1.0, what="they have computed for a second")
    # While one computes the other stands in line: on one processor for about as long.
    assert watch.crowded_s > 0.5
    assert watch.elapsed_s < watch.wall_s - 0.5


def test_a_stopwatch_counts_what_a_program_waits_for_by_itself() -> None:
    watch = Stopwatch()
    threading.Event().wait(0.5)
    with pytest.raises(AssertionError, match=r"it is done: after \d+\."):
        watch.check(0.2, "it is done")
    watch.check(60.0, "it is done")


async def test_a_stopwatch_tells_late_from_in_time() -> None:
    late = Stopwatch()

    async def after_a_while() -> bool:
        return late.wall_s > 0.5

    with pytest.raises(AssertionError, match="it came"):
        await late.within(0.2, after_a_while, what="it came")
    await Stopwatch().within(30.0, after_a_while, what="it came")


def test_a_port_that_was_given_is_free_for_its_program_and_given_to_nobody_else() -> None:
    first = free_block(3)
    ports = [first, first + 1, first + 2, *free_ports(20)]
    assert len(set(ports)) == 23
    assert min(ports) >= LOWEST
    for port in ports:
        with socket.socket() as program:
            program.bind((HOST, port))
        with socket.socket(type=socket.SOCK_DGRAM) as another_test, pytest.raises(OSError, match="in use"):
            another_test.bind((HOST, port))
