"""What the router reads of a request: its body, as bytes, and the few fields that it decides by.

The rest of the body is the engine's affair: it is neither built nor checked here, and what only the engine can judge
the engine refuses.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from starlette.types import Receive

from xim_router.http import errors
from xim_router.http.errors import REQUEST_ID_HEADER, ApiError

Headers = Iterable[tuple[bytes, bytes]]
"""As in an ASGI scope: lower-case names."""

# What the engine's parser (pydantic, not strict) takes for true, so that both ends agree on what streams.
_TRUE = frozenset({"1", "1.0", "true", '"1"', '"on"', '"t"', '"true"', '"y"', '"yes"'})


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The client left before its body was whole; nobody waits for an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestHead:
    """The fields of a body that the router decides by."""

    model: str | None
    """None where it is absent or null."""
    stream: bool
    """The client wants an event stream; null counts as false."""
    continues_response: bool
    """Responses API: `previous_response_id` names an answer to go on from, which lives in one engine's memory only."""


_NULL = msgspec.Raw(b"null")


class _Head(msgspec.Struct):
    """Only these are built; msgspec steps over all others. As in `json`, the last of equal keys wins."""

    model: str | None = None
    stream: msgspec.Raw = _NULL
    previous_response_id: msgspec.Raw = _NULL


_decode = msgspec.json.Decoder(_Head).decode


def read_head(body: bytes) -> RequestHead:
    """The head of a JSON object.

    Raises:
        ApiError: `invalid_body` when `body` is not JSON or not an object; `invalid_request` with `param` `model` when
            that is no string. Neither repeats anything of the body.
    """
    if not body or body.isspace():
        raise ApiError("invalid_body", "The request body is empty. Send a JSON object.")
    try:
        head = _decode(body)
    except msgspec.ValidationError as error:
        if "`$.model`" in str(error):
            raise ApiError("invalid_request", "`model` must be a string.", param="model") from None
        raise ApiError("invalid_body", "The request body must be a JSON object.") from None
    except msgspec.DecodeError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise ApiError("invalid_body", f"The request body is not valid JSON: {reason}.") from None
    except (UnicodeDecodeError, RecursionError):
        raise ApiError("invalid_body", "The request body is not valid JSON: not UTF-8, or nested too deep.") from None
    return RequestHead(
        model=head.model,
        stream=bytes(head.stream).decode("utf-8", "replace").lower() in _TRUE,
        continues_response=bytes(head.previous_response_id) != b"null",
    )


def check_content_type(content_type: bytes | None) -> None:
    """Refuse a body that calls itself anything but JSON.

    A body without a type is taken: it is parsed anyway, and the engine gets the right type from the agent.

    Raises:
        ApiError: `unsupported_media_type`.
    """
    if content_type is None:
        return
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        raise ApiError("unsupported_media_type", "Send the request with `Content-Type: application/json`.")


async def read_body(receive: Receive, limit_bytes: int, headers: Headers = ()) -> bytes | Disconnected:
    """The whole body, at most `limit_bytes`; a `Content-Length` beyond it is refused before anything is read.

    Ends with the body or when the client leaves; a client that does neither is for the caller to bound in time.

    Raises:
        ApiError: `body_too_large`.
    """
    declared = header(headers, b"content-length")
    if declared is not None and declared.isdigit():
        check_body_size(int(declared), limit_bytes)
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return Disconnected()
        piece = message.get("body", b"")
        size += len(piece)
        check_body_size(size, limit_bytes)
        pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def client_request_id(headers: Headers) -> str | None:
    """The client's own `X-Request-ID` when it is well formed, to be echoed and logged, never to be used as a key."""
    return errors.client_request_id(header(headers, REQUEST_ID_HEADER))


def header(headers: Headers, name: bytes) -> bytes | None:
    """The first value of the header `name` (lower case)."""
    for key, value in headers:
        if key == name:
            return value
    return None


def check_body_size(size: int, limit_bytes: int) -> None:
    """Refuse a body of more than `limit_bytes`.

    Raises:
        ApiError: `body_too_large`.
    """
    if size > limit_bytes:
        raise ApiError(
            "body_too_large", f"The request body is larger than the {limit_bytes} bytes that this router takes."
        )
