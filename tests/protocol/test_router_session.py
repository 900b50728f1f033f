"""The router's end: what it grants, what it takes, whom it ends."""

import pytest

from tests.protocol.golden_messages import GOLDEN
from tests.support.wire import Wire
from xim_protocol.codec import decode, encode
from xim_protocol.errors import LocalProtocolError, OffsetMismatch, UnexpectedMessage
from xim_protocol.events import AgentReported, GoodbyeReceived, RequestRefused, ResponseEnded, ResponseFailed
from xim_protocol.grants import MAX_PAUSE_BYTES, MAX_WINDOW_BYTES, MIN_WINDOW_BYTES, clamp_flow, clamp_lease_s
from xim_protocol.ids import InstanceId, RequestId, SessionId, StreamId
from xim_protocol.messages import (
    AgentState,
    Attach,
    Attached,
    Batch,
    Body,
    Cancel,
    CancelReason,
    Channel,
    Credit,
    EntryKind,
    Expired,
    FailCode,
    FlowControl,
    Goodbye,
    GoodbyeCode,
    Hello,
    Message,
    RefusalReason,
    Submit,
    Welcome,
)
from xim_protocol.router_session import Phase, RouterSession, RouterStream, negotiate_version
from xim_protocol.stream import StreamState

ONE = StreamId(1)
START = (EntryKind.START, 1, 200, "text/plain")
END = (EntryKind.END, 1, 0, None)


def opened(*, streaming_socket: bool = True) -> tuple[Wire, RouterSession[str]]:
    wire = Wire(streaming_socket=streaming_socket).connect()
    assert wire.router is not None
    wire.router_events.clear()
    return wire, wire.router


def submitted(body: bytes = b"{}") -> tuple[RouterSession[str], RouterStream[str]]:
    wire, router = opened()
    stream = wire.submit("a", body)
    router.frames_to_send()
    return router, stream


def take(router: RouterSession[str], *entries: tuple[object, ...]) -> list[object]:
    return list(router.receive(Channel.STREAMING, encode(Batch(entries=entries))))


def said(router: RouterSession[str]) -> list[Message | None]:
    router.flush_credit()
    return [decode(frames) for _, frames in router.frames_to_send()]


# --- Granting -------------------------------------------------------------------------------------------------------


def test_the_published_parameters_are_granted_as_asked() -> None:
    assert clamp_flow(FlowControl()) == FlowControl()


@pytest.mark.parametrize(
    ("asked", "window", "pause"),
    [(1, MIN_WINDOW_BYTES, MIN_WINDOW_BYTES), (2**30, MAX_WINDOW_BYTES, MAX_PAUSE_BYTES)],
)
def test_sizes_beyond_reason_are_clamped(asked: int, window: int, pause: int) -> None:
    granted = clamp_flow(FlowControl(window_bytes=asked, pause_threshold_bytes=asked, enabled=False))
    assert (granted.window_bytes, granted.pause_threshold_bytes, granted.enabled) == (window, pause, False)


@pytest.mark.parametrize(
    ("asked_ms", "interval_ms", "granted_s"),
    [(30_000, 10_000, 30.0), (1, 1, 0.5), (5_000, 10_000, 20.0), (10**9, 10_000, 300.0)],
)
def test_a_lease_is_at_least_two_renewals_and_at_most_five_minutes(
    asked_ms: int, interval_ms: int, granted_s: float
) -> None:
    assert clamp_lease_s(asked_ms, interval_ms) == granted_s


def test_the_newest_common_version_is_spoken_or_none() -> None:
    assert [negotiate_version(versions) for versions in ((1,), (3, 2, 1), (2, 3), ())] == [1, 1, None, None]


def test_streams_that_a_hello_brings_to_a_fresh_session_are_gone() -> None:
    hello = GOLDEN["hello"]
    assert isinstance(hello, Hello)
    router: RouterSession[str] = RouterSession(
        agent=Wire().agent.config.agent_version,  # type: ignore[arg-type]
        session=SessionId("s"),
        hello=hello,
        assignment=None,
        routers=(),
    )
    [welcome] = said(router)
    assert isinstance(welcome, Welcome)
    assert [(row.stream, row.verdict.name) for row in welcome.streams] == [(7, "GONE")]


# --- Attaching ------------------------------------------------------------------------------------------------------


def test_requests_go_only_after_the_streaming_socket_is_attached() -> None:
    wire = Wire()
    wire.agent.connect(0.0)
    wire.collect()
    wire.deliver_to_router(Channel.CONTROL)
    with pytest.raises(LocalProtocolError, match="submit while welcomed"):
        wire.submit("a")
    wire.settle()
    assert wire.submit("a").stream == 1


