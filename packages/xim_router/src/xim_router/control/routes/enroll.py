"""`POST /v1/enroll` and `POST /v1/enroll/refresh`: a body is read, checked and answered from the one table."""

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from xim_protocol.enrollment import (
    Enrollment,
    EnrollmentBodyInvalid,
    EnrollmentCode,
    EnrollRequest,
    JoinKeyError,
    RefreshRequest,
)
from xim_router.control.enrollment import Enroller
from xim_router.control.errors import DatabaseUnavailable
from xim_router.http.errors import ApiError

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
# Credentials are in the answer: nobody between the two ends may keep it.
_NO_STORE = {"cache-control": "no-store"}


def enroll_routes(enroller: Enroller) -> APIRouter:
    """The two routes, answered by `enroller`."""
    router = APIRouter()

    @router.post("/v1/enroll", status_code=201)
    async def enroll(request: Request) -> Response:
        with _told():
            return _answered(await enroller.enroll(EnrollRequest.from_json(await _json_body(request))), 201)

    @router.post("/v1/enroll/refresh")
    async def refresh(request: Request) -> Response:
        with _told():
            return _answered(await enroller.refresh(RefreshRequest.from_json(await _json_body(request))), 200)

    return router


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns what is wrong with a request, or with the database, into the answer that says so."""
    try:
        yield
    except JoinKeyError as error:
        raise ApiError(error.code, f"{error} {error.remedy}", param="join_key") from error
    except EnrollmentBodyInvalid as error:
        raise ApiError("invalid_body", str(error), param=error.field) from error
    except DatabaseUnavailable as error:
        log.warning("enrollment without database", extra={"why": str(error), "remedy": error.remedy})
        raise ApiError(EnrollmentCode.CONTROL_UNAVAILABLE) from error
    except ClientDisconnect:
        # Nobody takes this answer; without it what is no failure would be logged as one.
        raise ApiError("client_closed_request") from None


def _answered(outcome: Enrollment | EnrollmentCode, status: int) -> Response:
    if isinstance(outcome, EnrollmentCode):
        raise ApiError(outcome)
    return JSONResponse(outcome.to_json(), status, headers=_NO_STORE)


async def _json_body(request: Request) -> Any:
    """The body as JSON; never holds more than the limit."""
    received = bytearray()
    async for piece in request.stream():
        received += piece
        if len(received) > MAX_BODY_BYTES:
            raise ApiError("body_too_large", f"An enrollment has at most {MAX_BODY_BYTES} bytes.")
    try:
        return json.loads(received)
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid_body") from error
