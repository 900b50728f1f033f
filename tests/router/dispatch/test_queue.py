"""What becomes of parked requests."""

from tests.router.dispatch.watched import CHAT, EMBED, A, B, WatchedDispatcher, enrolled, req, view
from xim_protocol.messages import AgentState
from xim_router.dispatch.effects import Assign, Reject, Rejection


def fill(dispatcher: WatchedDispatcher, *, capacity: int = 1, parked: int = 0, now: float = 0.0) -> None:
    """Agent A is full with requests 1 to `capacity`, and as many more as `parked` wait for it."""
    dispatcher.register(enrolled(A))
    dispatcher.agent_up(view(A, capacity=capacity))
    for number in range(1, capacity + parked + 1):
        dispatcher.submit(req(number), now=now)


def test_parked_requests_leave_in_order_as_slots_become_free(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher, parked=3)
    assert dispatcher.finished(req(1), now=1.0) == [Assign(req(2), A, 1, 1.0)]
    assert dispatcher.finished(req(2), now=2.0) == [Assign(req(3), A, 1, 2.0)]
    assert dispatcher.finished(req(3), now=3.0) == [Assign(req(4), A, 1, 3.0)]
    assert dispatcher.finished(req(4), now=4.0) == []


def test_a_parked_request_is_rejected_at_its_deadline(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher)
    dispatcher.submit(req(2), now=5.0)
    assert dispatcher.real.next_deadline() == 35.0
    assert dispatcher.expire(now=34.9) == []
    assert dispatcher.expire(now=35.0) == [Reject(req(2), Rejection.QUEUE_TIMEOUT, 30.0)]
    assert dispatcher.real.next_deadline() is None
    assert dispatcher.expire(now=90.0) == []


def test_deadlines_come_in_order_over_all_endpoints(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A), enrolled(B, EMBED))
    dispatcher.submit(req(1), CHAT, now=2.0)
    dispatcher.submit(req(2), EMBED, now=1.0)
    dispatcher.submit(req(3), CHAT, now=3.0)
    assert [effect.request for effect in dispatcher.expire(now=60.0)] == [req(2), req(1), req(3)]


def test_a_client_that_leaves_frees_its_place(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher, parked=10)
    assert dispatcher.submit(req(20)) == [Reject(req(20), Rejection.QUEUE_FULL, 0.0)]
    assert dispatcher.withdraw(req(5)) == []
    assert dispatcher.submit(req(21)) == []
    assert dispatcher.withdraw(req(5)) == []


def test_a_client_that_leaves_frees_its_slot(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher, parked=1)
    assert dispatcher.withdraw(req(1), now=2.0) == [Assign(req(2), A, 1, 2.0)]
    assert dispatcher.withdraw(req(1), now=2.0) == []


def test_a_second_agent_flushes_the_queue(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher, parked=3)
    dispatcher.register(enrolled(A), enrolled(B))
    assert dispatcher.agent_up(view(B, capacity=2), now=1.0) == [
        Assign(req(2), B, 1, 1.0),
        Assign(req(3), B, 1, 1.0),
    ]
    # Two agents serve now and both are full: what is parked stays, what is new is turned away.
    assert dispatcher.submit(req(9), now=1.0) == [Reject(req(9), Rejection.AT_CAPACITY, 0.0)]
    assert dispatcher.finished(req(2), now=2.0) == [Assign(req(4), B, 1, 2.0)]


def test_an_assignment_in_the_catalog_flushes_the_queue(dispatcher: WatchedDispatcher) -> None:
    dispatcher.agent_up(view(B))
    fill(dispatcher, parked=1)
    assert dispatcher.register(enrolled(A), enrolled(B), now=3.0) == [Assign(req(2), B, 1, 3.0)]


def test_more_capacity_flushes_the_queue(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher, parked=3)
    effects = dispatcher.agent_up(view(A, capacity=3), now=1.0)
    assert [effect.request for effect in effects] == [req(2), req(3)]