def test_without_a_streaming_socket_the_session_is_open_at_once() -> None:
    assert opened(streaming_socket=False)[1].phase is Phase.OPEN


@pytest.mark.parametrize("name", ["welcome", "credit", "submit", "hello", "attached", "expired", "body", "assign"])
@pytest.mark.parametrize("channel", Channel)
def test_an_agent_that_talks_like_a_router_is_at_fault(name: str, channel: Channel) -> None:
    _, router = opened()
    with pytest.raises(UnexpectedMessage, match="while open"):
        router.receive(channel, encode(GOLDEN[name]))
    assert router.phase is Phase.OPEN


@pytest.mark.parametrize("channel", Channel)
def test_attaching_twice_is_a_fault(channel: Channel) -> None:
    _, router = opened()
    with pytest.raises(UnexpectedMessage, match="Attach"):
        router.receive(channel, encode(Attach(session=router.session)))


def test_attaching_to_another_session_is_a_fault() -> None:
    wire = Wire()
    wire.agent.connect(0.0)
    wire.collect()
    wire.deliver_to_router(Channel.CONTROL)
    assert wire.router is not None
    with pytest.raises(UnexpectedMessage, match="Attach on streaming while welcomed"):
        wire.router.receive(Channel.STREAMING, encode(Attach(session=SessionId("other"))))


@pytest.mark.parametrize(("streaming_socket", "channel"), [(True, Channel.CONTROL), (False, Channel.STREAMING)])
def test_a_batch_on_the_wrong_socket_is_a_fault(streaming_socket: bool, channel: Channel) -> None:
    _, router = opened(streaming_socket=streaming_socket)
    with pytest.raises(UnexpectedMessage, match="Batch on"):
        router.receive(channel, encode(Batch(entries=())))


def test_a_batch_before_the_attach_is_a_fault() -> None:
    wire = Wire()
    wire.agent.connect(0.0)
    wire.collect()
    wire.deliver_to_router(Channel.CONTROL)
    assert wire.router is not None
    with pytest.raises(UnexpectedMessage, match="Batch on streaming while welcomed"):
        take(wire.router)


def test_an_unknown_message_is_ignored() -> None:
    assert opened()[1].receive(Channel.CONTROL, [b"\x91\x63"]) == []


def test_what_still_comes_from_a_link_that_is_gone_is_dropped() -> None:
    _, router = opened()
    router.link_lost()
    assert router.receive(Channel.CONTROL, encode(GOLDEN["credit"])) == []


def test_a_renewal_is_answered_and_told() -> None:
    _, router = opened()
    [event] = router.receive(Channel.CONTROL, encode(GOLDEN["renew"]))
    assert isinstance(event, AgentReported)
    assert (event, event.state, event.in_flight) == (router.report, AgentState.DEGRADED, 3)
    assert [type(message).__name__ for message in said(router)] == ["Renewed"]


def test_draining_changes_nothing_but_the_state() -> None:
    _, router = opened()
    router.receive(Channel.CONTROL, encode(GOLDEN["renew"]))
    [event] = router.receive(Channel.CONTROL, encode(GOLDEN["draining"]))
    assert isinstance(event, AgentReported)
    assert (event.state, event.in_flight, event.statistics) == (
        AgentState.DRAINING,
        3,
        (("num_requests_running", 3.0),),
    )


def test_streams_that_ended_hold_no_place_after_a_lost_link() -> None:
    wire, router = opened()
    for context in "ab":
        wire.submit(context)
    wire.settle()
    wire.agent.refuse(ONE, RefusalReason.NOT_READY, in_flight=1)
    wire.reconnect()
    assert router.report.in_flight == 1


def test_a_goodbye_is_told() -> None:
    _, router = opened()
    heard = router.receive(Channel.CONTROL, encode(GOLDEN["goodbye"]))
    assert heard == [GoodbyeReceived(code=GoodbyeCode.SUPERSEDED, message="two")]


# --- Entries of streams ---------------------------------------------------------------------------------------------


def test_an_entry_of_a_stream_that_never_was_is_a_fault() -> None:
    router, _ = submitted()
    for entry in ((EntryKind.CHUNK, 2, 0, b"x"), (EntryKind.END, 2, 0, None)):
        with pytest.raises(UnexpectedMessage, match="entry of stream 2"):
            take(router, entry)


def test_an_entry_of_a_stream_that_is_over_is_harmless() -> None:
    router, _ = submitted()
    take(router, (EntryKind.REFUSED, 1, "not_ready", 0))
    assert take(router, (EntryKind.CHUNK, 1, 0, b"x"), END) == []


