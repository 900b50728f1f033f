"""When an engine that ended by itself is started again. Pure: the clock is an argument."""

from dataclasses import dataclass

FATAL_EXIT_CODES = {
    126: "the program may not be executed",
    127: "the program does not exist",
}
"""Ends that another start would only repeat; what vLLM itself says of an end stands in `diagnosis`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartPolicy:
    """Delays of min(base * 2^(n-1), cap) seconds; after `attempts` ends in a row it is a crash loop."""

    base_s: float = 1.0
    cap_s: float = 60.0
    attempts: int = 5
    """Ends in a row, without `settled_s` of service between them, that make a crash loop."""
    settled_s: float = 300.0
    """Serving this long forgets earlier ends: a crash a week is not a loop."""


class RestartBackoff:
    """Counts the ends of one engine."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._ends_in_a_row = 0

    def ended(self, *, served_s: float) -> float | None:
        """Seconds until the next start, or None when this is a crash loop.

        `served_s` is how long the engine was ready in the life that just ended, 0.0 when it never was.
        """
        policy = self._policy
        if served_s >= policy.settled_s:
            self._ends_in_a_row = 0
        self._ends_in_a_row += 1
        if self._ends_in_a_row >= policy.attempts:
            return None
        delay_s: float = policy.base_s * 2 ** (self._ends_in_a_row - 1)
        return min(delay_s, policy.cap_s)
