"""Lost links, each case by name: within the lease a client sees a pause and nothing else."""

import pytest

from tests.support.wire import Wire, content
from xim_protocol.codec import decode, encode
from xim_protocol.errors import OffsetMismatch
from xim_protocol.events import (
    RequestReceived,
    RequestRefused,
    ResponseEnded,
    ResponseFailed,
    ResponseStarted,
    SessionExpired,
    StreamAborted,
    StreamCancelled,
    Welcomed,
)
from xim_protocol.ids import StreamId
from xim_protocol.messages import (
    PROTOCOL_VERSION,
    CancelReason,
    Channel,
    FailCode,
    FlowControl,
    Hello,
    RefusalReason,
    StreamVerdict,
    Verdict,
    Welcome,
)
from xim_protocol.router_session import Phase

ONE = StreamId(1)


def answering(size: int = 0) -> Wire:
    """A wire with one stream, `a`, that has started and answered `size` bytes."""
    wire = Wire().connect()
    wire.submit("a")
    wire.settle()
    wire.agent.start_response(ONE, 200, "text/plain")
    if size:
        wire.agent.produce(ONE, content("a", 0, size), wire.now)
    wire.settle()
    return wire


def body_of(wire: Wire, context: str = "a") -> bytes:
    """All bytes of `context` that the router received."""
    return b"".join(event[1] for event in wire.router_events if isinstance(event, tuple) and event[0] == context)


def endings(wire: Wire) -> list[str]:
    """The names of the events that ended a stream at the router."""
    kinds = (ResponseEnded, ResponseFailed, RequestRefused)
    return [type(event).__name__ for event in wire.router_events if isinstance(event, kinds)]


def nothing_is_left(wire: Wire) -> bool:
    assert wire.router is not None
    agent, router = wire.agent.statistics(), wire.router.statistics()
    return (agent.streams, agent.kept_bytes, router.streams, router.queued_messages) == (0, 0, 0, 0)


def test_what_was_not_sent_on_the_old_link_is_not_sent_on_the_new_one() -> None:
    wire = answering(100)
    wire.agent.renew(wire.now)
    wire.agent.produce(ONE, content("a", 100, 100), wire.now)
    wire.agent.gather()
    wire.drop()
    wire.agent.connect(wire.now)
    outgoing = wire.agent.frames_to_send()
    assert [type(decode(frames)) for _, frames in outgoing] == [Hello]


def test_a_start_without_bytes_is_not_sent_for_a_new_link() -> None:
    wire = answering()
    wire.reconnect()
    assert not any(isinstance(event, ResponseStarted) for event in wire.router_events)
    wire.agent.produce(ONE, content("a", 0, 10), wire.now)
    wire.settle()
    assert body_of(wire) == content("a", 0, 10)


def test_a_lost_submit_is_sent_again_under_its_id() -> None:
    wire = Wire().connect()
    wire.submit("a", b"question")
    wire.collect()
    wire.reconnect()
    received = [event.submit for event in wire.agent_events if isinstance(event, RequestReceived)]
    assert [(submit.stream, submit.body) for submit in received] == [(1, b"question")]


def test_a_submit_sent_while_the_router_did_not_know_of_the_lost_link_is_sent_again() -> None:
    wire = Wire().connect()
    wire.drop(router_notices=False)
    wire.submit("a")
    wire.connect()
    assert [event.submit.stream for event in wire.agent_events if isinstance(event, RequestReceived)] == [1]


def test_a_lost_submit_that_was_cancelled_meanwhile_is_not_sent_again() -> None:
    wire = Wire().connect()
    stream = wire.submit("a")
    wire.drop()
    assert wire.router is not None
    wire.router.cancel(stream, CancelReason.CLIENT_LEFT)
    wire.connect()
    assert not [event for event in wire.agent_events if isinstance(event, RequestReceived)]
    assert endings(wire) == ["ResponseFailed"]
    assert nothing_is_left(wire)


