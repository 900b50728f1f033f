"""Credit: how many bytes may be under way, by absolute offsets.

Two ledgers with two meanings (docs/explanation/flow-control.md):

* per *stream*, a limit that runs one window ahead of what the HTTP side consumed. What was sent and lies within one
  window of the limit is exactly what the agent keeps to repeat after a lost link;
* per *link*, the bytes that the router received. The agent pauses while too many are unreported, so that a client
  that does not read holds its own window and nothing else.

Offsets never go down, as in QUIC's MAX_STREAM_DATA (RFC 9000, section 4.1): repeating a credit is harmless and
losing one is healed by the next.
"""

from collections import deque

from xim_protocol.errors import CreditExceeded, LocalProtocolError, OffsetMismatch
from xim_protocol.ids import StreamId


class CreditSender:
    """Bytes of one stream at the agent: produced, sent, and kept until they were consumed.

    Lives until the router says that the stream is closed. Holds at most one window; without flow control as much as
    the owner allows by `keep_at_most`.
    """

    __slots__ = ("_kept", "_unsent", "base", "enforced", "limit", "produced", "sent", "window")

    def __init__(self, window: int, *, enforced: bool = True) -> None:
        self.window = window
        self.limit = window
        """Absolute offset up to which the stream may send."""
        self.enforced = enforced
        self.base = 0
        """Offset of the first byte still kept."""
        self.sent = 0
        """Offset of the first byte not yet sent on this link."""
        self.produced = 0
        """Bytes accepted so far."""
        self._kept: deque[bytes] = deque()
        self._unsent: deque[bytes] = deque()

    @property
    def kept_bytes(self) -> int:
        """Bytes in memory: from `base` to `produced`."""
        return self.produced - self.base

    @property
    def room(self) -> int:
        """Bytes that `produce` would take now; without enforcement there is no bound here."""
        return self.limit - self.produced if self.enforced else 2**62

    def produce(self, payload: bytes) -> int:
        """Take as much of `payload` as there is credit for; returns how many bytes were taken."""
        size = len(payload)
        if self.enforced and size > self.limit - self.produced:
            size = self.limit - self.produced
            payload = payload[:size]
        if size:
            self._unsent.append(payload)
            self.produced += size
        return size

    def take(self, most: int) -> tuple[int, bytes] | None:
        """Next bytes to send, at most `most`, as (offset, payload); None when all is sent.

        Small payloads that gathered since the last call leave as one.
        """
        unsent = self._unsent
        if not unsent or most <= 0:
            return None
        payload = unsent.popleft()
        if unsent:
            payload = b"".join((payload, *unsent))
            unsent.clear()
        if len(payload) > most:
            unsent.append(payload[most:])
            payload = payload[:most]
        offset = self.sent
        self.sent = offset + len(payload)
        self._kept.append(payload)
        return offset, payload

    def raise_limit(self, stream: StreamId, limit: int) -> bool:
        """Note a new limit; true when it is higher than before. Frees what was consumed by then.

        Raises:
            OffsetMismatch: the limit means that bytes were consumed which were never sent.
        """
        if limit <= self.limit:
            return False
        consumed = limit - self.window
        if consumed > self.sent:
            raise OffsetMismatch(stream, consumed, self.sent)
        self.limit = limit
        self._free(self._kept, consumed)
        return True

    def keep_at_most(self, size: int, *, unsent_too: bool = False) -> None:
        """Free the oldest bytes beyond `size`; a stream that lost bytes not yet received cannot `resume`.

        Bytes that were not sent are freed with `unsent_too` alone, while there is no link.
        """
        self._free(self._kept, self.produced - size)
        if unsent_too:
            self._free(self._unsent, self.produced - size)

    def _free(self, payloads: deque[bytes], offset: int) -> None:
        """Free the bytes of `payloads` before `offset`; the first of them lies at `base`."""
        while payloads and self.base < offset:
            payload = payloads.popleft()
            before = offset - self.base
            if len(payload) > before:
                payloads.appendleft(payload[before:])
                payload = payload[:before]
            self.base += len(payload)

    def discard(self) -> None:
        """Drop everything not yet sent: nobody waits for it."""
        self._unsent.clear()
        self.produced = self.sent
        self.base = min(self.base, self.sent)

    def resume(self, stream: StreamId, received: int) -> bool:
        """Go on from `received` on a new link; what lies behind it is sent again.

        Returns false when those bytes are no longer kept, which only happens without flow control.

        Raises:
            OffsetMismatch: the router claims bytes that were never sent.
        """
        if received > self.sent:
            raise OffsetMismatch(stream, received, self.sent)
        if received < self.base:
            return False
        self._kept.extend(self._unsent)
        self._unsent = self._kept
        self._kept = deque()
        self._free(self._unsent, received)
        self.sent = received
        return True


