"""How many connections a listener holds: one descriptor each, of which the whole process has so many.

Whoever opens connections and asks for nothing keeps nobody else away: where there are too many, a newcomer ends the one
that has been without a request for longest. Where requests are not spared it ends the oldest, whatever that does: on
the metrics listener, where nobody needs a key, a request is no reason to stay.
"""

import logging
import time
from typing import Protocol

log = logging.getLogger(__name__)

WARN_S = 60.0
"""A crowd lasts: it is told of once in this time."""


class Connection(Protocol):
    """What can be ended."""

    def end(self) -> None:
        """Close now."""


class Crowd:
    """The connections of one listener; those without a request in the order in which they came to be so."""

    __slots__ = ("_idle", "_most", "_spares_requests", "_warned_at")

    def __init__(self, most: int, *, spares_requests: bool = True) -> None:
        """At most so many connections."""
        self._most = most
        self._spares_requests = spares_requests
        self._idle: dict[Connection, None] = {}
        self._warned_at = -WARN_S

    def came(self, connection: Connection, count: int) -> None:
        """A connection more, which makes `count`; where that is too many, one without a request is ended."""
        self._idle[connection] = None
        if count > self._most:
            longest = next(iter(self._idle))
            del self._idle[longest]
            self._warn()
            longest.end()

    def busy(self, connection: Connection) -> None:
        """A request has come on it."""
        if self._spares_requests:
            self._idle.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        """Its request is answered."""
        self._idle[connection] = None

    def left(self, connection: Connection) -> None:
        """It is gone."""
        self._idle.pop(connection, None)

    def _warn(self) -> None:
        now = time.monotonic()
        if now >= self._warned_at + WARN_S:
            self._warned_at = now
            remedy = "Raise the limit of open files, or let a proxy in front limit what one address may open."
            log.warning("too many connections, ending idle ones", extra={"most": self._most, "remedy": remedy})
