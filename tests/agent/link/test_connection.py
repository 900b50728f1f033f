"""The agent's link over real ZeroMQ with CURVE: dialling, resuming, refusals, congestion."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tests.agent.link.links import Agent, agent, config, curve_keys
from tests.support.programs import PATIENCE_S, eventually
from tests.support.router_stub import RouterStub
from tests.support.tcp_proxy import TcpProxy
from xim_agent.link import connection as connection_module
from xim_agent.link.ends import LinkStopped
from xim_agent.link.sockets import CurveKeys
from xim_agent.link.writer import StreamGone
from xim_protocol.events import (
    AgentEvent,
    AgentReported,
    BodyReceived,
    GoodbyeReceived,
    LinkReady,
    SessionExpired,
    StreamAborted,
    StreamCancelled,
    Welcomed,
)
from xim_protocol.grants import MAX_LEASE_S, MAX_WINDOW_BYTES
from xim_protocol.messages import AgentState, Channel, FlowControl, GoodbyeCode, RefusalReason

PROMPT = b'{"messages": [{"role": "user", "content": "the secret of the house"}]}'


def numbered(size: int) -> bytes:
    """Bytes of which no piece can be lost, doubled or misplaced unseen."""
    return b"".join(b"%07d " % number for number in range(size // 8))


async def test_a_request_and_its_answer_cross_the_link() -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        answer = await router.submit(PROMPT)
        submit = await node.told.request()
        assert (submit.body, submit.path) == (PROMPT, "/v1/chat/completions")
        node.writer.start_response(submit.stream, 200, "text/event-stream")
        await node.writer.write(submit.stream, b"hello ")
        await node.writer.write(submit.stream, b"world")
        node.writer.end(submit.stream, (3, 2, 1, "engine"))
        await router.until(lambda: answer.over)
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        assert (bytes(answer.body), answer.usage) == (b"hello world", (3, 2, 1, "engine"))


async def test_a_long_answer_goes_on_as_the_client_reads() -> None:
    body = numbered(1_000_000)
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        answer = await router.submit(PROMPT)
        submit = await node.told.request()
        node.writer.start_response(submit.stream, 200, "application/json")
        async with asyncio.timeout(PATIENCE_S):
            await node.writer.write(submit.stream, body)
        node.writer.end(submit.stream, None)
        await router.until(lambda: answer.over)
        assert bytes(answer.body) == body
        await node.connection.settle()
        assert node.connection.statistics().kept_bytes == 0


async def test_a_long_request_body_comes_whole() -> None:
    body = numbered(3_000_000)
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        await router.submit(body)
        submit = await node.told.request()
        assert (submit.body, submit.body_bytes) == (None, len(body))
        node.writer.continue_body(submit.stream)
        event = await node.told.of_type(BodyReceived)
        assert isinstance(event, BodyReceived)
        assert event.body == body


async def test_without_credit_a_write_waits_and_a_cancel_ends_it() -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        router.consuming = False
        answer = await router.submit(PROMPT)
        submit = await node.told.request()
        node.writer.start_response(submit.stream, 200, "text/event-stream")
        writing = asyncio.create_task(node.writer.write(submit.stream, numbered(200_000)))
        await router.until(lambda: len(answer.body) == 65_536)
        assert not writing.done()
        await router.cancel(answer)
        with pytest.raises(StreamGone):
            async with asyncio.timeout(PATIENCE_S):
                await writing
        await node.told.of_type(StreamCancelled)


async def test_a_link_cut_and_restored_within_the_lease_loses_no_byte() -> None:
    body = numbered(400_000)
    async with RouterStub() as router:
        address = router.address
        async with TcpProxy(address.control_addr) as control, TcpProxy(address.streaming_addr) as streaming:
            through = replace(address, control_addr=control.address, streaming_addr=streaming.address)
            keys = curve_keys()
            router.admitted[keys.public] = b"200"
            async with agent(through, keys=keys) as node:
                await node.linked()
                answer = await router.submit(PROMPT)
                submit = await node.told.request()
                node.writer.start_response(submit.stream, 200, "text/event-stream")
                writing = asyncio.create_task(node.writer.write(submit.stream, body))
                await router.until(lambda: len(answer.body) > 100_000)
                await asyncio.gather(control.cut(), streaming.cut())
                # In this order: without the other half a Hello would be one too many.
                await streaming.restore()
                await control.restore()
                await node.told.of_type(LinkReady, 2)
                async with asyncio.timeout(PATIENCE_S):
                    await writing
                node.writer.end(submit.stream, None)
                await router.until(lambda: answer.over)
                assert bytes(answer.body) == body
                assert [hello.instance for hello in router.hellos] == ["instance-1"] * 2
                assert node.connection.links == 2


async def test_the_loss_of_one_socket_is_the_loss_of_the_link() -> None:
    async with RouterStub() as router, TcpProxy(router.address.streaming_addr) as streaming:
        keys = curve_keys()
        router.admitted[keys.public] = b"200"
        async with agent(replace(router.address, streaming_addr=streaming.address), keys=keys) as node:
            await node.linked()
            await streaming.cut()
            await streaming.restore()
            await node.told.of_type(LinkReady, 2)
            assert len(router.hellos) == 2


@asynccontextmanager
async def working_through_a_proxy() -> AsyncIterator[tuple[RouterStub, TcpProxy, Agent]]:
    """An agent with a short lease and a request at work; the proxy is on its control connection."""
    async with RouterStub() as router, TcpProxy(router.address.control_addr) as control:
        keys = curve_keys()
        router.admitted[keys.public] = b"200"
        through = replace(router.address, control_addr=control.address)
        async with agent(through, keys=keys, settings=config(lease_s=0.6)) as node:
            await node.linked()
            await router.submit(PROMPT)
            await node.told.request()
            yield router, control, node


async def test_a_lease_that_ends_without_a_link_aborts_the_streams() -> None:
    async with working_through_a_proxy() as (router, control, node):
        await control.cut()
        await node.told.of_type(StreamAborted)
        await node.told.of_type(SessionExpired)
        await control.restore()
        await node.told.of_type(LinkReady, 2)
        welcome = await node.told.of_type(Welcomed, 2)
        assert isinstance(welcome, Welcomed)
        assert router.hellos[-1].streams == ()


async def test_who_waits_until_all_is_settled_goes_on_when_the_lease_ends_without_a_link() -> None:
    async with working_through_a_proxy() as (_, control, node):
        settled = asyncio.create_task(node.connection.settle())
        await control.cut()
        async with asyncio.timeout(PATIENCE_S):
            await settled


async def test_an_idle_link_stays_and_renews() -> None:
    # Long enough for a process that stands still for a second.
    async with RouterStub() as router, agent(router, settings=config(lease_s=2.4)) as node:
        await node.linked()
        await router.until(lambda: len(router.of_type(AgentReported)) >= 4)  # at every third of the lease
        assert node.connection.links == 1


@pytest.mark.parametrize("code", [GoodbyeCode.SHUTDOWN, GoodbyeCode.PROTOCOL_ERROR, GoodbyeCode.LINK_CONGESTED])
async def test_it_comes_again_after_a_goodbye_and_drops_its_streams(code: GoodbyeCode) -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        await router.submit(PROMPT)
        await node.told.request()
        await router.goodbye(code)
        await node.told.of_type(StreamAborted)
        await node.told.of_type(LinkReady, 2)
        assert router.hellos[-1].streams == ()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (GoodbyeCode.SUPERSEDED, "Two agents share one config directory"),
        (GoodbyeCode.REVOKED, "join-key create"),
        (GoodbyeCode.VERSION_UNSUPPORTED, "Update the older"),
    ],
)
async def test_after_some_goodbyes_it_does_not_come_again(code: GoodbyeCode, remedy: str) -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        await router.goodbye(code)
        with pytest.raises(LinkStopped) as stopped:
            async with asyncio.timeout(PATIENCE_S):
                await node.task
        assert remedy in stopped.value.remedy


async def test_a_second_process_with_the_same_identity_ends_the_first() -> None:
    keys = curve_keys()
    async with RouterStub() as router, agent(router, keys=keys) as first:
        await first.linked()
        async with agent(router, keys=keys, settings=config(instance="instance-2")) as second:
            await second.told.of_type(LinkReady)
            with pytest.raises(LinkStopped, match="superseded"):
                async with asyncio.timeout(PATIENCE_S):
                    await first.task


async def test_a_revoked_key_stops_with_the_remedy() -> None:
    keys = curve_keys()
    async with RouterStub() as router:
        router.admitted[keys.public] = b"400"
        async with agent(router, keys=keys, admit=False) as node:
            with pytest.raises(LinkStopped, match="agent_revoked"):
                async with asyncio.timeout(PATIENCE_S):
                    await node.task


async def test_a_key_not_yet_known_is_tried_again_until_it_is() -> None:
    keys = curve_keys()
    async with RouterStub() as router, agent(router, keys=keys, admit=False) as node:
        await router.until(lambda: b"300" in router.handshakes)
        router.admitted[keys.public] = b"200"
        await node.told.of_type(LinkReady)


async def test_another_routers_key_is_not_trusted(caplog: pytest.LogCaptureFixture) -> None:
    async with RouterStub() as router:
        impostor = replace(router.address, server_curve_key=curve_keys().public)
        with caplog.at_level(logging.WARNING, "xim_agent.link.connection"):
            async with agent(impostor):
                await _logged(caplog, "key_unknown")
        assert router.handshakes == []


async def _logged(caplog: pytest.LogCaptureFixture, problem: str) -> logging.LogRecord:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for record in caplog.records:
                if getattr(record, "problem", None) == problem:
                    return record
            turn = asyncio.Event()
            asyncio.get_running_loop().call_later(0.01, turn.set)
            await turn.wait()


@pytest.mark.parametrize("port", ["control", "streaming"])
async def test_a_router_that_cannot_be_dialled_is_tried_again_and_ends_nothing(
    caplog: pytest.LogCaptureFixture, port: str
) -> None:
    async with RouterStub() as router:
        none = "tcp://no host:5555"
        control = replace(router.address, control_addr=none)
        undialled = control if port == "control" else replace(router.address, streaming_addr=none)
        async with agent(undialled) as node:
            record = await _logged(caplog, "control_port_unreachable")
            assert "Invalid argument" in vars(record)["detail"]
            assert not node.task.done()


@pytest.mark.parametrize("port", ["control", "streaming"])
async def test_a_closed_port_is_named_with_its_remedy(caplog: pytest.LogCaptureFixture, port: str) -> None:
    keys = curve_keys()
    async with RouterStub() as router:
        router.admitted[keys.public] = b"200"
        async with TcpProxy(router.address.control_addr) as proxy:
            closed = proxy.address
        address = router.address
        broken = replace(address, control_addr=closed) if port == "control" else replace(address, streaming_addr=closed)
        with caplog.at_level(logging.WARNING, "xim_agent.link.connection"):
            async with agent(broken, keys=keys):
                record = await _logged(caplog, f"{port}_port_unreachable")
        assert f"XEROTIER_ROUTER_{port.upper()}_PORT" in vars(record)["remedy"]


async def test_a_streaming_port_that_never_answers_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xim_protocol.agent_session.ANSWER_TIMEOUT_S", 0.2)
    with caplog.at_level(logging.WARNING, "xim_agent.link.connection"):
        async with RouterStub(attach=False) as router, agent(router):
            record = await _logged(caplog, "streaming_port_unreachable")
    assert vars(record)["detail"] == "no answer in time"


async def test_a_router_that_grants_less_than_was_asked_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    greedy = config(lease_s=600.0, flow=FlowControl(window_bytes=MAX_WINDOW_BYTES + 1))
    with caplog.at_level(logging.WARNING, "xim_agent.link.connection"):
        async with RouterStub() as router, agent(router, settings=greedy) as node:
            await node.linked()
    (record,) = caplog.records
    told = {name: vars(record)[name] for name in ("lease_s", "asked_lease_s", "window_bytes", "asked_window_bytes")}
    assert told == {
        "lease_s": MAX_LEASE_S,
        "asked_lease_s": 600.0,
        "window_bytes": MAX_WINDOW_BYTES,
        "asked_window_bytes": MAX_WINDOW_BYTES + 1,
    }
    assert "asked_pause_threshold_bytes" not in vars(record)


async def test_a_router_that_grants_what_was_asked_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "xim_agent.link.connection"):
        async with RouterStub() as router, agent(router) as node:
            await node.linked()
    assert caplog.records == []


async def test_nonsense_from_the_router_ends_the_link_and_nothing_else() -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        await router.say(Channel.CONTROL, [b"\xc1 no message"])
        await router.until(lambda: len(router.of_type(GoodbyeReceived)) == 1)
        await node.told.of_type(LinkReady, 2)


async def test_a_fault_of_ours_at_a_deadline_is_an_error_of_the_link_as_one_in_a_message_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were it the event loop's alone to log, no timer would be left: no renewal, no end of the lease."""

    def faulty(now: float) -> list[AgentEvent]:
        raise ZeroDivisionError("a fault of ours")

    async with RouterStub() as router, agent(router, settings=config(lease_s=3.0)) as node:
        await node.linked()
        monkeypatch.setattr(node.connection.session, "handle_timeout", faulty)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ZeroDivisionError):
                await asyncio.shield(node.task)


