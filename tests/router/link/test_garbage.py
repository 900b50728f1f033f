"""What an agent may do wrong ends its own session, and nothing else."""

import asyncio
from collections.abc import Callable

import msgpack
import pytest
import zmq

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import JSON, SSE, AgentStub, Work, hold
from tests.support.programs import PATIENCE_S
from xim_protocol.codec import MAX_FRAME_BYTES, MAX_FRAMES, Frames, encode, encode_batch
from xim_protocol.errors import FaultReason
from xim_protocol.messages import Attach, Channel, EntryKind, GoodbyeCode, Renewed
from xim_router.link import links

DONE = b"data: [DONE]\n\n"
EVENTS = [b'data: {"n": %d}\n\n' % number for number in range(200)]
STREAM = b"".join(EVENTS) + DONE

Bad = Callable[[Work], tuple[Channel, Frames]]


def batch(*entries: tuple[object, ...]) -> tuple[Channel, Frames]:
    return Channel.STREAMING, encode_batch(list(entries))


def chunk(work: Work, offset: int, payload: bytes) -> tuple[object, ...]:
    return (EntryKind.CHUNK, work.stream, offset, payload)


WRONG: dict[str, tuple[FaultReason, Bad]] = {
    "noise on streaming": (FaultReason.MALFORMED, lambda work: (Channel.STREAMING, [b"\xc1\x00noise"])),
    "noise on control": (FaultReason.MALFORMED, lambda work: (Channel.CONTROL, [b"\xff" * 100])),
    "an empty message": (FaultReason.MALFORMED, lambda work: (Channel.CONTROL, [b""])),
    "a wrong type": (FaultReason.MALFORMED, lambda work: (Channel.CONTROL, [msgpack.packb((2, "ready", "1", 0))])),
    "a frame too many": (FaultReason.MALFORMED, lambda work: (Channel.STREAMING, [msgpack.packb((23, [])), b"x"])),
    "frames over the limit": (
        FaultReason.TOO_LARGE,
        lambda work: (Channel.STREAMING, [msgpack.packb((23, []))] + [b"x"] * MAX_FRAMES),
    ),
    "a message over the limit": (
        FaultReason.TOO_LARGE,
        lambda work: (Channel.STREAMING, [msgpack.packb((23, []))] + [b"x" * 1_000_000] * 3),
    ),
    "a message of the router": (FaultReason.UNEXPECTED, lambda work: (Channel.CONTROL, encode(Renewed(lease_ms=1)))),
    "a second Attach": (
        FaultReason.UNEXPECTED,
        lambda work: (Channel.STREAMING, encode(Attach(session=work.agent.welcomes[-1].session))),
    ),
    "a batch on control": (FaultReason.UNEXPECTED, lambda work: (Channel.CONTROL, batch(chunk(work, 0, b"x"))[1])),
    "a chunk before its start": (FaultReason.UNEXPECTED, lambda work: batch(chunk(work, 0, b"x"))),
    "a stream that never was": (
        FaultReason.UNEXPECTED,
        lambda work: batch((EntryKind.CHUNK, work.stream + 1000, 0, b"x")),
    ),
    "a gap": (
        FaultReason.OFFSET,
        lambda work: batch((EntryKind.START, work.stream, 200, SSE), chunk(work, 1, b"x")),
    ),
    "a wrong length": (
        FaultReason.OFFSET,
        lambda work: batch((EntryKind.START, work.stream, 200, SSE), (EntryKind.END, work.stream, 7, None)),
    ),
    "more than the window": (
        FaultReason.CREDIT,
        lambda work: batch((EntryKind.START, work.stream, 200, SSE), chunk(work, 0, b"x" * 65_537)),
    ),
}


async def stream_slowly(work: Work) -> None:
    """Answers as an event stream; goes on when the test asks for the next event."""
    work.start(200, SSE)
    await work.write(EVENTS[0])


@pytest.mark.parametrize("wrong", list(WRONG))
async def test_what_is_wrong_ends_the_session_of_its_sender_alone(wrong: str) -> None:
    reason, make = WRONG[wrong]
    async with (
        Rig("good", "bad") as rig,
        rig.agent("good", serve=stream_slowly) as good,
        await rig.call() as streaming,
    ):
        good_work = await good.work()
        await streaming.head()
        async with rig.agent("bad", serve=hold) as bad, await rig.call() as call:
            work = await bad.work()
            bad.say(*make(work))
            for number, event in enumerate(EVENTS[1:], start=1):
                await good_work.write(event)
                if number % 50 == 0:
                    await streaming.until(event)
            await bad.until(lambda: bad.goodbye is not None and bad.lost)
            assert bad.goodbye is not None
            assert bad.goodbye.code is GoodbyeCode.PROTOCOL_ERROR
            assert rig.faults(reason) == 1
            assert rig.link("bad") is None
            assert [link.agent for link in rig.links.values()] == ["good"]
            # The good agent is full: the bad one's request waits for it, as for a sole agent.
            await rig.parked(1)
            assert not rig.serving("bad")
            call.leave()
        await rig.parked(0)
        await good_work.write(DONE)
        good_work.end()
        await streaming.rest()
        assert bytes(streaming.body) == STREAM


async def test_a_frame_that_no_message_may_have_costs_the_link_and_not_the_request() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await rig.call() as call:
        await agent.work()
        agent.say(Channel.STREAMING, [b"x" * (MAX_FRAME_BYTES + 1)])
        await agent.until(lambda: agent.lost)
        await until(lambda: rig.count("xim_router_link_lost_total") == 1)
        await agent.drop()
        agent.connect()
        await agent.opened()
        await agent.works[0].answer(b'{"ok": true}')
        assert (await call.rest()).json() == {"ok": True}


