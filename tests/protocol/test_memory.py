"""What a message and a request leave in memory: nothing that adds up."""

import tracemalloc

import pytest

from tests.protocol.golden_messages import GOLDEN
from tests.support.blocks import blocks_kept
from tests.support.wire import Wire
from xim_protocol.codec import decode, encode
from xim_protocol.messages import CancelReason
from xim_protocol.router_session import RouterSession

TIMES = 2_000
ONE_IN_TWO = 0.5
"""Far above what free lists take once, and below one block for each call."""


@pytest.mark.parametrize("name", GOLDEN)
def test_a_message_that_was_written_and_read_leaves_nothing(name: str) -> None:
    message = GOLDEN[name]
    assert blocks_kept(lambda: decode(encode(message)), TIMES) < ONE_IN_TWO


@pytest.mark.parametrize("name", ["slots", "entry_chunk"])
def test_a_short_message_takes_little_memory_while_it_is_written(name: str) -> None:
    message = GOLDEN[name]
    encode(message)
    tracemalloc.start()
    try:
        encode(message)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 * 1024


def joined() -> tuple[Wire, RouterSession[str]]:
    wire = Wire().connect()
    assert wire.router is not None
    return wire, wire.router


def forget_events(wire: Wire) -> None:
    wire.agent_events.clear()
    wire.router_events.clear()


def test_a_request_that_was_answered_leaves_nothing() -> None:
    wire, router = joined()

    def answered() -> None:
        stream = wire.submit("request")
        wire.settle()
        wire.agent.start_response(stream.stream, 200, "text/plain")
        for _ in range(2):
            wire.agent.produce(stream.stream, bytes(40_000), wire.now)
            wire.settle()
            router.consumed(stream, 40_000)
            wire.settle()
        wire.agent.end(stream.stream, None)
        wire.settle()
        forget_events(wire)

    assert blocks_kept(answered, TIMES) < ONE_IN_TWO


def test_a_request_whose_client_left_leaves_nothing() -> None:
    wire, router = joined()

    def left() -> None:
        stream = wire.submit("request")
        wire.settle()
        wire.agent.start_response(stream.stream, 200, "text/plain")
        wire.settle()
        router.cancel(stream, CancelReason.CLIENT_LEFT)
        wire.settle()
        forget_events(wire)

    assert blocks_kept(left, TIMES) < ONE_IN_TWO


def test_a_link_that_was_lost_under_requests_leaves_nothing() -> None:
    wire, _ = joined()
    streams = [wire.submit(f"request-{number}") for number in range(3)]
    wire.settle()
    for stream in streams:
        wire.agent.start_response(stream.stream, 200, "text/plain")

    def lost() -> None:
        wire.reconnect()
        forget_events(wire)

    assert blocks_kept(lost, TIMES) < ONE_IN_TWO
