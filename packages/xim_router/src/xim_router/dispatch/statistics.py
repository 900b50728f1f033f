"""What the dispatcher holds at one moment, for metrics, readiness and the debug page."""

from collections.abc import Mapping
from dataclasses import dataclass

from xim_protocol.ids import AgentId, EndpointId
from xim_protocol.messages import AgentState
from xim_router.dispatch.roster import Standing


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentStatistics:
    """One agent of the roster."""

    standing: Standing
    endpoint: EndpointId | None
    """What the catalog assigns to it."""
    state: AgentState | None
    """What its session says, or None without a session."""
    capacity: int
    in_flight: int
    """Requests of this router."""
    held_back: bool
    """It refused a request and has not said since that it can take one."""
    refused_in_flight: int | None
    """Its total in flight over all routers as that refusal named it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatcherStatistics:
    """A snapshot; nothing in it changes later."""

    agents: Mapping[AgentId, AgentStatistics]
    parked_by_endpoint: Mapping[EndpointId, int]
    """Endpoints without a parked request are absent."""
    parked: int
    in_flight: int
    shutting_down: bool

    @property
    def agents_serving(self) -> int:
        """How many agents take requests while they have a free slot."""
        return sum(agent.standing is Standing.SERVING for agent in self.agents.values())
