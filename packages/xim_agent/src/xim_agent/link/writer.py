"""Gathers what all streams of one router produce into few messages, and holds back who has no credit.

A wake-up through ZeroMQ costs more than ten chunks, and an engine's API server writes the streams of one step one after
the other; so chunks wait a moment for company, and so does the end of an event stream, which comes with the last of
them: at once it would cut the burst of a step in two. First bytes, failures and other ends leave with this turn of the
loop (docs/reference/wire-protocol.md, "Requests and responses"), so that a short answer is one message.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xim_protocol.agent_session import AgentSession
from xim_protocol.codec import Frames
from xim_protocol.ids import StreamId
from xim_protocol.messages import Channel, Counted, FailCode, RefusalReason, Usage

FULL_BYTES = 32 * 1024
"""So much waits for company at most; half of what one message carries."""
BUCKETS = 13
"""Entries per message are counted up to 1, 2, 4 ... 4,096, the most that a message may have."""


class StreamGone(Exception):
    """Nobody takes the stream's bytes any more: it was cancelled, stalled or aborted."""

    def __init__(self, stream: StreamId) -> None:
        super().__init__(f"stream {stream} is gone")
        self.stream = stream


@dataclass(frozen=True, kw_only=True, slots=True)
class WriterStatistics:
    """What left so far; `buckets[i]` counts messages with at most 2^i entries and more than the bucket before."""

    messages: int
    entries: int
    buckets: tuple[int, ...]