async def test_a_fault_between_two_links_is_told_and_the_timer_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_module, "LOOK_S", 0.01)
    faults = []

    def faulty() -> float:
        faults.append(1)
        raise ZeroDivisionError("a fault of ours")

    none = "tcp://no host:5555"
    async with RouterStub() as router, agent(replace(router.address, control_addr=none)) as node:
        await _logged(caplog, "control_port_unreachable")
        monkeypatch.setattr(node.writer, "flush_pending", faulty)
        monkeypatch.setattr(node.connection.session, "next_deadline", lambda: 0.0)
        monkeypatch.setattr(node.connection.session, "handle_timeout", lambda now: [])
        node.connection._timed_out()
        await eventually(lambda: len(faults) > 2, what="the timer goes on")
        assert "a fault between two links" in caplog.messages


async def test_closing_says_goodbye_and_returns() -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        node.connection.close()
        async with asyncio.timeout(PATIENCE_S):
            await node.task
        await router.until(lambda: len(router.of_type(GoodbyeReceived)) == 1)
        assert router.of_type(GoodbyeReceived) == [GoodbyeReceived(code=GoodbyeCode.LEAVING, message="")]


async def test_a_change_of_state_is_told_at_once() -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        node.connection.session.report.state = AgentState.DEGRADED
        node.connection.renew()
        await router.until(lambda: bool(router.of_type(AgentReported)))
        node.connection.announce_draining()
        await router.until(lambda: len(router.of_type(AgentReported)) == 2)
        states = [event.state for event in router.of_type(AgentReported) if isinstance(event, AgentReported)]
        assert states == [AgentState.DEGRADED, AgentState.DRAINING]


