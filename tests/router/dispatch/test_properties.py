"""Whatever happens, in whatever order: no request is lost or doubled, and the queue is in order.

The rules themselves are checked by `WatchedDispatcher` after every step, from the effects alone. This machine brings
about the steps: agents that come, go, refuse and fail, clients that come and go, and time.
"""

from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.router.dispatch.watched import CHAT, EMBED, A, B, C, WatchedDispatcher, enrolled, req, view
from xim_protocol.ids import AgentId, EndpointId, RequestId
from xim_protocol.messages import AgentState
from xim_router.dispatch.catalog import RegisteredAgent
from xim_router.dispatch.effects import Assign, Effect, Reject, Rejection

AGENTS = st.sampled_from([A, B, C])
ENDPOINTS = st.sampled_from([CHAT, EMBED])
# Mostly ready, or little would ever be in flight.
STATES = st.sampled_from([AgentState.READY] * len(AgentState) + list(AgentState))
REGISTERED = st.builds(
    enrolled,
    AGENTS,
    st.one_of(ENDPOINTS, st.none()),
    suspended=st.sampled_from([False, False, False, True]),
    dead=st.sampled_from([False, False, False, True]),
    pending=st.sampled_from([False, False, False, True]),
)


class DispatcherMachine(RuleBasedStateMachine):
    """Three agents, two endpoints, any number of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.dispatcher = WatchedDispatcher(queue_timeout_s=30.0, queue_places=3, attempts=2)
        self.submitted: list[RequestId] = []
        self.ended: set[RequestId] = set()
        self.shut = False

    @initialize(endpoint=ENDPOINTS, capacity=st.integers(1, 3))
    def one_agent_serves(self, endpoint: EndpointId, capacity: int) -> None:
        self.take(self.dispatcher.register(enrolled(A, endpoint)))
        self.take(self.dispatcher.agent_up(view(A, capacity=capacity, endpoint=endpoint)))

    @rule(agents=st.lists(REGISTERED, max_size=3))
    def the_catalog_changes(self, agents: list[RegisteredAgent]) -> None:
        self.take(self.dispatcher.register(*agents, now=self.now))

    @rule(agent=AGENTS, capacity=st.integers(0, 4), state=STATES, connected=st.booleans(), endpoint=ENDPOINTS)
    def a_session_changes(
        self, agent: AgentId, capacity: int, state: AgentState, connected: bool, endpoint: EndpointId
    ) -> None:
        session = view(agent, capacity=capacity, state=state, connected=connected, endpoint=endpoint)
        self.take(self.dispatcher.agent_up(session, now=self.now))

    @rule(agent=AGENTS, order=st.randoms(use_true_random=False))
    def a_session_ends(self, agent: AgentId, order: Random) -> None:
        self.take(self.dispatcher.agent_down(agent, now=self.now))
        lost = sorted(r for r, where in self.dispatcher.books.in_flight.items() if where == agent)
        order.shuffle(lost)
        for request in lost:
            self.take(self.dispatcher.lost(request, now=self.now))

    @rule(endpoint=ENDPOINTS)
    def a_request_comes(self, endpoint: EndpointId) -> None:
        request = req(len(self.submitted))
        self.submitted.append(request)
        effects = self.dispatcher.submit(request, endpoint, now=self.now)
        assert len(effects) <= 1
        self.take(effects)

    @precondition(lambda self: self.dispatcher.books.in_flight)
    @rule(data=st.data())
    def a_stream_ends(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.dispatcher.books.in_flight)))
        self.ended.add(request)
        self.take(self.dispatcher.finished(request, now=self.now))

    @precondition(lambda self: self.dispatcher.books.in_flight)
    @rule(data=st.data())
    def an_attempt_fails(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.dispatcher.books.in_flight)))
        self.take(self.dispatcher.lost(request, now=self.now))

    @precondition(lambda self: self.dispatcher.books.in_flight)
    @rule(data=st.data(), total=st.one_of(st.none(), st.integers(0, 8)))
    def an_agent_refuses(self, data: st.DataObject, total: int | None) -> None:
        request = data.draw(st.sampled_from(sorted(self.dispatcher.books.in_flight)))
        self.take(self.dispatcher.refused(request, total, now=self.now))

    @rule(agent=AGENTS, free=st.integers(0, 3))
    def an_agent_names_free_slots(self, agent: AgentId, free: int) -> None:
        self.take(self.dispatcher.slots_free(agent, free, now=self.now))

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.submitted))
        if request in self.alive():
            self.ended.add(request)
        self.take(self.dispatcher.withdraw(request, now=self.now))

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        effects = self.dispatcher.expire(now=self.now)
        assert all(isinstance(e, Reject) and e.reason is Rejection.QUEUE_TIMEOUT for e in effects)
        self.take(effects)

    @precondition(lambda self: len(self.submitted) > 20 and not self.shut)
    @rule()
    def the_router_shuts_down(self) -> None:
        self.shut = True
        self.take(self.dispatcher.shut(now=self.now))
        assert not self.dispatcher.books.parked

    @invariant()
    def no_request_is_lost_or_doubled(self) -> None:
        alive = self.alive()
        assert not alive & self.ended
        assert alive | self.ended == set(self.submitted)

    def alive(self) -> set[RequestId]:
        books = self.dispatcher.books
        assert not books.parked & set(books.in_flight)
        return books.parked | set(books.in_flight)

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert effect.request not in self.ended
            if isinstance(effect, Reject):
                self.ended.add(effect.request)
            else:
                assert isinstance(effect, Assign)
                assert not self.shut

    def teardown(self) -> None:
        """Whatever is left leaves by its end or its deadline, and nothing stays behind."""
        self.now += 100.0
        while self.alive():
            self.take(self.dispatcher.expire(now=self.now))
            for request in sorted(self.dispatcher.books.in_flight):
                self.ended.add(request)
                self.take(self.dispatcher.finished(request, now=self.now))
        statistics = self.dispatcher.real.statistics()
        assert (statistics.parked, statistics.in_flight) == (0, 0)
        assert self.dispatcher.real.next_deadline() is None


TestDispatcher = DispatcherMachine.TestCase
TestDispatcher.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