class StreamWriter:
    """The writing side of one session; every method but `write` returns at once."""

    def __init__(
        self,
        session: AgentSession,
        send: Callable[[list[tuple[Channel, Frames]]], None],
        *,
        clock: Callable[[], float],
        coalesce_s: float,
        on_stall: Callable[[], None],
        congested: Callable[[], bool],
    ) -> None:
        """`on_stall` is told when a stream ran out of credit, since a stall has a deadline; `congested` says that a
        socket takes nothing more, which matters where no credit holds a stream back."""
        self._session = session
        self._send = send
        self._clock = clock
        self._coalesce_s = coalesce_s
        self._on_stall = on_stall
        self._congested = congested
        self._loop = asyncio.get_running_loop()
        self._waiting_bytes = 0
        self._armed: asyncio.Handle | None = None
        self._hurried = False
        """What is armed is the end of this turn of the loop."""
        self._opening: set[StreamId] = set()
        """Started, without a first byte yet."""
        self._event_streams: set[StreamId] = set()
        """Whose end may wait like any chunk: its client has the bytes before it already, or gets them with it."""
        self._waiters: dict[StreamId, asyncio.Future[None]] = {}
        self._messages = 0
        self._entries = 0
        self._buckets = [0] * BUCKETS

    # --- What a stream says ----------------------------------------------------------------------------------------

    def is_live(self, stream: StreamId) -> bool:
        """True while the stream may still produce."""
        return self._session.is_live(stream)

    def refuse(self, stream: StreamId, reason: RefusalReason, in_flight: int) -> None:
        """Do not take the request."""
        self._session.refuse(stream, reason, in_flight)
        self.flush()

    def continue_body(self, stream: StreamId) -> None:
        """Ask for a long request body."""
        self._session.continue_body(stream)
        self.flush()

    def start_response(self, stream: StreamId, status: int, content_type: str) -> None:
        """The engine answered; leaves with the first bytes, or the end."""
        self._session.start_response(stream, status, content_type)
        self._opening.add(stream)
        if content_type.startswith("text/event-stream"):
            self._event_streams.add(stream)

    def offer(self, stream: StreamId, payload: bytes) -> bytes | None:
        """Hand over what there is credit for now; returns what is left over, None when nothing is.

        Raises:
            StreamGone: nobody takes the stream's bytes any more.
        """
        session = self._session
        if not session.is_live(stream):
            raise StreamGone(stream)
        if not session.flow.enabled and self._congested():
            return payload
        taken = session.produce(stream, payload, self._clock())
        self._staged(stream, taken)
        return None if taken == len(payload) else payload[taken:]

    async def write(self, stream: StreamId, payload: bytes) -> None:
        """Hand over `payload`; suspends only while the stream has no credit.

        Raises:
            StreamGone: nobody takes the stream's bytes any more.
        """
        session = self._session
        if not session.is_live(stream):
            raise StreamGone(stream)
        taken = session.produce(stream, payload, self._clock())
        self._staged(stream, taken)
        while taken < len(payload):
            payload = payload[taken:]
            self._on_stall()
            await self._credit_for(stream)
            taken = session.produce(stream, payload, self._clock())
            self._staged(stream, taken)
        if not session.flow.enabled:
            await self._room_for(stream)

    def end(self, stream: StreamId, usage: Usage | None) -> None:
        """The response is whole."""
        self._session.end(stream, usage)
        patient = stream in self._event_streams and stream not in self._opening
        self._forget(stream)
        if patient:
            self._wait_for_company()
        else:
            self._hurry()

    def fail(
        self, stream: StreamId, code: FailCode, message: str, *, retryable: bool, usage: Usage | None = None
    ) -> None:
        """The stream ends without a whole response."""
        self._session.fail(stream, code, message, retryable=retryable, usage=usage)
        self._forget(stream)
        self._hurry()

    def announce_slots(self, free: int) -> bool:
        """Places are free again. False while no link can carry it."""
        announced = self._session.announce_slots(free)
        self.flush()
        return announced

    def report_counted(self, counted: Counted) -> None:
        """What a stream cost that ended without the engine's report; lost where no link can carry it."""
        self._session.report_counted(counted)
        self.flush_pending()

    # --- What the session was told ---------------------------------------------------------------------------------

    def credited(self, streams: Iterable[StreamId]) -> None:
        """These streams may go on."""
        for stream in streams:
            self._wake(stream)

    def gone(self, stream: StreamId) -> None:
        """The stream was cancelled, stalled or aborted."""
        self._forget(stream)
        self._wake(stream)

    def linked(self) -> None:
        """The link is open, or has room again: go on with what waited for it."""
        for stream in list(self._waiters):
            self._wake(stream)
        self.flush()

    # --- Sending ---------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send everything that may leave now."""
        self._disarm()
        self._waiting_bytes = 0
        outgoing = self._session.frames_to_send()
        while entries := self._session.gather():
            batches = self._session.frames_to_send()
            outgoing += batches
            self._count(entries, len(batches))
        if outgoing:
            self._send(outgoing)

    def flush_pending(self) -> None:
        """After something came in: answer it, and send what the link's pause held back; chunks keep waiting."""
        if self._armed is None:
            self.flush()
        elif outgoing := self._session.frames_to_send():
            self._send(outgoing)

    def close(self) -> None:
        """Send nothing more."""
        self._disarm()

    def statistics(self) -> WriterStatistics:
        """A reading for metrics."""
        return WriterStatistics(messages=self._messages, entries=self._entries, buckets=tuple(self._buckets))

    def _staged(self, stream: StreamId, size: int) -> None:
        if not size:
            return
        self._waiting_bytes += size
        if stream in self._opening:
            self._opening.discard(stream)
            self._hurry()
        elif self._waiting_bytes >= FULL_BYTES:
            self.flush()
        else:
            self._wait_for_company()

    def _wait_for_company(self) -> None:
        if self._armed is not None:
            return
        if self._coalesce_s > 0:
            self._armed = self._loop.call_later(self._coalesce_s, self.flush)
        else:
            self._hurry()

    def _hurry(self) -> None:
        """Flush once this turn of the loop has brought what it brings."""
        if not self._hurried:
            self._disarm()
            self._hurried = True
            self._armed = self._loop.call_soon(self.flush)

    def _disarm(self) -> None:
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None
            self._hurried = False

    def _forget(self, stream: StreamId) -> None:
        self._opening.discard(stream)
        self._event_streams.discard(stream)

    def _count(self, entries: int, messages: int) -> None:
        self._messages += messages
        self._entries += entries
        # One message as a rule; where the size limit cut it into several, each counts with its share.
        self._buckets[(max(1, entries // messages) - 1).bit_length()] += messages

    # --- Waiting ---------------------------------------------------------------------------------------------------

    async def _credit_for(self, stream: StreamId) -> None:
        """Ended by credit, by the stall timeout, by a cancel, or by the end of the lease."""
        while self._session.is_live(stream) and self._session.room(stream) <= 0:
            await self._sleep(stream)
        if not self._session.is_live(stream):
            raise StreamGone(stream)

    async def _room_for(self, stream: StreamId) -> None:
        """Without flow control the link itself is the brake. Ended like `_credit_for`, and by the link."""
        while self._session.is_live(stream) and self._congested():
            await self._sleep(stream)

    async def _sleep(self, stream: StreamId) -> None:
        waiter = self._waiters[stream] = self._loop.create_future()
        try:
            await waiter
        finally:
            if self._waiters.get(stream) is waiter:
                del self._waiters[stream]

    def _wake(self, stream: StreamId) -> None:
        waiter = self._waiters.get(stream)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
