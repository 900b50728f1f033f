"""Agents that refuse, fail, vanish, come back and replace each other."""

import asyncio
import logging

import msgpack
import pytest

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import SSE, AgentStub, Work, hold
from tests.support.http_client import Unfinished
from tests.support.programs import PATIENCE_S
from tests.support.tcp_proxy import TcpProxy
from xim_protocol.agent_config import hello_of
from xim_protocol.codec import encode
from xim_protocol.messages import (
    AgentState,
    Channel,
    Expired,
    FailCode,
    GoodbyeCode,
    RefusalReason,
    Renew,
)
from xim_router.dispatch.roster import Standing

DONE = b"data: [DONE]\n\n"


def event(number: int) -> bytes:
    return b'data: {"n": %d, "text": "%s"}\n\n' % (number, b"x" * (number % 97))


async def refuse(work: Work) -> None:
    work.refuse(RefusalReason.AT_CAPACITY, in_flight=1)


async def unavailable(work: Work) -> None:
    work.fail(FailCode.ENGINE_UNAVAILABLE, "The engine does not answer.", retryable=True)


# --- Two agents ----------------------------------------------------------------------------------------------------


async def test_the_least_loaded_agent_gets_the_request() -> None:
    async with (
        Rig("a", "b") as rig,
        rig.agent("a", serve=hold, capacity=8) as a,
        rig.agent("b", serve=hold, capacity=4) as b,
    ):
        calls = []
        for number in range(12):
            calls.append(await rig.call())
            await until(lambda number=number: rig.broker.statistics().in_flight == number + 1)  # type: ignore[misc]
        await a.work(7)
        await b.work(3)
        assert (len(a.works), len(b.works)) == (8, 4)
        # Both are full, and nobody waits where several serve.
        full = await rig.ask()
        assert (full.status, full.code) == (503, "no_agent_available")
        for call in calls:
            call.leave()


async def test_a_refused_request_goes_to_the_other_agent_and_that_is_no_attempt() -> None:
    async with Rig("a", "b") as rig, rig.agent("a", serve=refuse) as a, rig.agent("b", capacity=4) as b:
        for _ in range(3):
            assert (await rig.ask()).status == 200
        assert len(b.works) == 3
        assert all(work.submit.attempt == 1 for work in b.works)
        # Refused once, it is left alone until it says that it has room.
        assert len(a.works) <= 1
        assert rig.count("xim_router_retries_total", reason="refused") == len(a.works)


async def test_a_request_that_its_sole_agent_refused_waits_at_the_head_until_there_are_slots() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=refuse) as agent, await rig.call({"model": "chat", "n": 1}) as one:
        await agent.work()
        await until(lambda: rig.agent_statistics("a").held_back)
        async with await rig.call({"model": "chat", "n": 2}) as two:
            await rig.parked(2)
            agent.serve = lambda work: work.answer(work.body)
            agent.session.announce_slots(1)
            agent.flush()
            assert (await one.rest()).json()["n"] == 1
            assert (await two.rest()).json()["n"] == 2
        assert [work.submit.attempt for work in agent.works] == [1, 1, 1]


async def test_a_route_that_an_agent_does_not_serve_is_an_error_and_not_a_round_trip_for_ever() -> None:
    async def refuse_route(work: Work) -> None:
        work.refuse(RefusalReason.ROUTE)

    async with Rig("a") as rig, rig.agent("a", serve=refuse_route) as agent:
        call = await rig.ask()
        assert call.status == 400
        assert len(agent.works) == 1
        assert rig.serving("a")


async def test_after_two_failed_attempts_the_client_is_told_why() -> None:
    async with (
        Rig("a", "b") as rig,
        rig.agent("a", serve=unavailable) as a,
        rig.agent("b", serve=unavailable) as b,
    ):
        call = await rig.ask()
        assert (call.status, call.code) == (503, "engine_unavailable")
        assert call.headers["retry-after"] == "5"
        assert call.json()["error"]["message"] == "The engine does not answer."
        assert (len(a.works), len(b.works)) == (1, 1)
        assert sorted(work.submit.attempt for work in (*a.works, *b.works)) == [1, 2]


async def test_a_sole_agent_whose_engine_is_away_gets_the_request_again_when_it_is_ready_again() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=unavailable) as agent, await rig.call() as call:
        await agent.work()
        await rig.parked(1)
        assert rig.agent_statistics("a").standing is Standing.RETURNING
        assert len(agent.works) == 1
        agent.set_state(AgentState.DEGRADED)
        agent.serve = lambda work: work.answer(b'{"second": true}')
        agent.set_state(AgentState.READY)
        assert (await call.rest()).json() == {"second": True}
        assert [work.submit.attempt for work in agent.works] == [1, 2]


