"""Looks at every response now and then: cuts off clients that take nothing, and says what the others wait for.

Bytes wait for a client in two places: in its response's queue, and in its connection's write buffer. The server lets
`send` go on until that buffer holds 64 KiB, so an answer may be complete, and its slot free for long, while its client
has taken none of it: a response is watched until nothing of it waits any more. Behind both is the kernel's buffer, of
megabytes, which asks for more only when a third of it is free: a slow client that takes from it shows nowhere else.

One look at all of them, not a timer each: nothing is paid per chunk.
"""

import asyncio
from typing import Protocol

from xim_router.link.broker import Broker
from xim_router.link.exchange import Exchange
from xim_router.telemetry.metrics import HotCounters, StallCause

LOOK_S = 1.0
"""Between two looks, at most; a short timeout is looked at four times."""


class Watched(Protocol):
    """A response, as far as it is watched."""

    @property
    def sent_bytes(self) -> int:
        """Bytes given to the connection, or held for it."""

    def waiting_bytes(self) -> int:
        """How many of them the client has not taken."""

    def unacknowledged_bytes(self) -> int:
        """How many the kernel has taken, and the client's kernel has not; 0 where nobody knows."""


class _Entry:
    """One response between two looks."""

    __slots__ = ("exchange", "left", "received", "response", "since", "still_s", "taken", "unacknowledged", "waiting")

    def __init__(self, exchange: Exchange, response: Watched, since: float) -> None:
        self.exchange, self.response, self.since = exchange, response, since
        self.left = False
        self.taken = self.waiting = self.unacknowledged = self.received = 0
        self.still_s = 0.0

    def moved(self) -> bool:
        """Whether the client took anything since the last look, or has nothing to take."""
        waiting = self.response.waiting_bytes()
        if not waiting:
            self.waiting = 0
            return True
        unacknowledged = self.response.unacknowledged_bytes()
        # Framing is in what waits and not in what was sent, so a client that takes less than that shows by the second.
        taken = self.response.sent_bytes - waiting
        moved = taken > self.taken or waiting < self.waiting or unacknowledged < self.unacknowledged
        self.taken, self.waiting, self.unacknowledged = max(self.taken, taken), waiting, unacknowledged
        return moved

    def answered(self) -> bool:
        """Whether anything of the answer came since the last look."""
        received, self.received = self.received, self.exchange.received_bytes
        return self.received != received


class ClientWatch:
    """All responses of the process that have bytes to give, or will have."""

    def __init__(self, broker: Broker, hot: HotCounters, *, timeout_s: float) -> None:
        """A client that takes no byte for `timeout_s` while bytes wait is cut off."""
        self._broker = broker
        self._hot = hot
        self._timeout_s = timeout_s
        self._look_s = min(LOOK_S, timeout_s / 4)
        self._loop = asyncio.get_running_loop()
        self._entries: dict[Exchange, _Entry] = {}
        self._looked_at: float | None = None
        hot.unsent_bytes = self.waiting_bytes

    def add(self, exchange: Exchange, response: Watched) -> None:
        """Watch `response` until `leave`, or longer while bytes of it wait."""
        self._entries[exchange] = _Entry(exchange, response, self._loop.time())
        if self._looked_at is None:
            self._arm()

    def leave(self, exchange: Exchange) -> None:
        """The request's handler is done; what the client has not taken keeps its response here."""
        entry = self._entries.get(exchange)
        if entry is not None:
            entry.left = True
            if not entry.response.waiting_bytes():
                del self._entries[exchange]

    def waiting_bytes(self) -> int:
        """Bytes that wait for clients, over all responses, framing included."""
        return sum(entry.response.waiting_bytes() for entry in self._entries.values())

    @property
    def unfinished(self) -> int:
        """Responses that are complete here and not at their clients."""
        return sum(entry.left or entry.exchange.concluded for entry in self._entries.values())

    def _arm(self) -> None:
        self._looked_at = self._loop.time()
        self._loop.call_later(self._look_s, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        # A loop that stood still says nothing about clients: what is over two intervals is nobody's fault.
        elapsed_s = min(now - (self._looked_at or 0.0), 2 * self._look_s)
        try:
            for entry in list(self._entries.values()):
                # What came between two looks was not there for all of the time.
                self._look_at(entry, min(elapsed_s, now - entry.since))
        finally:
            # Also after an exception: nobody else would look again.
            self._looked_at = None
            if self._entries:
                self._arm()

    def _look_at(self, entry: _Entry, elapsed_s: float) -> None:
        exchange, stalled_s = entry.exchange, self._hot.stalled_s
        moved, answered = entry.moved(), entry.answered()
        if not moved:
            stalled_s[StallCause.CLIENT] += elapsed_s
            entry.still_s += elapsed_s
            if entry.still_s >= self._timeout_s:
                del self._entries[exchange]
                self._broker.client_stalled(exchange)
            return
        entry.still_s = 0.0
        if entry.left and not entry.waiting:
            del self._entries[exchange]
        elif exchange.stream is not None and not exchange.concluded and not entry.waiting and not answered:
            linked = self._broker.is_linked(exchange)
            stalled_s[StallCause.ENGINE if linked else StallCause.LINK] += elapsed_s
