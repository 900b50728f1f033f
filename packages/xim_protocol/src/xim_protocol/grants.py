"""What a router grants of what an agent's Hello asks for."""

from collections.abc import Sequence

from xim_protocol.events import AgentReported
from xim_protocol.messages import PROTOCOL_VERSION, FlowControl, Hello

MIN_LEASE_S = 0.5
MAX_LEASE_S = 300.0
MIN_WINDOW_BYTES = 1_024
MAX_WINDOW_BYTES = 4 * 1024 * 1024
MAX_PAUSE_BYTES = 64 * 1024 * 1024


def negotiate_version(versions: Sequence[int]) -> int | None:
    """The newest version both ends speak, or None."""
    return PROTOCOL_VERSION if PROTOCOL_VERSION in versions else None


def clamp_flow(asked: FlowControl) -> FlowControl:
    """What the router grants of the flow-control parameters an agent asked for."""
    return FlowControl(
        enabled=asked.enabled,
        window_bytes=min(max(asked.window_bytes, MIN_WINDOW_BYTES), MAX_WINDOW_BYTES),
        replenish_threshold=asked.replenish_threshold,
        pause_threshold_bytes=min(max(asked.pause_threshold_bytes, MIN_WINDOW_BYTES), MAX_PAUSE_BYTES),
        stall_timeout_ms=asked.stall_timeout_ms,
    )


def clamp_lease_s(asked_ms: int, renewal_interval_ms: int) -> float:
    """The lease granted: at least twice the renewal interval, at most five minutes."""
    least = max(MIN_LEASE_S, 2 * renewal_interval_ms / 1000)
    return min(max(asked_ms / 1000, least), MAX_LEASE_S)


def report_of(hello: Hello) -> AgentReported:
    """What a Hello says of the agent's state."""
    return AgentReported(
        state=hello.state,
        capacity=hello.capacity,
        in_flight=sum(not row.ended for row in hello.streams),
        served_model=hello.served_model,
    )
