"""A dispatcher whose every effect is checked against the rules that always hold.

The books are kept from the effects alone: what was submitted, what was assigned where, what was turned away. They know
nothing of how the dispatcher keeps its own.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from xim_protocol.ids import AgentId, EndpointId, ProjectId, RequestId
from xim_protocol.messages import AgentState
from xim_router.dispatch.catalog import RegisteredAgent
from xim_router.dispatch.dispatcher import Dispatcher
from xim_router.dispatch.effects import Assign, Effect, Reject
from xim_router.dispatch.roster import AgentView, Standing

A, B, C = AgentId("agent-a"), AgentId("agent-b"), AgentId("agent-c")
CHAT, EMBED = EndpointId("endpoint-chat"), EndpointId("endpoint-embed")


def req(number: int) -> RequestId:
    return RequestId(f"req_{number}")


def enrolled(
    agent: AgentId,
    endpoint: EndpointId | None = CHAT,
    *,
    suspended: bool = False,
    dead: bool = False,
    pending: bool = False,
) -> RegisteredAgent:
    return RegisteredAgent(
        agent=agent,
        name=str(agent),
        project=ProjectId("proj_1"),
        curve_public_key=b"k" * 32,
        endpoint=endpoint,
        suspended=suspended,
        dead=dead,
        pending=pending,
    )


def view(
    agent: AgentId,
    *,
    capacity: int = 1,
    state: AgentState = AgentState.READY,
    connected: bool = True,
    endpoint: EndpointId | None = CHAT,
) -> AgentView:
    return AgentView(agent=agent, endpoint=endpoint, capacity=capacity, state=state, connected=connected)


@dataclass(slots=True)
class Books:
    """Where every accepted request is, told from effects."""

    endpoints: dict[RequestId, EndpointId] = field(default_factory=dict)
    ranks: dict[RequestId, int] = field(default_factory=dict)
    parked: set[RequestId] = field(default_factory=set)
    in_flight: dict[RequestId, AgentId] = field(default_factory=dict)
    returned: set[RequestId] = field(default_factory=set)
    """Accepted, assigned, and parked again: these may stand beyond the queue's places."""
    losses: Counter[RequestId] = field(default_factory=Counter)


