"""The cases of h2spec on stream states and flow control that have a counterpart here, each under its name there.

h2spec (https://github.com/summerwind/h2spec) is the conformance suite of HTTP/2. What differs here is said where it
does: limits are absolute, so that nothing can overflow and repeating one is no fault; and since the two sockets of a
link have no common order, what comes late of a stream that is over is dropped without harm.
"""

import pytest

from tests.support.wire import Wire, content
from xim_protocol.codec import encode, encode_batch
from xim_protocol.credit import CreditSender
from xim_protocol.errors import CreditExceeded, MalformedMessage, OffsetMismatch, RemoteProtocolError, UnexpectedMessage
from xim_protocol.events import RequestReceived, RequestRefused
from xim_protocol.ids import StreamId
from xim_protocol.messages import (
    Body,
    CancelReason,
    Channel,
    Credit,
    Entry,
    EntryKind,
    FailCode,
    FlowControl,
    RefusalReason,
)
from xim_protocol.router_session import RouterSession, RouterStream

IDLE = StreamId(5)
"""No stream of this number was opened."""
WINDOW = 1_024


def wired() -> Wire:
    return Wire(flow=FlowControl(window_bytes=WINDOW, pause_threshold_bytes=64 * WINDOW)).connect()


def responding(wire: Wire) -> RouterStream[str]:
    """A stream whose response has begun."""
    stream = wire.submit("request")
    wire.settle()
    wire.agent.start_response(stream.stream, 200, "text/plain")
    wire.agent.produce(stream.stream, b"x", wire.now)
    wire.settle()
    return stream


def router_of(wire: Wire) -> RouterSession[str]:
    assert wire.router is not None
    return wire.router


def takes(wire: Wire, *entries: Entry) -> list[object]:
    """What the router makes of entries that its agent would not have sent."""
    return list(router_of(wire).receive(Channel.STREAMING, encode_batch(list(entries))))


def credit(wire: Wire, message: Credit) -> list[object]:
    """What the agent makes of a Credit."""
    return list(wire.agent.receive(Channel.CONTROL, encode(message), wire.now))


CHUNK: Entry = (EntryKind.CHUNK, IDLE, 0, b"x")
FAIL: Entry = (EntryKind.FAIL, IDLE, FailCode.INTERNAL, "", False, None)
START: Entry = (EntryKind.START, IDLE, 200, "text/plain")
CONTINUE: Entry = (EntryKind.CONTINUE, IDLE, 65_536)

# --- 5.1. Stream States --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(CHUNK, id="5.1/1 idle: Sends a DATA frame"),
        pytest.param(FAIL, id="5.1/2 idle: Sends a RST_STREAM frame"),
        pytest.param(CONTINUE, id="5.1/4 idle: Sends a CONTINUATION frame"),
    ],
)
def test_what_comes_for_a_stream_that_was_never_opened_is_a_fault(entry: Entry) -> None:
    with pytest.raises(UnexpectedMessage):
        takes(wired(), entry)


def test_5_1_3_idle_sends_a_window_update_frame() -> None:
    # Ignored, not a fault: an agent that restarted may still be told of streams that only its predecessor knew.
    wire = wired()
    assert credit(wire, Credit(received=0, limits=((IDLE, 10 * WINDOW),), closed=())) == []
    assert responding(wire).credit.received == 1


def over(wire: Wire, *, failed: bool) -> StreamId:
    """A stream whose agent said its last word."""
    stream = responding(wire).stream
    if failed:
        wire.agent.fail(stream, FailCode.INTERNAL, "", retryable=False)
    else:
        wire.agent.end(stream, None)
    wire.settle()
    wire.router_events.clear()
    return stream


@pytest.mark.parametrize(
    ("failed", "kind"),
    [
        pytest.param(False, EntryKind.CHUNK, id="5.1/5 half closed (remote): Sends a DATA frame"),
        pytest.param(False, EntryKind.START, id="5.1/6 half closed (remote): Sends a HEADERS frame"),
        pytest.param(False, EntryKind.CONTINUE, id="5.1/7 half closed (remote): Sends a CONTINUATION frame"),
        pytest.param(True, EntryKind.CHUNK, id="5.1/8 closed: Sends a DATA frame after sending RST_STREAM frame"),
        pytest.param(True, EntryKind.START, id="5.1/9 closed: Sends a HEADERS frame after sending RST_STREAM frame"),
        pytest.param(True, EntryKind.CONTINUE, id="5.1/10 closed: Sends a CONTINUATION frame after RST_STREAM"),
        pytest.param(False, EntryKind.FAIL, id="5.1/11 closed: Sends a frame after both have ended"),
    ],
)
def test_what_comes_for_a_stream_that_is_over_is_dropped_without_harm(failed: bool, kind: EntryKind) -> None:
    # Not a fault: after a lost link it is a repetition that the agent could not know to be one.
    wire = wired()
    stream = over(wire, failed=failed)
    entry = next(each for each in (CHUNK, START, CONTINUE, FAIL) if each[0] == kind)
    assert takes(wire, (entry[0], stream, *entry[2:])) == []
    again = wire.submit("another")
    wire.settle()
    assert any(
        isinstance(event, RequestReceived) and event.submit.stream == again.stream for event in wire.agent_events
    )


def test_5_1_a_response_that_begins_twice_is_a_fault() -> None:
    wire = wired()
    stream = responding(wire).stream
    with pytest.raises(UnexpectedMessage):
        takes(wire, (EntryKind.START, stream, 200, "text/plain"))


def test_5_1_data_before_headers_is_a_fault() -> None:
    wire = wired()
    stream = wire.submit("request").stream
    with pytest.raises(UnexpectedMessage):
        takes(wire, (EntryKind.CHUNK, stream, 0, b"x"))