@pytest.mark.parametrize(
    ("entries", "illegal"),
    [
        ([], (EntryKind.CHUNK, 1, 0, b"x")),
        ([], END),
        ([START], START),
        ([START], (EntryKind.REFUSED, 1, "not_ready", 0)),
        ([START], (EntryKind.CONTINUE, 1, 5)),
        ([], (EntryKind.CONTINUE, 1, 5)),
    ],
)
def test_an_entry_that_its_stream_has_no_place_for_is_a_fault_and_changes_nothing(
    entries: list[tuple[object, ...]], illegal: tuple[object, ...]
) -> None:
    router, stream = submitted()
    take(router, *entries)
    before = (stream.state, stream.started, router.statistics())
    with pytest.raises(UnexpectedMessage, match="of stream 1"):
        take(router, illegal)
    assert (stream.state, stream.started, router.statistics()) == before


def test_an_end_that_states_another_length_is_a_fault() -> None:
    router, stream = submitted()
    with pytest.raises(OffsetMismatch, match="stream 1: offset 3, expected 2"):
        take(router, START, (EntryKind.CHUNK, 1, 0, b"ab"), (EntryKind.END, 1, 3, None))
    assert stream.state is StreamState.RESPONDING


def test_an_end_brings_its_size_and_usage() -> None:
    router, _ = submitted()
    usage = (5, 7, 2, "engine")
    events = take(router, START, (EntryKind.CHUNK, 1, 0, b"ab"), (EntryKind.END, 1, 2, usage))
    assert events[1:] == [("a", b"ab"), ResponseEnded(context="a", size=2, usage=usage)]


def test_a_failure_brings_what_it_says() -> None:
    router, _ = submitted()
    [failed] = take(router, (EntryKind.FAIL, 1, "engine_unavailable", "no", True, None))
    assert failed == ResponseFailed(
        context="a", code=FailCode.ENGINE_UNAVAILABLE, message="no", retryable=True, usage=None
    )


def test_a_refusal_brings_the_agents_total() -> None:
    router, _ = submitted()
    [refused] = take(router, (EntryKind.REFUSED, 1, "at_capacity", 9))
    assert isinstance(refused, RequestRefused)
    assert (refused.context, refused.in_flight) == ("a", 9)


def test_the_end_of_a_stream_is_confirmed_in_the_next_credit() -> None:
    router, _ = submitted()
    take(router, START, END)
    assert (said(router), said(router)) == ([Credit(received=0, closed=(ONE,))], [])


def test_a_credit_carries_everything_that_is_due() -> None:
    router, stream = submitted()
    take(router, START, (EntryKind.CHUNK, 1, 0, bytes(40_000)))
    router.consumed(stream, 40_000)
    assert router.credit_due
    assert said(router) == [Credit(received=40_000, limits=((ONE, 105_536),))]


def test_nothing_is_due_before_the_threshold() -> None:
    router, stream = submitted()
    take(router, START, (EntryKind.CHUNK, 1, 0, bytes(40_000)))
    router.consumed(stream, 10_000)
    assert (router.credit_due, router.statistics().credit_owed_bytes) == (False, 10_000)


def test_a_repeated_chunk_is_told_once() -> None:
    router, _ = submitted()
    chunk = (EntryKind.CHUNK, 1, 0, b"ab")
    assert take(router, START, chunk, chunk)[1:] == [("a", b"ab")]


# --- Cancelling -----------------------------------------------------------------------------------------------------


def cancelled() -> tuple[RouterSession[str], RouterStream[str]]:
    router, stream = submitted()
    router.cancel(stream, CancelReason.CLIENT_LEFT)
    return router, stream


def test_a_stream_is_cancelled_once() -> None:
    router, stream = cancelled()
    router.cancel(stream, CancelReason.CLIENT_LEFT)
    assert said(router) == [Cancel(stream=ONE, reason=CancelReason.CLIENT_LEFT)]


def test_late_entries_of_a_cancelled_stream_are_dropped_until_its_end() -> None:
    router, _ = cancelled()
    late = take(router, START, (EntryKind.CHUNK, 1, 0, b"ab"), (EntryKind.CONTINUE, 1, 5))
    assert late == []
    assert take(router, (EntryKind.END, 1, 99, None)) == [ResponseEnded(context="a", size=99, usage=None)]


def test_a_stream_that_is_over_cannot_be_cancelled() -> None:
    router, stream = submitted()
    take(router, START, END)
    said(router)
    router.cancel(stream, CancelReason.TIME_UP)
    assert said(router) == []


def test_a_cancelled_stream_gets_no_more_credit() -> None:
    router, stream = submitted()
    take(router, START, (EntryKind.CHUNK, 1, 0, bytes(40_000)))
    router.cancel(stream, CancelReason.CLIENT_LEFT)
    said(router)
    router.consumed(stream, 40_000)
    assert not router.credit_due


