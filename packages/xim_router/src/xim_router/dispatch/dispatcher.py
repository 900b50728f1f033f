"""The dispatcher: which agent gets which request, who waits, who is turned away.

Pure: time comes in as `now` (seconds of one monotonic clock), decisions go out as effects that the caller carries out
in order. A slot is taken in the same step that returns its `Assign`. Rules that always hold:

- a request is in flight at one agent, or parked in one queue, or unknown;
- while a request is parked, no agent of its endpoint is open (serves, is not held back, and has a free slot);
- among the requests of one endpoint the one submitted first leaves the queue first.
"""

from collections.abc import Mapping

from xim_protocol.ids import AgentId, EndpointId, RequestId
from xim_router.dispatch.catalog import RegisteredAgent
from xim_router.dispatch.effects import Assign, Effect, Reject, Rejection
from xim_router.dispatch.placement import choose, why_not_park
from xim_router.dispatch.roster import AgentView, Node, Roster
from xim_router.dispatch.statistics import AgentStatistics, DispatcherStatistics
from xim_router.dispatch.waiting import Ticket, Waiting

QUEUE_PLACES = 10
"""Most requests that may wait for one node. The specification fixes it: more would only wait to time out."""

ATTEMPTS = 2
"""Most attempts per request before the commit point; a refused one does not count."""


