"""Every wire message, one frozen dataclass each, in the order a session uses them.

Agents speak first; `Channel` says on which of the two sockets a message travels. Everything of a stream from agent to
router travels in a `Batch`, on the streaming socket (on control when the agent has no streaming socket), in order;
everything else, and all small things towards the agent, on control; bulk towards the agent, on streaming.
Durations on the wire are integer milliseconds and never clock times: the two ends share no clock.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from xim_protocol.ids import EndpointId, InstanceId, ProjectId, RequestId, SessionId, StreamId

PROTOCOL_VERSION = 1
"""The version this package speaks; a Hello names every version its agent can speak."""


class Channel(StrEnum):
    """The two sockets of a link."""

    CONTROL = "control"
    STREAMING = "streaming"


class AgentState(StrEnum):
    """What an agent says of itself; the router dispatches to `READY` ones only."""

    CONNECTING = "connecting"
    PULLING = "pulling"
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    FAILED = "failed"


class GoodbyeCode(StrEnum):
    """Why a session ends, said by the end that ends it."""

    LEAVING = "leaving"
    """The agent stops in an orderly way."""
    SHUTDOWN = "shutdown"
    """The router stops; come again."""
    SUPERSEDED = "superseded"
    """Another process said Hello with this identity; do not come again."""
    REVOKED = "revoked"
    """The agent's credentials were revoked; enroll anew."""
    SUSPENDED = "suspended"
    """The owner disabled this agent; come again later."""
    PROTOCOL_ERROR = "protocol_error"
    """The peer broke the protocol; come again with a fresh session."""
    VERSION_UNSUPPORTED = "version_unsupported"
    """No common protocol version; update the older end."""
    LINK_CONGESTED = "link_congested"
    """The peer took nothing for too long; come again."""


class CancelReason(StrEnum):
    """Why nobody waits for a stream any more."""

    CLIENT_LEFT = "client_left"
    CLIENT_STALLED = "client_stalled"
    TIME_UP = "time_up"
    SHUTDOWN = "shutdown"


class RefusalReason(StrEnum):
    """Why an agent did not accept a stream; always safe to dispatch elsewhere."""

    AT_CAPACITY = "at_capacity"
    DRAINING = "draining"
    NOT_READY = "not_ready"
    ROUTE = "route"
    """The path is not one of the relayed routes, or may not be served to this project here."""


class FailCode(StrEnum):
    """Why a stream ended without its whole response."""

    CANCELLED = "cancelled"
    STALLED = "stalled"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    ENGINE_BROKEN = "engine_broken"
    """The engine's response broke off after its status."""
    AGENT_LOST = "agent_lost"
    """Said by the router's own session: the agent or its session is gone."""
    BODY_INVALID = "body_invalid"
    """The request's body is not what the route takes."""
    TIME_UP = "time_up"
    OUTRUN = "outrun"
    """Without flow control, a lost link took more than the replay buffer could repeat."""
    INTERNAL = "internal"


class Verdict(IntEnum):
    """What a Welcome says of one stream."""

    RESUME = 0
    SUBMIT_AGAIN = 1
    GONE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowControl:
    """Flow-control parameters, asked for in `Hello` and granted, perhaps clamped, in `Welcome`."""

    enabled: bool = True
    window_bytes: int = 65_536
    """Bytes of one stream that may be sent ahead of consumption. Published default of the original agent."""
    replenish_threshold: float = 0.5
    """Share of the window (and of the pause threshold) that makes a credit due."""
    pause_threshold_bytes: int = 262_144
    """Bytes on a link that the router has not yet received at which the agent pauses."""
    stall_timeout_ms: int = 30_000
    """A stream without credit for so long fails as stalled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What an agent is to serve."""

    endpoint: EndpointId
    served_name: str
    """The engine's one served model name: the endpoint's slug."""
    model: str
    task_mode: str = "generate"
    quantization: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterMember:
    """Where one router of the mesh listens for agents."""

    control_address: str
    streaming_address: str
    curve_public_key: bytes
    """32 raw bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamReport:
    """How far one live stream of the agent is, for a Hello."""

    stream: StreamId
    started: bool
    """A ResponseStart was produced."""
    sent: int
    """Bytes produced so far."""
    ended: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamVerdict:
    """What becomes of one stream after a Hello."""

    stream: StreamId
    verdict: Verdict
    started: bool = False
    """The router has the ResponseStart."""
    received: int = 0
    """The router has every byte before this offset; go on from here."""
    limit: int = 0
    """The stream's credit limit as it stands."""