# --- Long bodies ----------------------------------------------------------------------------------------------------


def test_a_body_up_to_64_kib_rides_in_its_submit_and_a_longer_one_does_not() -> None:
    wire, router = opened()
    wire.submit("a", bytes(65_536))
    wire.submit("b", bytes(65_537))
    short, long = said(router)
    assert isinstance(short, Submit)
    assert isinstance(long, Submit)
    assert (short.body, long.body, long.body_bytes) == (bytes(65_536), None, 65_537)


def pieces(router: RouterSession[str]) -> list[tuple[int, int, int]]:
    found = []
    while (piece := router.next_body()) is not None:
        message = decode(piece[1])
        assert isinstance(message, Body)
        found.append((int(message.stream), message.offset, len(message.payload)))
    return found


def test_pieces_of_a_body_go_up_to_what_was_asked_for() -> None:
    router, _ = submitted(bytes(200_000))
    assert pieces(router) == []
    take(router, (EntryKind.CONTINUE, 1, 100_000))
    assert pieces(router) == [(1, 0, 65_536), (1, 65_536, 34_464)]
    take(router, (EntryKind.CONTINUE, 1, 50_000), (EntryKind.CONTINUE, 1, 2**40))
    assert pieces(router) == [(1, 100_000, 65_536), (1, 165_536, 34_464)]


def test_long_bodies_take_turns() -> None:
    wire, router = opened()
    for context in "ab":
        wire.submit(context, bytes(131_072))
    take(router, (EntryKind.CONTINUE, 1, 2**20), (EntryKind.CONTINUE, 2, 2**20))
    assert [stream for stream, _, _ in pieces(router)] == [1, 2, 1, 2]


def test_a_cancelled_body_stops_at_once() -> None:
    router, stream = submitted(bytes(200_000))
    take(router, (EntryKind.CONTINUE, 1, 2**20))
    router.next_body()
    router.cancel(stream, CancelReason.CLIENT_LEFT)
    assert pieces(router) == []


# --- The end --------------------------------------------------------------------------------------------------------


def test_an_end_says_goodbye_and_cuts_every_stream_once() -> None:
    router, stream = submitted()
    assert (router.end(GoodbyeCode.SHUTDOWN, "later"), router.end(GoodbyeCode.SHUTDOWN)) == (["a"], [])
    assert said(router) == [Goodbye(code=GoodbyeCode.SHUTDOWN, message="later")]
    assert (stream.state, router.statistics().streams) == (StreamState.FAILED, 0)


def test_without_a_link_there_is_nobody_to_say_goodbye_to() -> None:
    router, _ = submitted()
    router.link_lost()
    assert (router.end(GoodbyeCode.SHUTDOWN), said(router)) == (["a"], [])
    router.link_lost()
    assert router.phase is Phase.ENDED


def test_an_expired_lease_is_told_where_there_is_a_link() -> None:
    router, _ = submitted()
    assert (router.expire(), said(router)) == (["a"], [Expired()])
    router, _ = submitted()
    router.link_lost()
    assert (router.expire(), said(router)) == (["a"], [])


def test_after_the_link_is_lost_nothing_is_queued_for_it() -> None:
    router, stream = submitted()
    router.link_lost()
    router.assign(GOLDEN["welcome"].assignment)  # type: ignore[union-attr]
    router.cancel(stream, CancelReason.CLIENT_LEFT)
    assert (said(router), router.next_body()) == ([], None)


def test_a_session_that_ended_cannot_be_resumed() -> None:
    wire, router = opened()
    hello = GOLDEN["hello"]
    assert isinstance(hello, Hello)
    with pytest.raises(LocalProtocolError, match="while open"):  # another process
        router.resume(hello)
    router.end(None)
    wire.agent.link_lost(0.0)
    wire.agent.connect(0.0)
    [(_, frames)] = wire.agent.frames_to_send()
    own = decode(frames)
    assert isinstance(own, Hello)
    with pytest.raises(LocalProtocolError, match="while ended"):
        router.resume(own)


def test_ids_rise_and_are_never_used_twice() -> None:
    wire, router = opened()
    first = wire.submit("a")
    take(router, (EntryKind.REFUSED, 1, "not_ready", 0))
    assert (first.stream, wire.submit("b").stream) == (1, 2)
    submit = wire.submit("c").submit
    assert submit is not None
    assert submit.request == RequestId("c")
    assert router.instance == InstanceId("instance-1")
    assert isinstance(decode(encode(Attached(session=router.session))), Attached)