def test_less_capacity_takes_nothing_from_what_is_in_flight(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher, capacity=3, parked=1)
    assert dispatcher.agent_up(view(A, capacity=1)) == []
    assert dispatcher.finished(req(1)) == []
    assert dispatcher.finished(req(2)) == []
    assert dispatcher.finished(req(3)) == [Assign(req(4), A, 1, 0.0)]


def test_parked_requests_outlast_their_agent(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A))
    dispatcher.agent_up(view(A, state=AgentState.STARTING))
    dispatcher.submit(req(1))
    dispatcher.agent_up(view(A, state=AgentState.FAILED))
    dispatcher.agent_down(A)
    dispatcher.register()
    assert dispatcher.submit(req(2)) == [Reject(req(2), Rejection.NO_AGENT, 0.0)]
    dispatcher.register(enrolled(B))
    assert dispatcher.agent_up(view(B), now=9.0) == [Assign(req(1), B, 1, 9.0)]


def test_an_agent_that_is_gone_is_forgotten_after_its_last_request(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher)
    dispatcher.register()
    dispatcher.agent_down(A)
    assert A in dispatcher.real.statistics().agents
    assert dispatcher.finished(req(1)) == []
    assert A not in dispatcher.real.statistics().agents
    assert dispatcher.agent_down(A) == []


def test_a_slot_that_was_freed_serves_the_endpoint_its_agent_has_now(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher)
    dispatcher.register(enrolled(A, EMBED))
    dispatcher.agent_up(view(A, endpoint=EMBED))
    dispatcher.submit(req(2), EMBED, now=1.0)
    assert dispatcher.finished(req(1), now=3.0) == [Assign(req(2), A, 1, 2.0)]


def test_what_is_unknown_changes_nothing(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher, parked=1)
    for request in (req(2), req(99)):
        assert dispatcher.real.finished(request, now=0.0) == []
        assert dispatcher.real.lost(request, now=0.0) == []
        assert dispatcher.real.refused(request, None, now=0.0) == []
    assert dispatcher.slots_free(B, 1) == []


def test_the_deadline_of_an_earlier_stay_ends_no_later_one(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A), enrolled(B, EMBED))
    dispatcher.agent_up(view(A))
    dispatcher.submit(req(9), EMBED, now=0.0)  # with the earliest deadline of all
    dispatcher.submit(req(1), now=1.0)
    dispatcher.submit(req(2), now=1.0)
    dispatcher.finished(req(1), now=2.0)
    dispatcher.agent_up(view(A, connected=False), now=3.0)
    assert dispatcher.lost(req(2), now=20.0) == []
    assert dispatcher.expire(now=30.0) == [Reject(req(9), Rejection.QUEUE_TIMEOUT, 30.0)]
    assert dispatcher.expire(now=31.0) == []
    assert dispatcher.real.next_deadline() == 50.0


def test_stale_deadlines_do_not_pile_up(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher)
    dispatcher.submit(req(2), now=0.0)  # parked for the whole test, so its entry stays on top
    for number in range(1_000, 2_000):
        dispatcher.real.submit(req(number), CHAT, now=1.0)
        dispatcher.real.withdraw(req(number), now=1.0)
    assert len(dispatcher.real._waiting._deadlines) < 100
    assert dispatcher.real.next_deadline() == 30.0


def test_the_statistics_tell_what_is_where(dispatcher: WatchedDispatcher) -> None:
    fill(dispatcher, capacity=2, parked=2)
    dispatcher.register(enrolled(A), enrolled(B, EMBED))
    statistics = dispatcher.real.statistics()
    assert statistics.agents_serving == 1
    assert statistics.parked_by_endpoint == {CHAT: 2}
    assert (statistics.parked, statistics.in_flight) == (2, 2)
    assert (statistics.agents[A].capacity, statistics.agents[A].in_flight) == (2, 2)
    assert (statistics.agents[B].state, statistics.agents[B].endpoint) == (None, EMBED)
