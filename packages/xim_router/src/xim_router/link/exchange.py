"""One client request on its way through the router, and what the broker needs of whoever answers it."""

from dataclasses import dataclass, field
from typing import Protocol

from xim_protocol.ids import AgentId, ProjectId, RequestId
from xim_protocol.messages import FailCode, Usage
from xim_protocol.router_session import RouterStream
from xim_protocol.routes import Route
from xim_router.dispatch.catalog import Endpoint
from xim_router.dispatch.effects import Rejection


class ResponseSink(Protocol):
    """Where a response goes: the HTTP edge implements it, the broker drives it. No call may wait."""

    @property
    def committed(self) -> bool:
        """The first byte was given to the client: from here on nothing may be dispatched again."""

    @property
    def sent_bytes(self) -> int:
        """Bytes of the body given to the client so far."""

    def start(self, status: int, content_type: str) -> None:
        """The engine answered with a status."""

    def put(self, payload: bytes) -> int:
        """The next bytes of the body. Returns how many count as consumed at once.

        Whatever does not is reported by the consumption callback later.
        """

    def end(self) -> str | None:
        """The body is whole; returns the code of an error where it turns out that it is not."""

    def reset(self) -> None:
        """Forget what has come so far; only before the commit point."""

    def reject(self, reason: Rejection) -> str:
        """Answer that the request was turned away; returns the code."""

    def fail(self, code: FailCode, message: str) -> str:
        """Answer, or end the answer, with a failure; returns the code."""

    def ping(self) -> None:
        """Keep a silent event stream alive, where it may be done."""

    def abort(self) -> None:
        """Close the client's connection now, unfinished."""


@dataclass(kw_only=True, slots=True, eq=False)
class Exchange:
    """A request, its attempts and its figures. Times are the loop's clock in seconds."""

    request: RequestId
    client_request: str | None
    """The client's own request id, for the log line."""
    project: ProjectId
    endpoint: Endpoint
    route: Route
    body: bytes
    headers: tuple[tuple[str, str], ...]
    sink: ResponseSink
    received_at: float
    deadline: float
    attempts: int = 0
    agent: AgentId | None = None
    stream: "RouterStream[Exchange] | None" = None
    """The stream of the current attempt; None while parked."""
    queue_wait_s: float = 0.0
    first_byte_at: float | None = None
    chunks: int = 0
    received_bytes: int = 0
    status: int | None = None
    usage: Usage | None = None
    failure: tuple[FailCode, str] | None = field(default=None)
    """Why the last attempt failed, told when no attempt is left."""
    concluded: bool = False
    """The client has its answer, or left; only the slot may still be taken."""
