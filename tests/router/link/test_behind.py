"""What a client sends behind a request that is not answered yet, or behind its body, harms nobody."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.router.link.rig import CHAT_PATH, KEY, Rig, until
from tests.support.agent_stub import SSE, AgentStub, StreamOver, Work, hold
from tests.support.http_client import Call, open_call, request_bytes
from tests.support.programs import PATIENCE_S
from xim_protocol.messages import CancelReason
from xim_router.http.protocol import MAX_HEAD_BYTES, HttpProtocol

HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
CHAT = request_bytes("POST", CHAT_PATH, HEADERS, b'{"model": "chat"}')
LONG = request_bytes("POST", CHAT_PATH, HEADERS, b'{"model": "chat"' + b" " * 200_000 + b"}")
"""It does not arrive in one piece."""
CHUNKED = request_bytes("POST", CHAT_PATH, HEADERS | {"transfer-encoding": "chunked"})
FIRST, SECOND, DONE = b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"


@dataclass
class Streaming:
    """One client's answer under way."""

    call: Call
    work: Work


@contextlib.asynccontextmanager
async def streaming(rig: Rig, agent: AgentStub, number: int, request: bytes = CHAT) -> AsyncIterator[Streaming]:
    async with await open_call(rig.http_port, request) as call:
        work = await agent.work(number)
        work.start(200, SSE)
        await work.write(FIRST)
        await call.head()
        await call.until(FIRST)
        yield Streaming(call, work)


def connections(rig: Rig) -> list[HttpProtocol]:
    return [each for each in rig._server.server_state.connections if isinstance(each, HttpProtocol)]


def waiting_on(rig: Rig) -> list[HttpProtocol]:
    """The connections on which a request waits behind another."""
    return [each for each in connections(rig) if each.pipeline]


@pytest.mark.parametrize("sent", [CHAT, LONG], ids=["whole at once", "in pieces"])
async def test_a_client_that_leaves_two_requests_cancels_the_work_and_costs_no_other_a_byte(
    sent: bytes,
) -> None:
    async with (
        Rig("a") as rig,
        rig.agent("a", serve=hold, capacity=2) as agent,
        streaming(rig, agent, 0, sent) as leaving,
        streaming(rig, agent, 1) as other,
    ):
        leaving.call.writer.write(CHAT)
        await until(lambda: waiting_on(rig))
        leaving.call.leave()
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(StreamOver):
                while True:  # the router notices with what it writes
                    agent.session.produce(leaving.work.stream, SECOND, agent.now())
                    await other.work.write(SECOND)
                    await other.call.until(SECOND)
                    other.call.body.clear()
                    leaving.work._check()
        assert leaving.work.cancelled is CancelReason.CLIENT_LEFT
        assert len(agent.works) == 2


@pytest.mark.parametrize("waiting", [0, 1])
@pytest.mark.parametrize("late", [False, True], ids=["broken", "late"])
async def test_a_request_that_is_none_never_answers_into_the_one_before(waiting: int, late: bool) -> None:
    async with (
        Rig("a") as rig,
        rig.agent("a", serve=hold, capacity=2) as agent,
        streaming(rig, agent, 0) as stream,
    ):
        stream.call.writer.write(waiting * CHAT + CHUNKED)
        await until(lambda: any(len(each.pipeline) > waiting for each in connections(rig)))
        (connection,) = waiting_on(rig)
        if late:
            connection.flow.resume_reading()
            connection._on_overdue()
        else:
            connection.data_received(b"no size\r\n")
        await stream.work.write(SECOND + DONE)
        stream.work.end()
        await stream.call.rest()
        assert bytes(stream.call.body) == FIRST + SECOND + DONE
        if waiting:
            work = await agent.work(1)
            await work.answer(b"{}")
            following = Call(reader=stream.call.reader, writer=stream.call.writer)
            assert (await following.rest()).status == 200
        assert await stream.call.reader.read() == b""


@pytest.mark.parametrize("key", [KEY, "wrong"])
async def test_trailers_are_dropped_and_bounded(key: str) -> None:
    head = CHUNKED.replace(KEY.encode(), key.encode())
    async with Rig("a") as rig, await open_call(rig.http_port, head + b"2\r\n{}\r\n0\r\n") as call:
        await until(lambda: any(each.cycle for each in connections(rig)))
        (connection,) = connections(rig)
        headers = len(connection.headers)
        for _ in range(1 + MAX_HEAD_BYTES // 10_000):
            connection.data_received(b"a: b\r\n" * 1_000 + b"c: " + b"d" * 3_995 + b"\r\n")
            assert len(connection.headers) == headers
        assert connection._told
        await call.head()
        assert call.status == (431 if key == KEY else 401)


async def test_a_body_in_many_small_chunks_is_no_trailer() -> None:
    async with Rig("a") as rig, rig.agent("a"), await open_call(rig.http_port, CHUNKED) as call:
        text = b'{"model": "chat"' + b" " * MAX_HEAD_BYTES + b"}"
        call.writer.write(b"".join(b"1\r\n%c\r\n" % each for each in text) + b"0\r\n\r\n")
        assert (await call.rest()).body == text
