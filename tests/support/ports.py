"""Ports for programs that are yet to start: nobody listens there, and no two tests are given the same."""

import random
import socket
from collections import deque
from contextlib import ExitStack, suppress

HOST = "127.0.0.1"
LOWEST, ABOVE = 20_000, 32_000
"""Below the range that the system gives to outgoing connections: none of them takes a port before its program does."""
REMEMBERED = 256
"""Who was given a port so many ports ago has bound it, or has ended."""

_given: deque[socket.socket] = deque()
"""A datagram socket on each port given last. It takes nothing from the program, whose port is one of TCP, and tells
every other test on this machine, this process's and others', that the port is somebody's."""


def free_ports(count: int) -> list[int]:
    """So many ports, all different."""
    return [free_block(1) for _ in range(count)]


def free_block(count: int) -> int:
    """The first of so many ports in a row."""
    while True:
        first = random.randrange(LOWEST, ABOVE - count)
        with suppress(OSError):
            _take(range(first, first + count))
            return first


def _take(ports: range) -> None:
    """Note the ports as given.

    Raises: OSError when one of them is somebody's; then none is.
    """
    with ExitStack() as undone:
        marks = []
        for port in ports:
            with socket.socket() as probe:
                probe.bind((HOST, port))
            mark = undone.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            mark.bind((HOST, port))
            marks.append(mark)
        undone.pop_all()
    _given.extend(marks)
    while len(_given) > REMEMBERED:
        _given.popleft().close()
