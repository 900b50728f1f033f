"""What the dispatcher decides, as values: the broker carries them out.

A request that was submitted leaves the queue by exactly one `Assign` or `Reject`, or because it was withdrawn.
"""

from dataclasses import dataclass
from enum import StrEnum

from xim_protocol.ids import AgentId, RequestId


class Rejection(StrEnum):
    """Why a request was turned away, at once or after waiting."""

    NO_AGENT = "no_agent"
    """No agent serves the endpoint, and there is no sole one that will come back."""
    AT_CAPACITY = "at_capacity"
    """Several agents serve the endpoint, and none has a free slot."""
    QUEUE_FULL = "queue_full"
    """The sole agent is full or away, and every place of its queue is taken."""
    QUEUE_TIMEOUT = "queue_timeout"
    """The request was parked, and no slot became free before its deadline."""
    AGENT_LOST = "agent_lost"
    """Every attempt failed before the commit point."""
    SHUTTING_DOWN = "shutting_down"
    """This router is about to end and takes nothing new."""


@dataclass(frozen=True, slots=True)
class Assign:
    """Give `request` to `agent`; its slot is taken already."""

    request: RequestId
    agent: AgentId
    attempt: int
    """1 for the first attempt. A refused attempt does not count, so its number is used again."""
    waited_s: float
    """Seconds the request has been parked, summed over all its stays in the queue."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Answer `request` with an error; it holds neither place nor slot any more."""

    request: RequestId
    reason: Rejection
    waited_s: float
    """As in `Assign`."""


Effect = Assign | Reject
