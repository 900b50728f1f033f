"""Few messages: what waits for company, and what does not. Two real sessions, no sockets; nothing waits for a timer."""

import asyncio

import pytest

from tests.support.programs import PATIENCE_S
from tests.support.wire import Wire
from xim_agent.link.writer import FULL_BYTES, StreamGone, StreamWriter
from xim_protocol.agent_session import AgentSession
from xim_protocol.codec import Frames, decode
from xim_protocol.events import RequestReceived
from xim_protocol.ids import StreamId
from xim_protocol.messages import Batch, Channel, EntryKind, FailCode, FlowControl


class Written:
    """A writer on an open session, and the batches that left."""

    def __init__(self, *, coalesce_s: float = 3600.0, flow: FlowControl | None = None) -> None:
        self.wire = Wire(flow=flow).connect()
        self.session: AgentSession = self.wire.agent
        self.batches: list[list[int]] = []
        """The kinds of entries of each message."""
        self.stalls = 0
        self.full = False
        self.writer = StreamWriter(
            self.session,
            self._send,
            clock=lambda: self.wire.now,
            coalesce_s=coalesce_s,
            on_stall=self._stalled,
            congested=lambda: self.full,
        )

    def stream(self, content_type: str = "text/event-stream") -> StreamId:
        """A stream whose response has started."""
        self.wire.submit("r")
        self.wire.settle()
        event = self.wire.agent_events[-1]
        assert isinstance(event, RequestReceived)
        self.writer.start_response(event.submit.stream, 200, content_type)
        return event.submit.stream

    def _send(self, messages: list[tuple[Channel, Frames]]) -> None:
        for channel, frames in messages:
            message = decode(frames)
            if isinstance(message, Batch):
                self.batches.append([int(str(int(entry[0]))) for entry in message.entries])  # type: ignore[call-overload]
            self.wire.to_router[channel].append(frames)

    def _stalled(self) -> None:
        self.stalls += 1


async def one_turn() -> None:
    """Everything that this turn of the loop was to do is done."""
    turn = asyncio.Event()
    asyncio.get_running_loop().call_soon(turn.set)
    await turn.wait()


async def test_the_first_bytes_leave_with_this_turn_of_the_loop_and_later_ones_wait() -> None:
    written = Written()
    stream = written.stream()
    assert written.batches == []
    await written.writer.write(stream, b"first")
    await one_turn()
    assert written.batches == [[EntryKind.START, EntryKind.CHUNK]]
    await written.writer.write(stream, b"second")
    await one_turn()
    assert len(written.batches) == 1
    written.writer.flush()
    assert written.batches[1:] == [[EntryKind.CHUNK]]


async def test_the_end_of_an_event_stream_waits_like_a_chunk() -> None:
    written = Written()
    stream = written.stream()
    await written.writer.write(stream, b"first")
    await one_turn()
    written.writer.end(stream, None)
    await one_turn()
    assert len(written.batches) == 1
    written.writer.flush()
    assert written.batches[1:] == [[EntryKind.END]]


async def test_an_end_without_a_byte_leaves_at_once() -> None:
    written = Written()
    written.writer.end(written.stream(), None)
    await one_turn()
    assert written.batches == [[EntryKind.START, EntryKind.END]]


async def test_any_other_answer_is_not_held_back_at_its_end() -> None:
    # Its client has nothing of it before it is whole.
    written = Written()
    stream = written.stream("application/json")
    await written.writer.write(stream, b"first")
    await one_turn()
    await written.writer.write(stream, b"second")
    written.writer.end(stream, None)
    await one_turn()
    assert written.batches[1:] == [[EntryKind.CHUNK, EntryKind.END]]


async def test_a_short_answer_is_one_message() -> None:
    written = Written()
    stream = written.stream()
    await written.writer.write(stream, b"all of it")
    written.writer.end(stream, None)
    await one_turn()
    assert written.batches == [[EntryKind.START, EntryKind.CHUNK, EntryKind.END]]


async def test_streams_that_begin_and_end_in_one_turn_share_its_message() -> None:
    written = Written()
    ending, going_on, beginning = (written.stream() for _ in range(3))
    for stream in (ending, going_on):
        await written.writer.write(stream, b"first")
    await one_turn()
    await written.writer.write(going_on, b"second")
    await written.writer.write(beginning, b"first")
    written.writer.end(ending, None)
    await written.writer.write(going_on, b"third")
    assert len(written.batches) == 1
    await one_turn()
    assert sorted(written.batches[1]) == sorted([EntryKind.START, EntryKind.CHUNK, EntryKind.CHUNK, EntryKind.END])
    assert len(written.batches) == 2


async def test_nothing_leaves_after_close() -> None:
    written = Written()
    stream = written.stream()
    await written.writer.write(stream, b"first")
    written.writer.close()
    await one_turn()
    assert written.batches == []