Usage = tuple[int, int, int, str]
"""Prompt tokens, completion tokens, cached prompt tokens, and who counted: one of `USAGE_SOURCES`."""

USAGE_SOURCES = ("engine", "counted")
"""The engine reported the tokens, or the agent counted them afterwards."""


# --- From the agent, on control -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """First message of every link. Sent before the engine is ready, so that a node shows up at once."""

    versions: tuple[int, ...]
    instance: InstanceId
    agent_version: str
    capacity: int
    """Most streams at once; an agent may have fewer places free than this."""
    state: AgentState
    served_model: str | None
    """Name of the model the engine serves now, or None."""
    accelerator: tuple[tuple[str, str], ...]
    """Facts of the node as name and value."""
    lease_ms: int
    """The lease asked for."""
    renewal_interval_ms: int
    """How often this agent will renew; no lease shorter than twice this is granted."""
    flow: FlowControl
    streaming_socket: bool
    streams: tuple[StreamReport, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Renew:
    """Renews the lease; carries no list of streams, because the two sockets have no common order."""

    state: AgentState
    capacity: int
    in_flight: int
    served_model: str | None = None
    statistics: tuple[tuple[str, float], ...] = ()
    """Figures of the engine by name, such as `num_requests_running`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """Places are free again, said to a router that was refused for capacity."""

    free: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """The tokens of a stream that ended without a report, counted after its end."""

    request: RequestId
    attempt: int
    usage: Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Draining:
    """Nothing new, please; what is in flight will be finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodbye:
    """An orderly end, from either side. `message` is for people."""

    code: GoodbyeCode
    message: str = ""


# --- From the router, on control ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """Answer to a Hello."""

    version: int
    session: SessionId
    lease_ms: int
    flow: FlowControl
    assignment: Assignment | None
    routers: tuple[RouterMember, ...]
    streams: tuple[StreamVerdict, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Renewed:
    """The lease runs for this long again, from now."""

    lease_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Expired:
    """The lease had run out; the session is over, say Hello anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assign:
    """A new assignment while connected."""

    assignment: Assignment | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """The mesh as it is now, while connected; takes the place of the Welcome's list."""

    routers: tuple[RouterMember, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Submit:
    """One request for the engine."""

    stream: StreamId
    request: RequestId
    attempt: int
    project: ProjectId
    path: str
    body: bytes | None
    """The whole body when it has up to `INLINE_BODY_BYTES`, else None."""
    body_bytes: int
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = ()
    """From a small allow-list; names in lower case."""
    time_left_ms: int | None = None
    traceparent: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancel:
    """Nobody waits for `stream` any more; stop the engine's work on it."""

    stream: StreamId
    reason: CancelReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    """Absolute offsets: what the router received on this link, how far streams may send, which are closed."""

    received: int
    """Payload bytes received since Attach (since Welcome without a streaming socket)."""
    limits: tuple[tuple[StreamId, int], ...] = ()
    closed: tuple[StreamId, ...] = ()


# --- On streaming -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Attach:
    """Agent to router: this socket is the streaming half of `session`."""

    session: SessionId


@dataclass(frozen=True, kw_only=True, slots=True)
class Attached:
    """Router to agent: requests may come now."""

    session: SessionId


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """Router to agent: a piece of a request body that was too long for its Submit."""

    stream: StreamId
    offset: int
    payload: bytes


class EntryKind(IntEnum):
    """What one entry of a Batch is. An entry is the tuple `(kind, stream, ...)` of the fields named here."""

    START = 0
    """`(0, stream, status, content_type)`."""
    CHUNK = 1
    """`(1, stream, offset, payload)`."""
    END = 2
    """`(2, stream, size, usage)`: `size` is the body's whole length, `usage` a `Usage` tuple or None."""
    FAIL = 3
    """`(3, stream, code, message, retryable, usage)`."""
    REFUSED = 4
    """`(4, stream, reason, in_flight)`: the agent's total in flight, over all routers."""
    CONTINUE = 5
    """`(5, stream, limit)`: send the body up to this absolute offset."""


Entry = tuple[object, ...]
"""One validated entry of a Batch; a tuple because a dataclass each costs a microsecond on the hot path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Agent to router: what many streams produced, in order per stream."""

    entries: tuple[Entry, ...]


AgentMessage = Hello | Renew | Slots | Counted | Draining | Goodbye | Attach | Batch
RouterMessage = Welcome | Renewed | Expired | Assign | Members | Submit | Cancel | Credit | Goodbye | Attached | Body
Message = AgentMessage | RouterMessage