def test_5_1_data_that_crosses_a_cancel_is_dropped() -> None:
    wire = wired()
    stream = responding(wire)
    wire.agent.produce(stream.stream, b"under way", wire.now)
    wire.collect_from_agent()
    router_of(wire).cancel(stream, CancelReason.CLIENT_LEFT)
    wire.router_events.clear()
    wire.settle()
    assert not [event for event in wire.router_events if isinstance(event, tuple)]
    assert router_of(wire).statistics().streams == wire.agent.statistics().streams == 0


def test_5_1_a_body_of_a_stream_that_does_not_await_one_is_dropped() -> None:
    wire = wired()
    stream = responding(wire).stream
    for number in (stream, IDLE):
        piece = encode(Body(stream=number, offset=0, payload=b"x"))
        assert wire.agent.receive(Channel.STREAMING, piece, wire.now) == []


# --- 5.1.2. Stream Concurrency -------------------------------------------------------------------------------------


def test_5_1_2_1_sends_headers_frames_that_causes_their_advertised_concurrent_stream_limit_to_be_exceeded() -> None:
    wire = wired()
    first = responding(wire)
    second = wire.submit("one too many")
    wire.settle()
    wire.agent.refuse(second.stream, RefusalReason.AT_CAPACITY, in_flight=1)
    wire.router_events.clear()
    wire.settle()
    (refused,) = wire.router_events
    assert isinstance(refused, RequestRefused)
    assert (refused.context, refused.reason, refused.in_flight) == ("one too many", RefusalReason.AT_CAPACITY, 1)
    # The stream that has the place goes on.
    wire.agent.produce(first.stream, b"more", wire.now)
    wire.settle()
    assert wire.router_events[1:] == [("request", b"more")]


# --- 6.9. WINDOW_UPDATE --------------------------------------------------------------------------------------------


def test_6_9_1_sends_a_window_update_frame_with_a_flow_control_window_increment_of_0() -> None:
    # Of the link: the same count again.
    wire = wired()
    responding(wire)
    for _ in range(2):
        assert credit(wire, Credit(received=1, limits=(), closed=())) == []
    assert wire.agent.statistics().unacknowledged_bytes == 0
    assert credit(wire, Credit(received=0, limits=(), closed=())) == []
    assert wire.agent.statistics().unacknowledged_bytes == 0


@pytest.mark.parametrize("limit", [WINDOW, WINDOW - 1, 1, 0], ids=["equal", "lower", "one", "nothing"])
def test_6_9_2_sends_a_window_update_frame_with_a_flow_control_window_increment_of_0_on_a_stream(limit: int) -> None:
    # A lower or equal limit is ignored: it was overtaken by a higher one, or repeated after a lost link.
    wire = wired()
    stream = responding(wire).stream
    room = wire.agent.room(stream)
    assert credit(wire, Credit(received=1, limits=((stream, limit),), closed=())) == []
    assert wire.agent.room(stream) == room == WINDOW - 1


@pytest.mark.parametrize("cut", [1, 2])
def test_6_9_3_sends_a_window_update_frame_with_a_length_other_than_4_octets(cut: int) -> None:
    wire = wired()
    (frame,) = encode(Credit(received=0, limits=(), closed=()))
    with pytest.raises(RemoteProtocolError) as fault:
        wire.agent.receive(Channel.CONTROL, [frame[:-cut]], wire.now)
    assert isinstance(fault.value, MalformedMessage)


# --- 6.9.1. The Flow-Control Window --------------------------------------------------------------------------------


def test_6_9_1_1_sends_settings_frame_to_set_the_initial_window_size_to_1_and_sends_headers_frame() -> None:
    sender = CreditSender(1)
    assert (sender.produce(b"ab"), sender.take(100), sender.room) == (1, (0, b"a"), 0)
    assert sender.raise_limit(IDLE, 2)
    assert (sender.produce(b"b"), sender.take(100)) == (1, (1, b"b"))


def test_6_9_1_1_as_a_session_does_it_with_the_smallest_window_there_is() -> None:
    wire = wired()
    stream = responding(wire)
    taken = wire.agent.produce(stream.stream, content("request", 0, 10 * WINDOW), wire.now)
    wire.settle()
    assert taken == WINDOW - 1
    assert stream.credit.received == WINDOW
    router_of(wire).consumed(stream, WINDOW)
    wire.settle()
    assert wire.agent.room(stream.stream) == WINDOW


def test_6_9_1_2_sends_multiple_window_update_frames_increasing_the_flow_control_window_to_above_2_31_1() -> None:
    # An absolute count cannot overflow; what is a fault is a count of bytes that were never sent.
    wire = wired()
    responding(wire)
    with pytest.raises(OffsetMismatch):
        credit(wire, Credit(received=2**31, limits=(), closed=()))


def test_6_9_1_3_sends_multiple_window_update_frames_increasing_the_window_to_above_2_31_1_on_a_stream() -> None:
    wire = wired()
    stream = responding(wire).stream
    assert credit(wire, Credit(received=1, limits=((stream, WINDOW + 1),), closed=())) != []
    with pytest.raises(OffsetMismatch):
        credit(wire, Credit(received=1, limits=((stream, 2**31),), closed=()))


def test_6_9_1_data_beyond_the_window_is_a_fault_by_one_byte() -> None:
    wire = wired()
    stream = responding(wire).stream
    assert takes(wire, (EntryKind.CHUNK, stream, 1, b"y" * (WINDOW - 1))) == [("request", b"y" * (WINDOW - 1))]
    with pytest.raises(CreditExceeded):
        takes(wire, (EntryKind.CHUNK, stream, WINDOW, b"z"))
