"""Event streams on a live installation: keep-alives, first chunks that nobody holds back, and no delay by Nagle."""

import ctypes
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest
import pytest_asyncio

from tests.faults.parts import load_on, metric_is
from tests.support.accounts import Accounts
from tests.support.load import assert_whole, readings
from tests.support.programs import Program, eventually
from tests.support.topology import Topology

pytestmark = pytest.mark.asyncio(loop_scope="module")

PING_S = 0.6
COALESCE_MS = 100
TRIES = 5
"""A crowd on the machine makes a chunk late now and then; what the programs themselves do is in every try."""
_PIDFD_GETFD = 438


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def topology(accounts: Accounts) -> AsyncIterator[Topology]:
    """Frequent pings, and an agent that lets chunks wait for company as long as it may."""
    async with Topology(accounts, router={"XEROTIER_ROUTER_SSE_PING_S": str(PING_S)}) as made:
        await made.start_node(MAX_CONCURRENT="2", STREAM_COALESCE_MS=str(COALESCE_MS))
        yield made


async def test_a_begun_stream_whose_engine_is_silent_is_kept_alive_and_a_parked_one_is_not(topology: Topology) -> None:
    load = load_on(topology)
    silent = [await load.open(chunks=10, text_chars=50, hang_after=3, interval_ms=5) for _ in range(2)]
    parked = await load.open(chunks=3, text_chars=50, interval_ms=5, seed=1)
    await metric_is(topology, "xim_router_queue_depth", 1)
    await eventually(lambda: all(client.reading.pings >= 3 for client in silent), what="both are kept alive")
    # Its status is not known yet, so that nothing may be said.
    assert (parked.reading.status, parked.reading.pings) == (0, 0)
    for client in silent:
        # Each comment stood between two events, or one of them would be no event.
        assert (client.reading.received, client.reading.wrong) == (150, "")
        client.leave()
    assert_whole(await readings([parked]))


async def test_before_its_first_byte_a_request_is_not_committed_by_a_keep_alive(topology: Topology) -> None:
    client = await load_on(topology).open(chunks=3, text_chars=50, interval_ms=5, first_ms=1000)
    (seen,) = await readings([client])
    assert_whole([seen])
    assert seen.pings == 0


async def test_a_stream_that_is_not_silent_is_never_pinged(topology: Topology) -> None:
    pings = []
    for _ in range(TRIES):
        # Longer than two pings are apart.
        (seen,) = await readings([await load_on(topology).open(chunks=24, text_chars=50, interval_ms=60)])
        assert_whole([seen])
        pings.append(seen.pings)
        if not seen.pings:
            break
    assert pings[-1] == 0, pings


async def test_the_first_chunk_is_never_held_back_for_company(topology: Topology) -> None:
    load = load_on(topology)
    waits: list[float] = []
    # Beside a stream whose chunks wait, one after the other: each first chunk leaves at once.
    beside = await load.open(chunks=400, text_chars=50, interval_ms=10)
    await beside.begun
    for seed in range(10):
        asked = topology.stopwatch()
        client = await load.open(chunks=2, text_chars=50, interval_ms=0, seed=seed)
        await client.begun
        waits.append(asked.elapsed_s)
        assert_whole(await readings([client]))
    beside.leave()
    # Held back, the mean would be half of the time that chunks may wait, and the least of ten close to it.
    assert sorted(waits)[len(waits) // 2] < COALESCE_MS / 1000 / 2, waits


def sockets_of(program: Program) -> Iterator[tuple[socket.socket, int, int]]:
    """The program's own TCP connections, with local and remote port, as copies of its descriptors."""
    assert program.process is not None
    getfd = ctypes.CDLL(None, use_errno=True).syscall
    pidfd = os.pidfd_open(program.process.pid)
    try:
        for connection in psutil.Process(program.process.pid).net_connections("tcp"):
            if connection.status != psutil.CONN_ESTABLISHED:
                continue
            copy = getfd(_PIDFD_GETFD, pidfd, connection.fd, 0)
            if copy < 0 and ctypes.get_errno() == errno.EBADF:
                continue  # it was closed after the list was made
            if copy < 0:
                pytest.skip(f"this system lets nobody look at another's sockets: {os.strerror(ctypes.get_errno())}")
            with socket.socket(fileno=copy) as seen:
                yield seen, connection.laddr.port, connection.raddr.port
    finally:
        os.close(pidfd)


async def test_no_connection_of_client_or_agent_waits_for_acknowledgements(topology: Topology) -> None:
    (node,) = topology.nodes
    client = await load_on(topology).open(chunks=100, text_chars=50, interval_ms=50)
    await client.begun
    ports = {topology.http_port: 0, topology.control_port: 0, topology.streaming_port: 0}
    for program in (topology.router, node.program):
        for seen, local, remote in sockets_of(program):
            for port in {local, remote} & ports.keys():
                assert seen.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1, (program.name, local, remote)
                ports[port] += 1
    client.leave()
    # The client's, and of each of the link's two connections both ends.
    assert ports[topology.http_port] >= 1
    assert (ports[topology.control_port], ports[topology.streaming_port]) == (2, 2)


async def test_chunks_come_as_they_are_made_without_a_wait_of_forty_milliseconds(accounts: Accounts) -> None:
    async with Topology(accounts) as topology:
        await topology.start_node()
        quartiles = []
        for _ in range(TRIES):
            load = load_on(topology)
            clients = [await load.open(chunks=100, text_chars=50, interval_ms=5, timed=True) for _ in range(2)]
            seen = await readings(clients)
            assert_whole([seen[0]])
            gaps = sorted(gap for each in seen for gap in each.gaps)
            quartiles.append(gaps[len(gaps) * 3 // 4])
            if quartiles[-1] < 0.030:
                break
        # Nagle's wait for a delayed acknowledgement would be in every second gap of every try.
        assert quartiles[-1] < 0.030, quartiles
