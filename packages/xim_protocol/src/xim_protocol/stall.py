"""Stall clocks: how long a stream of the agent has waited for credit.

They stand still while there is no link, because no credit can come then.
"""

from xim_protocol.ids import StreamId


class StallClocks:
    """One clock for each stream that waits for credit, oldest first."""

    def __init__(self) -> None:
        # Insertion order is the order in which they stalled.
        self._since: dict[StreamId, float] = {}
        self._still_since: float | None = None

    def start(self, stream: StreamId, now: float) -> None:
        """`stream` waits for credit from now, unless it did before."""
        self._since.setdefault(stream, now)

    def stop(self, stream: StreamId) -> None:
        """`stream` has credit, or is over."""
        self._since.pop(stream, None)

    def stand_still(self, now: float) -> None:
        """There is no link from here on."""
        if self._still_since is None:
            self._still_since = now

    def go_on(self, now: float) -> None:
        """There is a link again; what each stream waited before counts on."""
        if self._still_since is not None:
            for stream, since in self._since.items():
                self._since[stream] = now - max(0.0, self._still_since - since)
            self._still_since = None

    def oldest(self) -> float | None:
        """Since when the longest waiting stream waits."""
        return next(iter(self._since.values()), None)

    def late(self, now: float, timeout_s: float) -> list[StreamId]:
        """Streams that waited for `timeout_s`, longest waiting first."""
        return [stream for stream, since in self._since.items() if now >= since + timeout_s]
