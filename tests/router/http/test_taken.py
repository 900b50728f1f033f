"""Requests that have arrived whole are taken on the spot, the others by a task of uvicorn's: both end the same way."""

import asyncio
import gc
import json
import logging
from collections.abc import Awaitable, Callable

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from tests.router.link.rig import CHAT, CHAT_PATH, KEY, Rig, until
from tests.support.agent_stub import SSE, Work, echo, hold
from tests.support.http_client import Call, Unfinished, open_call, request_bytes
from xim_protocol.messages import CancelReason
from xim_router.http.inference import Inference
from xim_router.http.protocol import HttpProtocol

BODY = json.dumps({"model": "chat", "messages": []}).encode()
HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
WHOLE = request_bytes("POST", CHAT_PATH, HEADERS, BODY)


async def whole(rig: Rig) -> Call:
    """A request that arrives in one piece."""
    return await rig.call(BODY)


async def asked_for(rig: Rig) -> Call:
    """A request whose body comes when the router says that it wants it, and so surely after its head."""
    headers = HEADERS | {"expect": "100-continue", "content-length": str(len(BODY))}
    call = await open_call(rig.http_port, request_bytes("POST", CHAT_PATH, headers))
    assert b"100 Continue" in await call.reader.readuntil(b"\r\n\r\n")
    call.writer.write(BODY)
    return call


Ask = Callable[[Rig], Awaitable[Call]]
both_ways = pytest.mark.parametrize("send", [whole, asked_for])


def tasks(rig: Rig) -> int:
    """How many requests uvicorn runs."""
    return len(rig._server.server_state.tasks)


async def begin(work: Work) -> None:
    """Answers with one event, and no end."""
    work.start(200, SSE)
    await work.write(b"data: 1\n\n")


async def test_a_whole_request_needs_no_task() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold, capacity=2) as agent, await whole(rig) as call:
        first = await agent.work()
        assert tasks(rig) == 0
        async with await asked_for(rig) as other:
            second = await agent.work(1)
            assert tasks(rig) == 1
            await second.answer(b"{}")
            await other.rest()
        await first.answer(b"{}")
        assert (await call.rest()).status == 200


@both_ways
async def test_a_client_that_leaves_early_is_counted_once_and_leaves_nothing(send: Ask) -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent:
        async with await send(rig):
            work = await agent.work()
        await agent.until(lambda: work.cancelled is CancelReason.CLIENT_LEFT)
        await rig.idle()
        assert rig.count("xim_router_client_disconnects_total", phase="dispatched") == 1


@both_ways
async def test_a_body_is_kept_until_the_answer_begins_and_no_longer(send: Ask) -> None:
    def kept() -> list[bytes]:
        (connection,) = rig._server.server_state.connections
        (exchange,) = rig.broker._exchanges.values()
        assert isinstance(connection, HttpProtocol)
        assert exchange.stream is not None
        return [bytes(connection.cycle.body), exchange.body, exchange.stream.body]

    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await send(rig) as call:
        work = await agent.work()
        # For a second attempt, and for a new link.
        assert kept() == [b"", BODY, BODY]
        await begin(work)
        await call.head()
        assert kept() == [b"", b"", b""]


@both_ways
async def test_a_client_that_leaves_in_its_answer_is_counted_once_and_leaves_nothing(send: Ask) -> None:
    async with Rig("a") as rig, rig.agent("a", serve=begin) as agent:
        async with await send(rig) as call:
            await call.head()
            await call.until(b"data: 1\n\n")
        work = await agent.work()
        await agent.until(lambda: work.cancelled is CancelReason.CLIENT_LEFT)
        await rig.idle()
        assert rig.count("xim_router_client_disconnects_total", phase="answering") == 1


@both_ways
async def test_a_connection_goes_on_after_an_answer_and_after_a_refusal(send: Ask) -> None:
    async with Rig("a") as rig, rig.agent("a") as agent, await send(rig) as call:
        await call.rest()
        assert (call.status, bytes(call.body)) == (200, BODY)
        for request, status in ((WHOLE.replace(b"Bearer ", b"Bearer x"), 401), (WHOLE, 200)):
            call.status, call.body = 0, bytearray()
            call.writer.write(request)
            assert (await call.rest()).status == status
        assert len(agent.works) == 2
        assert rig.count("xim_router_requests_refused_total", code="invalid_api_key") == 1
        # Nobody is taken for one that left.
        outcomes = [
            rig.count("xim_router_requests_total", project=CHAT.project, endpoint=CHAT.slug, code=code)
            for code in ("200", "client_closed_request")
        ]
        assert outcomes == [2, 0]


