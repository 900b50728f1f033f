"""The direct way past uvicorn's `send`, against a real uvicorn: the bytes on the wire, and when it is not taken."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from tests.support.programs import PATIENCE_S, eventually
from xim_router.app import _Server
from xim_router.http.direct import ChunkWriter, NoDirectWay, UvicornWriter, chunk_writer

Answerer = Callable[[ChunkWriter, Send], Awaitable[None]]


@asynccontextmanager
async def server(answerer: Answerer, *, started: bool = True) -> AsyncIterator[int]:
    """A uvicorn whose application starts a response and leaves the rest, or all, to `answerer`; gives the port."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await answerer(chunk_writer(send), send)
        while (await receive())["type"] != "http.disconnect":
            pass

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http="httptools",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=3_600,  # what is to be closed is closed at once, or these tests wait for it
    )
    running = _Server(config)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(running.serve(sockets=[listener]))
        yield listener.getsockname()[1]
        running.force_exit = True
        running.stop()


async def fetch(port: int, request: bytes) -> bytes:
    """Everything the server answers on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def answers(answerer: Answerer, request: bytes) -> bytes:
    """What a server says to `request` whose responses `answerer` makes from their start; without its clock."""
    async with server(answerer, started=False) as port:
        return re.sub(rb"date: [^\r]*", b"date: now", await fetch(port, request))


GET = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


async def finish(send: Send, body: bytes = b"") -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def test_chunks_written_directly_and_by_send_are_one_chunked_body() -> None:
    async def answer(writer: ChunkWriter, send: Send) -> None:
        assert isinstance(writer, UvicornWriter)
        assert writer.write(b"first ")
        await send({"type": "http.response.body", "body": b"second ", "more_body": True})
        assert writer.write(b"x" * 300)
        await finish(send)

    async with server(answer) as port:
        body = (await fetch(port, GET)).partition(b"\r\n\r\n")[2]
    assert body == b"6\r\nfirst \r\n7\r\nsecond \r\n12c\r\n" + b"x" * 300 + b"\r\n0\r\n\r\n"


async def test_the_date_of_answers_goes_on() -> None:
    async def date() -> bytes:
        head = (await fetch(port, GET)).partition(b"\r\n\r\n")[0]
        (found,) = [line for line in head.split(b"\r\n") if line.startswith(b"date: ")]
        return found

    async with server(lambda _writer, send: finish(send)) as port:
        first = await date()

        async def moved() -> bool:
            return await date() != first

        await eventually(moved, what="another second")


HEADERS = [(b"content-type", b"text/event-stream"), (b"x-request-id", b"req_1")]
PIPELINED = b"POST /1 HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize("request_bytes", [GET, PIPELINED + GET])
@pytest.mark.parametrize("last", [b"", b"last"])
async def test_begin_and_finish_write_what_send_writes(request_bytes: bytes, last: bytes) -> None:
    async def direct(writer: ChunkWriter, send: Send) -> None:
        assert writer.begin(200, HEADERS, b"first")
        assert writer.finish(last)

    async def by_send(writer: ChunkWriter, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await finish(send, last)

    assert await answers(direct, request_bytes) == await answers(by_send, request_bytes)


@pytest.mark.parametrize("request_bytes", [GET, PIPELINED + GET])
@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_a_whole_answer_is_what_send_writes(request_bytes: bytes, body: bytes) -> None:
    headers = [*HEADERS, (b"content-length", str(len(body)).encode())]

    async def direct(writer: ChunkWriter, send: Send) -> None:
        assert writer.whole(422, headers, body)

    async def by_send(writer: ChunkWriter, send: Send) -> None:
        await send({"type": "http.response.start", "status": 422, "headers": headers})
        await finish(send, body)

    assert await answers(direct, request_bytes) == await answers(by_send, request_bytes)


async def test_what_has_no_body_goes_through_send() -> None:
    async def answer(writer: ChunkWriter, send: Send) -> None:
        taken.append(writer.begin(204, [], b"x"))
        taken.append(writer.finish(b""))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await finish(send)
        taken.append(writer.begin(200, [], b"late"))
        taken.append(writer.whole(200, [], b"late"))

    taken: list[bool] = []
    assert b"late" not in await answers(answer, GET)
    assert b"x" not in await answers(answer, GET.replace(b"GET", b"HEAD"))
    assert not any(taken)


async def test_a_response_that_is_not_chunked_goes_through_send() -> None:
    taken: list[bool] = []

    async def answer(writer: ChunkWriter, send: Send) -> None:
        taken.append(writer.write(b"never"))
        await finish(send)

    async with server(answer) as port:
        assert b"never" not in await fetch(port, GET.replace(b"GET", b"HEAD"))
    assert taken == [False]


async def test_nothing_is_written_after_the_end() -> None:
    taken: list[bool] = []

    async def answer(writer: ChunkWriter, send: Send) -> None:
        await finish(send, b"whole")
        taken.append(writer.write(b"late"))

    async with server(answer) as port:
        assert b"late" not in await fetch(port, GET)
    assert taken == [False]


async def test_a_client_that_takes_nothing_stops_the_direct_way() -> None:
    stopped = asyncio.Event()

    async def answer(writer: ChunkWriter, send: Send) -> None:
        payload = b"x" * 65_536
        for _ in range(4096):
            if not writer.write(payload):
                stopped.set()
                break
        writer.abort()

    async with server(answer) as port:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, GET)
        async with asyncio.timeout(PATIENCE_S):
            await stopped.wait()
        client.close()


async def test_abort_closes_the_connection_without_its_end() -> None:
    async def answer(writer: ChunkWriter, send: Send) -> None:
        writer.abort()

    async with server(answer) as port:
        try:
            answered = await fetch(port, GET)
        except ConnectionResetError:
            return
        assert not answered.endswith(b"0\r\n\r\n")


async def test_any_other_server_has_no_direct_way() -> None:
    async def send(message: object) -> None:
        raise AssertionError("nothing is sent")

    writer = chunk_writer(send)
    assert isinstance(writer, NoDirectWay)
    assert not writer.write(b"x")
    assert not writer.begin(200, [], b"x")
    assert not writer.whole(200, [], b"x")
    assert not writer.finish(b"x")
    writer.abort()
