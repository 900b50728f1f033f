"""HTTP to the engine: every byte as it came, and every way it can break off."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.agent.engine.engines import States, fake_vllm, policy
from tests.support.programs import PATIENCE_S, eventually
from xim_agent.engine.client import EngineBroken, EngineClient, EngineError, EngineResponse, EngineUnavailable
from xim_agent.engine.http import EngineConnection, request_bytes
from xim_agent.engine.process import Engine, EngineState

JSON = {"Content-Type": "application/json"}
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(tmp_path: Path, handler: Handler) -> AsyncIterator[EngineClient]:
    """A client of a Unix socket behind which `handler` writes raw bytes."""
    async with asyncio.TaskGroup() as connections:
        server = await asyncio.start_unix_server(
            lambda reader, writer: connections.create_task(_whole(handler, reader, writer)) and None,
            str(tmp_path / "s"),
        )
        async with server, EngineClient(tmp_path / "s") as client:
            yield client


async def _whole(handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection and wait until it is closed, so that no test leaves one behind."""
    try:
        await handler(reader, writer)
        writer.close()
        await writer.wait_closed()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass


def answering(*pieces: bytes, abort: bool = False) -> Handler:
    """Write `pieces` to every request, then close or reset."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if abort:
            writer.transport.abort()
        else:
            writer.close()

    return handle


async def read_all(response: EngineResponse) -> bytes:
    body = b""
    while chunk := await response.read_chunk():
        body += chunk
    return body


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_bytes_status_and_content_type_come_as_they_are(tmp_path: Path) -> None:
    whole = b"HTTP/1.1 418 x\r\nContent-Type: a/b; c=d\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x00\xff!"
    async with serving(tmp_path, answering(whole)) as client, client.open("GET", "/x", {}, None) as response:
        assert (response.status, response.content_type) == (418, "a/b; c=d")
        assert response.headers["content-encoding"] == "gzip"
        assert await read_all(response) == b"\x00\xff!"
        assert await response.read_chunk() == b""


@pytest.mark.parametrize("abort", [False, True])
async def test_an_answer_cut_in_the_middle_is_broken(tmp_path: Path, abort: bool) -> None:
    handler = answering(CHUNKED, b"5\r\nhello\r\n", abort=abort)
    async with serving(tmp_path, handler) as client, client.open("GET", "/x", {}, None) as response:
        with pytest.raises(EngineBroken):
            await read_all(response)


async def test_a_body_shorter_than_its_length_is_broken(tmp_path: Path) -> None:
    handler = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort")
    async with serving(tmp_path, handler) as client, client.open("GET", "/x", {}, None) as response:
        with pytest.raises(EngineBroken):
            await read_all(response)


@pytest.mark.parametrize("handler", [answering(), answering(abort=True), answering(b"no HTTP at all\r\n\r\n")])
async def test_no_status_is_unavailable(tmp_path: Path, handler: Handler) -> None:
    async with serving(tmp_path, handler) as client:
        with pytest.raises(EngineUnavailable):
            async with client.open("POST", "/x", JSON, b"{}"):
                pytest.fail("there was no status")


async def test_no_engine_is_unavailable_and_not_healthy(tmp_path: Path) -> None:
    async with EngineClient(tmp_path / "nothing") as client:
        with pytest.raises(EngineUnavailable):
            async with client.open("POST", "/x", JSON, b"{}"):
                pytest.fail("there is no engine")
        assert not await client.health(1.0)
        with pytest.raises(EngineError):
            await client.metrics_text()


async def test_an_engine_that_says_nothing_is_not_healthy(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with serving(tmp_path, silent) as client:
        assert not await client.health(0.05)
        with pytest.raises(EngineUnavailable, match=r"within 0\.05 s"):
            await client.metrics_text(0.05)


async def test_leaving_early_closes_the_connection(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED + b"5\r\nhello\r\n")
        await reader.read()  # until the other end closes
        closed.set()
        writer.close()

    async with serving(tmp_path, endless) as client:
        async with client.open("GET", "/x", {}, None) as response:
            assert await response.read_chunk() == b"hello"
        async with asyncio.timeout(PATIENCE_S):
            await closed.wait()


async def test_a_whole_answer_leaves_the_connection_for_the_next(tmp_path: Path) -> None:
    connections = 0

    async def keep_alive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async with serving(tmp_path, keep_alive) as client:
        for _ in range(3):
            async with client.open("GET", "/x", {}, None) as response:
                assert await read_all(response) == b"ok"
    assert connections == 1


async def test_the_request_carries_what_was_given_and_no_more(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        heads.append(await reader.readexactly(4))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    headers = {"X-Request-Id": "r-1"}
    async with serving(tmp_path, record) as client, client.open("POST", "/a%20b?c=%2F", headers, b"body") as response:
        assert await read_all(response) == b""
    assert heads[0].startswith(b"POST /a%20b?c=%2F HTTP/1.1\r\n")
    assert b"X-Request-Id: r-1\r\n" in heads[0]
    assert b"Content-Type" not in heads[0]
    assert b"gzip" not in heads[0]
    assert heads[1] == b"body"


async def test_against_the_fake_engine(tmp_path: Path) -> None:
    states = States()
    async with EngineClient(tmp_path / "s") as client:
        engine = Engine(fake_vllm(tmp_path / "s"), client, policy(), states)
        task = asyncio.create_task(engine.run())
        await states.reach(EngineState.READY)
        assert await client.health(5.0)
        assert b"vllm:num_requests_running" in await client.metrics_text()
        assert "version" in json.loads(await client.version())
        body = {"model": "served", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        async with client.open("POST", "/v1/chat/completions", JSON, json.dumps(body).encode()) as response:
            assert response.content_type.startswith("text/event-stream")
            assert (await read_all(response)).endswith(b"data: [DONE]\n\n")
        await engine.stop(10.0)
        await task


class Taker:
    """Takes an answer from the socket's callback; `limit` pieces at a time, then `until_stopped` returns."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.heads: list[tuple[int, str]] = []
        self.pieces: list[bytes] = []
        self.whole = False
        self.error: EngineError | None = None
        self._over = asyncio.Event()
        self._stopped = asyncio.Event()

    def headed(self, status: int, content_type: str) -> None:
        self.heads.append((status, content_type))

    def take(self, piece: bytes) -> bool:
        assert not self._stopped.is_set(), "a piece came although nothing was wanted"
        self.pieces.append(piece)
        if self.limit is not None and len(self.pieces) % self.limit == 0:
            self._stopped.set()
        return not self._stopped.is_set()

    def ended(self) -> None:
        assert not self._over.is_set()
        self.whole = True
        self._over.set()

    def broke(self, error: EngineError) -> None:
        assert not self._over.is_set()
        self.error = error
        self._over.set()

    async def over(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._over.wait()

    async def stopped_or_over(self) -> bool:
        """True when nothing is wanted, false at the end."""
        waits = [asyncio.create_task(event.wait()) for event in (self._stopped, self._over)]
        _, late = await asyncio.wait(waits, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        for task in late:
            task.cancel()
        return self._stopped.is_set()

    def want(self) -> None:
        self._stopped.clear()


async def asked(client: EngineClient, taker: Taker) -> EngineConnection:
    """A connection that was asked something and answers to `taker`."""
    connection = client.idle() or await client.connect()
    connection.begin(request_bytes("GET", "/", {}, None), taker)
    return connection


async def test_a_body_is_passed_on_as_it_comes_and_whole(tmp_path: Path) -> None:
    pieces = [b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\ncontent-length: 9\r\n\r\nabc", b"def", b"ghi"]
    taker = Taker()
    async with serving(tmp_path, answering(*pieces)) as client:
        connection = await asked(client, taker)
        await taker.over()
        client.give_back(connection)
    assert taker.heads == [(200, "a/b")]
    assert (b"".join(taker.pieces), taker.whole) == (b"abcdefghi", True)


async def test_chunks_of_one_read_are_passed_on_together(tmp_path: Path) -> None:
    taker = Taker()
    chunks = b"".join(b"1\r\n%c\r\n" % letter for letter in b"abcd")
    async with serving(tmp_path, answering(CHUNKED + chunks + b"0\r\n\r\n")) as client:
        client.give_back(await taken(client, taker))
    assert taker.pieces == [b"abcd"]


async def taken(client: EngineClient, taker: Taker) -> EngineConnection:
    connection = await asked(client, taker)
    await taker.over()
    return connection


@pytest.mark.parametrize("size", [1_000, 600_000])
async def test_who_takes_nothing_for_now_is_given_nothing_and_loses_nothing(tmp_path: Path, size: int) -> None:
    body = bytes(range(256)) * (size // 256)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    taker = Taker(limit=1)
    async with serving(tmp_path, answering(head, *(body[i : i + 9000] for i in range(0, len(body), 9000)))) as client:
        connection = await asked(client, taker)
        while await taker.stopped_or_over():
            taker.want()
            connection.go_on()
        assert taker.whole
        client.give_back(connection)
    assert b"".join(taker.pieces) == body


async def test_what_came_before_the_break_is_taken_before_it_is_told(tmp_path: Path) -> None:
    taker = Taker(limit=1)
    async with serving(tmp_path, answering(CHUNKED + b"1\r\na\r\n", b"1\r\nb\r\n")) as client:
        connection = await asked(client, taker)
        assert await taker.stopped_or_over()
        await eventually(lambda: connection.closed)
        errors = [taker.error]
        while taker.error is None:
            taker.want()
            connection.go_on()
            errors.append(taker.error)
        assert errors[0] is None
        assert isinstance(errors[-1], EngineBroken)
        client.give_back(connection)
    assert b"".join(taker.pieces) == b"ab"


async def test_an_exchange_that_is_given_back_in_the_middle_is_broken_off_without_a_word(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED)
        try:
            while True:
                writer.write(b"1\r\nx\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            closed.set()
            raise

    taker = Taker(limit=1)
    async with asyncio.timeout(PATIENCE_S), serving(tmp_path, endless) as client:
        connection = await asked(client, taker)
        assert await taker.stopped_or_over()
        client.give_back(connection)
        await closed.wait()
        assert client.idle() is None
    assert (len(taker.pieces), taker.whole, taker.error) == (1, False, None)


@pytest.mark.parametrize("excess", [b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx", b"HTTP/1.1 2", b"no HTTP"])
async def test_a_connection_that_says_more_than_it_was_asked_is_not_used_again(tmp_path: Path, excess: bytes) -> None:
    async def talkative(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc" + excess)
        await reader.read()  # until the other end closes
        writer.close()

    taker = Taker()
    async with serving(tmp_path, talkative) as client:
        client.give_back(await taken(client, taker))
        assert client.idle() is None
    assert (taker.pieces, taker.whole, taker.heads) == ([b"abc"], True, [(200, "")])


async def test_a_connection_that_broke_before_it_was_asked_is_unavailable(tmp_path: Path) -> None:
    async def gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    taker = Taker()
    async with serving(tmp_path, gone) as client:
        connection = await client.connect()
        await eventually(lambda: connection.closed)
        connection.begin(request_bytes("GET", "/", {}, None), taker)
        assert isinstance(taker.error, EngineUnavailable)
        client.give_back(connection)


async def test_an_answer_without_a_length_ends_with_its_connection(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, answering(b"HTTP/1.1 200 OK\r\n\r\nall", b" of it")) as client,
        client.open("GET", "/", {}, None) as response,
    ):
        assert await read_all(response) == b"all of it"


async def test_what_is_no_http_is_unavailable(tmp_path: Path) -> None:
    async with serving(tmp_path, answering(b"220 hello\r\n")) as client:
        with pytest.raises(EngineUnavailable):
            async with client.open("GET", "/", {}, None):
                pass


async def test_a_header_with_a_line_break_is_not_sent(tmp_path: Path) -> None:
    seen = bytearray()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    async with serving(tmp_path, echo) as client:
        headers = {"accept": "*/*", "x-evil": "a\r\nx-smuggled: 1"}
        async with client.open("GET", "/", headers, None) as response:
            assert response.status == 200
    assert b"smuggled" not in seen
    assert b"accept: */*" in seen