class CreditReceiver:
    """Bytes of one stream at the router: received, consumed, and the limit granted so far."""

    __slots__ = ("consumed", "enforced", "granted", "owed_threshold", "received", "window")

    def __init__(self, window: int, replenish_threshold: float, *, enforced: bool = True) -> None:
        self.window = window
        self.owed_threshold = max(1, int(window * replenish_threshold))
        """Bytes owed that make a credit due; at least one, or a threshold of 0 would grant nothing for ever."""
        self.enforced = enforced
        self.received = 0
        self.consumed = 0
        self.granted = window
        """The limit the agent has been told."""

    @property
    def owed(self) -> int:
        """Bytes consumed and not yet granted back."""
        return self.consumed + self.window - self.granted

    def receive(self, stream: StreamId, offset: int, payload: bytes) -> bytes:
        """The part of `payload` not seen before, after checking its place; empty for a repetition.

        Raises:
            OffsetMismatch: bytes are missing before `offset`.
            CreditExceeded: the payload ends beyond the limit, with flow control on.
        """
        received = self.received
        end = offset + len(payload)
        if end > self.granted and self.enforced:
            raise CreditExceeded(stream, end, self.granted)
        if offset == received:
            self.received = end
            return payload
        if offset > received:
            raise OffsetMismatch(stream, offset, received)
        if end <= received:
            return b""
        self.received = end
        return payload[received - offset :]

    def consume(self, size: int) -> bool:
        """Note that `size` more bytes left for the client; true when a credit is due."""
        self.consumed += size
        if self.consumed > self.received:
            raise LocalProtocolError(f"consumed {self.consumed} of {self.received} received bytes")
        return self.consumed + self.window - self.granted >= self.owed_threshold

    def grant(self) -> int:
        """The limit as it should be now; from here on it counts as told."""
        self.granted = self.consumed + self.window
        return self.granted


class LinkSender:
    """Payload bytes of one link at the agent: pauses while too many are unreported."""

    __slots__ = ("enforced", "paused", "pauses", "received", "sent", "threshold")

    def __init__(self, threshold: int, *, enforced: bool = True) -> None:
        self.threshold = threshold
        self.enforced = enforced
        self.sent = 0
        self.received = 0
        self.paused = False
        self.pauses = 0
        """How often this link paused, for metrics."""

    @property
    def room(self) -> int:
        """Bytes that may leave now."""
        if not self.enforced:
            return 2**62
        return 0 if self.paused else self.threshold - (self.sent - self.received)

    def send(self, size: int) -> None:
        """Note `size` payload bytes as sent."""
        self.sent += size
        if self.enforced and not self.paused and self.sent - self.received >= self.threshold:
            self.paused = True
            self.pauses += 1

    def report(self, received: int) -> None:
        """Note the router's absolute count; resumes below half of the threshold.

        Raises:
            OffsetMismatch: the router claims more than was sent.
        """
        if received > self.sent:
            raise OffsetMismatch(None, received, self.sent)
        self.received = max(self.received, received)
        if self.paused and (self.sent - self.received) * 2 < self.threshold:
            self.paused = False


class LinkReceiver:
    """Payload bytes of one link at the router, and when to report them."""

    __slots__ = ("due_bytes", "enforced", "received", "reported", "threshold")

    def __init__(self, pause_threshold: int, replenish_threshold: float, *, enforced: bool = True) -> None:
        self.threshold = pause_threshold
        self.enforced = enforced
        # At most half: an agent that sends whole payloads only may stop well before its threshold, and goes on below
        # half of it.
        self.due_bytes = max(1, int(pause_threshold * min(replenish_threshold, 0.5)))
        self.received = 0
        self.reported = 0

    def receive(self, size: int) -> bool:
        """Note `size` received payload bytes; true when a report is due.

        Raises:
            CreditExceeded: the agent did not pause, with flow control on.
        """
        self.received += size
        unreported = self.received - self.reported
        if unreported > self.threshold and self.enforced:
            raise CreditExceeded(None, self.received, self.reported + self.threshold)
        return unreported >= self.due_bytes

    def report(self) -> int:
        """The absolute count; from here on it counts as reported."""
        self.reported = self.received
        return self.received
