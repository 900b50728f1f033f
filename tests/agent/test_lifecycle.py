"""The agent's states."""

import pytest

from xim_agent.lifecycle import TRANSITIONS, AgentState, Step, StepIllegal, after


def walk(*steps: Step) -> AgentState:
    state = AgentState.UNENROLLED
    for step in steps:
        state = after(state, step)
    return state


START = (Step.JOIN_KEY_GIVEN, Step.ENROLLED, Step.LINKED, Step.ENGINE_STARTED, Step.ENGINE_READY)


def test_a_first_start_ends_ready() -> None:
    assert walk(*START) is AgentState.READY


def test_an_unhealthy_engine_degrades_and_recovers() -> None:
    assert walk(*START, Step.ENGINE_UNHEALTHY) is AgentState.DEGRADED
    assert walk(*START, Step.ENGINE_UNHEALTHY, Step.ENGINE_STARTED, Step.ENGINE_READY) is AgentState.READY


def test_degraded_for_too_long_is_failed_until_the_engine_is_ready() -> None:
    assert walk(*START, Step.ENGINE_UNHEALTHY, Step.DEGRADED_TOO_LONG) is AgentState.FAILED
    assert walk(*START, Step.ENGINE_UNHEALTHY, Step.DEGRADED_TOO_LONG, Step.ENGINE_READY) is AgentState.READY


def test_draining_ends_stopped_whatever_happens_meanwhile() -> None:
    assert walk(*START, Step.DRAIN_ASKED, Step.LINK_LOST, Step.LINKED, Step.DRAINED) is AgentState.STOPPED


def test_from_every_state_but_the_last_a_drain_leads_to_an_end() -> None:
    for state in AgentState:
        if state is not AgentState.STOPPED:
            reached = after(state, Step.DRAIN_ASKED)
            assert reached is AgentState.STOPPED or after(reached, Step.DRAINED) is AgentState.STOPPED


def test_the_table_covers_every_state_and_a_missing_step_is_illegal() -> None:
    assert set(TRANSITIONS) == set(AgentState)
    with pytest.raises(StepIllegal, match="engine_ready while unenrolled"):
        after(AgentState.UNENROLLED, Step.ENGINE_READY)


LIVING = [
    state for state in AgentState if state not in (AgentState.UNENROLLED, AgentState.ENROLLING, AgentState.STOPPED)
]


@pytest.mark.parametrize("state", LIVING)
@pytest.mark.parametrize("step", [Step.LINKED, Step.LINK_LOST, Step.LEASE_LOST])
def test_links_come_and_go_in_every_state(state: AgentState, step: Step) -> None:
    assert after(state, step) in AgentState


def test_a_lost_link_alone_degrades_nothing_but_a_lost_lease_does() -> None:
    assert walk(*START, Step.LINK_LOST) is AgentState.READY
    assert walk(*START, Step.LINK_LOST, Step.LEASE_LOST) is AgentState.DEGRADED
    # Linked again, the node sees that the engine is ready and says so.
    assert walk(*START, Step.LEASE_LOST, Step.LINKED, Step.ENGINE_READY) is AgentState.READY


def test_without_a_model_a_lost_link_means_connecting_again() -> None:
    assert walk(Step.ENROLLED, Step.LINKED, Step.LINK_LOST) is AgentState.CONNECTING
    assert walk(Step.ENROLLED, Step.LINKED, Step.LINK_LOST, Step.LINKED) is AgentState.IDLE


def test_an_engine_that_was_stopped_is_waited_for_no_more_and_the_next_one_starts() -> None:
    asked = (*START, Step.ENGINE_UNHEALTHY)
    assert walk(*asked, Step.ENGINE_STOPPED) is AgentState.IDLE
    assert walk(*asked, Step.DEGRADED_TOO_LONG, Step.ENGINE_STOPPED, Step.ENGINE_STARTED) is AgentState.STARTING


@pytest.mark.parametrize(
    "step", [Step.ENGINE_STARTED, Step.ENGINE_READY, Step.ENGINE_UNHEALTHY, Step.ENGINE_STOPPED, Step.GAVE_UP]
)
@pytest.mark.parametrize("state", [AgentState.STARTING, AgentState.READY, AgentState.DEGRADED, AgentState.FAILED])
def test_whatever_the_engine_does_while_it_is_supervised_has_a_state(state: AgentState, step: Step) -> None:
    assert after(state, step) in AgentState
