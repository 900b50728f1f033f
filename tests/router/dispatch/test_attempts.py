"""Requests whose agent was lost or refused them."""

from tests.router.dispatch.watched import CHAT, EMBED, A, B, C, WatchedDispatcher, enrolled, req, view
from xim_protocol.messages import AgentState
from xim_router.dispatch.effects import Assign, Reject, Rejection


def serve(dispatcher: WatchedDispatcher, *, a: int, b: int | None = None) -> None:
    """Agent A with `a` slots and, unless None, agent B with `b`."""
    capacities = {A: a} if b is None else {A: a, B: b}
    dispatcher.register(*[enrolled(agent) for agent in capacities])
    for agent, capacity in capacities.items():
        dispatcher.agent_up(view(agent, capacity=capacity))


# Lost


def test_a_lost_request_is_dispatched_once_more_and_then_rejected(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1)
    dispatcher.submit(req(1))
    assert dispatcher.lost(req(1), now=1.0) == [Assign(req(1), A, 2, 0.0)]
    assert dispatcher.lost(req(1), now=2.0) == [Reject(req(1), Rejection.AGENT_LOST, 0.0)]


def test_the_slot_of_a_request_that_is_given_up_goes_to_the_next(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1)
    dispatcher.submit(req(1))
    dispatcher.submit(req(2))
    assert dispatcher.lost(req(1), now=1.0) == [Assign(req(1), A, 2, 0.0)], "accepted first, so before request 2"
    assert dispatcher.lost(req(1), now=2.0) == [
        Reject(req(1), Rejection.AGENT_LOST, 0.0),
        Assign(req(2), A, 1, 2.0),
    ]


def test_the_requests_of_a_sole_lost_agent_wait_at_the_head_even_of_a_full_queue(
    dispatcher: WatchedDispatcher,
) -> None:
    serve(dispatcher, a=2)
    for number in range(1, 13):
        dispatcher.submit(req(number))
    dispatcher.agent_down(A, now=20.0)
    assert dispatcher.lost(req(2), now=20.0) == []
    assert dispatcher.lost(req(1), now=20.0) == []
    assert dispatcher.submit(req(13), now=20.0) == [Reject(req(13), Rejection.QUEUE_FULL, 0.0)]
    assert dispatcher.expire(now=30.0) == [
        Reject(req(number), Rejection.QUEUE_TIMEOUT, 30.0) for number in range(3, 13)
    ]
    assert dispatcher.real.next_deadline() == 50.0, "a request that was accepted waits its full time again"
    assert dispatcher.agent_up(view(A, capacity=2), now=40.0) == [
        Assign(req(1), A, 2, 20.0),
        Assign(req(2), A, 2, 20.0),
    ]


def test_a_lost_request_goes_to_the_other_agent(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1, b=1)
    assert dispatcher.submit(req(1)) == [Assign(req(1), A, 1, 0.0)]
    assert dispatcher.lost(req(1)) == [Assign(req(1), B, 2, 0.0)]


def test_the_slot_of_a_lost_request_serves_the_endpoint_its_agent_has_now(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1)
    dispatcher.submit(req(1))
    dispatcher.register(enrolled(A, EMBED), enrolled(B))
    dispatcher.agent_up(view(A, endpoint=EMBED))
    dispatcher.submit(req(2), EMBED)
    assert dispatcher.lost(req(1)) == [Assign(req(2), A, 1, 0.0)]


def test_a_lost_request_returns_to_its_agent_when_the_other_is_full(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1, b=1)
    dispatcher.submit(req(1))
    dispatcher.submit(req(2))
    assert dispatcher.lost(req(1)) == [Assign(req(1), A, 2, 0.0)]


def test_a_lost_request_waits_for_the_sole_agent_that_is_left(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1, b=1)
    dispatcher.submit(req(1))
    dispatcher.submit(req(2))
    dispatcher.agent_down(A)
    assert dispatcher.lost(req(1), now=1.0) == []
    assert dispatcher.finished(req(2), now=3.0) == [Assign(req(1), B, 2, 2.0)]


def test_a_lost_request_is_rejected_where_several_others_are_full(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1, b=1)
    dispatcher.register(enrolled(A), enrolled(B), enrolled(C))
    dispatcher.agent_up(view(C))
    for number in (1, 2, 3):
        dispatcher.submit(req(number))
    dispatcher.agent_down(A)
    assert dispatcher.lost(req(1)) == [Reject(req(1), Rejection.AT_CAPACITY, 0.0)]


def test_a_lost_request_is_rejected_where_no_agent_is_left(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1)
    dispatcher.submit(req(1))
    dispatcher.register()
    dispatcher.agent_down(A)
    assert dispatcher.lost(req(1)) == [Reject(req(1), Rejection.NO_AGENT, 0.0)]


def test_a_request_that_is_lost_during_the_shutdown_is_rejected(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=2)
    dispatcher.submit(req(1))
    dispatcher.submit(req(2))
    dispatcher.shut()
    assert dispatcher.lost(req(1)) == [Reject(req(1), Rejection.SHUTTING_DOWN, 0.0)]
    assert dispatcher.refused(req(2)) == [Reject(req(2), Rejection.SHUTTING_DOWN, 0.0)]


# Refused


def test_a_refused_request_keeps_its_deadline_and_its_attempt(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1)
    dispatcher.submit(req(1), now=2.0)
    assert dispatcher.refused(req(1), 1, now=3.0) == []
    assert dispatcher.real.next_deadline() == 32.0
    assert dispatcher.slots_free(A, 1, now=5.0) == [Assign(req(1), A, 1, 2.0)]
    assert dispatcher.refused(req(1), 1, now=6.0) == []
    assert dispatcher.expire(now=32.0) == [Reject(req(1), Rejection.QUEUE_TIMEOUT, 28.0)]


