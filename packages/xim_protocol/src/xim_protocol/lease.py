"""Leases: an agent's right to receive requests until a deadline.

The agent renews; the router expires. Neither sees the other's clock: a lease crosses the wire as a duration. `now`
is each end's own monotonic clock in seconds (the agent's counts suspend, so that a laptop that slept knows that its
lease is over).
"""

import heapq
from collections import deque

from xim_protocol.ids import AgentId

LONGEST_HEARTBEAT_S = 5.0
"""A NAT forgets a connection that is idle for longer."""
SHORTEST_HEARTBEAT_S = 0.1
"""ZeroMQ counts a heartbeat's time to live in tenths of a second, and one of none is no limit."""


def heartbeat_s(lease_s: float) -> float:
    """Interval and timeout of a link's heartbeats under this lease.

    A sixth of it, so that detection, backoff and handshake fit into what is left; within the bounds above.
    """
    return max(SHORTEST_HEARTBEAT_S, min(lease_s / 6, LONGEST_HEARTBEAT_S))


class LeaseHolder:
    """The agent's view of its lease: when to renew, when it is lost."""

    def __init__(self, renewal_interval_s: float) -> None:
        self.renewal_interval_s = renewal_interval_s
        self.deadline: float | None = None
        """When the lease is over, or None while there is none."""
        self._next_renewal: float | None = None
        # Answers come in the order of the questions, so each is counted from its own.
        self._asked_at: deque[float] = deque()

    @property
    def held(self) -> bool:
        """True between a grant and its end."""
        return self.deadline is not None

    def asked(self, now: float) -> None:
        """A Hello or Renew leaves now. The lease that answers it runs from here, the earliest the router can mean."""
        self._asked_at.append(now)
        self._next_renewal = now + self.renewal_interval_s

    def granted(self, duration_s: float, now: float) -> None:
        """The router granted `duration_s`."""
        asked_at = self._asked_at.popleft() if self._asked_at else now
        self.deadline = max(self.deadline or 0.0, asked_at + duration_s)
        # A short lease (the router clamped it) must be renewed well within it.
        latest = self._asked_at[-1] if self._asked_at else asked_at
        self._next_renewal = latest + min(self.renewal_interval_s, duration_s / 2)

    def link_lost(self) -> None:
        """What was asked on that link is never answered; the lease itself goes on."""
        self._asked_at.clear()

    def lost(self) -> None:
        """Forget the lease."""
        self.deadline = self._next_renewal = None
        self._asked_at.clear()

    def renewal_due(self, now: float) -> bool:
        """True when a Renew should leave."""
        return self.held and self._next_renewal is not None and now >= self._next_renewal

    def expired(self, now: float) -> bool:
        """True when the lease ran out."""
        return self.deadline is not None and now >= self.deadline

    def next_deadline(self, *, linked: bool) -> float | None:
        """When to look again: the next renewal while linked, else the end of the lease."""
        if self.deadline is None:
            return None
        if linked and self._next_renewal is not None:
            return min(self._next_renewal, self.deadline)
        return self.deadline


class LeaseTable:
    """The router's leases: who holds one until when, and who let it run out."""

    def __init__(self) -> None:
        self._deadlines: dict[AgentId, float] = {}
        # Lazy heap: a renewed lease leaves its old entry behind, dropped when it comes to the top.
        self._heap: list[tuple[float, AgentId]] = []

    def __len__(self) -> int:
        return len(self._deadlines)

    def grant(self, agent: AgentId, duration_s: float, now: float) -> None:
        """`agent` holds a lease for `duration_s` from now."""
        deadline = now + duration_s
        self._deadlines[agent] = deadline
        heapq.heappush(self._heap, (deadline, agent))
        if len(self._heap) > 64 + 4 * len(self._deadlines):
            self._rebuild()

    def release(self, agent: AgentId) -> None:
        """`agent` gave its lease back, or it was taken."""
        self._deadlines.pop(agent, None)

    def deadline_of(self, agent: AgentId) -> float | None:
        """When the lease of `agent` ends, or None."""
        return self._deadlines.get(agent)

    def postpone(self, by_s: float) -> None:
        """Move every deadline by `by_s`: the router itself was late, and nobody is expired for that."""
        self._deadlines = {agent: deadline + by_s for agent, deadline in self._deadlines.items()}
        self._rebuild()

    def next_deadline(self) -> float | None:
        """The earliest end of a lease."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def expire(self, now: float) -> list[AgentId]:
        """Take back every lease that ran out, earliest first."""
        expired: list[AgentId] = []
        self._drop_stale()
        while self._heap and self._heap[0][0] <= now:
            agent = heapq.heappop(self._heap)[1]
            del self._deadlines[agent]
            expired.append(agent)
            self._drop_stale()
        return expired

    def _drop_stale(self) -> None:
        while self._heap and self._deadlines.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)

    def _rebuild(self) -> None:
        self._heap = [(deadline, agent) for agent, deadline in self._deadlines.items()]
        heapq.heapify(self._heap)
