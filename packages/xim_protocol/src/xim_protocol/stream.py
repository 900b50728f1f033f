"""Lifecycle of one stream, the same table at both ends.

What is missing from the table is illegal: a step that has no place raises and changes nothing.
"""

from enum import StrEnum


class StreamState(StrEnum):
    """Where a stream stands."""

    SUBMITTED = "submitted"
    RESPONDING = "responding"
    CANCELLED = "cancelled"
    """The router withdrew it; the agent's terminal entry is still to come."""
    ENDED = "ended"
    FAILED = "failed"
    REFUSED = "refused"


class Step(StrEnum):
    """What can happen to a stream."""

    START = "start"
    CHUNK = "chunk"
    END = "end"
    FAIL = "fail"
    REFUSE = "refuse"
    CANCEL = "cancel"


TRANSITIONS: dict[StreamState, dict[Step, StreamState]] = {
    StreamState.SUBMITTED: {
        Step.START: StreamState.RESPONDING,
        Step.FAIL: StreamState.FAILED,
        Step.REFUSE: StreamState.REFUSED,
        Step.CANCEL: StreamState.CANCELLED,
    },
    StreamState.RESPONDING: {
        Step.CHUNK: StreamState.RESPONDING,
        Step.END: StreamState.ENDED,
        Step.FAIL: StreamState.FAILED,
        Step.CANCEL: StreamState.CANCELLED,
    },
    # What was under way when the router cancelled still arrives and is dropped without harm.
    StreamState.CANCELLED: {
        Step.START: StreamState.CANCELLED,
        Step.CHUNK: StreamState.CANCELLED,
        Step.CANCEL: StreamState.CANCELLED,
        Step.END: StreamState.ENDED,
        Step.FAIL: StreamState.FAILED,
        Step.REFUSE: StreamState.REFUSED,
    },
    StreamState.ENDED: {},
    StreamState.FAILED: {},
    StreamState.REFUSED: {},
}

TERMINAL: frozenset[StreamState] = frozenset(state for state, steps in TRANSITIONS.items() if not steps)


def next_state(state: StreamState, step: Step) -> StreamState | None:
    """The state after `step`, or None where the table has no place for it."""
    return TRANSITIONS[state].get(step)
