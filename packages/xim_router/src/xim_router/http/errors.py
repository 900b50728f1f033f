"""Every error a client can be answered: one table from code to status, OpenAI type and sentence.

The envelope is OpenAI's, `{"error": {"message", "type", "code", "param"}}`, and the status alone decides which
exception the `openai` client raises. Callers branch on `code`, which is stable. Every 503 carries `Retry-After`.
The inference routes use the table directly; `install_error_handlers` gives the FastAPI routes the same answers.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xim_protocol.enrollment import FAILURES
from xim_router.http.hints import route_hint

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = b"x-request-id"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorRule:
    """How one code is answered."""

    status: int
    type: str
    message: str
    """What is said when the caller has nothing more exact to say."""
    retry_after_s: int | None = None


def _type_of(status: int) -> str:
    """OpenAI's `type` for a status."""
    types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error"}
    return types.get(status, "invalid_request_error" if status < 500 else "server_error")


def _rule(status: int, message: str, retry_after_s: int | None = None) -> ErrorRule:
    return ErrorRule(status=status, type=_type_of(status), message=message, retry_after_s=retry_after_s)


_INFERENCE: dict[str, ErrorRule] = {
    "invalid_request": _rule(400, "The request cannot be understood."),
    "invalid_body": _rule(400, "The request body is not valid JSON."),
    "task_mode_mismatch": _rule(400, "The endpoint does not serve this kind of request."),
    "invalid_api_key": _rule(401, "The API key is missing, wrong, expired or revoked."),
    "scope_insufficient": _rule(403, "The API key lacks the scope that this route needs."),
    "cross_project_access": _rule(403, "The API key belongs to another project."),
    "endpoint_mismatch": _rule(403, "The API key is for another endpoint."),
    "endpoint_not_found": _rule(404, "The project has no endpoint of this name."),
    "model_not_found": _rule(404, "The project has no endpoint or model of this name."),
    "route_not_found": _rule(404, "There is no such route."),
    "method_not_allowed": _rule(405, "The route does not take this method."),
    "request_incomplete": _rule(408, "The request did not arrive in time."),
    "body_too_large": _rule(413, "The request body is larger than this router takes."),
    "url_too_long": _rule(414, "The URL is longer than this router takes."),
    "unsupported_media_type": _rule(415, "The request body must be application/json."),
    "validation_error": _rule(422, "A field of the request breaks its rule."),
    "headers_too_large": _rule(431, "The request's headers are larger than this router takes."),
    "client_closed_request": _rule(499, "The client left before the answer."),
    # Every refusal for want of capacity is safe to repeat after a moment; how long the caller may know better.
    "no_agent_available": _rule(503, "No agent serves this model now.", 5),
    "queue_full": _rule(503, "The agent is busy and its queue is full.", 5),
    "queue_timeout": _rule(503, "No place became free in time.", 5),
    # 503, not 502: the request never ran, so it is safe to repeat, and the engine is usually starting again.
    "engine_unavailable": _rule(503, "The agent's engine does not answer.", 5),
    "shutting_down": _rule(503, "The router is shutting down.", 2),
    "agent_lost": _rule(502, "The agent was lost while it worked on the request."),
    "engine_error": _rule(502, "The agent's engine failed while it worked on the request."),
    "request_timeout": _rule(504, "The request took longer than it may."),
    "stalled": _rule(504, "The answer stopped flowing and was given up."),
    "internal_error": _rule(500, "The router failed. Its log has the details under this request's id."),
}

ERRORS: Mapping[str, ErrorRule] = MappingProxyType(
    _INFERENCE
    | {
        code.value: _rule(failure.status, f"{failure.message} {failure.remedy}", 5 if failure.status == 503 else None)
        for code, failure in FAILURES.items()
        if failure.status is not None
    }
)
"""The one table, by code."""