def test_a_submit_cancelled_between_welcome_and_attach_is_not_sent_again() -> None:
    wire = Wire().connect()
    stream = wire.submit("a")
    wire.drop()
    wire.agent.connect(wire.now)
    wire.collect()
    wire.deliver_to_router(Channel.CONTROL)
    assert wire.router is not None
    assert wire.router.phase is Phase.WELCOMED
    wire.router.cancel(stream, CancelReason.CLIENT_LEFT)
    wire.settle()
    assert not [event for event in wire.agent_events if isinstance(event, RequestReceived)]
    assert endings(wire) == ["ResponseFailed"]
    assert nothing_is_left(wire)


def test_a_lost_cancel_is_found_in_the_welcome() -> None:
    wire = answering(10)
    assert wire.router is not None
    wire.router.cancel(wire.router._streams[ONE], CancelReason.CLIENT_LEFT)
    wire.collect()
    wire.reconnect()
    assert StreamAborted(stream=ONE) in wire.agent_events
    failed = [event for event in wire.router_events if isinstance(event, ResponseFailed)]
    assert [event.code for event in failed] == [FailCode.CANCELLED]
    assert nothing_is_left(wire)


def test_a_cancel_follows_its_submit_and_the_agent_answers_it() -> None:
    wire = answering(10)
    assert wire.router is not None
    wire.router.cancel(wire.router._streams[ONE], CancelReason.TIME_UP)
    wire.agent.produce(ONE, b"late", wire.now)
    wire.settle()
    assert StreamCancelled(stream=ONE, reason=CancelReason.TIME_UP) in wire.agent_events
    assert (body_of(wire), endings(wire), nothing_is_left(wire)) == (
        content("a", 0, 10),
        ["ResponseFailed"],
        True,
    )


def test_bytes_on_a_lost_link_are_repeated_from_where_the_router_has_them() -> None:
    wire = answering(1_000)
    wire.agent.produce(ONE, content("a", 1_000, 500), wire.now)
    wire.collect()
    wire.reconnect()
    assert body_of(wire) == content("a", 0, 1_500)


def test_a_lost_start_is_repeated() -> None:
    wire = answering()
    wire.agent.produce(ONE, content("a", 0, 10), wire.now)
    wire.collect()
    wire.reconnect()
    assert [type(event) for event in wire.router_events][-2:] == [ResponseStarted, tuple]


def test_a_start_that_arrived_is_not_repeated() -> None:
    wire = answering(10)
    wire.reconnect()
    wire.agent.produce(ONE, content("a", 10, 10), wire.now)
    wire.settle()
    assert sum(isinstance(event, ResponseStarted) for event in wire.router_events) == 1


def test_a_lost_end_is_repeated() -> None:
    wire = answering(10)
    wire.agent.end(ONE, None)
    wire.collect()
    wire.reconnect()
    assert (endings(wire), nothing_is_left(wire)) == (["ResponseEnded"], True)


def test_a_lost_refusal_is_repeated() -> None:
    wire = Wire().connect()
    wire.submit("a")
    wire.settle()
    wire.agent.refuse(ONE, RefusalReason.AT_CAPACITY, in_flight=3)
    wire.collect()
    wire.reconnect()
    assert (endings(wire), nothing_is_left(wire)) == (["RequestRefused"], True)


def test_a_lost_closed_is_found_in_the_welcome_and_aborts_nothing() -> None:
    wire = answering(10)
    wire.agent.end(ONE, None)
    wire.collect_from_agent()
    wire.deliver_to_router(Channel.STREAMING)
    wire.collect_from_router()
    wire.reconnect()
    assert (endings(wire), nothing_is_left(wire)) == (["ResponseEnded"], True)
    assert StreamAborted(stream=ONE) not in wire.agent_events


