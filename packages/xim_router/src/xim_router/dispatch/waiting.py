"""Parked requests: one queue per endpoint, in the order of submission, and the deadlines of all of them.

A request that returns to its queue (refused, or its agent was lost) takes its old rank, which is the head: whatever
was assigned was submitted before whatever is still parked. So the queue is in order of submission at any time.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from xim_protocol.ids import AgentId, EndpointId, RequestId


@dataclass(slots=True, eq=False)
class Ticket:
    """One accepted request until its end; it is in flight (`agent` is set) or parked (`parked_at` is set)."""

    request: RequestId
    endpoint: EndpointId
    rank: int
    """Rises with every submission."""
    deadline: float
    """Until when it may be parked."""
    agent: AgentId | None = None
    assigned: int = 0
    """Which assignment of the router its last one was."""
    parked_at: float | None = None
    losses: int = 0
    """Attempts that failed before the commit point."""
    avoid: AgentId | None = None
    """The agent of the last of them."""
    waited_s: float = 0.0
    """Seconds parked so far, the present stay not counted."""


def _rank(ticket: Ticket) -> int:
    return ticket.rank


class Waiting:
    """The queues. Parking and leaving cost O(log n) steps and a move of pointers within one endpoint's list."""

    def __init__(self) -> None:
        self._queues: dict[EndpointId, list[Ticket]] = {}
        # Entries of requests that left are dropped when they come to the top, or when they are the most.
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._entries = count()
        self._parked = 0

    def __len__(self) -> int:
        return self._parked

    def length(self, endpoint: EndpointId) -> int:
        """How many are parked for `endpoint`."""
        return len(self._queues.get(endpoint, ()))

    def lengths(self) -> dict[EndpointId, int]:
        """How many are parked, by endpoint; endpoints without any are absent."""
        return {endpoint: len(queue) for endpoint, queue in self._queues.items()}

    def head(self, endpoint: EndpointId) -> Ticket | None:
        """The request of `endpoint` that was submitted first."""
        queue = self._queues.get(endpoint)
        return queue[0] if queue else None

    def park(self, ticket: Ticket, now: float) -> None:
        """Queue `ticket` at its rank, until its deadline."""
        ticket.parked_at = now
        insort(self._queues.setdefault(ticket.endpoint, []), ticket, key=_rank)
        self._parked += 1
        heappush(self._deadlines, (ticket.deadline, next(self._entries), ticket))
        if len(self._deadlines) > 64 + 2 * self._parked:
            self._drop_stale()

    def leave(self, ticket: Ticket, now: float) -> None:
        """Take the parked `ticket` out of its queue and add up its wait."""
        assert ticket.parked_at is not None
        ticket.waited_s += max(0.0, now - ticket.parked_at)
        ticket.parked_at = None
        queue = self._queues[ticket.endpoint]
        del queue[bisect_left(queue, ticket.rank, key=_rank)]
        self._parked -= 1
        if not queue:
            del self._queues[ticket.endpoint]

    def leave_expired(self, now: float) -> list[Ticket]:
        """Take out every request whose deadline is not after `now`, earliest deadline first."""
        expired = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            ticket = self._deadlines[0][2]
            self.leave(ticket, now)
            expired.append(ticket)
        return expired

    def leave_all(self, now: float) -> list[Ticket]:
        """Empty every queue, each in order."""
        tickets = [ticket for queue in self._queues.values() for ticket in queue]
        for ticket in tickets:
            self.leave(ticket, now)
        return tickets

    def next_deadline(self) -> float | None:
        """The earliest deadline of a parked request."""
        while self._deadlines and not _current(self._deadlines[0]):
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _drop_stale(self) -> None:
        self._deadlines = [entry for entry in self._deadlines if _current(entry)]
        heapify(self._deadlines)


def _current(entry: tuple[float, int, Ticket]) -> bool:
    deadline, _, ticket = entry
    return ticket.parked_at is not None and ticket.deadline == deadline
