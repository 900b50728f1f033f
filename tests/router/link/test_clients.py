"""Clients that leave, at any moment, and clients that do not read."""

import asyncio
from pathlib import Path

import pytest

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import SSE, AgentStub, Work, hold
from tests.support.programs import PATIENCE_S
from tests.support.stopwatch import Stopwatch
from xim_protocol.messages import CancelReason, FailCode, FlowControl, RefusalReason

DONE = b"data: [DONE]\n\n"
WINDOW = FlowControl().window_bytes
SLACK_BYTES = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2]) + 1024 * 1024
"""What the kernel and the server's own buffer take at most; every body here that must not fit is larger."""


def lines(size: int) -> bytes:
    """Events of which no byte can be lost, doubled or misplaced unseen."""
    return b"".join(b"data: %010d\n\n" % number for number in range(size // 18))


async def endless(work: Work) -> None:
    """Streams until nobody waits for it."""
    work.start(200, SSE)
    piece = lines(4_096)
    while True:
        await work.write(piece)
        await asyncio.sleep(0)


async def cancelled_within_a_second(work: Work) -> None:
    """Return when the agent has heard that the client, which left just now, left."""
    left = Stopwatch()
    await work.agent.until(lambda: work.cancelled is not None)
    left.check(1.0, "the work is cancelled")


# --- Leaving -------------------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_while_parked_takes_nothing_with_it() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await rig.call() as first:
        await agent.work()
        async with await rig.call():
            await rig.parked(1)
        await rig.parked(0)
        assert rig.broker.open_exchanges == 1
        await agent.works[0].answer()
        assert (await first.rest()).status == 200
        assert len(agent.works) == 1


async def test_a_client_that_leaves_before_the_first_byte_cancels_the_work() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent:
        async with await rig.call():
            work = await agent.work()
        await cancelled_within_a_second(work)
        assert work.cancelled is CancelReason.CLIENT_LEFT
        await rig.idle()
        assert rig.count("xim_router_client_disconnects_total", phase="dispatched") == 1


async def test_a_client_that_leaves_mid_stream_cancels_the_work_and_the_next_one_gets_the_slot() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=endless) as agent:
        async with await rig.call() as leaving:
            await leaving.head()
            await leaving.until(b"0000000100\n\n")
        await cancelled_within_a_second(await agent.work())
        agent.serve = lambda work: work.answer(work.body)
        assert (await rig.ask()).status == 200
        assert rig.count("xim_router_client_disconnects_total", phase="answering") == 1


async def test_a_client_that_leaves_a_whole_answer_half_made_cancels_the_work() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent:
        async with await rig.call():
            work = await agent.work()
            work.start()
            await work.write(b'{"half": ')
            await until(lambda: rig.metrics.hot.buffered_bytes == 9)
        await cancelled_within_a_second(work)
        await rig.idle()


async def test_a_client_that_leaves_while_its_request_waits_for_a_second_attempt_takes_nothing_with_it() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent:
        async with await rig.call():
            work = await agent.work()
            work.fail(FailCode.ENGINE_UNAVAILABLE, retryable=True)
            await rig.parked(1)
        await rig.parked(0)
        assert rig.broker.open_exchanges == 0


async def test_a_request_that_is_refused_when_its_client_has_left_goes_nowhere_else() -> None:
    async with Rig("a", queue_timeout_s=3_600.0) as rig, rig.agent("a", serve=hold) as agent:
        async with await rig.call():
            work = await agent.work()
            agent.silent = True  # it has not heard yet that the client left
        await until(lambda: not rig.broker.in_flight)
        assert next(iter(rig.broker._exchanges.values())).body == b""
        work.refuse(RefusalReason.AT_CAPACITY)
        agent.silent = False
        await rig.idle()
        assert len(agent.works) == 1


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_request() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        async with await rig.call(b'{"model": "chat"', content_length="1000") as call:
            await call.writer.drain()
        await rig.idle()
        await until(lambda: rig.count("xim_router_client_disconnects_total", phase="body") == 1)
        assert (await rig.ask()).status == 200
        assert len(agent.works) == 1


async def test_a_request_that_takes_too_long_is_ended_and_its_work_cancelled() -> None:
    async with Rig("a", request_timeout_s=2.0) as rig, rig.agent("a", serve=hold) as agent, await rig.call() as call:
        work = await agent.work()
        assert work.submit.time_left_ms is not None
        assert 0 < work.submit.time_left_ms <= 2_000
        await call.rest()
        assert (call.status, call.code) == (504, "request_timeout")
        await agent.until(lambda: work.cancelled is not None)
        assert work.cancelled is CancelReason.TIME_UP


# --- Not reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [65_536, 262_144])
async def test_what_is_held_for_a_client_that_does_not_read_stays_within_its_bound(bound: int) -> None:
    async with (
        Rig("a", response_buffer_bytes=bound) as rig,
        rig.agent("a", serve=endless, capacity=2) as agent,
        await rig.call(receive_buffer_bytes=4_096) as slow,
    ):
        work = await agent.work()
        # The work stands still for want of credit.
        await until(lambda: work.produced > bound and agent.session.room(work.stream) == 0)
        await until(lambda: rig.metrics.hot.buffered_bytes > bound)
        assert rig.metrics.hot.buffered_bytes <= bound + WINDOW
        assert work.produced <= bound + WINDOW + SLACK_BYTES
        # Another client's stream of the same agent is not held up.
        agent.serve = lambda work: work.answer(lines(1_000_000) + DONE, content_type=SSE)
        other = await rig.ask()
        assert bytes(other.body) == lines(1_000_000) + DONE
        # It goes on where it stood, once the client reads.
        stood = work.produced
        await slow.head()
        while work.produced < stood + 4 * (bound + WINDOW):
            await slow.piece()
        piece = lines(4_096)
        assert bytes(slow.body) == (piece * (len(slow.body) // len(piece) + 1))[: len(slow.body)]
        slow.leave()
        await agent.until(lambda: work.over)


async def test_a_client_that_reads_late_gets_every_byte() -> None:
    body = lines(2 * SLACK_BYTES) + DONE
    async with (
        Rig("a", response_buffer_bytes=65_536) as rig,
        # Its renewals would carry the credit along otherwise, ten seconds later.
        rig.agent("a", serve=lambda work: work.answer(body, content_type=SSE), lease_s=300.0) as agent,
        await rig.call(receive_buffer_bytes=4_096) as slow,
    ):
        work = await agent.work()
        await until(lambda: work.produced > 0 and agent.session.room(work.stream) == 0)
        await slow.rest()
        assert bytes(slow.body) == body


async def test_a_client_that_takes_nothing_for_too_long_is_cut_off_and_its_work_cancelled() -> None:
    async with (
        Rig("a", client_stall_timeout_s=0.5) as rig,
        rig.agent("a", serve=endless) as agent,
        await rig.call(receive_buffer_bytes=4_096) as slow,
    ):
        work = await agent.work()
        await agent.until(lambda: work.over)
        assert work.cancelled is CancelReason.CLIENT_STALLED
        await rig.idle()
        assert rig.count("xim_router_client_stalled_total") == 1
        # Its connection is gone as well: what the kernel still holds is all that it can read.
        async with asyncio.timeout(PATIENCE_S):
            while await slow.reader.read(65_536):
                pass


async def test_a_client_that_reads_slowly_but_reads_is_not_cut_off() -> None:
    body = lines(2 * SLACK_BYTES) + DONE
    async with (
        Rig("a", client_stall_timeout_s=1.0, response_buffer_bytes=65_536) as rig,
        rig.agent("a", serve=lambda work: work.answer(body, content_type=SSE)) as agent,
        await rig.call(receive_buffer_bytes=4_096) as slow,
    ):
        began = agent.now()
        await slow.head()
        for pause in range(1, 11):  # together twice as long as a client may take nothing
            await slow.piece()
            await until(lambda pause=pause: agent.now() >= began + 0.2 * pause)  # type: ignore[misc]
        assert len(slow.body) < len(body)
        while await slow.piece():
            pass
        assert bytes(slow.body) == body
        assert rig.count("xim_router_client_stalled_total") == 0


async def test_an_answer_that_is_whole_waits_for_a_slow_client_and_its_slot_is_free_meanwhile() -> None:
    body = b'{"text": "' + b"z" * 2 * SLACK_BYTES + b'"}'
    async with (
        Rig("a", response_buffer_bytes=4 * SLACK_BYTES) as rig,
        rig.agent("a", serve=lambda work: work.answer(body)) as agent,
        await rig.call(receive_buffer_bytes=4_096) as slow,
    ):
        await until(lambda: rig.broker.open_exchanges == 0 and len(agent.works) == 1)
        assert (await rig.ask()).status == 200
        await slow.rest()
        assert bytes(slow.body) == body
        assert slow.headers["content-length"] == str(len(body))


async def test_over_all_answers_no_more_is_held_than_the_total_says() -> None:
    async with (
        Rig("a", response_buffer_bytes=262_144, response_buffer_total_bytes=300_000) as rig,
        rig.agent("a", serve=endless, capacity=4) as agent,
    ):
        calls = [await rig.call(receive_buffer_bytes=4_096) for _ in range(4)]
        await until(lambda: len(agent.works) == 4 and all(no_room(agent, work) for work in agent.works))
        assert rig.metrics.hot.buffered_bytes <= 300_000 + 4 * WINDOW
        for call in calls:
            call.leave()
        await agent.until(lambda: all(work.over for work in agent.works))


def no_room(agent: AgentStub, work: Work) -> bool:
    return work.produced > 0 and agent.session.room(work.stream) == 0