async def test_a_failure_that_is_not_retryable_is_told_at_once() -> None:
    async def fail(work: Work) -> None:
        work.fail(FailCode.BODY_INVALID, "`messages` must be a list.")

    async with Rig("a", "b") as rig, rig.agent("a", serve=fail) as a, rig.agent("b", serve=fail) as b:
        call = await rig.ask()
        assert (call.status, call.code) == (400, "invalid_body")
        assert call.json()["error"]["message"] == "`messages` must be a list."
        assert len(a.works) + len(b.works) == 1


async def test_an_engines_own_error_passes_through_untouched() -> None:
    body = b'{"error": {"message": "too long", "code": 400}}'
    async with Rig("a") as rig, rig.agent("a", serve=lambda work: work.answer(body, status=400)):
        call = await rig.ask()
        assert (call.status, bytes(call.body)) == (400, body)


# --- Lost ----------------------------------------------------------------------------------------------------------


async def test_an_agent_that_is_killed_before_the_commit_point_costs_the_client_nothing() -> None:
    async with Rig("a", "b") as rig, AgentStub(rig.dial("a"), serve=hold, lease_s=0.6) as a:
        await a.opened()
        async with await rig.call() as call:
            work = await a.work()
            work.start(200, "application/json")
            await work.write(b'{"half": ')
            async with rig.agent("b"):
                await a.drop()
                await call.rest()
                assert (call.status, call.json()["model"]) == (200, "chat")
        assert rig.count("xim_router_lease_expired_total") == 1
        assert rig.count("xim_router_retries_total", reason="agent_lost") == 1


async def test_a_parked_request_and_one_before_its_commit_point_are_answered_by_the_restarted_agent() -> None:
    async with Rig("a") as rig, AgentStub(rig.dial("a"), serve=hold) as old:
        await old.opened()
        async with await rig.call({"model": "chat", "n": 1}) as one:
            await old.work()
            async with await rig.call({"model": "chat", "n": 2}) as two:
                await rig.parked(1)
                # Killed: no Goodbye. Its successor says Hello as another process, long before the lease is over.
                await old.drop()
                async with rig.agent("a") as new:
                    assert (await one.rest()).json()["n"] == 1
                    assert (await two.rest()).json()["n"] == 2
                    assert [work.submit.attempt for work in new.works] == [2, 1]


async def test_an_agent_lost_after_the_commit_point_ends_the_stream_in_an_error_event_at_a_boundary() -> None:
    async with Rig("a", "b") as rig, AgentStub(rig.dial("a"), serve=hold, lease_s=0.5) as a:
        await a.opened()
        async with rig.agent("b") as b, await rig.call() as call:
            work = await first_work(a, b)
            work.start(200, SSE)
            await work.write(event(1))
            await call.head()
            await call.until(event(1))
            await work.agent.drop()
            if work.agent is b:
                rig.revoke("b")
            await call.rest()
            assert b"[DONE]" not in call.body
            error = bytes(call.body).removeprefix(event(1))
            assert error.startswith(b'data: {"error":{')
            assert error.endswith(b"}}\n\n")
            assert b'"code":"agent_lost"' in error


async def first_work(*agents: AgentStub) -> Work:
    """The one request, wherever it went."""
    for agent in agents:
        agent.serve = hold
    await until(lambda: any(agent.works for agent in agents))
    return next(agent.works[0] for agent in agents if agent.works)


async def test_an_agent_lost_after_the_first_byte_of_a_plain_body_leaves_it_unfinished() -> None:
    async with Rig("a", response_buffer_bytes=65_536) as rig, AgentStub(rig.dial("a"), serve=hold, lease_s=0.5) as a:
        await a.opened()
        async with await rig.call() as call:
            work = await a.work()
            work.start()
            await work.write(b"x" * 70_000)
            await call.head()
            await a.drop()
            with pytest.raises(Unfinished):
                await call.rest()


async def test_an_agent_that_leaves_gives_its_requests_back() -> None:
    async with Rig("a", "b") as rig, rig.agent("a", serve=hold) as a, await rig.call() as call:
        await a.work()
        async with rig.agent("b"):
            await a.leave()
            assert (await call.rest()).status == 200
            assert rig.link("a") is None


# --- Leases and instances ------------------------------------------------------------------------------------------


async def test_another_process_with_the_same_identity_supersedes_the_first() -> None:
    async with Rig("a") as rig, AgentStub(rig.dial("a"), serve=hold) as first:
        await first.opened()
        async with await rig.call() as call:
            await first.work()
            async with rig.agent("a") as second:
                await first.until(lambda: first.goodbye is not None and first.lost)
                assert first.goodbye is not None
                assert first.goodbye.code is GoodbyeCode.SUPERSEDED
                assert (await call.rest()).status == 200
                assert [work.submit.attempt for work in second.works] == [2]


