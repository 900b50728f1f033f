"""What the two sessions tell their owners: the values that `receive()` and `handle_timeout()` return.

Chunks at the router are the one exception: they come as plain tuples `(context, payload)`, because an object for
each costs a microsecond on the hot path.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

from xim_protocol.ids import SessionId, StreamId
from xim_protocol.messages import (
    AgentState,
    Assignment,
    CancelReason,
    Channel,
    Counted,
    FailCode,
    GoodbyeCode,
    RefusalReason,
    RouterMember,
    Submit,
    Usage,
)

# --- At the agent --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcomed:
    """The router answered the Hello. Streams that did not survive were reported as `StreamAborted` just before."""

    session: SessionId
    resumed: bool
    lease_s: float
    assignment: Assignment | None
    routers: tuple[RouterMember, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkReady:
    """Both halves of the link are bound to the session; requests may come."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestReceived:
    """A request to serve. Where `submit.body` is None, `continue_body` asks for it and `BodyReceived` brings it."""

    submit: Submit


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyReceived:
    """The long body of a request is whole."""

    stream: StreamId
    body: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamCancelled:
    """Nobody waits for the stream: stop the engine's work on it. Its terminal entry is already queued."""

    stream: StreamId
    reason: CancelReason


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamAborted:
    """The stream is gone at the router, or with the lease: stop the engine's work on it, say nothing."""

    stream: StreamId


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamFailed:
    """The session itself failed the stream (no credit for too long, outrun): stop the engine's work on it."""

    stream: StreamId
    code: FailCode


@dataclass(frozen=True, kw_only=True, slots=True)
class CreditGranted:
    """These streams may produce again."""

    streams: tuple[StreamId, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assigned:
    """The router assigned something else while connected."""

    assignment: Assignment | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MembersChanged:
    """Routers joined or left the mesh; the list takes the place of the one in `Welcomed`."""

    routers: tuple[RouterMember, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionExpired:
    """The lease is over; the streams were aborted. Close the link and say Hello on a new one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkFailed:
    """The peer did not answer in time on this channel; close both sockets and try a new link."""

    channel: Channel


@dataclass(frozen=True, kw_only=True, slots=True)
class GoodbyeReceived:
    """The peer ended the session."""

    code: GoodbyeCode
    message: str


AgentEvent = (
    Welcomed
    | LinkReady
    | RequestReceived
    | BodyReceived
    | StreamCancelled
    | StreamAborted
    | StreamFailed
    | CreditGranted
    | Assigned
    | MembersChanged
    | SessionExpired
    | LinkFailed
    | GoodbyeReceived
)

# --- At the router -------------------------------------------------------------------------------------------------

C = TypeVar("C")
"""What the router's owner attaches to a stream: its own record of the request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentReported:
    """The agent said how it is: in a Renew, or that it drains."""

    state: AgentState
    capacity: int
    in_flight: int
    served_model: str | None
    statistics: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotsFree:
    """An agent that had refused for capacity has places again."""

    free: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseStarted(Generic[C]):
    """The engine answered with a status."""

    context: C
    status: int
    content_type: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseEnded(Generic[C]):
    """The response is whole."""

    context: C
    size: int
    usage: Usage | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseFailed(Generic[C]):
    """The stream ended without a whole response."""

    context: C
    code: FailCode
    message: str
    retryable: bool
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRefused(Generic[C]):
    """The agent did not take the request."""

    context: C
    reason: RefusalReason
    in_flight: int


ChunkReceived = tuple[C, bytes]
"""The stream's context and bytes that were not seen before."""

RouterEvent = (
    ChunkReceived[C]
    | ResponseStarted[C]
    | ResponseEnded[C]
    | ResponseFailed[C]
    | RequestRefused[C]
    | AgentReported
    | SlotsFree
    | Counted
    | LinkReady
    | GoodbyeReceived
)
