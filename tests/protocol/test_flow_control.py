"""Many streams over one link: everybody moves, and who does not read harms nobody else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.wire import Wire, content
from xim_protocol.agent_session import Link
from xim_protocol.codec import decode, encode
from xim_protocol.errors import CreditExceeded
from xim_protocol.events import StreamFailed
from xim_protocol.ids import StreamId
from xim_protocol.messages import Batch, Channel, Credit, EntryKind, FailCode, FlowControl
from xim_protocol.router_session import RouterStream

PUBLISHED = FlowControl()
"""Window 65,536, replenish at 0.5, pause at 262,144: the defaults of the original agent."""


class Party:
    """Streams that want to answer for ever, of which some clients read whatever came."""

    def __init__(self, flow: FlowControl, streams: int, *, streaming_socket: bool = True) -> None:
        self.wire = Wire(flow=flow, streaming_socket=streaming_socket).connect()
        self.streams: dict[str, RouterStream[str]] = {}
        self.received: dict[str, int] = {}
        for at in range(streams):
            context = f"request-{at}"
            self.streams[context] = self.wire.submit(context)
            self.received[context] = 0
        self.wire.settle()
        for stream in self.streams.values():
            self.wire.agent.start_response(stream.stream, 200, "text/plain")

    def round(self, offer: int, readers: set[str]) -> None:
        """Every engine offers `offer` bytes, everything is delivered, the readers read all they got."""
        agent, router = self.wire.agent, self.wire.router
        assert router is not None
        for context, stream in self.streams.items():
            if agent.is_live(stream.stream):
                produced = agent._streams[stream.stream].credit.produced
                agent.produce(stream.stream, content(context, produced, offer), self.wire.now)
        self.wire.settle()
        for event in self.wire.router_events:
            if isinstance(event, tuple):
                context, payload = event
                assert payload == content(context, self.received[context], len(payload))
                self.received[context] += len(payload)
        self.wire.router_events.clear()
        for context in readers:
            stream = self.streams[context]
            router.consumed(stream, self.received[context] - stream.credit.consumed)
        self.wire.settle()

    def total(self, contexts: set[str]) -> int:
        return sum(self.received[context] for context in contexts)


@pytest.mark.parametrize("streams", [1, 4, 9, 64])
@pytest.mark.parametrize("offer", [100, 65_536])
def test_with_the_published_defaults_every_stream_moves_in_every_round(streams: int, offer: int) -> None:
    party = Party(PUBLISHED, streams)
    for rounds in range(1, 6):
        party.round(offer, readers=set(party.streams))
        assert all(size >= rounds * min(offer, 32_768) for size in party.received.values())


@pytest.mark.parametrize("asleep", [4, 8, 64])
def test_clients_that_never_read_slow_no_other_stream(asleep: int) -> None:
    party = Party(PUBLISHED, asleep + 1)
    reader = {f"request-{asleep}"}
    sleepers = set(party.streams) - reader
    for rounds in range(1, 20):
        party.round(65_536, readers=reader)
        assert party.total(reader) == rounds * 65_536
    assert {party.received[context] for context in sleepers} == {PUBLISHED.window_bytes}


def test_a_client_that_does_not_read_holds_its_own_window_and_nothing_else() -> None:
    party = Party(PUBLISHED, 1)
    for _ in range(5):
        party.round(1_000_000, readers=set())
    held = party.wire.agent.statistics()
    assert held.kept_bytes == PUBLISHED.window_bytes
    assert held.unacknowledged_bytes < PUBLISHED.pause_threshold_bytes / 2


def test_a_stopped_reader_that_reads_again_gets_everything() -> None:
    party = Party(PUBLISHED, 2)
    for _ in range(3):
        party.round(65_536, readers={"request-0"})
    for _ in range(3):
        party.round(65_536, readers={"request-0", "request-1"})
    assert party.received["request-1"] == 3 * 65_536


@given(
    window=st.integers(1_024, 4_096),
    pause=st.integers(1_024, 8_192),
    threshold=st.floats(0.0, 1.0),
    streams=st.integers(1, 12),
    offer=st.integers(1, 5_000),
    sleepers=st.integers(0, 12),
    streaming=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_parameters_readers_move_and_sleepers_stop_at_their_window(
    window: int, pause: int, threshold: float, streams: int, offer: int, sleepers: int, streaming: bool
) -> None:
    flow = FlowControl(window_bytes=window, pause_threshold_bytes=pause, replenish_threshold=threshold)
    party = Party(flow, streams, streaming_socket=streaming)
    readers = set(list(party.streams)[sleepers:])
    for _ in range(2 * window // offer + 3):
        party.round(offer, readers)
    for context, size in party.received.items():
        # A reader's window was used up and renewed at least once.
        assert size > window if context in readers else size <= window


def test_a_paused_link_serves_first_who_was_served_last() -> None:
    flow = FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024)
    party = Party(flow, 3)
    for stream in party.streams.values():
        party.wire.agent.produce(stream.stream, bytes(3_000), 0.0)
    order = []
    for _ in range(6):
        party.wire.collect()
        while party.wire.deliver_to_router(Channel.STREAMING):
            pass
        order += [event[0] for event in party.wire.router_events if isinstance(event, tuple)]
        party.wire.router_events.clear()
        party.wire.collect()
        while party.wire.deliver_to_agent(Channel.CONTROL):
            pass
    assert order[:3] == ["request-0", "request-1", "request-2"]
    assert order[3:6] == ["request-0", "request-1", "request-2"]


def test_a_paused_link_has_nothing_pending_until_the_router_reports() -> None:
    party = Party(FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024), 1)
    party.wire.agent.produce(StreamId(1), bytes(3_000), 0.0)
    party.wire.collect_from_agent()
    assert not party.wire.agent.pending
    party.wire.deliver_to_router(Channel.STREAMING)
    party.wire.collect_from_router()
    party.wire.deliver_to_agent(Channel.CONTROL)
    assert party.wire.agent.pending


def test_a_link_that_still_has_too_much_under_way_stays_paused() -> None:
    party = Party(FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024), 1)
    agent = party.wire.agent
    agent.produce(StreamId(1), bytes(3_000), 0.0)
    agent.gather()
    for received, pending in ((512, False), (513, True)):
        agent.receive(Channel.CONTROL, encode(Credit(received=received)), 0.0)
        assert agent.pending is pending


def test_the_end_of_a_stream_passes_a_paused_link() -> None:
    party = Party(FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024), 2)
    agent = party.wire.agent
    agent.produce(StreamId(1), bytes(3_000), 0.0)
    agent.gather()
    agent.fail(StreamId(2), FailCode.ENGINE_BROKEN, "", retryable=False)
    assert agent.gather() == 2  # its start and its end


def test_a_stream_that_has_more_to_say_leaves_nobody_behind_that_was_held_back_before_it() -> None:
    party = Party(FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024), 3)
    agent = party.wire.agent
    for stream in (1, 2, 3):
        agent.produce(StreamId(stream), content(f"request-{stream - 1}", 0, 1_000), 0.0)
        agent.gather()
    party.round(0, readers=set(party.streams))
    assert party.received == dict.fromkeys(party.streams, 1_000)


def test_who_was_held_back_goes_before_who_came_later() -> None:
    party = Party(FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024), 2)
    agent = party.wire.agent
    agent.produce(StreamId(2), bytes(2_000), 0.0)
    agent.gather()
    agent.produce(StreamId(1), bytes(2_000), 0.0)
    agent.frames_to_send()
    agent.receive(Channel.CONTROL, encode(Credit(received=1_024)), 0.0)
    agent.gather()
    sent = [decode(frames) for _, frames in agent.frames_to_send()]
    assert [entry[1] for batch in sent if isinstance(batch, Batch) for entry in batch.entries] == [2, 1, 1]


def test_the_end_of_a_stream_waits_for_its_bytes() -> None:
    party = Party(FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024), 1)
    agent = party.wire.agent
    agent.produce(StreamId(1), content("request-0", 0, 3_000), 0.0)
    agent.end(StreamId(1), None)
    assert agent.gather() == 2  # its start and what the link takes
    party.round(0, readers=set())
    assert party.received == {"request-0": 3_000}
    assert party.wire.agent.statistics().streams == 0


def test_a_batch_ends_where_it_is_long_enough() -> None:
    party = Party(PUBLISHED, 3)
    for stream in party.streams.values():
        party.wire.agent.produce(stream.stream, bytes(40_000), 0.0)
    party.wire.agent.gather()
    assert len(party.wire.agent.frames_to_send()) == 2


def test_an_agent_beyond_a_streams_limit_is_at_fault_whatever_the_link_allows() -> None:
    party = Party(PUBLISHED, 1)
    assert party.wire.router is not None
    start = (EntryKind.START, 1, 200, "text/plain")
    over = Batch(entries=(start, (EntryKind.CHUNK, 1, 0, bytes(PUBLISHED.window_bytes + 1))))
    with pytest.raises(CreditExceeded, match="limit 65536"):
        party.wire.router.receive(Channel.STREAMING, encode(over))


def test_an_agent_that_does_not_pause_is_at_fault_even_with_streams_in_credit() -> None:
    flow = FlowControl(window_bytes=4_096, pause_threshold_bytes=1_024)
    party = Party(flow, 1)
    assert party.wire.router is not None
    start = (EntryKind.START, 1, 200, "text/plain")
    over = Batch(entries=(start, (EntryKind.CHUNK, 1, 0, bytes(1_025))))
    with pytest.raises(CreditExceeded, match="link"):
        party.wire.router.receive(Channel.STREAMING, encode(over))


# --- Stalled streams ------------------------------------------------------------------------------------------------


def test_a_stream_without_credit_for_the_timeout_fails_as_stalled() -> None:
    party = Party(PUBLISHED, 1)
    party.round(65_537, readers=set())
    assert party.wire.agent.next_deadline() == 10.0  # the renewal
    assert [event for event in party.wire.advance(29.9) if isinstance(event, StreamFailed)] == []
    party.wire.settle()
    assert party.wire.advance(0.1) == [StreamFailed(stream=StreamId(1), code=FailCode.STALLED)]
    party.wire.settle()
    assert [getattr(event, "code", None) for event in party.wire.router_events if not isinstance(event, tuple)][-1] == (
        FailCode.STALLED
    )


def test_credit_stops_the_stall_clock() -> None:
    party = Party(PUBLISHED, 1)
    party.round(65_537, readers=set())
    party.wire.advance(20.0)
    party.round(1, readers={"request-0"})
    party.round(65_537, readers=set())
    party.wire.advance(29.0)
    party.wire.settle()
    assert party.wire.agent.is_live(StreamId(1))


def test_the_stall_clock_stands_still_without_a_link() -> None:
    party = Party(PUBLISHED, 1)
    wire = party.wire
    party.round(65_537, readers=set())  # waits from 0
    wire.advance(10.0)
    wire.settle()
    wire.drop()
    wire.now += 15.0
    wire.connect()  # waited for 10 so far
    wire.advance(19.9)
    wire.settle()
    assert wire.agent.is_live(StreamId(1))
    assert StreamFailed(stream=StreamId(1), code=FailCode.STALLED) in wire.advance(0.1)


def test_a_stream_that_stalls_without_a_link_waits_from_the_next_one() -> None:
    party = Party(PUBLISHED, 1)
    wire = party.wire
    wire.drop()
    party.wire.agent.produce(StreamId(1), bytes(65_537), 0.0)
    wire.now += 15.0
    wire.connect()
    wire.advance(29.9)
    wire.settle()
    assert wire.agent.is_live(StreamId(1))
    assert StreamFailed(stream=StreamId(1), code=FailCode.STALLED) in wire.advance(0.1)


IMPATIENT = FlowControl(stall_timeout_ms=5_000)


def test_a_stalled_stream_that_ended_is_not_failed_once_more() -> None:
    party = Party(IMPATIENT, 1)
    party.round(65_537, readers=set())
    party.wire.agent.fail(StreamId(1), FailCode.ENGINE_BROKEN, "", retryable=False)
    party.wire.agent.gather()
    assert not [event for event in party.wire.advance(6.0) if isinstance(event, StreamFailed)]
    party.wire.settle()
    assert getattr(party.wire.router_events[-1], "code", None) == FailCode.ENGINE_BROKEN


@pytest.mark.parametrize("attaching", [False, True])
def test_nothing_stalls_while_a_link_is_on_its_way(attaching: bool) -> None:
    party = Party(IMPATIENT, 1)
    wire = party.wire
    party.round(65_537, readers=set())
    wire.now += 4.0
    wire.drop()
    wire.agent.connect(wire.now)
    if attaching:
        wire.collect()
        wire.deliver_to_router(Channel.CONTROL)
        wire.collect()
        wire.deliver_to_agent(Channel.CONTROL)
        assert wire.agent.link is Link.ATTACHING
    wire.now += 2.0
    wire.agent.handle_timeout(wire.now)
    assert wire.agent.is_live(StreamId(1))


# --- Without flow control -------------------------------------------------------------------------------------------

OFF = FlowControl(enabled=False)


def test_without_flow_control_limits_are_not_waited_for_and_no_fault() -> None:
    party = Party(OFF, 1)
    for _ in range(10):
        party.round(100_000, readers=set())
    assert party.received == {"request-0": 1_000_000}


def test_without_flow_control_credit_still_frees_what_was_consumed() -> None:
    party = Party(OFF, 1)
    party.round(100_000, readers={"request-0"})
    assert party.wire.agent.statistics().kept_bytes == 0


def test_without_flow_control_the_link_keeps_at_most_the_pause_threshold() -> None:
    party = Party(OFF, 5)
    for _ in range(10):
        party.round(100_000, readers=set())
        assert party.wire.agent.statistics().kept_bytes <= OFF.pause_threshold_bytes


def test_without_flow_control_a_short_answer_survives_a_lost_link() -> None:
    party = Party(OFF, 1)
    party.wire.agent.produce(StreamId(1), content("request-0", 0, 5_000), 0.0)
    party.wire.collect()
    party.wire.reconnect()
    party.round(5_000, readers=set())
    assert party.received == {"request-0": 10_000}


@pytest.mark.parametrize("ended", [False, True])
def test_without_flow_control_a_stream_that_outran_its_buffer_fails_on_a_lost_link(ended: bool) -> None:
    party = Party(OFF, 1)
    agent = party.wire.agent
    party.round(100, readers=set())
    party.wire.drop()
    for _ in range(10):
        agent.produce(StreamId(1), bytes(100_000), 0.0)
    assert agent.statistics().kept_bytes == OFF.pause_threshold_bytes
    if ended:
        agent.end(StreamId(1), None)
    party.wire.connect()
    told = StreamFailed(stream=StreamId(1), code=FailCode.OUTRUN) in party.wire.agent_events
    assert told is not ended  # who ended its stream is not told of it again
    assert getattr(party.wire.router_events[-1], "code", None) == FailCode.OUTRUN
    assert party.wire.agent.statistics().streams == 0


def test_without_flow_control_what_comes_between_welcome_and_attached_is_kept() -> None:
    """The router was told that the stream goes on: what it was promised must not make room for what is new."""
    party = Party(OFF, 1)
    wire, share = party.wire, OFF.pause_threshold_bytes
    wire.agent.produce(StreamId(1), content("request-0", 0, share), wire.now)
    wire.drop()
    wire.agent.connect(wire.now)
    wire.collect()
    wire.deliver_to_router(Channel.CONTROL)
    wire.collect()
    wire.deliver_to_agent(Channel.CONTROL)
    assert wire.agent.link is Link.ATTACHING
    wire.agent.produce(StreamId(1), content("request-0", share, 1_000), wire.now)
    party.round(1_000, readers=set())
    assert party.received == {"request-0": share + 2_000}


def test_without_a_streaming_socket_everything_travels_on_control() -> None:
    party = Party(PUBLISHED, 2, streaming_socket=False)
    party.round(1_000, readers=set(party.streams))
    assert party.received == {"request-0": 1_000, "request-1": 1_000}
