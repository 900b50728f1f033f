"""Many connections: who asks for nothing keeps nobody away, and no request is ended for a newcomer."""

import asyncio
import contextlib
import logging
import resource

import pytest

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import hold
from tests.support.programs import PATIENCE_S
from xim_router import descriptors
from xim_router.http.crowd import Crowd

GET = b"GET /healthz HTTP/1.1\r\nhost: router\r\n\r\n"


class Peer:
    """A connection that notes its end."""

    def __init__(self) -> None:
        self.ended = False

    def end(self) -> None:
        self.ended = True


def crowd_of(most: int, count: int) -> tuple[Crowd, list[Peer]]:
    crowd, peers = Crowd(most), [Peer() for _ in range(count)]
    for number, peer in enumerate(peers):
        crowd.came(peer, number + 1)
    return crowd, peers


def test_as_many_as_there_may_be_stay() -> None:
    _, peers = crowd_of(3, 3)
    assert not any(peer.ended for peer in peers)


def test_the_one_that_was_idle_for_longest_is_ended() -> None:
    crowd, peers = crowd_of(3, 3)
    crowd.busy(peers[0])
    crowd.busy(peers[1])
    crowd.idle(peers[0])
    crowd.left(peers[2])
    newcomer = Peer()
    crowd.came(newcomer, 4)
    assert [peer.ended for peer in (*peers, newcomer)] == [True, False, False, False]


def test_where_all_are_busy_the_newcomer_is_ended() -> None:
    crowd, peers = crowd_of(2, 2)
    for peer in peers:
        crowd.busy(peer)
    newcomer = Peer()
    crowd.came(newcomer, 3)
    assert newcomer.ended
    assert not any(peer.ended for peer in peers)


def test_a_crowd_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        crowd_of(1, 10)
    assert [record.message for record in caplog.records] == ["too many connections, ending idle ones"]


@pytest.mark.parametrize(
    ("limit", "clients", "strangers"),
    [
        (64, 32, 8),
        (256, 128, 32),
        (1_024, 896, 32),
        (4_096, 3_584, 128),
        (1_048_576, 917_504, 512),
        (resource.RLIM_INFINITY, 2**63 - 1, 512),
    ],
)
def test_some_descriptors_are_kept_for_others_than_clients_and_strangers(
    limit: int, clients: int, strangers: int
) -> None:
    assert descriptors.for_clients(limit) == clients
    assert descriptors.for_unattached(limit) == strangers


async def ended(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read() == b""
    return True


@pytest.mark.parametrize("sent", [b"", GET[:20], GET], ids=["silent", "half a head", "answered"])
async def test_idle_connections_make_place_for_newcomers_and_requests_stay(sent: bytes) -> None:
    async with (
        Rig("a", most_connections=4) as rig,
        rig.agent("a", serve=hold) as agent,
        await rig.call() as call,
        contextlib.AsyncExitStack() as stack,
    ):
        await agent.until(lambda: len(agent.works) == 1)
        opened = []
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.http_port)
            stack.callback(writer.transport.abort)
            writer.write(sent)
            if sent == GET:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
            opened.append((reader, writer))
        await until(lambda: rig.connections == 4)
        for reader, _ in opened[:2]:
            assert await ended(reader)
        # Whoever asks is served, and the request that was there first goes on.
        assert (await rig.ask(method="GET", path="/healthz", body=b"")).status == 200
        await agent.works[0].answer()
        assert (await call.rest()).status == 200