async def test_an_agent_that_comes_again_after_a_fault_is_served_as_a_fresh_one() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        agent.say(Channel.CONTROL, [b"\xc1"])
        await agent.until(lambda: agent.lost and agent.goodbye is not None)
        await agent.drop()
        agent.connect()
        await agent.opened()
        assert (await rig.ask()).status == 200
        assert len({welcome.session for welcome in agent.welcomes}) == 2


async def test_answers_that_ended_in_the_message_with_the_fault_leave_nobody_waiting() -> None:
    """The session closed their streams before it came to the wrong entry, and knows them no more."""
    async with Rig("a") as rig, rig.agent("a", serve=hold, capacity=4) as agent, await rig.call() as call:
        work = await agent.work()
        body = b'{"whole": true}'
        agent.say(
            *batch(
                (EntryKind.START, work.stream, 200, "application/json"),
                chunk(work, 0, body),
                (EntryKind.END, work.stream, len(body), None),
                (EntryKind.CHUNK, work.stream + 1000, 0, b"x"),
            )
        )
        await agent.until(lambda: agent.lost)
        # The request goes to the agent once more when it is back.
        await rig.parked(1)
        agent.serve = lambda work: work.answer(b'{"again": true}')
        await agent.drop()
        agent.connect()
        assert (await call.rest()).json() == {"again": True}


async def test_a_fault_after_the_commit_point_ends_the_stream_in_an_error_event() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await rig.call() as call:
        work = await agent.work()
        work.start(200, SSE)
        await work.write(b'data: {"n": 0}\n\ndata: {"half')
        await call.head()
        await call.until(b"half")
        agent.say(Channel.CONTROL, [b"\xc1"])
        await call.rest()
        assert b"[DONE]" not in call.body
        assert bytes(call.body).startswith(b'data: {"n": 0}\n\ndata: {"half\n\ndata: {"error"')
        assert b'"code":"agent_lost"' in call.body


async def test_garbage_from_a_peer_without_a_session_shuts_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "UNATTACHED_S", 3_600.0)  # which would shut it too
    async with Rig("a") as rig, AgentStub(rig.dial("a")) as agent:
        await agent.opened()
        before = rig.faults(FaultReason.MALFORMED)
        stranger = agent._make_socket()
        monitor = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        stranger.connect(agent.dial.streaming)
        try:
            stranger.send_multipart([b"\xc1"])
            async with asyncio.timeout(PATIENCE_S):
                await monitor.recv_multipart()
        finally:
            stranger.disable_monitor()
            monitor.close(linger=0)
            stranger.close(linger=0)
        assert rig.faults(FaultReason.MALFORMED) == before + 1
        assert rig.serving("a")


async def test_a_second_streaming_half_of_a_whole_link_is_nobodys() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        second = agent._make_socket()
        second.connect(agent.dial.streaming)
        try:
            second.send_multipart(encode(Attach(session=agent.welcomes[-1].session)))
            await until(lambda: rig.count("xim_router_fenced_messages_total") == 1)
        finally:
            second.close(linger=0)
        assert rig.faults(FaultReason.UNEXPECTED) == 0
        assert (await rig.ask()).status == 200
        assert not agent.lost


async def test_too_many_frames_from_a_peer_without_a_session_are_a_fault_too() -> None:
    async with Rig("a") as rig, AgentStub(rig.dial("a")) as agent:
        await agent.opened()
        stranger = agent._make_socket()
        stranger.connect(agent.dial.control)
        try:
            stranger.send_multipart([b"x"] * (MAX_FRAMES + 1))
            await until(lambda: rig.faults(FaultReason.TOO_LARGE) == 1)
        finally:
            stranger.close(linger=0)
        assert rig.serving("a")


@pytest.mark.parametrize(
    ("status", "content_type"), [(100, JSON), (204, SSE), (304, JSON), (700, JSON), (200, "text/plain\r\nx: y")]
)
async def test_an_answer_that_http_cannot_say_harms_no_other_of_its_message(status: int, content_type: str) -> None:
    async with (
        Rig("a") as rig,
        rig.agent("a", serve=hold, capacity=2) as agent,
        await rig.call({"model": "chat", "n": 1}) as odd,
        await rig.call({"model": "chat", "n": 2}) as even,
    ):
        await agent.until(lambda: len(agent.works) == 2)
        # By what they ask: of two connections the later one may be read first.
        first, second = sorted(agent.works, key=lambda work: work.body)
        agent.say(
            *batch(
                (EntryKind.START, first.stream, status, content_type),
                chunk(first, 0, DONE),
                (EntryKind.END, first.stream, len(DONE), None),
                (EntryKind.START, second.stream, 200, JSON),
                chunk(second, 0, b"{}"),
                (EntryKind.END, second.stream, 2, None),
            )
        )
        assert (await even.rest()).body == b"{}"
        await odd.rest()
        assert (odd.status, bytes(odd.body)) == (status if status == 200 else 502, DONE)


async def test_one_bad_message_does_not_keep_those_behind_it_from_being_read() -> None:
    async with Rig("a", "b") as rig, rig.agent("a") as bad, rig.agent("b") as good:
        for _ in range(20):
            bad.say(Channel.CONTROL, [b"\xc1"])
        await bad.until(lambda: bad.lost)
        assert (await rig.ask()).status == 200
        assert len(good.works) == 1
