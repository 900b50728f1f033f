"""The one ASGI application of the router: sorts requests by path.

Relayed routes are raw ASGI and come first; a few small answers are made here; everything else is the control
plane's application. Every error is answered by the one table, with the request's id.
"""

import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from xim_protocol.routes import ROUTES_BY_PATH, Route
from xim_router.http.answer import Answer, send_answer
from xim_router.http.errors import ApiError, answer, answered_error
from xim_router.http.hints import MODELS_PATH
from xim_router.http.inference import Inference, RequestIds, UnderWay, identify
from xim_router.http.models import get_model, list_models
from xim_router.http.operations import Readiness, healthz, readyz
from xim_router.link.broker import Broker

log = logging.getLogger(__name__)


class Front:
    """See the module's docstring."""

    def __init__(
        self,
        inference: Inference,
        broker: Broker,
        control: ASGIApp,
        readiness: Callable[[], Readiness],
        refused: Callable[[str], None],
    ) -> None:
        """`refused` is told the code of every error that is answered here and not by an exchange."""
        self._inference = inference
        self._broker = broker
        self._control = control
        self._readiness = readiness
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this router does not speak {scope['type']}")
        request_id = identify(scope).shown
        try:
            await self._route(scope, receive, send, request_id)
        except ApiError as error:
            self._note_refusal(scope, error.code)
            await _send_error(send, error, request_id, scope["method"])
        except Exception:
            self._refused("internal_error")
            log.exception("request failed", extra=_facts(scope))
            await _send_error(send, ApiError("internal_error"), request_id, scope["method"])

    def take(self, scope: Scope, body: bytes, send: Send) -> UnderWay | None:
        """Relay a request that has arrived whole, at once; None where it is for `__call__` to serve, or to refuse.

        Whoever calls says by `close` when it is over.
        """
        route, project, slug, _ = _sort(scope["path"])
        if route is None or scope["method"] != "POST":
            return None
        identify(scope)
        try:
            return self._inference.take(scope, body, send, route, project, slug)
        except Exception:
            # Before anything was sent or opened: `__call__` meets the same again, and says it.
            return None

    async def _route(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        route, project, slug, path = _sort(scope["path"])
        if route is not None:
            _require_method(scope, "POST")
            await self._inference.relay(scope, receive, send, route, project, slug)
            return
        made = self._small_answer(scope, path, project, slug, request_id)
        if made is None:
            await self._control(scope, receive, send)
            code = answered_error(scope)
            if code is not None:
                self._note_refusal(scope, code)
        else:
            await send_answer(send, made, head_only=scope["method"] == "HEAD")

    def _note_refusal(self, scope: Scope, code: str) -> None:
        """Count an error that is answered; a fault of the control plane's was logged with its traceback."""
        self._refused(code)
        if code != "internal_error":
            log.info("request refused", extra=_facts(scope) | {"code": code})

    def _small_answer(
        self, scope: Scope, path: str, project: str | None, slug: str | None, request_id: str
    ) -> Answer | None:
        if project is None and path in ("/healthz", "/readyz"):
            _require_method(scope, "GET", "HEAD")
            return healthz(request_id) if path == "/healthz" else readyz(self._readiness(), request_id)
        if path != MODELS_PATH and not path.startswith(MODELS_PATH + "/"):
            return None
        _require_method(scope, "GET", "HEAD")
        catalog, principal = self._broker.catalog, self._inference.principal(scope)
        if path == MODELS_PATH:
            return list_models(catalog, principal, project, slug, request_id)
        return get_model(catalog, principal, project, slug, path.removeprefix(MODELS_PATH + "/"), request_id)


def _facts(scope: Scope) -> dict[str, object]:
    """What a log line says of a request that never became an exchange."""
    ids: RequestIds = scope["state"]["request_ids"]
    return {"request": ids.own, "client_request": ids.client, "path": scope["path"][:200]}


def _sort(path: str) -> tuple[Route | None, str | None, str | None, str]:
    """The relayed route that a path is for, if it is for one; project, endpoint, and the rest of the path."""
    route = ROUTES_BY_PATH.get(path)
    if route is not None:
        return route, None, None, path
    project, slug, path = _split(path)
    return ROUTES_BY_PATH.get(path), project, slug, path


def _split(path: str) -> tuple[str | None, str | None, str]:
    """`/{project}/{endpoint}/v1/...` as its three parts; any other path as it is."""
    parts = path.split("/", 3)
    if len(parts) == 4 and parts[1] and parts[2] and parts[1] != "v1":
        rest = "/" + parts[3]
        if rest in ROUTES_BY_PATH or rest.startswith(MODELS_PATH):
            return parts[1], parts[2], rest
    return None, None, path


class _MethodNotAllowed(ApiError):
    """Carries what is allowed, which a 405 must name (RFC 9110, section 15.5.6)."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__("method_not_allowed", f"Use {' or '.join(allowed)}.")
        self.allowed = allowed


def _require_method(scope: Scope, *allowed: str) -> None:
    if scope["method"] not in allowed:
        raise _MethodNotAllowed(allowed)


async def _send_error(send: Send, error: ApiError, request_id: str, method: str) -> None:
    made = answer(error, request_id)
    headers = made.headers
    if isinstance(error, _MethodNotAllowed):
        headers = [*headers, (b"allow", ", ".join(error.allowed).encode())]
    await send_answer(send, Answer(status=made.status, headers=headers, body=made.body), head_only=method == "HEAD")
