"""What an agent process asks for and says of itself."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from xim_protocol.ids import InstanceId
from xim_protocol.messages import PROTOCOL_VERSION, AgentState, FlowControl, Hello, Renew, StreamReport


class Link(StrEnum):
    """Where the link stands at the agent."""

    DOWN = "down"
    HELLO_SENT = "hello_sent"
    ATTACHING = "attaching"
    OPEN = "open"


@dataclass(kw_only=True, slots=True)
class AgentReport:
    """What the owner last knew of itself; goes into every Hello and Renew."""

    capacity: int
    state: AgentState = AgentState.CONNECTING
    in_flight: int = 0
    served_model: str | None = None
    statistics: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentConfig:
    """What an agent process asks for in its Hello."""

    instance: InstanceId
    agent_version: str
    accelerator: tuple[tuple[str, str], ...] = ()
    lease_s: float = 30.0
    renewal_interval_s: float = 10.0
    flow: FlowControl = field(default_factory=FlowControl)
    streaming_socket: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentSessionStatistics:
    """What a session holds, for metrics and for tests that nothing leaks."""

    streams: int
    kept_bytes: int
    unacknowledged_bytes: int
    link_pauses: int


def hello_of(config: AgentConfig, report: AgentReport, streams: Iterable[StreamReport]) -> Hello:
    """The Hello of an agent whose live streams are `streams`."""
    return Hello(
        versions=(PROTOCOL_VERSION,),
        instance=config.instance,
        agent_version=config.agent_version,
        capacity=report.capacity,
        state=report.state,
        served_model=report.served_model,
        accelerator=config.accelerator,
        lease_ms=round(config.lease_s * 1000),
        renewal_interval_ms=round(config.renewal_interval_s * 1000),
        flow=config.flow,
        streaming_socket=config.streaming_socket,
        streams=tuple(streams),
    )


def renew_of(report: AgentReport) -> Renew:
    """The Renew that carries `report`."""
    return Renew(
        state=report.state,
        capacity=report.capacity,
        in_flight=report.in_flight,
        served_model=report.served_model,
        statistics=report.statistics,
    )