class Dispatcher:
    """All requests of one router, from submission to their end."""

    def __init__(self, *, queue_timeout_s: float, queue_places: int = QUEUE_PLACES, attempts: int = ATTEMPTS) -> None:
        """`queue_timeout_s` bounds one stay in the queue; a request whose agent was lost begins a new stay."""
        self._queue_timeout_s = queue_timeout_s
        self._queue_places = queue_places
        self._attempts = attempts
        self._roster = Roster()
        self._waiting = Waiting()
        self._tickets: dict[RequestId, Ticket] = {}
        self._submitted = 0
        self._assigned = 0
        self._shut = False

    # Agents

    def set_registered(self, agents: Mapping[AgentId, RegisteredAgent], now: float) -> list[Effect]:
        """Take over what the catalog says of all enrolled agents; one that is missing is enrolled no more.

        Requests in flight at an agent that left stay there until they are reported.
        """
        self._roster.set_registered(agents)
        return self._fill(*self._waiting.lengths(), now=now)

    def agent_up(self, view: AgentView, now: float) -> list[Effect]:
        """A session began, or anything about it changed. The catalog may learn of the agent later."""
        node = self._roster.set_view(view)
        return self._fill(node.endpoint, now=now)

    def agent_down(self, agent: AgentId, now: float) -> list[Effect]:
        """The session of `agent` is over; say so first, then report each of its requests by `lost` or `finished`."""
        self._roster.drop_view(agent)
        return []

    def slots_free(self, agent: AgentId, free: int, now: float) -> list[Effect]:
        """`agent` refused requests before and now has `free` slots, which other routers may take first.

        It gets as many requests, and any number once it named a slot for each that it refused.
        """
        node = self._roster.get(agent)
        if node is None or free < 1:
            return []
        node.name_slots(free)
        return self._fill(node.endpoint, now=now)

    # Requests

    def submit(self, request: RequestId, endpoint: EndpointId, now: float) -> list[Effect]:
        """Assign `request` (one effect), park it (none), or reject it (one).

        Raises: ValueError when `request` is known already.
        """
        if request in self._tickets:
            raise ValueError(f"request {request} was submitted twice")
        if self._shut:
            return [Reject(request, Rejection.SHUTTING_DOWN, 0.0)]
        self._submitted += 1
        ticket = Ticket(request, endpoint, rank=self._submitted, deadline=now + self._queue_timeout_s)
        # Never overtakes: while others are parked, no node of the endpoint is open.
        node = choose(self._roster.candidates(endpoint))
        if node is None:
            reason = self._why_not_park(endpoint)
            if reason is not None:
                return [Reject(request, reason, 0.0)]
            self._waiting.park(ticket, now)
            self._tickets[request] = ticket
            return []
        self._tickets[request] = ticket
        return [self._assign(ticket, node)]

    def finished(self, request: RequestId, now: float) -> list[Effect]:
        """The stream of `request` ended for good; does nothing for a request that is not in flight."""
        ticket = self._in_flight(request)
        if ticket is None:
            return []
        del self._tickets[request]
        return self._fill(self._free_slot(ticket).endpoint, now=now)

    def lost(self, request: RequestId, now: float) -> list[Effect]:
        """An attempt of `request` failed before the commit point; does nothing for one that is not in flight.

        It is dispatched again, to another agent where one is open. It was accepted already, so where it may wait it
        does so at the head of the queue, even of a full one, with a new deadline.
        """
        ticket = self._in_flight(request)
        if ticket is None:
            return []
        node = self._free_slot(ticket)
        ticket.losses += 1
        ticket.avoid = node.agent
        if ticket.losses >= self._attempts:
            return [self._reject(ticket, Rejection.AGENT_LOST), *self._fill(node.endpoint, now=now)]
        if self._shut:
            return [self._reject(ticket, Rejection.SHUTTING_DOWN)]
        ticket.deadline = now + self._queue_timeout_s
        self._waiting.park(ticket, now)
        effects = self._fill(ticket.endpoint, node.endpoint, now=now)
        if ticket.parked_at is not None:
            reason = why_not_park(self._roster.candidates(ticket.endpoint))
            if reason is not None:
                self._waiting.leave(ticket, now)
                effects.append(self._reject(ticket, reason))
        return effects

    def refused(self, request: RequestId, in_flight_total: int | None, now: float) -> list[Effect]:
        """The agent of `request` did not take it, which is no attempt; does nothing for one that is not in flight.

        It goes to another open agent, or back to the head of its queue with the deadline that it had. The agent gets
        nothing more until it names free slots or begins to serve anew. `in_flight_total` is what the agent named as
        its total over all routers, if it was full; one that refused for another reason names no slots, so the end of
        one of its streams opens it too.
        """
        ticket = self._in_flight(request)
        if ticket is None:
            return []
        node = self._return_slot(ticket)
        if ticket.assigned > node.released_at:
            node.hold_back(in_flight_total)
        if self._shut:
            return [self._reject(ticket, Rejection.SHUTTING_DOWN)]
        self._waiting.park(ticket, now)
        return self._fill(ticket.endpoint, now=now)

    def withdraw(self, request: RequestId, now: float) -> list[Effect]:
        """Nobody waits for `request` any more: free its place or its slot. Does nothing for an unknown one."""
        ticket = self._tickets.pop(request, None)
        if ticket is None:
            return []
        if ticket.agent is not None:
            return self._fill(self._free_slot(ticket).endpoint, now=now)
        self._waiting.leave(ticket, now)
        return []

    # Time and end

    def expire(self, now: float) -> list[Effect]:
        """Reject every parked request whose deadline is not after `now`."""
        return [self._reject(ticket, Rejection.QUEUE_TIMEOUT) for ticket in self._waiting.leave_expired(now)]

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next, or None while nothing is parked."""
        return self._waiting.next_deadline()

    def shut(self, now: float = 0.0) -> list[Effect]:
        """Reject what is parked, now and later; what is in flight goes on. Without `now` the last wait counts as 0."""
        self._shut = True
        return [self._reject(ticket, Rejection.SHUTTING_DOWN) for ticket in self._waiting.leave_all(now)]

    def statistics(self) -> DispatcherStatistics:
        """What is where; costs a step per agent, so it is for scrapes and pages, not for requests."""
        return DispatcherStatistics(
            agents={node.agent: _statistics_of(node) for node in self._roster},
            parked_by_endpoint=self._waiting.lengths(),
            parked=len(self._waiting),
            in_flight=len(self._tickets) - len(self._waiting),
            shutting_down=self._shut,
        )

    def _why_not_park(self, endpoint: EndpointId) -> Rejection | None:
        reason = why_not_park(self._roster.candidates(endpoint))
        if reason is None and self._waiting.length(endpoint) >= self._queue_places:
            return Rejection.QUEUE_FULL
        return reason

    def _in_flight(self, request: RequestId) -> Ticket | None:
        ticket = self._tickets.get(request)
        return None if ticket is None or ticket.agent is None else ticket

    def _assign(self, ticket: Ticket, node: Node) -> Assign:
        self._assigned += 1
        node.in_flight += 1
        node.last_assigned = ticket.assigned = self._assigned
        if node.held_back:
            node.named -= 1
        ticket.agent = node.agent
        return Assign(ticket.request, node.agent, ticket.losses + 1, ticket.waited_s)

    def _reject(self, ticket: Ticket, reason: Rejection) -> Reject:
        del self._tickets[ticket.request]
        return Reject(ticket.request, reason, ticket.waited_s)

    def _return_slot(self, ticket: Ticket) -> Node:
        assert ticket.agent is not None
        node = self._roster.give_back(ticket.agent)
        ticket.agent = None
        return node

    def _free_slot(self, ticket: Ticket) -> Node:
        """Return the slot of a stream that ended. A full agent says itself who gets the place."""
        node = self._return_slot(ticket)
        if not node.refused:
            node.release_hold()
        return node

    def _fill(self, *endpoints: EndpointId | None, now: float) -> list[Effect]:
        """Assign parked requests of `endpoints`, in order, while their agents are open."""
        effects: list[Effect] = []
        for endpoint in endpoints:
            if endpoint is None:
                continue
            while (ticket := self._waiting.head(endpoint)) is not None:
                node = choose(self._roster.candidates(endpoint), ticket.avoid)
                if node is None:
                    break
                self._waiting.leave(ticket, now)
                effects.append(self._assign(ticket, node))
        return effects


def _statistics_of(node: Node) -> AgentStatistics:
    return AgentStatistics(
        standing=node.standing,
        endpoint=node.endpoint,
        state=None if node.view is None else node.view.state,
        capacity=node.capacity,
        in_flight=node.in_flight,
        held_back=node.held_back,
        refused_in_flight=node.refused_in_flight,
    )
