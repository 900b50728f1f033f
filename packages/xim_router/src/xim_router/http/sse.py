"""Event streams: where events end, keep-alive comments, and the error event that ends a stream. Pure.

The engine's bytes go through untouched; what is known of them is known from a short tail.
"""

import json
import re
from collections.abc import Callable

from xim_protocol.routes import TerminalEvent
from xim_router.http.errors import ERRORS, envelope

PING = b": ping\n\n"
"""A comment: keeps a silent connection alive and is no event. Sent at a boundary only."""

# Longer than the longest end that is looked for (message_stop and [DONE] after it, 66 bytes with CRLF more).
_TAIL_BYTES = 128

# One pass over the chunk; three searches with `in` cost three times as much, 0.8 us against 0.23 for 200 bytes.
_response_end = re.compile(rb"\nevent: response\.(?:completed|incomplete|failed)\r?\n").search
# One byte less than the longest match, so that one that is cut anywhere is found in overlap and chunk.
_OVERLAP_BYTES = len(b"\nevent: response.incomplete\r\n") - 1


class EventBoundary:
    """Follows one event stream: is it between two events, and has it said that it is complete?

    Understands lines that end in LF or CRLF, as engines write them. An event's data is one line of JSON, in which a
    line break is escaped, so that a line which looks like an end is one.
    """

    __slots__ = ("_ended", "_looks_inside", "_tail", "_terminal")

    def __init__(self, terminal: TerminalEvent) -> None:
        self._terminal = terminal
        # The Responses API ends in an event that holds the whole answer, so its name is far from the end.
        self._looks_inside = terminal is TerminalEvent.RESPONSE
        self._ended = False
        # As if an event had just ended: a stream that has not begun is at a boundary, and each line follows a break.
        self._tail = b"\n\n"

    def feed(self, chunk: bytes) -> None:
        """Take note of the next bytes of the stream; cut anywhere."""
        if self._looks_inside:
            self._look_inside(chunk)
        self._tail = chunk[-_TAIL_BYTES:] if len(chunk) >= _TAIL_BYTES else (self._tail + chunk)[-_TAIL_BYTES:]

    @property
    def at_boundary(self) -> bool:
        """No event is under way: a comment or another event may follow."""
        return self._tail.endswith((b"\n\n", b"\n\r\n"))

    @property
    def complete(self) -> bool:
        """The terminal event was seen, whole. False for ever on a route that never streams."""
        return self.at_boundary and _COMPLETE[self._terminal](self)

    def _look_inside(self, chunk: bytes) -> None:
        if _response_end(self._tail[-_OVERLAP_BYTES:] + chunk) is not None:
            self._ended, self._looks_inside = True, False

    def _lines(self) -> list[bytes]:
        """The last whole lines; the first of them may have lost its beginning."""
        return self._tail.split(b"\n")[1:]

    def _is_done(self) -> bool:
        return b"data: [DONE]" in [line.rstrip(b"\r") for line in self._lines()]

    def _is_message_stop(self) -> bool:
        return b"event: message_stop" in [line.rstrip(b"\r") for line in self._lines()]


_COMPLETE: dict[TerminalEvent, Callable[[EventBoundary], bool]] = {
    TerminalEvent.DONE: EventBoundary._is_done,
    TerminalEvent.RESPONSE: lambda boundary: boundary._ended,
    TerminalEvent.MESSAGE_STOP: EventBoundary._is_message_stop,
    TerminalEvent.NONE: lambda boundary: False,
}


def error_event(terminal: TerminalEvent, code: str, message: str | None = None, *, at_boundary: bool = True) -> bytes:
    """The last bytes of a stream that failed: an event in the form that clients of the route raise an error for.

    No terminal event follows it. An event that is under way is closed first, which its reader may find cut short.

    Raises:
        KeyError: `code` is not in the table of errors.
    """
    return (b"" if at_boundary else b"\n\n") + _ERROR_EVENTS[terminal](code, message or ERRORS[code].message)


def _openai_error(code: str, message: str) -> bytes:
    return b"data: " + envelope(code, message) + b"\n\n"


def _response_error(code: str, message: str) -> bytes:
    # The Responses API has the fields at the top; the `openai` client raises only for an `error` beside them.
    error = json.loads(envelope(code, message))["error"]
    return _named_error({"type": "error", "code": code, "message": message, "param": None, "error": error})


def _message_error(code: str, message: str) -> bytes:
    types = {503: "overloaded_error", 504: "timeout_error"}
    kind = types.get(ERRORS[code].status, "api_error")
    return _named_error({"type": "error", "error": {"type": kind, "message": message}})


def _named_error(data: dict[str, object]) -> bytes:
    return b"event: error\ndata: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


_ERROR_EVENTS: dict[TerminalEvent, Callable[[str, str], bytes]] = {
    TerminalEvent.DONE: _openai_error,
    TerminalEvent.NONE: _openai_error,
    TerminalEvent.RESPONSE: _response_error,
    TerminalEvent.MESSAGE_STOP: _message_error,
}
