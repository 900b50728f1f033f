"""Who comes first in a message: it is taken apart in its order, and a first byte has somebody waiting for it."""

from tests.support.wire import Wire
from xim_protocol.codec import decode
from xim_protocol.ids import StreamId
from xim_protocol.messages import Batch, Channel, FlowControl


def started(wire: Wire, count: int) -> list[StreamId]:
    """`count` streams whose first byte has left."""
    streams = [wire.submit(f"r{n}").stream for n in range(count)]
    wire.settle()
    for stream in streams:
        wire.agent.start_response(stream, 200, "text/event-stream")
        wire.agent.produce(stream, b"first", wire.now)
    wire.settle()
    return streams


def turns(wire: Wire) -> list[StreamId]:
    """The streams of the next message, each once, in their order."""
    wire.agent.gather()
    (message,) = [decode(frames) for _, frames in wire.agent.frames_to_send()]
    assert isinstance(message, Batch)
    return list(dict.fromkeys(StreamId(int(str(entry[1]))) for entry in message.entries))


def test_first_bytes_come_before_what_waited_for_company() -> None:
    wire = Wire().connect()
    running = started(wire, 3)
    new = wire.submit("new").stream
    wire.settle()
    for stream in running:
        wire.agent.produce(stream, b"more", wire.now)
    wire.agent.start_response(new, 200, "text/event-stream")
    wire.agent.produce(new, b"first", wire.now)
    assert turns(wire) == [new, *running]
    # From then on it is one of them.
    for stream in (*running, new):
        wire.agent.produce(stream, b"more", wire.now)
    assert turns(wire) == [*running, new]


def test_a_stream_that_has_said_nothing_yet_goes_before_nobody() -> None:
    wire = Wire().connect()
    (running,) = started(wire, 1)
    new = wire.submit("new").stream
    wire.settle()
    wire.agent.produce(running, b"more", wire.now)
    wire.agent.start_response(new, 200, "text/event-stream")
    assert turns(wire) == [running]


PAUSING = FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024)


def held_back(wire: Wire, streams: list[StreamId]) -> None:
    """Let the link pause: of `streams` the first takes all it has room for; the router has not reported yet."""
    for stream in streams:
        wire.agent.produce(stream, bytes(3_000), wire.now)
    wire.collect_from_agent()


def report(wire: Wire) -> None:
    """The router says how much it received."""
    while wire.deliver_to_router(Channel.STREAMING):
        pass
    wire.collect_from_router()
    while wire.deliver_to_agent(Channel.CONTROL):
        pass


def test_who_was_held_back_by_the_pause_comes_before_first_bytes() -> None:
    # Else streams that keep beginning could keep everybody else from going on.
    wire = Wire(flow=PAUSING).connect()
    first, second = started(wire, 2)
    new = wire.submit("new").stream
    wire.settle()
    held_back(wire, [first, second])
    wire.agent.start_response(new, 200, "text/event-stream")
    wire.agent.produce(new, b"first", wire.now)
    report(wire)
    assert turns(wire)[0] == second


def test_a_stream_that_is_forgotten_before_its_turn_has_none() -> None:
    wire = Wire(flow=PAUSING).connect()
    held_back(wire, started(wire, 2))
    report(wire)
    wire.restart_router()
    wire.connect()
    new = wire.submit("new").stream
    wire.settle()
    wire.agent.start_response(new, 200, "text/event-stream")
    wire.agent.produce(new, b"first", wire.now)
    assert turns(wire) == [new]