def test_refusals_do_not_use_up_attempts(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1)
    dispatcher.submit(req(1))
    for second in range(5):
        dispatcher.refused(req(1), 1, now=float(second))
        assert dispatcher.slots_free(A, 1, now=float(second)) == [Assign(req(1), A, 1, 0.0)]
    assert dispatcher.lost(req(1), now=9.0) == [Assign(req(1), A, 2, 0.0)]


def test_refused_requests_are_parked_in_the_order_of_submission(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=3)
    for number in (1, 2, 3, 4):
        dispatcher.submit(req(number))
    for number in (2, 1, 3):
        dispatcher.refused(req(number), 3)
    assert [effect.request for effect in dispatcher.slots_free(A, 2)] == [req(1), req(2)]
    assert [effect.request for effect in dispatcher.slots_free(A, 1)] == [req(3)]


def test_a_refused_request_goes_to_another_open_agent(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1, b=1)
    dispatcher.submit(req(1))
    assert dispatcher.refused(req(1), 4) == [Assign(req(1), B, 1, 0.0)]
    statistics = dispatcher.real.statistics()
    assert (statistics.agents[A].held_back, statistics.agents[A].refused_in_flight) == (True, 4)


def test_a_refused_request_waits_even_for_several_full_agents(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1, b=1)
    dispatcher.submit(req(1))
    dispatcher.submit(req(2))
    assert dispatcher.refused(req(1), 1) == []
    assert dispatcher.finished(req(2), now=1.0) == [Assign(req(1), B, 1, 1.0)]


def test_an_agent_that_refused_gets_nothing_until_it_names_free_slots(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=4)
    dispatcher.submit(req(1))
    dispatcher.refused(req(1), 4)
    assert dispatcher.submit(req(2)) == []
    assert dispatcher.slots_free(A, 0) == []
    assert [effect.request for effect in dispatcher.slots_free(A, 4)] == [req(1), req(2)]


def test_an_agent_that_was_not_ready_is_open_again_when_one_of_its_streams_ends(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=4)
    dispatcher.submit(req(1))
    dispatcher.submit(req(2))
    dispatcher.refused(req(2), None)
    assert dispatcher.finished(req(1)) == [Assign(req(2), A, 1, 0.0)]


def test_a_full_agent_says_itself_who_gets_the_place_of_a_stream_that_ended(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=4)
    dispatcher.submit(req(1))
    dispatcher.submit(req(2))
    dispatcher.refused(req(2), 4)
    assert dispatcher.finished(req(1)) == []
    assert dispatcher.slots_free(A, 1) == [Assign(req(2), A, 1, 0.0)]


def test_each_named_slot_takes_one_request_until_all_that_were_refused_had_one(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=4)
    for number in range(1, 4):
        dispatcher.submit(req(number))
    for number in range(1, 4):
        dispatcher.refused(req(number), 4)
    # It came while the agent was held back, so the agent never saw it.
    dispatcher.submit(req(4))
    assert dispatcher.slots_free(A, 1) == [Assign(req(1), A, 1, 0.0)]
    assert dispatcher.submit(req(5)) == []
    assert dispatcher.slots_free(A, 1) == [Assign(req(2), A, 1, 0.0)]
    # The agent knows of no other refusal: what is sent beyond the slot brings a new one, or is taken.
    assert [effect.request for effect in dispatcher.slots_free(A, 1)] == [req(3), req(4)]


def test_a_refusal_that_slots_overtook_holds_nothing_back(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1)
    dispatcher.submit(req(1))
    assert dispatcher.slots_free(A, 1) == []
    assert dispatcher.refused(req(1), 1) == [Assign(req(1), A, 1, 0.0)]
    assert dispatcher.refused(req(1), 1) == [], "this one was submitted after the slots were named"
    assert dispatcher.slots_free(A, 1) == [Assign(req(1), A, 1, 0.0)]


def test_an_agent_that_refused_is_open_again_when_it_serves_anew(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=4)
    dispatcher.submit(req(1))
    dispatcher.refused(req(1), None)
    assert dispatcher.agent_up(view(A, capacity=4)) == [], "nothing changed"
    assert dispatcher.agent_up(view(A, capacity=4, state=AgentState.DEGRADED)) == []
    assert dispatcher.agent_up(view(A, capacity=4)) == [Assign(req(1), A, 1, 0.0)]


def test_a_refusal_from_before_it_served_anew_holds_nothing_back(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1)
    dispatcher.submit(req(1))
    dispatcher.agent_up(view(A, connected=False))
    dispatcher.agent_up(view(A))
    assert dispatcher.refused(req(1), 1) == [Assign(req(1), A, 1, 0.0)]


def test_an_agent_that_names_no_slot_is_not_open_for_that(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=4)
    dispatcher.submit(req(1))
    dispatcher.refused(req(1), None)
    assert dispatcher.slots_free(A, 0) == []


def test_an_agent_that_refused_is_open_again_when_it_has_more_capacity(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=4)
    dispatcher.submit(req(1))
    dispatcher.refused(req(1), 4)
    assert dispatcher.agent_up(view(A, capacity=5)) == [Assign(req(1), A, 1, 0.0)]
    assert dispatcher.real.statistics().agents[A].refused_in_flight is None


def test_a_refusal_by_an_agent_that_moved_on_parks_for_the_old_endpoint(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1)
    dispatcher.submit(req(1))
    dispatcher.register(enrolled(A, EMBED), enrolled(B))
    assert dispatcher.refused(req(1), None) == []
    assert dispatcher.real.statistics().parked_by_endpoint == {CHAT: 1}
    assert dispatcher.agent_up(view(B), now=1.0) == [Assign(req(1), B, 1, 1.0)]
