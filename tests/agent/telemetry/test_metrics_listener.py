"""The metrics server on a raw socket: what it takes from a connection is bounded, and so are the connections."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from tests.support.http_client import PATIENCE_S
from tests.support.programs import eventually
from xim_agent.telemetry import server
from xim_agent.telemetry.metrics import AgentMetrics
from xim_agent.telemetry.server import MOST_CONNECTIONS, metrics_server

SCRAPE = b"GET /metrics HTTP/1.1\r\nhost: agent\r\n\r\n"
LAST_SCRAPE = b"GET /metrics HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Listener:
    """One metrics server, whose engine has more to say than a socket takes."""

    port: int = 0
    asked: int = 0
    """Scrapes that wait for the engine."""
    begun: int = 0
    """Scrapes that ever did."""
    silent: bool = False
    """The engine does not answer."""
    opened: list[Connection] = field(default_factory=list)

    async def engine(self) -> bytes:
        self.asked += 1
        self.begun += 1
        try:
            if self.silent:
                await asyncio.Event().wait()
            return b"# HELP things Things.\n" + b"# of no interest ..............\n" * 200_000
        finally:
            self.asked -= 1

    async def open(self, sent: bytes = b"") -> Connection:
        """A new connection, which has sent so much."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.opened.append((reader, writer))
        writer.write(sent)
        return reader, writer

    async def say(self, sent: bytes) -> bytes:
        """Send this and read until the agent closes the connection."""
        reader, _ = await self.open(sent)
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()

    def leave(self) -> None:
        """Close every connection."""
        for _, writer in self.opened:
            writer.transport.abort()

    async def ended(self, connections: list[Connection]) -> None:
        """Return when the agent has ended all of these."""
        for reader, _ in connections:
            with contextlib.suppress(ConnectionResetError):
                async with asyncio.timeout(PATIENCE_S):
                    await reader.read()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    made = Listener()
    async with metrics_server("127.0.0.1", 0, AgentMetrics(version="1"), made.engine) as made.port:
        yield made
        made.leave()


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /metrics", b"200 OK"),
        (b"HEAD /metrics", b"200 OK"),
        (b"GET /metrics?x=1", b"200 OK"),
        (b"GET /", b"404 Not Found"),
        (b"POST /metrics", b"405 Method Not Allowed"),
        (b"GET /" + b"a" * 100_000, b"400 Bad Request"),
    ],
)
async def test_only_scrapes_are_answered(listener: Listener, line: bytes, status: bytes) -> None:
    told = await listener.say(line + b" HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n")
    assert told.partition(b"\r\n")[0].partition(b" ")[2] == status
    assert told.endswith(b"\r\n\r\n") == line.startswith(b"HEAD")


@pytest.mark.parametrize("sent", [b"x: " + b"a" * 10_000, b"x: y\r\n" * 1_000], ids=["a header", "many"])
async def test_a_head_is_bounded(listener: Listener, sent: bytes) -> None:
    told = await listener.say(b"GET /metrics HTTP/1.1\r\n" + sent + b"\r\n\r\n")
    assert told.partition(b"\r\n")[0].endswith(b" 400 Bad Request")


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\n"])
async def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(server, "IDLE_S", 0.05)
    made = Listener()
    async with metrics_server("127.0.0.1", 0, AgentMetrics(version="1"), made.engine) as made.port:
        assert await made.say(sent) == b""
        made.leave()


@pytest.mark.parametrize("sent", [b"", b"GET /metrics", SCRAPE * 20], ids=["silent", "half a head", "reads nothing"])
async def test_a_newcomer_ends_the_oldest_where_there_are_too_many(listener: Listener, sent: bytes) -> None:
    held = [await listener.open(sent) for _ in range(MOST_CONNECTIONS)]
    more = [await listener.open(sent) for _ in range(5)]
    await listener.ended(held[:5])
    assert not any(reader.at_eof() for reader, _ in held[5:] + more)
    # Whoever scrapes is served all the same.
    assert (await listener.say(LAST_SCRAPE)).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "sent",
    [
        b"no HTTP at all\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"GET /metrics HTTP/1.1\r\nhost: agent\r\nauthorization Bearer s3cret\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nhost: agent\r\ncookie: " + b"s3cret" * 10_000 + b"\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nhost: agent\r\ncontent-length: s3cret\r\n\r\n",
        b"GET http://[s3cret/metrics HTTP/1.1\r\nhost: agent\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nhost: agent\r\ntransfer-encoding: chunked\r\n\r\ns3cret\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nhost: agent\r\n\r\ns3cret\r\n\r\n",
    ],
    ids=["text", "TLS", "a header", "a long header", "a length", "a URL", "a chunk", "after a request"],
)
async def test_what_is_no_request_is_a_quiet_line(
    listener: Listener, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    with caplog.at_level(logging.DEBUG):
        told = await listener.say(sent)
    assert b" 400 Bad Request\r\n" in told
    (record,) = [record for record in caplog.records if record.name != "asyncio"]
    assert (record.levelno, record.exc_info) == (logging.DEBUG, None)
    assert "s3cret" not in str(vars(record))
    assert len(str(vars(record))) < 2000


async def test_a_fault_of_the_agents_own_is_told_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> bytes:
        raise ValueError("a fault")

    made = Listener()
    async with metrics_server("127.0.0.1", 0, AgentMetrics(version="1"), broken) as made.port:
        assert (await made.say(LAST_SCRAPE)).startswith(b"HTTP/1.1 500 ")
        made.leave()
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_a_scrape_that_was_given_up_waits_for_no_engine(listener: Listener) -> None:
    listener.silent = True
    held = [await listener.open(SCRAPE) for _ in range(3 * MOST_CONNECTIONS)]
    await listener.ended(held[:-MOST_CONNECTIONS])
    await eventually(lambda: listener.begun > MOST_CONNECTIONS and listener.asked == MOST_CONNECTIONS)