async def test_an_answer_that_is_whole_at_once_leaves_nothing() -> None:
    async with Rig() as rig, await whole(rig) as call:
        # Nobody serves the endpoint, and nobody will.
        assert (await call.rest()).status == 503
        assert tasks(rig) == 0
        await rig.idle()
        call.status, call.body = 0, bytearray()
        call.writer.write(WHOLE)
        assert (await call.rest()).status == 503


async def test_requests_in_a_row_are_answered_in_their_order() -> None:
    numbered = [request_bytes("POST", CHAT_PATH, HEADERS, b'{"model": "chat", "n": %d}' % n) for n in range(4)]
    async with Rig("a") as rig, rig.agent("a", capacity=4) as agent:
        async with await open_call(rig.http_port, b"".join(numbered)) as call:
            for number in range(4):
                call.status, call.body = 0, bytearray()
                assert (await call.rest()).json()["n"] == number
        assert len(agent.works) == 4


async def test_a_client_that_leaves_with_requests_in_a_row_leaves_nothing() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold, capacity=4) as agent:
        async with await open_call(rig.http_port, WHOLE * 3):
            work = await agent.work()
        # uvicorn reads nothing while requests wait behind this one, so it learns of the end when it writes.
        agent.serve = echo
        await work.answer(b"{}")
        await rig.idle()
        await until(lambda: not rig.connections)


async def test_a_body_too_long_for_one_look_is_taken_all_the_same() -> None:
    body = b'{"model": "chat", "p": "' + b"x" * 200_000 + b'"}'
    async with Rig("a") as rig, rig.agent("a"):
        assert bytes((await rig.ask(body)).body) == body


async def test_who_leaves_after_a_body_that_stopped_the_reading_is_noticed() -> None:
    body = b'{"model": "chat", "p": "' + b"x" * 200_000 + b'"}'
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent:
        async with await open_call(rig.http_port, b""):
            await until(lambda: rig.connections)
            (connection,) = rig._server.server_state.connections
            # In one piece, however the kernel would cut it.
            connection.data_received(request_bytes("POST", CHAT_PATH, HEADERS, body))
            work = await agent.work()
        await agent.until(lambda: work.cancelled is CancelReason.CLIENT_LEFT)


async def test_what_goes_wrong_on_the_spot_is_said_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Inference, *_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Inference, "_open", broken)
    async with Rig("a") as rig, await whole(rig) as call:
        assert ((await call.rest()).status, call.code) == (500, "internal_error")
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert record.getMessage() == "request failed"


@both_ways
async def test_a_connection_that_is_over_is_freed_without_a_collection(send: Ask) -> None:
    def in_memory() -> list[object]:
        return [each for each in gc.get_objects() if type(each) in (HttpProtocol, RequestResponseCycle)]

    def left() -> bool:
        return not all(any(each is other for other in before) for each in in_memory())

    async with Rig("a") as rig, rig.agent("a") as agent:
        gc.collect()
        before = in_memory()  # such as a test holds that failed
        gc.disable()
        try:
            for _ in range(5):
                async with await send(rig) as call:
                    await call.rest()
            agent.serve = hold
            async with await send(rig):
                await agent.work(5)
            await rig.idle()
            await until(lambda: not rig.connections)
            # What the loop still holds of the last one it gives up in its next turn.
            await until(lambda: not left())
        finally:
            gc.enable()


async def test_an_answer_cut_off_by_the_router_ends_what_was_taken() -> None:
    async def endless(work: Work) -> None:
        work.start(200, SSE)
        while True:
            await work.write(b"data: " + b"x" * 10_000 + b"\n\n")
            await asyncio.sleep(0)

    async with (
        Rig("a", client_stall_timeout_s=0.2) as rig,
        rig.agent("a", serve=endless),
        await rig.call(BODY, receive_buffer_bytes=4_096) as call,
    ):
        await until(lambda: rig.count("xim_router_client_stalled_total") == 1)
        await rig.idle()
        with pytest.raises(Unfinished):
            await call.rest()
