"""When the router's session has something to send at once, and what may wait for company."""

from tests.support.wire import Wire
from xim_protocol.codec import MAX_TEXT
from xim_protocol.events import ResponseEnded, ResponseFailed
from xim_protocol.messages import FailCode
from xim_protocol.router_stream import CLOSED_AT_ONCE


def ended_streams(wire: Wire, count: int) -> None:
    """Bring `count` streams to their end at the router, without letting it send."""
    streams = [wire.submit(f"r{n}") for n in range(count)]
    wire.settle()
    for stream in streams:
        wire.agent.start_response(stream.stream, 200, "application/json")
        wire.agent.end(stream.stream, None)
    wire.collect_from_agent()
    assert wire.router is not None
    for channel in wire.to_router:
        while wire.deliver_to_router(channel):
            pass


def test_a_closed_stream_alone_waits_for_company() -> None:
    wire = Wire().connect()
    ended_streams(wire, 1)
    router = wire.router
    assert router is not None
    assert (router.closes_streams, router.wants_to_send) == (True, False)
    router.flush_credit()
    assert (router.closes_streams, router.wants_to_send) == (False, True)


def test_many_closed_streams_are_told_at_once() -> None:
    wire = Wire().connect()
    ended_streams(wire, CLOSED_AT_ONCE)
    assert wire.router is not None
    assert wire.router.wants_to_send


def test_a_request_leaves_at_once() -> None:
    wire = Wire().connect()
    wire.submit("r")
    assert wire.router is not None
    assert wire.router.wants_to_send
    wire.settle()
    assert not wire.router.wants_to_send


def test_many_streams_that_fail_at_once_with_long_texts_fit_into_messages() -> None:
    wire = Wire().connect()
    streams = [wire.submit(f"r{n}") for n in range(1_000)]
    wire.settle()
    for stream in streams:
        wire.agent.fail(stream.stream, FailCode.INTERNAL, "\N{SNOWMAN}" * MAX_TEXT, retryable=False)
    wire.settle()
    failed = [event for event in wire.router_events if isinstance(event, ResponseFailed)]
    assert len(failed) == len(streams)


def test_many_streams_that_start_at_once_with_long_content_types_fit_into_messages() -> None:
    wire = Wire().connect()
    streams = [wire.submit(f"r{n}") for n in range(2_100)]
    wire.settle()
    for stream in streams:
        wire.agent.start_response(stream.stream, 200, "\N{MUSICAL SYMBOL G CLEF}" * 256)
        wire.agent.end(stream.stream, None)
    wire.settle()
    ended = [event for event in wire.router_events if isinstance(event, ResponseEnded)]
    assert len(ended) == len(streams)


def test_many_short_answers_at_once_fit_into_messages() -> None:
    wire = Wire().connect()
    streams = [wire.submit(f"r{n}") for n in range(1_500)]
    wire.settle()
    for stream in streams:
        wire.agent.start_response(stream.stream, 200, "text/plain")
        wire.agent.produce(stream.stream, b"x", wire.now)
        wire.agent.end(stream.stream, None)
    wire.settle()
    ended = [event for event in wire.router_events if isinstance(event, ResponseEnded)]
    assert len(ended) == len(streams)
