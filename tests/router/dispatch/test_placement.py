"""Which of several agents gets a request."""

from tests.router.dispatch.watched import A, B, C, WatchedDispatcher, enrolled, req, view
from xim_protocol.ids import AgentId
from xim_protocol.messages import AgentState
from xim_router.dispatch.effects import Assign, Effect
from xim_router.dispatch.placement import choose


def agent_of(effects: list[Effect]) -> AgentId:
    (effect,) = effects
    assert isinstance(effect, Assign)
    return effect.agent


def serve(dispatcher: WatchedDispatcher, **capacities: int) -> None:
    agents = {"a": A, "b": B, "c": C}
    dispatcher.register(*[enrolled(agents[name]) for name in capacities])
    for name, capacity in capacities.items():
        dispatcher.agent_up(view(agents[name], capacity=capacity))


def test_of_no_node_none_is_chosen() -> None:
    assert choose([]) is None


def test_equal_agents_take_turns(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=8, b=8, c=8)
    taken = []
    for number in range(6):
        taken.append(agent_of(dispatcher.submit(req(number))))
        dispatcher.finished(req(number))
    assert taken == [A, B, C, A, B, C]


def test_the_agent_with_the_least_part_of_its_capacity_in_use_is_taken(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=2, b=8)
    taken = [agent_of(dispatcher.submit(req(number))) for number in range(5)]
    # Both idle: A comes first. Then B until its part in use, 4 of 8, equals that of A.
    assert taken == [A, B, B, B, B]


def test_of_agents_with_equal_parts_in_use_the_one_with_fewer_requests_is_taken(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, b=8)
    for number in range(4):
        dispatcher.submit(req(number))
    serve(dispatcher, a=2, b=8)
    assert agent_of(dispatcher.submit(req(4))) == A
    # 1 of 2 and 4 of 8; A was the last to be given something, and still goes first.
    assert agent_of(dispatcher.submit(req(5))) == A


def test_a_full_agent_is_passed_over(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=1, b=2)
    assert {agent_of(dispatcher.submit(req(number))) for number in range(2)} == {A, B}
    assert agent_of(dispatcher.submit(req(2))) == B


def test_an_agent_that_drains_is_passed_over(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=4, b=4)
    dispatcher.agent_up(view(A, capacity=4, state=AgentState.DRAINING))
    assert {agent_of(dispatcher.submit(req(number))) for number in range(4)} == {B}


def test_a_request_avoids_the_agent_that_failed_it_while_another_is_open(dispatcher: WatchedDispatcher) -> None:
    serve(dispatcher, a=8, b=8)
    assert agent_of(dispatcher.submit(req(1))) == A
    assert agent_of(dispatcher.submit(req(2))) == B
    # A is idle now and B is not.
    assert dispatcher.lost(req(1), now=1.0) == [Assign(req(1), B, 2, 0.0)]
