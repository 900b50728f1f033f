"""The states of an agent and every legal step between them, as one table. Pure."""

from enum import StrEnum


class AgentState(StrEnum):
    """What the agent is doing; the router's API and the metrics use the same words."""

    UNENROLLED = "unenrolled"
    ENROLLING = "enrolling"
    CONNECTING = "connecting"
    """Credentials are there; no link to a router yet, or again."""
    IDLE = "idle"
    """Linked, without a model to serve."""
    PULLING = "pulling"
    """A model is on its way."""
    STARTING = "starting"
    """The engine loads the model."""
    READY = "ready"
    DEGRADED = "degraded"
    """The engine's health check fails, the engine restarts, or the lease was lost while the engine is fine."""
    FAILED = "failed"
    """Degraded for too long, or the engine was given up; nothing is routed here."""
    DRAINING = "draining"
    """Takes nothing new, finishes what is in flight."""
    STOPPED = "stopped"


class Step(StrEnum):
    """What happened to the agent."""

    JOIN_KEY_GIVEN = "join_key_given"
    ENROLLED = "enrolled"
    LINKED = "linked"
    LINK_LOST = "link_lost"
    """No link to any router is left; the lease may still hold."""
    LEASE_LOST = "lease_lost"
    """No router holds a lease of this agent any more."""
    PULL_STARTED = "pull_started"
    ENGINE_STARTED = "engine_started"
    ENGINE_READY = "engine_ready"
    ENGINE_UNHEALTHY = "engine_unhealthy"
    ENGINE_STOPPED = "engine_stopped"
    """As asked, and nothing of it is left: what it served is assigned no more."""
    DEGRADED_TOO_LONG = "degraded_too_long"
    GAVE_UP = "gave_up"
    DRAIN_ASKED = "drain_asked"
    DRAINED = "drained"


class StepIllegal(Exception):
    """A step that the table does not have: our own mistake."""

    def __init__(self, state: AgentState, step: Step) -> None:
        super().__init__(f"{step} while {state}")
        self.state, self.step = state, step


