"""A whole answer that the router gives by itself, and how it is sent over plain ASGI."""

import json
from dataclasses import dataclass

from starlette.types import Send

from xim_router.http.errors import REQUEST_ID_HEADER

JSON = b"application/json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Status, headers (lower-case names, as ASGI wants them) and the whole body."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def json_answer(status: int, payload: object, request_id: str) -> Answer:
    """`payload` as JSON, with the request's id."""
    return body_answer(status, JSON, json.dumps(payload, separators=(",", ":")).encode(), request_id)


def body_answer(status: int, content_type: bytes, body: bytes, request_id: str) -> Answer:
    """`body` as it is, with the request's id."""
    headers = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        (REQUEST_ID_HEADER, request_id.encode()),
    ]
    return Answer(status=status, headers=headers, body=body)


async def send_answer(send: Send, answer: Answer, *, head_only: bool = False) -> None:
    """Send `answer`; for a HEAD request without its body. The server ends the wait when the client is gone."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": b"" if head_only else answer.body})
