"""How each of the dispatcher's rejections is answered: its code in the table of errors, and its sentence."""

from collections.abc import Mapping
from types import MappingProxyType

from xim_router.dispatch.effects import Rejection
from xim_router.http.errors import ApiError

REJECTIONS: Mapping[Rejection, tuple[str, str]] = MappingProxyType(
    {
        Rejection.NO_AGENT: ("no_agent_available", "No agent serves this model now. Repeat the request in a moment."),
        Rejection.AT_CAPACITY: (
            "no_agent_available",
            "Every agent that serves this model is at capacity. Repeat the request in a moment.",
        ),
        Rejection.QUEUE_FULL: (
            "queue_full",
            "The agent that serves this model is busy, and its queue is full. Repeat the request in a moment.",
        ),
        Rejection.QUEUE_TIMEOUT: (
            "queue_timeout",
            "The request waited for the agent that serves this model, and no slot became free in time.",
        ),
        Rejection.AGENT_LOST: ("agent_lost", "The agent was lost while it worked on the request, twice in a row."),
        Rejection.SHUTTING_DOWN: ("shutting_down", "The router is shutting down. Repeat the request in a moment."),
    }
)
"""Every member of `Rejection`. `no_agent_available` has two sentences: programs treat both alike, people do not."""


def error_of(reason: Rejection) -> ApiError:
    """The error that tells a client `reason`."""
    code, message = REJECTIONS[reason]
    return ApiError(code, message)