async def test_a_silent_agent_loses_its_lease_and_is_told_so() -> None:
    async with Rig("a") as rig, rig.agent("a", lease_s=0.5) as agent:
        agent.silent = True
        await until(lambda: rig.link("a") is None)
        assert rig.count("xim_router_lease_expired_total") == 1
        assert rig.agent_statistics("a").standing is Standing.ABSENT
        await agent.until(lambda: agent.lost)


async def test_a_renewed_lease_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    # Long enough for a process that stands still for a second.
    async with Rig("a") as rig, rig.agent("a", lease_s=2.0) as agent:
        began = agent.now()
        await agent.until(lambda: agent.now() - began > 2.5)
        assert rig.serving("a")
        assert rig.count("xim_router_lease_expired_total") == 0


async def test_a_renew_without_a_session_is_answered_expired() -> None:
    """An agent that stood still, as a laptop does that slept, cannot know that its lease is over."""
    async with Rig("a") as rig, rig.agent("a") as agent:
        socket = agent._make_socket()
        socket.connect(agent.dial.control)
        try:
            socket.send_multipart(encode(Renew(state=AgentState.READY, capacity=1, in_flight=0)))
            async with asyncio.timeout(PATIENCE_S):
                assert await socket.recv_multipart() == encode(Expired())
        finally:
            socket.close(linger=0)
        assert rig.serving("a")


async def test_an_agent_that_was_told_expired_says_hello_anew_and_serves() -> None:
    async with Rig("a") as rig, rig.agent("a", lease_s=0.5, serve=hold) as agent, await rig.call() as call:
        await agent.work()
        agent.silent = True
        await until(lambda: rig.link("a") is None)
        await rig.parked(1)
        agent.wake()
        assert agent.expirations == 1
        agent.serve = lambda work: work.answer(b'{"again": true}')
        await agent.drop()
        agent.connect()
        assert (await call.rest()).json() == {"again": True}


async def test_an_agent_is_told_that_its_lease_is_over() -> None:
    # By its own clock it would find out much later.
    async with Rig("a") as rig, rig.agent("a", lease_s=300.0) as agent:
        rig.broker._leases.postpone(-1_000.0)
        rig.broker._timer_deadline = agent.now()
        rig.broker._on_timer()
        await agent.until(lambda: agent.expirations == 1)


async def test_a_router_that_stood_still_expires_nobody_for_it() -> None:
    async with Rig("a") as rig, rig.agent("a"):
        rig.broker._leases.postpone(-1_000.0)
        rig.broker._timer_deadline = asyncio.get_running_loop().time() - 1_000.0
        rig.broker._on_timer()
        assert rig.serving("a")


async def test_a_renewal_that_has_arrived_counts_though_nobody_has_read_it() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        agent.set_state(AgentState.READY)
        assert rig.transport._sockets[Channel.CONTROL].poll(round(PATIENCE_S * 1000))  # waits without the loop
        rig.broker._leases.postpone(-1_000.0)
        rig.broker._timer_deadline = agent.now()
        rig.broker._on_timer()
        assert rig.serving("a")


async def test_an_agent_that_still_serves_what_was_assigned_before_gets_nothing() -> None:
    async with Rig("a") as rig, rig.agent("a", served_model="what was before") as agent:
        assert not rig.serving("a")
        agent.set_state(AgentState.READY, served_model="chat")
        await until(lambda: rig.serving("a"))


# --- Lost links ----------------------------------------------------------------------------------------------------


async def reconnect(agent: AgentStub) -> None:
    """What an agent does when its link is lost."""
    await agent.until(lambda: agent.lost)
    await agent.drop()
    agent.connect()
    await agent.opened()


async def test_a_link_that_is_broken_and_restored_within_the_lease_costs_no_byte() -> None:
    events = [event(number) for number in range(400)]
    async with (
        Rig("a") as rig,
        TcpProxy(f"127.0.0.1:{rig.ports[0]}") as control,
        TcpProxy(f"127.0.0.1:{rig.ports[1]}") as streaming,
        rig.agent("a", control=control, streaming=streaming, serve=hold) as agent,
        await rig.call() as call,
    ):
        work = await agent.work()
        work.start(200, SSE)
        reading = asyncio.create_task(call.rest())
        for number, payload in enumerate(events):
            await work.write(payload)
            if number % 100 == 50:
                # By turns: one half of the link alone is enough to lose it.
                await (control if number % 200 == 50 else streaming).drop()
                await reconnect(agent)
        await work.write(DONE)
        work.end()
        await reading
        assert bytes(call.body) == b"".join(events) + DONE
        assert rig.count("xim_router_link_lost_total") == 4
        assert all(welcome.resumed for welcome in agent.welcomes[1:])


