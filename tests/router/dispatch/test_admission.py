"""Which requests are assigned, parked or turned away when they arrive."""

import pytest

from tests.router.dispatch.watched import EMBED, A, B, C, WatchedDispatcher, enrolled, req, view
from xim_protocol.messages import AgentState
from xim_router.dispatch.catalog import RegisteredAgent
from xim_router.dispatch.effects import Assign, Reject, Rejection
from xim_router.dispatch.roster import AgentView

COMING_BACK = [
    view(A, connected=False),
    view(A, state=AgentState.CONNECTING),
    view(A, state=AgentState.PULLING),
    view(A, state=AgentState.STARTING),
    view(A, state=AgentState.DEGRADED),
    view(A, state=AgentState.DRAINING),
    view(A, endpoint=EMBED),
    view(A, endpoint=None),
]


def serve(dispatcher: WatchedDispatcher, *, capacity: int = 1) -> None:
    """One agent, A, with `capacity` slots."""
    dispatcher.register(enrolled(A))
    dispatcher.agent_up(view(A, capacity=capacity))


def test_a_request_for_an_endpoint_without_agents_is_rejected(dispatcher: WatchedDispatcher) -> None:
    assert dispatcher.submit(req(1)) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]


def test_a_request_goes_to_the_agent_with_a_free_slot(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher)
    assert dispatcher.submit(req(1)) == [Assign(req(1), A, 1, 0.0)]


def test_an_agent_of_another_endpoint_gets_nothing(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher)
    assert dispatcher.submit(req(1), EMBED) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]


def test_a_session_that_the_catalog_does_not_know_gets_nothing_until_it_does(dispatcher: WatchedDispatcher) -> None:
    dispatcher.agent_up(view(A))
    assert dispatcher.submit(req(1)) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]
    dispatcher.register(enrolled(A))
    assert dispatcher.submit(req(2)) == [Assign(req(2), A, 1, 0.0)]


def test_an_agent_without_an_assignment_gets_nothing(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A, None))
    dispatcher.agent_up(view(A, endpoint=None))
    assert dispatcher.submit(req(1)) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]


def test_the_same_request_cannot_be_submitted_twice(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher)
    dispatcher.submit(req(1))
    with pytest.raises(ValueError, match="req_1"):
        dispatcher.submit(req(1))


def test_ten_requests_wait_for_the_sole_full_agent_and_the_next_is_rejected_at_once(
    dispatcher: WatchedDispatcher,
) -> None:
    serve(dispatcher)
    dispatcher.submit(req(1))
    assert [dispatcher.submit(req(number)) for number in range(2, 12)] == [[]] * 10
    assert dispatcher.submit(req(12)) == [Reject(req(12), Rejection.QUEUE_FULL, 0.0)]


def test_a_queue_of_one_endpoint_leaves_the_places_of_another(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A), enrolled(B, EMBED))
    dispatcher.agent_up(view(A))
    dispatcher.agent_up(view(B, endpoint=EMBED))
    for number in range(11):
        dispatcher.submit(req(number))
    assert dispatcher.submit(req(20), EMBED) == [Assign(req(20), B, 1, 0.0)]
    assert dispatcher.submit(req(21), EMBED) == []


def test_an_agent_without_capacity_is_waited_for(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, capacity=0)
    assert dispatcher.submit(req(1), now=1.0) == []
    assert dispatcher.agent_up(view(A, capacity=1), now=3.0) == [Assign(req(1), A, 1, 2.0)]


def test_several_full_agents_reject_at_once(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A), enrolled(B))
    dispatcher.agent_up(view(A))
    dispatcher.agent_up(view(B))
    assert {effect.agent for n in (1, 2) for effect in dispatcher.submit(req(n)) if isinstance(effect, Assign)} == {
        A,
        B,
    }
    assert dispatcher.submit(req(3)) == [Reject(req(3), Rejection.AT_CAPACITY, 0.0)]