TRANSITIONS: dict[AgentState, dict[Step, AgentState]] = {
    AgentState.UNENROLLED: {
        Step.JOIN_KEY_GIVEN: AgentState.ENROLLING,
        Step.ENROLLED: AgentState.CONNECTING,  # credentials were on disk
        Step.DRAIN_ASKED: AgentState.STOPPED,
    },
    AgentState.ENROLLING: {
        Step.ENROLLED: AgentState.CONNECTING,
        Step.GAVE_UP: AgentState.FAILED,
        Step.DRAIN_ASKED: AgentState.STOPPED,
    },
    AgentState.CONNECTING: {
        Step.LINKED: AgentState.IDLE,
        Step.LINK_LOST: AgentState.CONNECTING,
        Step.LEASE_LOST: AgentState.CONNECTING,
        # A local model is loaded while the link is still being made.
        Step.ENGINE_STARTED: AgentState.STARTING,
        Step.GAVE_UP: AgentState.FAILED,
        Step.DRAIN_ASKED: AgentState.DRAINING,
    },
    AgentState.IDLE: {
        Step.LINKED: AgentState.IDLE,
        Step.LINK_LOST: AgentState.CONNECTING,
        Step.LEASE_LOST: AgentState.CONNECTING,
        Step.PULL_STARTED: AgentState.PULLING,
        Step.ENGINE_STARTED: AgentState.STARTING,
        Step.GAVE_UP: AgentState.FAILED,
        Step.DRAIN_ASKED: AgentState.DRAINING,
    },
    AgentState.PULLING: {
        Step.LINKED: AgentState.PULLING,
        Step.LINK_LOST: AgentState.PULLING,
        Step.LEASE_LOST: AgentState.PULLING,
        Step.ENGINE_STARTED: AgentState.STARTING,
        Step.GAVE_UP: AgentState.FAILED,
        Step.DRAIN_ASKED: AgentState.DRAINING,
    },
    AgentState.STARTING: {
        Step.LINKED: AgentState.STARTING,
        Step.LINK_LOST: AgentState.STARTING,
        Step.LEASE_LOST: AgentState.STARTING,
        Step.ENGINE_STARTED: AgentState.STARTING,
        Step.ENGINE_READY: AgentState.READY,
        Step.ENGINE_UNHEALTHY: AgentState.STARTING,  # it ended before it was ever ready
        Step.ENGINE_STOPPED: AgentState.IDLE,
        Step.GAVE_UP: AgentState.FAILED,
        Step.DRAIN_ASKED: AgentState.DRAINING,
    },
    AgentState.READY: {
        Step.LINKED: AgentState.READY,
        Step.LINK_LOST: AgentState.READY,  # it comes back within the lease, as a rule
        Step.LEASE_LOST: AgentState.DEGRADED,
        Step.ENGINE_READY: AgentState.READY,
        Step.ENGINE_UNHEALTHY: AgentState.DEGRADED,
        Step.ENGINE_STOPPED: AgentState.IDLE,
        Step.PULL_STARTED: AgentState.PULLING,  # another assignment
        Step.ENGINE_STARTED: AgentState.STARTING,
        Step.GAVE_UP: AgentState.FAILED,
        Step.DRAIN_ASKED: AgentState.DRAINING,
    },
    AgentState.DEGRADED: {
        Step.LINKED: AgentState.DEGRADED,  # until the engine is seen to be ready
        Step.LINK_LOST: AgentState.DEGRADED,
        Step.LEASE_LOST: AgentState.DEGRADED,
        Step.ENGINE_STARTED: AgentState.DEGRADED,
        Step.ENGINE_READY: AgentState.READY,
        Step.ENGINE_UNHEALTHY: AgentState.DEGRADED,
        Step.ENGINE_STOPPED: AgentState.IDLE,
        Step.DEGRADED_TOO_LONG: AgentState.FAILED,
        Step.GAVE_UP: AgentState.FAILED,
        Step.DRAIN_ASKED: AgentState.DRAINING,
    },
    AgentState.FAILED: {
        Step.LINKED: AgentState.FAILED,
        Step.LINK_LOST: AgentState.FAILED,
        Step.LEASE_LOST: AgentState.FAILED,
        Step.ENGINE_STARTED: AgentState.FAILED,
        Step.ENGINE_UNHEALTHY: AgentState.FAILED,
        Step.ENGINE_STOPPED: AgentState.IDLE,
        Step.ENGINE_READY: AgentState.READY,
        Step.GAVE_UP: AgentState.FAILED,
        Step.DRAIN_ASKED: AgentState.DRAINING,
    },
    AgentState.DRAINING: {
        Step.LINKED: AgentState.DRAINING,
        Step.LINK_LOST: AgentState.DRAINING,
        Step.LEASE_LOST: AgentState.DRAINING,
        Step.ENGINE_STARTED: AgentState.DRAINING,
        Step.ENGINE_READY: AgentState.DRAINING,
        Step.ENGINE_UNHEALTHY: AgentState.DRAINING,
        Step.ENGINE_STOPPED: AgentState.DRAINING,
        Step.DEGRADED_TOO_LONG: AgentState.DRAINING,
        Step.GAVE_UP: AgentState.STOPPED,
        Step.DRAIN_ASKED: AgentState.DRAINING,
        Step.DRAINED: AgentState.STOPPED,
    },
    AgentState.STOPPED: {},
}
"""What is missing is illegal; the page of states is drawn from it."""

SERVING = frozenset({AgentState.READY})
"""States in which the agent takes requests."""


def after(state: AgentState, step: Step) -> AgentState:
    """The state after `step`.

    Raises:
        StepIllegal: the table has no such step.
    """
    following = TRANSITIONS[state].get(step)
    if following is None:
        raise StepIllegal(state, step)
    return following