async def test_a_refusal_crosses_and_leaves_nothing_behind() -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        answer = await router.submit(PROMPT)
        submit = await node.told.request()
        node.writer.refuse(submit.stream, RefusalReason.AT_CAPACITY, 7)
        await router.until(lambda: answer.over)
        assert answer.refused is not None
        assert (answer.refused.reason, answer.refused.in_flight) == (RefusalReason.AT_CAPACITY, 7)
        await node.connection.settle()


async def test_without_the_streaming_socket_everything_crosses_on_control() -> None:
    body = numbered(300_000)
    async with RouterStub() as router, agent(router, settings=config(streaming=False)) as node:
        await node.linked()
        answer = await router.submit(PROMPT)
        submit = await node.told.request()
        node.writer.start_response(submit.stream, 200, "text/event-stream")
        async with asyncio.timeout(PATIENCE_S):
            await node.writer.write(submit.stream, body)
        node.writer.end(submit.stream, None)
        await router.until(lambda: answer.over)
        assert bytes(answer.body) == body


async def test_without_flow_control_a_long_answer_crosses_whole() -> None:
    body = numbered(2_000_000)
    settings = config(flow=FlowControl(enabled=False))
    async with RouterStub() as router, agent(router, settings=settings) as node:
        await node.linked()
        router.consuming = False
        answer = await router.submit(PROMPT)
        submit = await node.told.request()
        node.writer.start_response(submit.stream, 200, "text/event-stream")
        async with asyncio.timeout(PATIENCE_S):
            for start in range(0, len(body), 50_000):
                await node.writer.write(submit.stream, body[start : start + 50_000])
        node.writer.end(submit.stream, None)
        await router.until(lambda: answer.over)
        assert bytes(answer.body) == body


