"""Clients of HTTP/1.0: they know no chunks, and the end of the connection ends an answer without a length."""

import asyncio
import socket

import pytest

from tests.router.link.rig import CHAT_PATH, KEY, Rig, until
from tests.support.agent_stub import JSON, SSE, hold
from tests.support.http_client import Call, open_call, request_bytes
from tests.support.programs import PATIENCE_S
from xim_protocol.messages import FailCode

HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
BODY = b'{"model": "chat", "messages": []}'
EVENTS = b"data: 1\n\n", b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"


async def ask(rig: Rig, *, receive_buffer_bytes: int | None = None, **headers: str) -> Call:
    """One request, as an old client or proxy sends it."""
    request = request_bytes("POST", CHAT_PATH, HEADERS | headers, BODY).replace(b" HTTP/1.1", b" HTTP/1.0", 1)
    call = await open_call(rig.http_port, request, receive_buffer_bytes=receive_buffer_bytes)
    rig._calls.append(call)
    return call


async def to_the_end(call: Call) -> bytes:
    """What comes after the head until the connection ends."""
    async with asyncio.timeout(PATIENCE_S):
        return await call.reader.read()


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
async def test_a_stream_ends_with_the_connection_and_is_not_in_chunks(connection: str) -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await ask(rig, connection=connection) as call:
        work = await agent.work()
        work.start(200, SSE)
        await work.write(EVENTS[0])
        await call.head()
        assert "transfer-encoding" not in call.headers
        assert "content-length" not in call.headers
        assert call.headers["connection"] == "close"
        # It is a stream all the same: each event comes when it is there.
        assert await call.reader.readexactly(len(EVENTS[0])) == EVENTS[0]
        await work.write(EVENTS[1])
        assert await call.reader.readexactly(len(EVENTS[1])) == EVENTS[1]
        await work.write(EVENTS[2])
        work.end()
        assert await to_the_end(call) == EVENTS[2]


async def test_a_stream_that_fails_ends_with_an_error_event() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await ask(rig) as call:
        work = await agent.work()
        work.start(200, SSE)
        await work.write(EVENTS[0])
        await call.head()
        work.fail(FailCode.ENGINE_BROKEN)
        assert (await to_the_end(call)).startswith(EVENTS[0] + b'data: {"error":{')


async def test_a_long_answer_to_a_slow_client_is_whole() -> None:
    answer = bytes(range(256)) * 16_384
    async with (
        Rig("a", response_buffer_bytes=65_536) as rig,
        rig.agent("a", serve=hold) as agent,
        await ask(rig, receive_buffer_bytes=4096) as call,
    ):
        writing = asyncio.create_task((await agent.work()).answer(answer))
        await call.head()
        assert "transfer-encoding" not in call.headers
        assert await to_the_end(call) == answer
        await writing


async def test_an_answer_that_breaks_off_is_not_taken_for_whole() -> None:
    async with (
        Rig("a", response_buffer_bytes=65_536) as rig,
        rig.agent("a", serve=hold) as agent,
        await ask(rig) as call,
    ):
        work = await agent.work()
        work.start(200, JSON)
        await work.write(b"x" * 100_000)
        await call.head()
        work.fail(FailCode.ENGINE_BROKEN)
        with pytest.raises(ConnectionResetError):
            await to_the_end(call)


@pytest.mark.parametrize("size", [4_194_304, 40_960], ids=["not all is given out", "all but the client's part is done"])
async def test_an_answer_that_is_cut_off_on_its_way_is_not_taken_for_whole(size: int) -> None:
    """As where the router ends before a slow client has all of it."""
    async with Rig("a", response_buffer_bytes=1024) as rig, rig.agent("a", serve=hold) as agent:
        rig._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        async with await ask(rig, receive_buffer_bytes=4096) as call:
            writing = asyncio.create_task((await agent.work()).answer(bytes(size)))
            (connection,) = rig._server.server_state.connections
            transport = connection.transport
            until_closing = size < 65_536
            await until(lambda: transport.get_write_buffer_size() > 0 and transport.is_closing() is until_closing)
            assert rig._server.cut_off() == 1
            with pytest.raises(ConnectionResetError):
                await to_the_end(call)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_an_answer_of_known_length_has_it() -> None:
    async with Rig("a") as rig, rig.agent("a"), await ask(rig) as call:
        await call.head()
        assert call.headers["content-length"] == str(len(BODY))
        assert "transfer-encoding" not in call.headers
        assert await to_the_end(call) == BODY


async def test_no_body_is_asked_for() -> None:
    headers = HEADERS | {"expect": "100-continue", "content-length": str(len(BODY))}
    head = request_bytes("POST", CHAT_PATH, headers).replace(b" HTTP/1.1", b" HTTP/1.0", 1)
    async with Rig("a") as rig, rig.agent("a"), await open_call(rig.http_port, head) as call:
        await until(lambda: rig._server.server_state.tasks)
        call.writer.write(BODY)
        assert (await call.reader.readline()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_has_no_body_has_no_length(status: int) -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await rig.call(connection="close") as call:
        await (await agent.work()).answer(b"", status=status)
        await call.head()
        assert call.status == status
        assert "content-length" not in call.headers
        assert "transfer-encoding" not in call.headers
        assert await to_the_end(call) == b""