class ApiError(Exception):
    """A request is answered with an error of the table.

    Raises:
        KeyError: `code` is not in the table; a new error starts there.
    """

    def __init__(
        self, code: str, message: str | None = None, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        self.rule = ERRORS[code]
        self.code, self.param = code, param
        self.message = message or self.rule.message
        self.retry_after_s = self.rule.retry_after_s if retry_after_s is None else retry_after_s
        super().__init__(f"{code}: {self.message}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorAnswer:
    """An error as it goes out."""

    status: int
    headers: list[tuple[bytes, bytes]]
    """Lower-case names, as ASGI wants them."""
    body: bytes


def envelope(code: str, message: str | None = None, *, param: str | None = None) -> bytes:
    """The JSON body for `code`; also the data of an event stream's `error` event.

    Raises:
        KeyError: `code` is not in the table.
    """
    rule = ERRORS[code]
    error = {"message": message or rule.message, "type": rule.type, "code": code, "param": param}
    return json.dumps({"error": error}, separators=(",", ":")).encode()


def answer(error: ApiError, request_id: str) -> ErrorAnswer:
    """Status, headers and body of `error`, with `X-Request-ID`, and `Retry-After` where the table has one."""
    body = envelope(error.code, error.message, param=error.param)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (REQUEST_ID_HEADER, request_id.encode()),
    ]
    if error.retry_after_s is not None:
        # Retry-After is whole seconds; rounded up, so that nobody is told to come too early.
        headers.append((b"retry-after", str(max(1, -int(-error.retry_after_s // 1))).encode()))
    if error.rule.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return ErrorAnswer(status=error.rule.status, headers=headers, body=body)


DRAWN_IDS = 64
"""So many at once: asking the kernel costs as much for one."""
_drawn: list[str] = []


def new_request_id() -> str:
    """The router's own id of one request: `req_` and 24 hexadecimal digits, of chance that only the kernel knows."""
    if not _drawn:
        digits = secrets.token_hex(12 * DRAWN_IDS)
        _drawn.extend([f"req_{digits[start : start + 24]}" for start in range(0, len(digits), 24)])
    return _drawn.pop()


# Two processes must not go on with the same ids.
os.register_at_fork(after_in_child=_drawn.clear)


def client_request_id(value: bytes | None) -> str | None:
    """The client's `X-Request-ID` when it is well formed: 1 to 128 letters, digits, `.`, `_`, `:` and `-`."""
    return value.decode() if value is not None and _REQUEST_ID.fullmatch(value) else None


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of `app` answer the envelope, and every answer carry `X-Request-ID`.

    For 404, 405, 422 and unhandled exceptions as much as for `ApiError`.
    """
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_middleware(_RequestIds)


class _RequestIds:
    """Gives each request its id and turns what nobody handled into a 500 of the envelope.

    A plain ASGI layer, since Starlette answers unhandled exceptions outside of all middleware, where no header
    of ours would reach the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _identify(scope)
        started = False

        async def send_identified(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                rest = [(name, value) for name, value in message.get("headers", ()) if name != REQUEST_ID_HEADER]
                message = {**message, "headers": [*rest, (REQUEST_ID_HEADER, request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, send_identified)
        except Exception:
            log.exception("request failed", extra={"request": request_id, "path": scope["path"]})
            if started:
                raise
            failed = answer(_noted(scope, ApiError("internal_error")), request_id)
            await send({"type": "http.response.start", "status": failed.status, "headers": failed.headers})
            await send({"type": "http.response.body", "body": failed.body})


def _identify(scope: Scope) -> str:
    """The id of this request: given by an outer layer, or the client's, or a new one; left in the scope's state."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        sent = next((value for name, value in scope["headers"] if name == REQUEST_ID_HEADER), None)
        state["request_id"] = client_request_id(sent) or new_request_id()
    return str(state["request_id"])


def answered_error(scope: Scope) -> str | None:
    """The code of the error that an application with these handlers answered, None where it was none.

    A client that left was answered nothing.
    """
    code: str | None = scope["state"].get("error_code")
    return None if code == "client_closed_request" else code


def _noted(scope: Scope, error: ApiError) -> ApiError:
    """`error`, left in the scope's state for who called the application."""
    scope["state"]["error_code"] = error.code
    return error


def _respond(request: Request, error: ApiError) -> Response:
    request_id = _identify(request.scope)
    made = answer(_noted(request.scope, error), request_id)
    response = Response(made.body, made.status)
    response.raw_headers = made.headers
    return response


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _respond(request, error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes: dict[int, str] = {
        401: "invalid_api_key",
        404: "route_not_found",
        405: "method_not_allowed",
        413: "body_too_large",
        415: "unsupported_media_type",
    }
    known = codes.get(error.status_code)
    if known == "route_not_found":
        hint = route_hint(request.url.path)
        response = _respond(request, ApiError(known, f"{ERRORS[known].message} {hint}".rstrip()))
    elif known is not None:
        response = _respond(request, ApiError(known))
    else:
        code = "invalid_request" if error.status_code < 500 else "internal_error"
        response = _respond(request, ApiError(code, HTTPStatus(error.status_code).phrase))
        response.status_code = error.status_code
    # 405 must name the methods that are allowed (RFC 9110, section 15.5.6).
    response.headers.update({k: v for k, v in (error.headers or {}).items() if k.lower() == "allow"})
    return response


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = next(iter(error.errors()), {})
    param = ".".join(str(part) for part in first.get("loc", ())[1:]) or None
    if first.get("type") == "json_invalid":
        return _respond(request, ApiError("invalid_body"))
    return _respond(request, ApiError("validation_error", first.get("msg"), param=param))
