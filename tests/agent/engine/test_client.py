"""HTTP to the engine: every byte as it came, and every way it can break off."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.agent.engine.engines import States, fake_vllm, policy
from tests.support.programs import PATIENCE_S
from xim_agent.engine.client import EngineBroken, EngineClient, EngineError, EngineResponse, EngineUnavailable
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


async def test_a_body_is_delivered_piece_by_piece_and_whole(tmp_path: Path) -> None:
    pieces = [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", b"def", b"ghi"]
    taken: list[bytes] = []
    async with (
        serving(tmp_path, answering(*pieces)) as client,
        client.open("GET", "/", {}, None) as response,
    ):
        assert await response.deliver(lambda piece: taken.append(piece)) is None
    assert b"".join(taken) == b"abcdefghi"


async def test_what_a_taker_leaves_over_comes_back_once_and_nothing_is_lost(tmp_path: Path) -> None:
    body = bytes(range(256)) * 64
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    taken = bytearray()

    def take(piece: bytes) -> bytes | None:
        taken.extend(piece[:100])
        return piece[100:] or None

    async with (
        serving(tmp_path, answering(head, *(body[i : i + 1000] for i in range(0, len(body), 1000)))) as client,
        client.open("GET", "/", {}, None) as response,
    ):
        while (rest := await response.deliver(take)) is not None:
            taken.extend(rest)
    assert bytes(taken) == body


async def test_what_a_taker_raises_ends_the_delivery_and_the_connection(tmp_path: Path) -> None:
    class Ended(Exception):
        pass

    def take(piece: bytes) -> bytes | None:
        raise Ended

    closed = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"1\r\nx\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            closed.set()
            raise

    async with asyncio.timeout(PATIENCE_S), serving(tmp_path, endless) as client:
        with pytest.raises(Ended):
            async with client.open("GET", "/", {}, None) as response:
                await response.deliver(take)
        await closed.wait()


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
