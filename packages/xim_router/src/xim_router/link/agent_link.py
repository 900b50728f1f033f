"""One agent's session together with the sockets it runs over."""

from collections import deque
from dataclasses import dataclass, field
from time import monotonic

from xim_protocol.codec import Frames
from xim_protocol.ids import AgentId
from xim_protocol.messages import Channel, GoodbyeCode
from xim_protocol.router_session import RouterSession
from xim_router.link.exchange import Exchange
from xim_router.link.transport import RoutingId, SendResult, Transport

RETRY_INTERVAL_S = 0.01
"""POLLOUT of a ROUTER says nothing about one peer, so a full pipe is tried again by the clock."""
QUEUE_BYTES = 1024 * 1024
QUEUE_AGE_S = 5.0
"""A queue longer or older than this means that the peer takes nothing any more."""
BODIES_PER_FLUSH = 16
"""Pieces of long request bodies, 64 KiB each, that leave before others get their turn."""


@dataclass(kw_only=True, slots=True, eq=False)
class AgentLink:
    """The latest link of one agent: whatever comes by any other is dropped."""

    agent: AgentId
    session: RouterSession[Exchange]
    routing_ids: dict[Channel, RoutingId] = field(default_factory=dict)
    descriptors: dict[Channel, int] = field(default_factory=dict)
    """TCP connections as they were when Hello and Attach came; removed when the monitor reports them gone."""
    queue: deque[tuple[Channel, Frames]] = field(default_factory=deque)
    queued_bytes: int = 0
    queued_since: float = 0.0
    touched_later: bool = False
    """A timer will flush this link, and tell of closed streams."""
    tells_closed: bool = False
    """That timer has fired: the next flush says everything."""
    seen_at: float = 0.0
    """When the agent was last heard of, in Unix seconds: what it reported, or its Goodbye. Chunks do not count."""
    goodbye: GoodbyeCode | None = None
    """What the agent ended the session with."""

    def flush(self, transport: Transport) -> SendResult:
        """Send what the session wants to send, as far as the peer takes it.

        `FULL` means: call again after `RETRY_INTERVAL_S`. `UNREACHABLE`: the link is lost or must be given up.
        """
        session = self.session
        if self.tells_closed or session.credit_urgent:
            self.tells_closed = False
            session.flush_credit()
        for channel, frames in session.frames_to_send():
            self._enqueue(channel, frames)
        result = self._send_queue(transport)
        if result is not SendResult.SENT:
            return result
        for _ in range(BODIES_PER_FLUSH):
            piece = session.next_body()
            if piece is None:
                return SendResult.SENT
            self._enqueue(*piece)
            result = self._send_queue(transport)
            if result is not SendResult.SENT:
                return result
        return SendResult.FULL

    def drop_queue(self) -> None:
        """Forget what was not sent."""
        self.queue.clear()
        self.queued_bytes = 0

    def _enqueue(self, channel: Channel, frames: Frames) -> None:
        if not self.queue:
            self.queued_since = monotonic()
        self.queue.append((channel, frames))
        self.queued_bytes += sum(map(len, frames))

    def _send_queue(self, transport: Transport) -> SendResult:
        queue = self.queue
        while queue:
            channel, frames = queue[0]
            routing_id = self.routing_ids.get(channel)
            result = SendResult.UNREACHABLE if routing_id is None else transport.send(channel, routing_id, frames)
            if result is SendResult.FULL and self._congested():
                return SendResult.UNREACHABLE
            if result is not SendResult.SENT:
                return result
            queue.popleft()
            self.queued_bytes -= sum(map(len, frames))
            self.queued_since = monotonic()
        return SendResult.SENT

    def _congested(self) -> bool:
        return self.queued_bytes > QUEUE_BYTES or monotonic() - self.queued_since > QUEUE_AGE_S