class WatchedDispatcher:
    """Passes everything on to a real `Dispatcher` and checks the books after every step."""

    def __init__(self, *, queue_timeout_s: float = 30.0, queue_places: int = 10, attempts: int = 2) -> None:
        self.real = Dispatcher(queue_timeout_s=queue_timeout_s, queue_places=queue_places, attempts=attempts)
        self.books = Books()
        self.queue_places = queue_places
        self.attempts = attempts
        self._views: dict[AgentId, AgentView] = {}
        self._overtaken: set[RequestId] = set()
        """In flight since before their agent named slots or changed: their refusal would be an old one."""

    def register(self, *agents: RegisteredAgent, now: float = 0.0) -> list[Effect]:
        return self.set_registered({agent.agent: agent for agent in agents}, now)

    def set_registered(self, agents: Mapping[AgentId, RegisteredAgent], now: float = 0.0) -> list[Effect]:
        self._overtaken.update(self.books.in_flight)
        return self._book(self.real.set_registered(agents, now))

    def agent_up(self, agent: AgentView, now: float = 0.0) -> list[Effect]:
        self._views[agent.agent] = agent
        self._overtake(agent.agent)
        return self._book(self.real.agent_up(agent, now))

    def agent_down(self, agent: AgentId, now: float = 0.0) -> list[Effect]:
        self._views.pop(agent, None)
        return self._book(self.real.agent_down(agent, now))

    def slots_free(self, agent: AgentId, free: int, now: float = 0.0) -> list[Effect]:
        self._overtake(agent)
        return self._book(self.real.slots_free(agent, free, now))

    def submit(self, request: RequestId, endpoint: EndpointId = CHAT, now: float = 0.0) -> list[Effect]:
        effects = self.real.submit(request, endpoint, now)
        self.books.endpoints[request] = endpoint
        self.books.ranks[request] = len(self.books.ranks)
        self.books.parked.add(request)
        return self._book(effects)

    def finished(self, request: RequestId, now: float = 0.0) -> list[Effect]:
        self.books.in_flight.pop(request, None)
        return self._book(self.real.finished(request, now))

    def lost(self, request: RequestId, now: float = 0.0) -> list[Effect]:
        if self._park_again(request):
            self.books.losses[request] += 1
        return self._book(self.real.lost(request, now))

    def refused(self, request: RequestId, in_flight_total: int | None = None, now: float = 0.0) -> list[Effect]:
        agent = self.books.in_flight.get(request)
        self._park_again(request)
        effects = self.real.refused(request, in_flight_total, now)
        again = [effect for effect in effects if isinstance(effect, Assign) and effect.agent == agent]
        assert not again or request in self._overtaken, "it refused, and was asked again at once"
        return self._book(effects)

    def withdraw(self, request: RequestId, now: float = 0.0) -> list[Effect]:
        self.books.in_flight.pop(request, None)
        self.books.parked.discard(request)
        return self._book(self.real.withdraw(request, now))

    def expire(self, now: float) -> list[Effect]:
        effects = self.real.expire(now)
        deadline = self.real.next_deadline()
        assert deadline is None or deadline > now
        return self._book(effects)

    def shut(self, now: float = 0.0) -> list[Effect]:
        return self._book(self.real.shut(now))

    def check(self) -> None:
        """The dispatcher's own account equals the books, and no slot or place is over its bound."""
        statistics = self.real.statistics()
        in_flight = Counter(self.books.in_flight.values())
        assert {agent: node.in_flight for agent, node in statistics.agents.items() if node.in_flight} == in_flight
        assert statistics.in_flight == in_flight.total()
        parked = Counter(self.books.endpoints[request] for request in self.books.parked)
        assert statistics.parked_by_endpoint == parked
        assert statistics.parked == parked.total()
        assert (self.real.next_deadline() is None) == (not self.books.parked)
        for endpoint in parked:
            waiting = [r for r in self.books.parked - self.books.returned if self.books.endpoints[r] == endpoint]
            assert len(waiting) <= self.queue_places
            assert not [
                agent
                for agent, node in statistics.agents.items()
                if node.endpoint == endpoint
                and node.standing is Standing.SERVING
                and not node.held_back
                and node.in_flight < node.capacity
            ], "a request is parked beside a free slot"

    def _overtake(self, agent: AgentId) -> None:
        self._overtaken.update(request for request, where in self.books.in_flight.items() if where == agent)

    def _park_again(self, request: RequestId) -> bool:
        if self.books.in_flight.pop(request, None) is None:
            return False
        self.books.parked.add(request)
        self.books.returned.add(request)
        return True

    def _book(self, effects: list[Effect]) -> list[Effect]:
        for effect in effects:
            assert effect.request in self.books.parked, "it was not waiting for a decision"
            assert effect.waited_s >= 0.0
            self.books.parked.remove(effect.request)
            if isinstance(effect, Assign):
                self._book_assignment(effect)
        rejected = {effect.request for effect in effects if isinstance(effect, Reject)}
        assert not rejected & set(self.books.in_flight)
        self.check()
        return effects

    def _book_assignment(self, effect: Assign) -> None:
        endpoint = self.books.endpoints[effect.request]
        earlier = [
            request
            for request in self.books.parked
            if self.books.endpoints[request] == endpoint
            and self.books.ranks[request] < self.books.ranks[effect.request]
        ]
        assert not earlier, "it overtook a request of its endpoint"
        agent = self._views[effect.agent]
        assert agent.state is AgentState.READY
        assert agent.connected
        assert agent.endpoint == endpoint
        self.books.in_flight[effect.request] = effect.agent
        self._overtaken.discard(effect.request)
        assert Counter(self.books.in_flight.values())[effect.agent] <= agent.capacity
        assert effect.attempt == self.books.losses[effect.request] + 1 <= self.attempts
