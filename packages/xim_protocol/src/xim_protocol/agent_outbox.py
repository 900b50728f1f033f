"""What the streams of an agent's session have to send, and who sends next.

Streams take turns. Nothing leaves beyond the stream's own credit or the link's pause threshold; a stream that the
pause held back comes first when the router reports. Then come those that begin: a message is taken apart in its order,
and a client that has nothing yet waits for its first byte longer than the others for one more.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from xim_protocol.codec import MAX_ENTRIES
from xim_protocol.credit import CreditSender, LinkSender
from xim_protocol.errors import OffsetMismatch
from xim_protocol.ids import StreamId
from xim_protocol.messages import Body, Entry, EntryKind, FlowControl, StreamReport, Submit
from xim_protocol.stream import StreamState

BATCH_BYTES = 65_536
"""Payload bytes of one batch, unless a single entry is larger; bounds how long one message occupies a slow link."""


@dataclass(kw_only=True, slots=True, eq=False)
class AgentStream:
    """One stream as the agent sees it, kept until the router says closed."""

    submit: Submit
    credit: CreditSender
    state: StreamState = StreamState.SUBMITTED
    start: Entry | None = None
    start_sent: bool = False
    terminal: Entry | None = None
    """The terminal entry without its size, which is known when it leaves."""
    terminal_sent: bool = False
    body: bytearray | None = None
    """A long request body as far as it came; None when the body is whole or nobody waits for it."""

    def report(self) -> StreamReport:
        """How far the stream is, for a Hello."""
        return StreamReport(
            stream=self.submit.stream,
            started=self.start is not None,
            sent=self.credit.produced,
            ended=self.terminal is not None,
        )

    def take_body(self, piece: Body) -> bytes | None:
        """Add one piece of a long body; the whole body when this was the last.

        Raises:
            OffsetMismatch: the piece is not the next one, or goes beyond the stated length.
        """
        body = self.body
        if body is None:
            return None  # cancelled or refused meanwhile
        if piece.offset != len(body) or len(body) + len(piece.payload) > self.submit.body_bytes:
            raise OffsetMismatch(piece.stream, piece.offset, len(body))
        body += piece.payload
        if len(body) < self.submit.body_bytes:
            return None
        self.body = None
        return bytes(body)

    @property
    def all_sent(self) -> bool:
        """True when nothing of the stream waits to be sent."""
        if self.credit.sent != self.credit.produced:
            return False
        return self.terminal is None or self.terminal_sent


class AgentOutbox:
    """See the module's docstring."""

    def __init__(self, flow: FlowControl) -> None:
        self.sender = LinkSender(flow.pause_threshold_bytes, enforced=flow.enabled)
        self._dirty: dict[StreamId, AgentStream] = {}
        # Held back by the pause. Not in `_dirty`, so that `pending` is false while nothing can leave.
        self._blocked: dict[StreamId, AgentStream] = {}
        self._returning: dict[StreamId, AgentStream] = {}
        """Those of `_dirty` that the pause held back before."""
        self._continues: list[Entry] = []

    @property
    def pending(self) -> bool:
        """True when `gather` has something to look at."""
        return bool(self._dirty or self._continues)

    def new_link(self, flow: FlowControl) -> None:
        """Count from zero; requests for bodies went with the old link."""
        self.sender = LinkSender(flow.pause_threshold_bytes, enforced=flow.enabled)
        self._continues.clear()
        self._unblock()

    def mark(self, stream: AgentStream) -> None:
        """`stream` has something to send."""
        self._dirty[stream.submit.stream] = stream

    def drop(self, number: StreamId) -> None:
        """Nothing of the stream is to be sent any more."""
        self._dirty.pop(number, None)
        self._blocked.pop(number, None)
        self._returning.pop(number, None)

    def ask_body(self, number: StreamId, limit: int) -> None:
        """Ask for the stream's request body up to `limit`."""
        self._continues.append((EntryKind.CONTINUE, number, limit))

    def reported(self, received: int) -> None:
        """The router received so many payload bytes on this link.

        Raises:
            OffsetMismatch: more than were sent.
        """
        self.sender.report(received)
        if self.sender.room:
            self._unblock()

    def gather(self) -> Iterable[list[Entry]]:
        """Turn what may leave now into batches, one round: every stream has one turn."""
        entries, self._continues = self._continues, []
        waiting, self._dirty = self._in_turn(), {}
        size = 0
        served: dict[StreamId, AgentStream] = {}
        unserved: dict[StreamId, AgentStream] = {}
        for number, stream in waiting.items():
            before = stream.credit.sent
            size += self._take_turn(stream, entries)
            if not stream.all_sent:
                (served if stream.credit.sent != before else unserved)[number] = stream
            if size >= BATCH_BYTES or len(entries) >= MAX_ENTRIES - 3:
                yield entries
                entries, size = [], 0
        if entries:
            yield entries
        if self.sender.room:
            self._dirty = served
        else:
            # Who got nothing this time comes first next time.
            self._blocked = self._blocked | unserved | served

    def _in_turn(self) -> dict[StreamId, AgentStream]:
        returning, self._returning = self._returning, {}
        beginning = {number: stream for number, stream in self._dirty.items() if not stream.start_sent}
        return returning | beginning | self._dirty if beginning else self._dirty

    def _take_turn(self, stream: AgentStream, entries: list[Entry]) -> int:
        """Append the entries of one stream that may leave now; returns payload bytes, and characters of texts."""
        credit, sender = stream.credit, self.sender
        size = 0
        if not stream.start_sent and stream.start is not None and (credit.produced or stream.terminal):
            entries.append(stream.start)
            stream.start_sent = True
            size = len(stream.start[3])  # type: ignore[arg-type]
        taken = credit.take(min(sender.room, BATCH_BYTES))
        if taken is not None:
            offset, payload = taken
            size += len(payload)
            sender.send(len(payload))
            entries.append((EntryKind.CHUNK, stream.submit.stream, offset, payload))
        terminal = stream.terminal
        if terminal is not None and not stream.terminal_sent and credit.sent == credit.produced:
            if terminal[0] == EntryKind.END:
                terminal = (EntryKind.END, terminal[1], credit.produced, terminal[2])
            elif terminal[0] == EntryKind.FAIL:
                size += len(terminal[3])  # type: ignore[arg-type]
            entries.append(terminal)
            stream.terminal_sent = True
        return size

    def _unblock(self) -> None:
        self._returning |= self._blocked
        self._dirty = self._blocked | self._dirty
        self._blocked = {}
