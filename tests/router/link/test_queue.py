"""One agent with one slot: who waits, who is turned away, and what they are told."""

import asyncio
import logging

import pytest

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import AgentStub, hold
from tests.support.http_client import Call
from tests.support.stopwatch import Stopwatch
from xim_protocol.messages import AgentState, CancelReason


def numbered(number: int) -> dict[str, object]:
    return {"model": "chat", "n": number}


async def occupied(rig: Rig, agent: AgentStub) -> Call:
    """A request that holds the agent's one slot until the test answers it."""
    call = await rig.call(numbered(1))
    await agent.work()
    return call


def check_refusal(call: Call, code: str, client_id: str, caplog: pytest.LogCaptureFixture) -> None:
    """Status, code, headers and log line of a request that was turned away."""
    assert (call.status, call.code) == (503, code)
    assert call.headers["retry-after"] == "5"
    assert call.headers["x-request-id"] == client_id
    line = next(r for r in caplog.records if r.__dict__.get("client_request") == client_id)
    assert line.name == "xim_router.request"
    assert line.__dict__["outcome"] == code
    assert line.__dict__["request"].startswith("req_")
    assert line.levelno == logging.WARNING


async def test_ten_wait_in_order_and_the_twelfth_is_turned_away_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await occupied(rig, agent) as first:
        waiting = []
        for number in range(2, 12):
            waiting.append(await rig.call(numbered(number)))
            await rig.parked(number - 1)
        asked = Stopwatch()
        twelfth = await rig.ask(numbered(12), x_request_id="mine-12")
        asked.check(1.0, "the twelfth is told")
        rig.journal.settle()
        check_refusal(twelfth, "queue_full", "mine-12", caplog)
        assert rig.broker.statistics().parked == 10
        for number, call in enumerate([first, *waiting]):
            work = await agent.work(number)
            await work.answer(work.body)
            assert (await call.rest()).json() == numbered(number + 1)
            call.leave()
        assert len(agent.works) == 11
        assert rig.count("xim_router_queue_wait_seconds_count", outcome="assigned") == 10


async def test_a_waiting_client_that_leaves_frees_its_place() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await occupied(rig, agent) as first:
        waiting = []
        for number in range(2, 12):
            waiting.append(await rig.call(numbered(number)))
            await rig.parked(number - 1)
        waiting[0].leave()
        waiting[4].leave()
        await rig.parked(8)
        for number in (12, 13):
            waiting.append(await rig.call(numbered(number)))
            await rig.parked(number - 3)
        assert (await rig.ask(numbered(14))).code == "queue_full"
        await agent.works[0].answer()
        await first.rest()
        second = await agent.work(1)
        assert b'"n": 3' in second.body
        for call in waiting:
            call.leave()
        await until(lambda: second.cancelled is CancelReason.CLIENT_LEFT)
        await rig.idle()
        assert rig.count("xim_router_client_disconnects_total", phase="parked") == 11
        assert rig.count("xim_router_client_disconnects_total", phase="dispatched") == 1


async def test_a_request_that_waits_too_long_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with (
        Rig("a", queue_timeout_s=0.4) as rig,
        rig.agent("a", serve=hold) as agent,
        await occupied(rig, agent) as first,
    ):
        asked = Stopwatch()
        call = await rig.ask(numbered(2), x_request_id="mine-2")
        waited_s = asked.wall_s
        asked.check(2.0, "it is told after 0.4 s")
        rig.journal.settle()
        check_refusal(call, "queue_timeout", "mine-2", caplog)
        # The loop's clock, by which the router waits, counts whole milliseconds.
        assert waited_s >= 0.399
        assert rig.count("xim_router_queue_wait_seconds_count", outcome="timed_out") == 1
        line = next(r for r in caplog.records if r.__dict__.get("client_request") == "mine-2")
        assert 0.4 <= line.__dict__["queue_wait_s"] <= waited_s + 0.001
        # The one that holds the slot is not bound by the queue's timeout.
        await agent.works[0].answer(b'{"late": true}')
        assert (await first.rest()).json() == {"late": True}


async def test_with_no_time_to_wait_a_request_is_turned_away_and_not_forgotten() -> None:
    async with (
        Rig("a", queue_timeout_s=0.0) as rig,
        rig.agent("a", serve=hold) as agent,
        await occupied(rig, agent) as first,
    ):
        assert (await rig.ask(numbered(2))).code == "queue_timeout"
        await agent.works[0].answer()
        assert (await first.rest()).status == 200


async def test_requests_wait_for_an_agent_that_is_enrolled_and_not_there_yet() -> None:
    async with Rig("a") as rig, await rig.call() as call:
        await rig.parked(1)
        async with rig.agent("a", state=AgentState.STARTING) as agent:
            assert not agent.works
            assert rig.broker.statistics().parked == 1
            agent.set_state(AgentState.READY)
            assert (await call.rest()).status == 200


async def test_without_any_agent_a_request_is_refused_at_once() -> None:
    async with Rig() as rig:
        call = await rig.ask()
        assert (call.status, call.code) == (503, "no_agent_available")
        assert call.headers["retry-after"] == "5"


async def test_parked_requests_are_turned_away_when_the_router_drains() -> None:
    async with (
        Rig("a") as rig,
        rig.agent("a", serve=hold) as agent,
        await occupied(rig, agent) as first,
        await rig.call(numbered(2)) as second,
    ):
        await rig.parked(1)
        rig.broker.drain()
        await second.rest()
        assert (second.status, second.code) == (503, "shutting_down")
        third = await rig.ask(numbered(3))
        assert (third.status, third.code) == (503, "shutting_down")
        await agent.works[0].answer(b'{"finished": true}')
        assert (await first.rest()).json() == {"finished": True}


async def test_a_draining_agent_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with Rig("a", "b") as rig, rig.agent("a", serve=hold, capacity=4) as a, await rig.call() as first:
        work = await a.work()
        async with rig.agent("b") as b:
            a.session.announce_draining()
            a.flush()
            await until(lambda: not rig.serving("a"))
            assert (await rig.ask()).status == 200
            assert (len(a.works), len(b.works)) == (1, 1)
            await work.answer(b'{"from": "a"}')
            assert (await first.rest()).json() == {"from": "a"}


async def test_a_request_body_reaches_the_agent_whole_however_long_it_is() -> None:
    body = b'{"model": "chat", "prompt": "' + b"0123456789abcdef" * (5 * 65_536) + b'"}'
    assert len(body) > 5_000_000
    async with Rig("a") as rig, rig.agent("a", capacity=4) as agent:
        calls = await asyncio.gather(*(rig.ask(body) for _ in range(3)))
        assert [bytes(call.body) == body for call in calls] == [True] * 3
        assert all(work.submit.body is None for work in agent.works)


async def test_an_earlier_deadline_takes_the_place_of_the_timer() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold, lease_s=300.0) as agent, await occupied(rig, agent) as first:
        of_the_lease = rig.broker._timer
        assert of_the_lease is not None
        async with await rig.call(numbered(2)):
            await rig.parked(1)
            assert of_the_lease.cancelled()
            of_the_queue = rig.broker._timer
            assert of_the_queue is not None
            assert of_the_queue.when() < of_the_lease.when()
        await rig.parked(0)
        assert of_the_queue.cancelled()
        first.leave()