@pytest.mark.parametrize("away", COMING_BACK, ids=lambda v: f"{v.state}-{v.connected}-{v.endpoint}")
def test_the_sole_agent_that_will_serve_again_is_waited_for(dispatcher: WatchedDispatcher, away: AgentView) -> None:
    dispatcher.register(enrolled(A))
    dispatcher.agent_up(away)
    assert dispatcher.submit(req(1), now=5.0) == []
    assert dispatcher.agent_up(view(A), now=7.5) == [Assign(req(1), A, 1, 2.5)]


def test_several_agents_that_will_serve_again_are_not_waited_for(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A), enrolled(B))
    dispatcher.agent_up(view(A, state=AgentState.STARTING))
    dispatcher.agent_up(view(B, connected=False))
    assert dispatcher.submit(req(1)) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]


def test_the_serving_agent_is_waited_for_whatever_the_others_do(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A), enrolled(B), enrolled(C))
    dispatcher.agent_up(view(A))
    dispatcher.agent_up(view(B, state=AgentState.STARTING))
    dispatcher.submit(req(1))
    assert dispatcher.submit(req(2)) == []


def test_the_sole_enrolled_agent_without_a_session_is_waited_for(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A))
    assert dispatcher.submit(req(1)) == []


def test_several_enrolled_agents_without_a_session_are_not_waited_for(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A), enrolled(B))
    assert dispatcher.submit(req(1)) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]


def test_an_agent_without_a_session_counts_only_when_no_other_is_left(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A), enrolled(B), enrolled(C))
    dispatcher.agent_up(view(A, state=AgentState.DRAINING))
    assert dispatcher.submit(req(1)) == []


@pytest.mark.parametrize(
    "out",
    [enrolled(A, suspended=True), enrolled(A, dead=True), enrolled(A, pending=True)],
    ids=["suspended", "dead", "pending"],
)
def test_an_agent_that_is_out_is_not_waited_for(dispatcher: WatchedDispatcher, out: RegisteredAgent) -> None:
    dispatcher.register(out)
    assert dispatcher.submit(req(1)) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]


def test_an_agent_that_never_connected_does_not_count_beside_one_that_did(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A), enrolled(B, pending=True))
    assert dispatcher.submit(req(1)) == []


def test_an_agent_that_has_connected_is_waited_for_though_the_catalog_does_not_know_it_yet(
    dispatcher: WatchedDispatcher,
) -> None:
    dispatcher.register(enrolled(A, pending=True))
    dispatcher.agent_up(view(A))
    dispatcher.agent_down(A)
    assert dispatcher.submit(req(1)) == []
    # Any change of the catalog brings the same again.
    dispatcher.register(enrolled(A, pending=True))
    assert dispatcher.submit(req(2)) == []


def test_a_dead_agent_that_has_come_back_serves(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A, dead=True))
    dispatcher.agent_up(view(A))
    assert dispatcher.submit(req(1)) == [Assign(req(1), A, 1, 0.0)]


def test_a_suspended_agent_with_a_session_gets_nothing(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A, suspended=True))
    dispatcher.agent_up(view(A))
    assert dispatcher.submit(req(1)) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]


def test_a_failed_agent_never_counts(dispatcher: WatchedDispatcher) -> None:
    dispatcher.register(enrolled(A))
    dispatcher.agent_up(view(A, state=AgentState.FAILED))
    assert dispatcher.submit(req(1)) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]
    dispatcher.register(enrolled(A), enrolled(B))
    assert dispatcher.submit(req(2)) == [], "B, enrolled and away, is the sole one left"


def test_after_the_shutdown_nothing_is_taken(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher)
    dispatcher.submit(req(1))
    dispatcher.submit(req(2), now=1.0)
    assert dispatcher.shut(now=4.0) == [Reject(req(2), Rejection.SHUTTING_DOWN, 3.0)]
    assert dispatcher.submit(req(3)) == [Reject(req(3), Rejection.SHUTTING_DOWN, 0.0)]
    assert dispatcher.finished(req(1)) == []
    assert dispatcher.real.statistics().shutting_down
