"""The lifecycle of a stream is one table."""

import re
from pathlib import Path

import pytest

from xim_protocol.stream import TERMINAL, TRANSITIONS, Step, StreamState, next_state

PAGE = Path(__file__).parents[2] / "docs/reference/wire-protocol.md"


def test_every_state_stands_in_the_table() -> None:
    assert set(TRANSITIONS) == set(StreamState)


def test_terminal_states_are_those_that_nothing_leaves() -> None:
    assert {StreamState.ENDED, StreamState.FAILED, StreamState.REFUSED} == TERMINAL


@pytest.mark.parametrize("state", StreamState)
@pytest.mark.parametrize("step", Step)
def test_a_step_leads_where_the_table_says_or_nowhere(state: StreamState, step: Step) -> None:
    assert next_state(state, step) == TRANSITIONS[state].get(step)


@pytest.mark.parametrize("state", set(StreamState) - TERMINAL)
def test_every_stream_can_still_end(state: StreamState) -> None:
    assert set(TRANSITIONS[state].values()) & TERMINAL


def test_a_cancelled_stream_only_waits_for_its_end() -> None:
    assert set(TRANSITIONS[StreamState.CANCELLED].values()) == TERMINAL | {StreamState.CANCELLED}


def test_the_documented_diagram_is_this_table() -> None:
    drawn = re.findall(r"^ +(\w+) --> (\w+): (\w+)$", PAGE.read_text(), re.MULTILINE)
    table = [(str(state), str(after), str(step)) for state, row in TRANSITIONS.items() for step, after in row.items()]
    assert sorted(drawn) == sorted(table)
