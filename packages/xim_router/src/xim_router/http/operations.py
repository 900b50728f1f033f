"""What operators and load balancers ask: `/healthz`, `/readyz`, and `/metrics` on its own listener.

- `/healthz` answers 200 as long as the process runs. Restart it by this one.
- `/readyz` answers 200 when a request has someone to answer it: the router accepts requests and at least one agent
  serves. Before, and during a shutdown, it answers 503 with the reason. A control plane that does not answer leaves
  the router ready: inference goes on by the last catalog, and the answer says how old that is. Route clients by this
  one, but not agents: they enroll before any agent serves.

Both are public and name no tenant.
"""

from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.types import Receive, Scope, Send

from xim_router.http.answer import Answer, body_answer, json_answer, send_answer
from xim_router.http.errors import ApiError, answer, new_request_id
from xim_router.http.request import header

FRESH_S = 5.0
"""A catalog that the database confirmed not longer ago is called fresh: the publisher asks every two seconds."""


class ReadyStatus(StrEnum):
    """The one word of `/readyz`."""

    READY = "ready"
    STARTING = "starting"
    WAITING = "waiting"
    SHUTTING_DOWN = "shutting_down"


_REASONS = {
    ReadyStatus.STARTING: "The router has not read its catalog yet.",
    ReadyStatus.WAITING: "No agent serves yet.",
    ReadyStatus.SHUTTING_DOWN: "The router is shutting down.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Readiness:
    """What readiness is told from."""

    control_stale_s: float | None
    """Seconds since the database last confirmed the catalog; None before the first one was read."""
    agents_ready: int
    """Agents that serve, over all endpoints."""
    endpoints_ready: int
    """Endpoints that at least one of them serves."""
    shutting_down: bool

    @property
    def status(self) -> ReadyStatus:
        if self.shutting_down:
            return ReadyStatus.SHUTTING_DOWN
        if self.control_stale_s is None:
            return ReadyStatus.STARTING
        return ReadyStatus.READY if self.agents_ready else ReadyStatus.WAITING


def healthz(request_id: str) -> Answer:
    """200: the process is up."""
    return json_answer(200, {"status": "ok"}, request_id)


def readyz(readiness: Readiness, request_id: str) -> Answer:
    """200 when ready, else 503 with a reason; `control` is `fresh`, `stale 42 s` or `unread`."""
    status = readiness.status
    payload: dict[str, object] = {
        "status": status,
        "control": _control(readiness.control_stale_s),
        "agents_ready": readiness.agents_ready,
        "endpoints_ready": readiness.endpoints_ready,
    }
    if status is ReadyStatus.READY:
        return json_answer(200, payload, request_id)
    return json_answer(503, payload | {"reason": _REASONS[status]}, request_id)


class MetricsApp:
    """The ASGI application of the metrics listener: `GET /metrics` and nothing else."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Without a lifespan of its own; the server goes on when this raises, as the ASGI specification has it.
            raise RuntimeError(f"the metrics listener does not speak {scope['type']}")
        request_id = new_request_id()
        method = scope["method"]
        if scope["path"] != "/metrics":
            await send_answer(send, _error("route_not_found", "Metrics are at /metrics.", request_id))
        elif method not in ("GET", "HEAD"):
            await send_answer(send, _error("method_not_allowed", "Use GET.", request_id))
        else:
            accept = (header(scope["headers"], b"accept") or b"").decode("latin-1")
            encode, content_type = choose_encoder(accept)
            scraped = body_answer(200, content_type.encode(), encode(self._registry), request_id)
            await send_answer(send, scraped, head_only=method == "HEAD")


def _control(stale_s: float | None) -> str:
    if stale_s is None:
        return "unread"
    return "fresh" if stale_s <= FRESH_S else f"stale {stale_s:.0f} s"


def _error(code: str, message: str, request_id: str) -> Answer:
    made = answer(ApiError(code, message), request_id)
    return Answer(status=made.status, headers=made.headers, body=made.body)