def test_a_lost_credit_is_healed_by_the_welcome() -> None:
    wire = answering(65_536)
    assert wire.router is not None
    wire.router.consumed(wire.router._streams[ONE], 65_536)
    wire.collect()
    wire.reconnect()
    assert wire.agent.room(ONE) == 65_536


def test_credit_that_was_owed_when_the_link_was_lost_comes_with_the_welcome() -> None:
    wire = answering(65_536)
    assert wire.router is not None
    wire.router.consumed(wire.router._streams[ONE], 100)  # far below what makes a credit due
    wire.reconnect()
    assert wire.agent.room(ONE) == 100


def test_a_question_for_a_body_goes_with_its_link() -> None:
    wire = Wire().connect()
    wire.submit("a", bytes(100_000))
    wire.settle()
    wire.agent.continue_body(ONE)
    wire.restart_router()
    wire.connect()  # a router that knows no stream 1 would take the question for a fault
    assert nothing_is_left(wire)


def test_what_a_pause_held_back_goes_with_its_session() -> None:
    wire = Wire(flow=FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024)).connect()
    wire.submit("a")
    wire.settle()
    wire.agent.start_response(ONE, 200, "text/plain")
    wire.agent.produce(ONE, bytes(4_096), wire.now)
    wire.collect()
    wire.restart_router()
    wire.connect()
    assert not wire.agent.pending
    assert nothing_is_left(wire)


def test_a_link_lost_twice_in_a_row_loses_nothing() -> None:
    wire = answering(1_000)
    wire.agent.produce(ONE, content("a", 1_000, 500), wire.now)
    wire.collect()
    wire.drop()
    wire.agent.connect(wire.now)
    wire.collect()
    wire.reconnect()
    assert body_of(wire) == content("a", 0, 1_500)


def test_a_link_lost_between_welcome_and_attached_loses_nothing() -> None:
    wire = answering(1_000)
    wire.agent.produce(ONE, content("a", 1_000, 500), wire.now)
    wire.submit("b")
    wire.drop()
    wire.agent.connect(wire.now)
    wire.collect()
    wire.deliver_to_router(Channel.CONTROL)
    wire.collect()
    wire.deliver_to_agent(Channel.CONTROL)  # the Welcome
    wire.collect()
    wire.deliver_to_router(Channel.STREAMING)  # the Attach; the Attached is lost
    wire.collect()
    wire.reconnect()
    assert body_of(wire) == content("a", 0, 1_500)
    received = [event.submit.request for event in wire.agent_events if isinstance(event, RequestReceived)]
    assert received == ["a", "b"]


def test_a_submit_may_overtake_attached() -> None:
    wire = Wire()
    wire.agent.connect(wire.now)
    wire.collect()
    wire.deliver_to_router(Channel.CONTROL)
    wire.collect()
    wire.deliver_to_agent(Channel.CONTROL)
    wire.collect()
    wire.deliver_to_router(Channel.STREAMING)
    wire.submit("a")
    wire.collect()
    wire.deliver_to_agent(Channel.CONTROL)
    assert isinstance(wire.agent_events[-1], RequestReceived)
    wire.agent.start_response(ONE, 200, "text/plain")
    wire.agent.end(ONE, None)
    wire.settle()
    assert endings(wire) == ["ResponseEnded"]


def test_a_body_that_did_not_arrive_whole_is_sent_again_from_its_beginning() -> None:
    wire = Wire().connect()
    body = content("a", 0, 300_000)
    wire.submit("a", body)
    wire.settle()
    wire.agent.continue_body(ONE)
    wire.collect()
    wire.deliver_to_router(Channel.STREAMING)
    wire.collect()
    wire.deliver_to_agent(Channel.STREAMING)
    wire.deliver_to_agent(Channel.STREAMING)
    wire.reconnect()
    assert StreamAborted(stream=ONE) in wire.agent_events
    wire.agent.continue_body(ONE)
    wire.settle()
    assert getattr(wire.agent_events[-1], "body", None) == body