@pytest.mark.parametrize("secure", [True, False])
async def test_curve_alone_hides_the_answer_from_the_network(secure: bool) -> None:
    async with RouterStub(secure=secure) as router, TcpProxy(router.address.streaming_addr) as proxy:
        keys: CurveKeys = curve_keys()
        router.admitted[keys.public] = b"200"
        through = replace(router.address, streaming_addr=proxy.address)
        async with agent(through, keys=keys, secure=secure) as node:
            await node.linked()
            answer = await router.submit(PROMPT)
            submit = await node.told.request()
            node.writer.start_response(submit.stream, 200, "text/event-stream")
            await node.writer.write(submit.stream, PROMPT)
            node.writer.end(submit.stream, None)
            await router.until(lambda: answer.over)
        assert (PROMPT in proxy.to_target) is not secure


async def test_a_router_that_takes_nothing_loses_the_link(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xim_agent.link.sockets.QUEUE_AGE_S", 0.2)
    settings = config(flow=FlowControl(enabled=False))
    async with RouterStub() as router, TcpProxy(router.address.streaming_addr) as streaming:
        keys = curve_keys()
        router.admitted[keys.public] = b"200"
        through = replace(router.address, streaming_addr=streaming.address)
        async with agent(through, keys=keys, settings=settings) as node:
            await node.linked()
            await router.submit(PROMPT)
            submit = await node.told.request()
            node.writer.start_response(submit.stream, 200, "text/event-stream")
            streaming.pause()

            async def pour() -> None:
                while True:
                    await node.writer.write(submit.stream, bytes(60_000))

            pouring = asyncio.create_task(pour())
            with caplog.at_level(logging.WARNING, "xim_agent.link.connection"):
                record = await _logged(caplog, "congested")
            assert "a message waits" in vars(record)["detail"]
            pouring.cancel()
            await asyncio.wait({pouring})
