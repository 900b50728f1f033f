"""A connection to the engine: answers before the answer, and what it is good for after one."""

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.agent.engine.test_client import CHUNKED, Taker, answering, read_all, serving, taken
from xim_agent.engine import http
from xim_agent.engine.client import EngineUnavailable
from xim_agent.engine.http import HELD_BYTES, EngineConnection

INTERIM = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 102 Processing\r\ncontent-length: 7\r\n\r\n"
    b"HTTP/1.1 103 Early Hints\r\ncontent-type: text/event-stream\r\nlink: x\r\n\r\n"
)
"""Three answers before the answer (RFC 9110, section 15.2); none has a body, whatever its headers say."""


class Wire(asyncio.Transport):
    """A transport whose reads a test makes."""

    def __init__(self) -> None:
        super().__init__()
        self._reading = True

    def write(self, data: object) -> None:
        pass

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True


def wired() -> tuple[EngineConnection, Wire]:
    """A connection over such a transport."""
    connection, wire = EngineConnection(), Wire()
    connection.connection_made(wire)
    return connection, wire


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_an_interim_answer_is_not_the_answer(size: int) -> None:
    connection, _ = wired()
    said = INTERIM + b"HTTP/1.1 201 Created\r\ncontent-type: a/b\r\ncontent-length: 3\r\n\r\nabc"
    for _ in range(2):
        taker = Taker()
        connection.begin(b"", taker)
        for begin in range(0, len(said), size):
            connection.data_received(said[begin : begin + size])
        assert (taker.heads, b"".join(taker.pieces), taker.whole) == ([(201, "a/b")], b"abc", True)
        assert connection.headers == {"content-type": "a/b", "content-length": "3"}
        assert connection.release()


async def test_an_end_after_an_interim_answer_is_unavailable(tmp_path: Path) -> None:
    taker = Taker()
    async with serving(tmp_path, answering(INTERIM)) as client:
        client.give_back(await taken(client, taker))
        assert client.idle() is None
    assert isinstance(taker.error, EngineUnavailable)
    assert (taker.heads, taker.whole) == ([], False)


@pytest.mark.parametrize("headers", [b"connection: upgrade\r\nupgrade: x\r\n", b""])
async def test_an_engine_that_switches_protocols_is_unavailable(
    tmp_path: Path, headers: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    taker = Taker()
    async with serving(tmp_path, answering(b"HTTP/1.1 101 Switching Protocols\r\n" + headers + b"\r\nxyz")) as client:
        client.give_back(await taken(client, taker))
        assert client.idle() is None
    assert isinstance(taker.error, EngineUnavailable)
    assert "switched protocols" in str(taker.error)
    assert (taker.heads, taker.pieces, taker.whole) == ([], [], False)
    assert not caplog.records  # nothing of it is left to the loop


async def test_a_connection_whose_answer_nobody_took_to_its_end_reads_the_next() -> None:
    connection, wire = wired()
    taker = Taker(limit=1)
    connection.begin(b"", taker)
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\na" % (HELD_BYTES + 2))
    connection.data_received(bytes(HELD_BYTES + 1))
    assert not wire.is_reading()
    # Its client left, and the engine has nothing more to do: the connection is as good as before.
    assert connection.release()
    assert wire.is_reading()
    taker = Taker()
    connection.begin(b"", taker)
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nb")
    assert (taker.pieces, taker.whole) == ([b"b"], True)


async def test_an_old_connection_is_left_though_a_newer_one_is_always_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(http, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def patient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\na")

    async with serving(tmp_path, patient) as client:
        # Neither is given back before the other is asked.
        first, second = [await taken(client, Taker()) for _ in range(2)]
        client.give_back(first)
        client.give_back(second)
        for clock.now in (1.0, 2.5):
            assert await taken(client, Taker()) is second
            client.give_back(second)
        assert first.closed
        assert not second.closed


async def test_trailers_are_no_headers(tmp_path: Path) -> None:
    handler = answering(CHUNKED + b"1\r\na\r\n0\r\ncontent-type: c/d\r\n\r\n")
    async with serving(tmp_path, handler) as client, client.open("GET", "/", {}, None) as response:
        assert await read_all(response) == b"a"
        assert response.headers["content-type"] == "text/event-stream"