def test_a_restarted_agent_has_no_streams_and_the_old_ones_end() -> None:
    wire = answering(10)
    wire.restart_agent()
    wire.connect()
    assert (wire.cut, wire.sessions, nothing_is_left(wire)) == (["a"], 2, True)


def test_an_agent_whose_router_restarted_learns_that_everything_is_gone() -> None:
    wire = answering(10)
    wire.restart_router()
    wire.connect()
    welcomed = [event for event in wire.agent_events if isinstance(event, Welcomed)]
    assert [event.resumed for event in welcomed] == [False, False]
    assert wire.agent_events[-3:-1] == [StreamAborted(stream=ONE), welcomed[-1]]
    assert nothing_is_left(wire)


def test_an_agent_that_lost_its_lease_without_a_link_aborts_and_starts_anew() -> None:
    wire = answering(10)
    wire.drop()
    assert wire.advance(30.0) == [StreamAborted(stream=ONE), SessionExpired()]
    wire.connect()
    failed = [event for event in wire.router_events if isinstance(event, ResponseFailed)]
    assert [event.code for event in failed] == [FailCode.AGENT_LOST]
    assert nothing_is_left(wire)


def test_a_lease_that_ends_between_hello_and_welcome_takes_the_link_down() -> None:
    wire = answering(10)
    wire.drop()
    wire.now += 29.0
    wire.agent.connect(wire.now)
    wire.collect()
    wire.deliver_to_router(Channel.CONTROL)
    wire.collect()
    wire.advance(1.0)
    wire.deliver_to_agent(Channel.CONTROL)  # a Welcome that would resume what the agent gave up
    assert not wire.agent.lease.held
    wire.reconnect()
    assert (endings(wire), nothing_is_left(wire)) == (["ResponseFailed"], True)


def test_a_lease_that_the_router_expired_ends_the_session_at_both_ends() -> None:
    wire = answering(10)
    wire.now += 30.0  # the agent slept: no renewal came
    wire.expire_leases()
    assert wire.cut == ["a"]
    wire.settle()
    assert wire.agent_events[-2:] == [StreamAborted(stream=ONE), SessionExpired()]
    wire.reconnect()
    assert (wire.sessions, nothing_is_left(wire)) == (2, True)


def test_a_renewed_lease_goes_on_as_long_as_it_is_renewed() -> None:
    wire = answering(10)
    for _ in range(20):
        wire.advance(10.0)
        wire.settle()
        wire.expire_leases()
    assert (wire.cut, wire.sessions, wire.agent.is_live(ONE)) == ([], 1, True)


def test_a_session_that_expired_without_a_link_is_followed_by_a_new_one() -> None:
    wire = answering(10)
    wire.drop()
    wire.now += 30.0
    wire.expire_leases()
    wire.connect()
    assert (wire.cut, wire.sessions, nothing_is_left(wire)) == (["a"], 2, True)


def test_a_welcome_that_is_a_fault_forgets_no_stream_unsaid() -> None:
    wire = answering(100)
    wire.submit("b")
    wire.settle()
    wire.drop()
    wire.agent.connect(wire.now)
    assert wire.agent.session is not None
    verdicts = (
        StreamVerdict(stream=ONE, verdict=Verdict.RESUME, started=True, received=101, limit=65_536),
        StreamVerdict(stream=StreamId(2), verdict=Verdict.GONE),
    )
    fault = Welcome(
        version=PROTOCOL_VERSION,
        session=wire.agent.session,
        lease_ms=30_000,
        flow=wire.flow,
        assignment=None,
        routers=(),
        streams=verdicts,
    )
    with pytest.raises(OffsetMismatch):
        wire.agent.receive(Channel.CONTROL, encode(fault), wire.now)
    wire.agent.link_lost(wire.now)
    assert wire.agent.is_live(StreamId(2))