async def test_a_failure_takes_what_waits_with_it() -> None:
    written = Written()
    first, second = written.stream(), written.stream()
    for stream in (first, second):
        await written.writer.write(stream, b"first")
    await one_turn()
    await written.writer.write(first, b"second")
    written.writer.fail(first, FailCode.ENGINE_BROKEN, "", retryable=True)
    await one_turn()
    assert written.batches[1:] == [[EntryKind.CHUNK, EntryKind.FAIL]]


async def test_much_that_waits_leaves_without_a_timer() -> None:
    written = Written()
    stream = written.stream()
    await written.writer.write(stream, b"first")
    await one_turn()
    for _ in range(FULL_BYTES // 1024):
        assert len(written.batches) == 1
        await written.writer.write(stream, bytes(1024))
    assert written.batches[1:] == [[EntryKind.CHUNK]]


async def test_at_zero_what_one_turn_of_the_loop_brings_leaves_together() -> None:
    written = Written(coalesce_s=0.0)
    streams = [written.stream() for _ in range(3)]
    for stream in streams:
        await written.writer.write(stream, b"first")
    await one_turn()
    for stream in streams:
        await written.writer.write(stream, b"second")
    await one_turn()
    assert written.batches[1:] == [[EntryKind.CHUNK] * 3]
    statistics = written.writer.statistics()
    assert (statistics.messages, statistics.entries, statistics.buckets[:4]) == (2, 9, (0, 0, 1, 1))


async def test_a_write_with_credit_never_suspends() -> None:
    written = Written()
    stream = written.stream()
    writing = written.writer.write(stream, bytes(65_536))
    with pytest.raises(StopIteration):
        writing.send(None)


async def test_a_write_beyond_credit_waits_for_it_and_says_so() -> None:
    written = Written()
    stream = written.stream()
    writing = asyncio.create_task(written.writer.write(stream, bytes(65_537)))
    await asyncio.wait({writing}, timeout=0.01)
    assert not writing.done()
    assert written.stalls == 1
    written.wire.settle()
    assert written.wire.router is not None
    taken = written.wire.router_events[-1]
    assert isinstance(taken, tuple)
    for number, each in written.wire.router._streams.items():
        assert number == stream
        written.wire.router.consumed(each, 65_536)
    written.wire.settle()
    written.writer.credited([stream])
    async with asyncio.timeout(PATIENCE_S):
        await writing


async def test_a_write_to_a_stream_that_is_gone_says_so() -> None:
    written = Written()
    stream = written.stream()
    writing = asyncio.create_task(written.writer.write(stream, bytes(65_537)))
    await asyncio.wait({writing}, timeout=0.01)
    written.wire.drop()
    written.session.handle_timeout(1e9)  # the lease is over
    written.writer.gone(stream)
    with pytest.raises(StreamGone):
        async with asyncio.timeout(PATIENCE_S):
            await writing
    with pytest.raises(StreamGone):
        await written.writer.write(stream, b"more")


async def test_after_much_has_left_little_waits_again() -> None:
    written = Written()
    stream = written.stream()
    await written.writer.write(stream, b"first")
    await one_turn()
    await written.writer.write(stream, bytes(FULL_BYTES))
    left = len(written.batches)
    await written.writer.write(stream, b"little")
    assert len(written.batches) == left


async def test_chunks_go_on_waiting_when_something_came_in() -> None:
    written = Written()
    stream = written.stream()
    await written.writer.write(stream, b"first")
    await one_turn()
    await written.writer.write(stream, b"second")
    written.writer.flush_pending()
    assert len(written.batches) == 1


async def test_nothing_is_kept_of_streams_that_are_over() -> None:
    written = Written()
    writer = written.writer
    ended, failed, gone, waiting = (written.stream() for _ in range(4))
    await writer.write(ended, b"all")
    writer.end(ended, None)
    writer.fail(failed, FailCode.ENGINE_BROKEN, "", retryable=True)
    writing = asyncio.create_task(writer.write(waiting, bytes(65_537)))
    await asyncio.wait({writing}, timeout=0.01)
    written.wire.drop()
    written.session.handle_timeout(1e9)  # the lease is over
    for stream in (gone, waiting):
        writer.gone(stream)
    with pytest.raises(StreamGone):
        await writing
    assert (writer._opening, writer._event_streams, writer._waiters) == (set(), set(), {})


async def test_without_flow_control_a_full_socket_is_the_brake() -> None:
    written = Written(flow=FlowControl(enabled=False))
    stream = written.stream()
    written.full = True
    writing = asyncio.create_task(written.writer.write(stream, bytes(100_000)))
    await asyncio.wait({writing}, timeout=0.01)
    assert not writing.done()
    written.full = False
    written.writer.linked()
    async with asyncio.timeout(PATIENCE_S):
        await writing
