"""The metrics listener on a raw socket: it takes as little from a connection as the other, and few connections."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from tests.router.http.test_protocol import Answered, answers_in
from tests.router.link.rig import until
from tests.support.http_client import PATIENCE_S
from xim_router.app import METRICS_CONNECTIONS, _metrics_config, _Server
from xim_router.http import protocol
from xim_router.listening import listen

SCRAPE = b"GET /metrics HTTP/1.1\r\nhost: router\r\n\r\n"
LAST_SCRAPE = b"GET /metrics HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Listener:
    """One metrics listener of its own, with metrics that fill more than a socket takes."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        gauge = Gauge("things", "Things.", ["name"], registry=registry)
        for number in range(5_000):
            gauge.labels(f"{number:0100d}").set(number)
        self.server = _Server(_metrics_config(registry))
        self.socket = listen("127.0.0.1", 0, "", "")
        self.opened: list[Connection] = []

    async def open(self, sent: bytes = b"") -> Connection:
        """A new connection, which has sent so much."""
        reader, writer = await asyncio.open_connection(*self.socket.getsockname())
        self.opened.append((reader, writer))
        writer.write(sent)
        return reader, writer

    async def say(self, sent: bytes) -> list[Answered]:
        """Send this and read until the router closes the connection."""
        reader, _ = await self.open(sent)
        async with asyncio.timeout(PATIENCE_S):
            return answers_in(await reader.read())

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    """A listener that serves."""
    made = Listener()
    serving = asyncio.create_task(made.server.serve(sockets=[made.socket]))
    await until(lambda: made.server.started)
    yield made
    for _, writer in made.opened:
        writer.transport.abort()
    made.server.should_exit = made.server.force_exit = True
    await serving


async def test_a_scrape_is_answered_however_often_on_one_connection(listener: Listener) -> None:
    answers = await listener.say(SCRAPE * 2 + LAST_SCRAPE)
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert all(answer.body.startswith(b"# HELP things") for answer in answers)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GARBAGE\r\n\r\n", (400, "invalid_request")),
        (b"GET /" + b"a" * protocol.MAX_URL_BYTES, (414, "url_too_long")),
        (b"GET /metrics HTTP/1.1\r\nx: " + b"a" * 20 * protocol.MAX_HEAD_BYTES, (431, "headers_too_large")),
    ],
)
async def test_a_head_is_bounded(listener: Listener, sent: bytes, expected: tuple[int, str]) -> None:
    (told,) = await listener.say(sent)
    assert (told.status, told.code) == expected


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\n"])
async def test_a_head_that_does_not_come_is_not_waited_for(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(protocol, "ARRIVAL_S", 0.3)
    assert [told.status for told in await listener.say(sent)] == ([408] if sent else [])


@pytest.mark.parametrize("sent", [b"", b"GET /metrics", SCRAPE * 20], ids=["silent", "half a head", "reads nothing"])
async def test_a_newcomer_ends_the_oldest_where_there_are_too_many(listener: Listener, sent: bytes) -> None:
    held = [await listener.open(sent) for _ in range(METRICS_CONNECTIONS)]
    await until(lambda: listener.connections == METRICS_CONNECTIONS)
    more = [await listener.open(sent) for _ in range(5)]
    for reader, _ in held[:5]:
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(PATIENCE_S):
                await reader.read()
    await until(lambda: listener.connections == METRICS_CONNECTIONS)
    assert not any(reader.at_eof() for reader, _ in held[5:] + more)
    # Whoever scrapes is served all the same, and leaves when it has its answer.
    (scraped,) = await listener.say(LAST_SCRAPE)
    assert scraped.status == 200
    assert listener.connections < METRICS_CONNECTIONS


async def test_many_at_once_never_hold_more_than_a_few_descriptors(listener: Listener) -> None:
    await asyncio.gather(*(listener.open(b"GET /metrics") for _ in range(5 * METRICS_CONNECTIONS)))
    (scraped,) = await listener.say(LAST_SCRAPE)
    assert scraped.status == 200
    assert listener.connections <= METRICS_CONNECTIONS