async def test_a_link_whose_loss_only_the_agent_noticed_is_replaced_by_its_next() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        older = list(agent._sockets.values())
        agent.session.link_lost(agent.now())
        agent.connect()
        await agent.opened()
        assert [len(bound) for bound in rig.broker._links._bound.values()] == [1, 1]
        assert rig.count("xim_router_link_lost_total") == 1
        for socket in older:
            socket.disable_monitor()
            socket.close(linger=0)
        await until(lambda: rig.serving("a"))


async def test_while_the_link_is_away_the_agent_is_expected_back_and_gets_what_waited() -> None:
    async with (
        Rig("a") as rig,
        TcpProxy(f"127.0.0.1:{rig.ports[0]}") as control,
        rig.agent("a", control=control) as agent,
    ):
        await control.cut()
        await until(lambda: not rig.serving("a"))
        assert rig.agent_statistics("a").standing is Standing.RETURNING
        async with await rig.call() as call:
            await rig.parked(1)
            await control.restore()
            await reconnect(agent)
            assert (await call.rest()).status == 200


async def test_a_submit_and_a_cancel_that_were_lost_with_the_link_are_made_up_for() -> None:
    async with (
        Rig("a") as rig,
        TcpProxy(f"127.0.0.1:{rig.ports[0]}") as control,
        rig.agent("a", control=control, serve=hold, capacity=2) as agent,
        await rig.call({"model": "chat", "n": 1}) as leaving,
    ):
        await agent.work()
        control.pause()
        async with await rig.call({"model": "chat", "n": 2}) as staying:
            await until(lambda: rig.broker.statistics().in_flight == 2)
            leaving.leave()
            await until(lambda: rig.broker.in_flight == 1)
            await control.drop()
            await control.restore()
            agent.serve = lambda work: work.answer(work.body)
            await reconnect(agent)
            assert (await staying.rest()).json()["n"] == 2
            assert agent.works[0].over
            assert [work.submit.attempt for work in agent.works] == [1, 1]


async def test_a_client_that_leaves_while_the_link_is_away_is_made_known_on_the_next_one() -> None:
    async with (
        Rig("a") as rig,
        TcpProxy(f"127.0.0.1:{rig.ports[1]}") as streaming,
        rig.agent("a", streaming=streaming, serve=hold) as agent,
        await rig.call() as call,
    ):
        work = await agent.work()
        work.start(200, SSE)
        await work.write(event(1))
        await call.head()
        await streaming.cut()
        await until(lambda: not rig.serving("a"))
        call.leave()
        await until(lambda: rig.broker.in_flight == 0)
        # The slot is the agent's to give back.
        assert rig.broker.open_exchanges == 1
        await streaming.restore()
        await reconnect(agent)
        await agent.until(lambda: work.over)


async def test_an_agent_without_a_streaming_socket_is_served_on_control_alone() -> None:
    body = b'{"model": "chat", "prompt": "' + b"y" * 300_000 + b'"}'
    async with Rig("a") as rig, rig.agent("a", streaming_socket=False):
        assert bytes((await rig.ask(body)).body) == body


async def test_an_agent_that_speaks_no_common_version_is_told_which_ones_there_are() -> None:
    async with Rig("a") as rig, AgentStub(rig.dial("a")) as agent:
        await agent.opened()
        stranger = agent._make_socket()
        stranger.connect(agent.dial.control)
        hello = list(msgpack.unpackb(encode(hello_of(agent.session.config, agent.report, ()))[0]))
        hello[1] = [2, 3]
        try:
            stranger.send_multipart([msgpack.packb(hello)])
            async with asyncio.timeout(PATIENCE_S):
                kind, code, text = msgpack.unpackb((await stranger.recv_multipart())[0])
        finally:
            stranger.close(linger=0)
        assert (kind, code) == (5, "version_unsupported")
        assert "speaks version 1" in text
        assert "[2, 3]" in text
        assert rig.serving("a")


async def test_the_log_line_of_a_request_names_its_agent_and_attempts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig("a") as rig, rig.agent("a"):
        await rig.ask(x_request_id="mine")
    line = next(r for r in caplog.records if r.__dict__.get("client_request") == "mine").__dict__
    assert (line["agent"], line["attempts"], line["outcome"], line["status"]) == ("a", 1, "200", 200)
    assert (line["project"], line["endpoint"], line["path"]) == ("proj_acme", "chat", "/v1/chat/completions")
    assert line["chunks"] == 1
    assert line["bytes"] > 0
    assert line["ttft_s"] is not None
