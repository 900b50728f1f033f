"""One response on its way to an HTTP client.

The socket's callback drives the server's `send` on the spot: `send(...)` is a coroutine that finishes without
suspending while the client keeps up, so no task is switched and no future made per chunk (measured: a task or future
per chunk costs more than everything else the router does for it). When the client is slow, `send` suspends; then one
task takes over, what comes meanwhile waits in a bounded buffer, and the callback takes over again when it is empty.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Send

from xim_protocol.messages import FailCode
from xim_protocol.routes import Route, TerminalEvent
from xim_router.dispatch.effects import Rejection
from xim_router.http.direct import BODYLESS, chunk_writer
from xim_router.http.errors import REQUEST_ID_HEADER, ApiError, answer
from xim_router.http.rejections import error_of
from xim_router.http.resumed import Resumed
from xim_router.http.sse import PING, EventBoundary, error_event
from xim_router.telemetry.metrics import HotCounters

log = logging.getLogger(__name__)

UNSAYABLE_STATUS = 502
"""Stands for a status that no answer with this body can have: the agent, or its engine, is at fault."""
FAILURES: dict[FailCode, tuple[str, str | None]] = {
    FailCode.CANCELLED: ("client_closed_request", None),
    FailCode.STALLED: ("stalled", None),
    FailCode.ENGINE_UNAVAILABLE: ("engine_unavailable", None),
    FailCode.ENGINE_BROKEN: ("engine_error", None),
    FailCode.AGENT_LOST: ("agent_lost", None),
    FailCode.BODY_INVALID: ("invalid_body", "The request body is not what this route takes."),
    FailCode.TIME_UP: ("request_timeout", None),
    FailCode.OUTRUN: ("agent_lost", None),
    FailCode.INTERNAL: ("engine_error", "The agent failed while it worked on the request."),
}
"""How a stream's failure is told to a client: its code in the table of errors, and a sentence of its own if any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseBuffers:
    """Bounds of what responses may hold, in bytes; what all of them hold now stands in `hot.buffered_bytes`."""

    per_response_bytes: int
    total_bytes: int
    hot: HotCounters


class HttpResponse:
    """Implements `link.exchange.ResponseSink` over an ASGI `send`."""

    __slots__ = (
        "_body",
        "_boundary",
        "_broken",
        "_buffers",
        "_direct",
        "_ended",
        "_event_stream",
        "_head",
        "_held",
        "_on_consumed",
        "_on_stalled",
        "_queue",
        "_request_id",
        "_send",
        "_silent",
        "_task",
        "_terminal",
        "_uncredited",
        "committed",
        "sent_bytes",
    )

    def __init__(
        self,
        send: Send,
        *,
        route: Route,
        request_id: str,
        buffers: ResponseBuffers,
        on_consumed: Callable[[int], None],
    ) -> None:
        """`on_consumed(size)` reports bytes that `put` did not."""
        self._send = send
        self._direct = chunk_writer(send)
        self._terminal = route.terminal
        self._request_id = request_id
        self._buffers = buffers
        self._on_consumed = on_consumed
        self.committed = False
        self.sent_bytes = 0
        self._head: tuple[int, bytes] | None = None
        self._event_stream = False
        self._boundary: EventBoundary | None = None
        self._body: list[bytes] = []
        self._ended = False
        self._broken = False
        self._silent = 0
        self._task: asyncio.Task[None] | None = None
        self._queue: deque[tuple[Message, int]] = deque()
        self._held = 0
        self._uncredited = 0

    # --- What the engine said --------------------------------------------------------------------------------------

    def start(self, status: int, content_type: str) -> None:
        """Note status and type; nothing leaves before the first byte of the body, so that a retry stays possible."""
        # A line break in it would write headers of the agent's own.
        fit = content_type.isascii() and content_type.isprintable()
        self._head = (
            status if 200 <= status <= 599 else UNSAYABLE_STATUS,
            content_type.encode() if fit else b"application/octet-stream",
        )
        self._event_stream = content_type.startswith("text/event-stream")
        if self._event_stream:
            self._boundary = EventBoundary(self._terminal)

    def put(self, payload: bytes) -> int:
        """Give `payload` to the client, or hold it while the client is slow or the body may still be whole at once."""
        boundary = self._boundary
        if boundary is None:
            return self._put_plain(payload)
        self._silent = 0
        boundary.feed(payload)
        if not self.committed:
            return self._begin(payload)
        if self._task is None and self._direct.write(payload):
            self.sent_bytes += len(payload)
            return len(payload)
        return self._give(payload)

    def _put_plain(self, payload: bytes) -> int:
        if self.committed:
            return self._give(payload)
        # A body that fits the buffer leaves whole, with its length; until then a failure can still be a status.
        self._body.append(payload)
        self._hold(len(payload))
        if self._held <= self._buffers.per_response_bytes:
            return len(payload)
        body = b"".join(self._body)
        self._body.clear()
        self._release(len(body))
        # All but this payload was reported as consumed when it came.
        return self._begin(body, len(payload))

    def end(self) -> str | None:
        """The engine's body is whole: finish, unless an event stream lacks its terminal event."""
        if self._truncated():
            return self.fail(FailCode.ENGINE_BROKEN, "The engine's answer broke off.")
        if not self.committed:
            body = b"".join(self._body)
            self._body.clear()
            self._release(self._held)
            self.sent_bytes += len(body)
            status, headers = self._head_of_answer(empty=not body)
            if status not in BODYLESS:
                headers.append((b"content-length", str(len(body)).encode()))
            self._whole(status, headers, body)
        else:
            self._finish(b"")
        return None

    def _truncated(self) -> bool:
        head, boundary = self._head, self._boundary
        if boundary is None or head is None or head[0] != 200 or self._terminal is TerminalEvent.NONE:
            return False
        return not boundary.complete

    def reset(self) -> None:
        """Forget what has come so far; another attempt will bring it anew."""
        self._release(self._held)
        self._body.clear()
        self._head = self._boundary = None

    # --- What the router says --------------------------------------------------------------------------------------

    def reject(self, reason: Rejection) -> str:
        """Answer that the request was turned away; only before the commit point."""
        error = error_of(reason)
        self._answer(error)
        return error.code

    def fail(self, code: FailCode, message: str) -> str:
        """Before the commit point an HTTP error; after it an `error` event, or a connection closed unfinished."""
        word, sentence = FAILURES[code]
        text = message or sentence
        if not self.committed:
            self._answer(ApiError(word, text))
        elif self._boundary is not None:
            event = error_event(self._terminal, word, text, at_boundary=self._boundary.at_boundary)
            self._finish(event)
        else:
            self.abort()
        return word

    def ping(self) -> None:
        """Send a comment when an event stream was silent for two calls in a row and is between two events."""
        boundary = self._boundary
        if boundary is None or self._ended or self._task is not None:
            return
        self._silent += 1
        if self._silent >= 2 and boundary.at_boundary:
            self._silent = 0
            # Nobody's credit: the agent never sent it.
            if self.committed:
                self._give(PING, 0)
            else:
                self._begin(PING, 0)

    def abort(self) -> None:
        """Close the client's connection now, without flushing: it takes nothing, or must not take this for whole."""
        self._ended = True
        self.close()
        self._direct.abort()

    def close(self) -> None:
        """Nobody waits any more: drop what is held. Called by the request's handler at its end."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._queue.clear()
        self._body.clear()
        self._release(self._held)
        # It holds the exchange, which holds this: a circle for each request, that only a full collection would find.
        self._on_consumed = _nobody

    def waiting_bytes(self) -> int:
        """Bytes that were given out and that the client's kernel has not taken: held here, or by the connection."""
        return self._direct.waiting_bytes() + (0 if self._task is None else self._held)

    def unacknowledged_bytes(self) -> int:
        """Bytes that the kernel has taken, and the client's kernel has not; an earlier answer's too."""
        return self._direct.unacknowledged_bytes()

    # --- Towards the client ----------------------------------------------------------------------------------------

    def _answer(self, error: ApiError) -> None:
        """A whole error answer in place of the engine's."""
        self.reset()
        made = answer(error, self._request_id)
        self._whole(made.status, made.headers, made.body)

    def _head_of_answer(self, *, empty: bool = False) -> tuple[int, list[tuple[bytes, bytes]]]:
        status, content_type = self._head or (200, b"application/json")
        if status in BODYLESS and not empty:
            status = UNSAYABLE_STATUS  # its body would be taken for an answer
        headers = [(b"content-type", content_type), (REQUEST_ID_HEADER, self._request_id.encode())]
        if self._event_stream:
            # Proxies in front must neither store nor gather an event stream.
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        return status, headers

    def _begin(self, payload: bytes, size: int | None = None) -> int:
        """The commit point of an answer whose length is not known: head and first bytes; returns as `_give`."""
        status, headers = self._head_of_answer()
        self.committed = True
        if self._direct.begin(status, headers, payload):
            self.sent_bytes += len(payload)
            return len(payload) if size is None else size
        self._offer({"type": "http.response.start", "status": status, "headers": headers}, 0)
        return self._give(payload, size)

    def _whole(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """The commit point and the end of an answer of known length."""
        self.committed = self._ended = True
        if not self._direct.whole(status, headers, body):
            self._offer({"type": "http.response.start", "status": status, "headers": headers}, 0)
            self._finish(body)

    def _give(self, payload: bytes, size: int | None = None) -> int:
        """Send body bytes, of which the last `size` (all) are still to be consumed; returns how many are now."""
        self.sent_bytes += len(payload)
        if size is None:
            size = len(payload)
        if self._offer({"type": "http.response.body", "body": payload, "more_body": True}, len(payload)):
            return size
        # Held: counts as consumed while there is room, so that a slow client does not slow the engine at once.
        buffers = self._buffers
        if self._held <= buffers.per_response_bytes and buffers.hot.buffered_bytes <= buffers.total_bytes:
            return size
        self._uncredited += size
        return 0

    def _finish(self, body: bytes) -> None:
        self._ended = True
        if self._task is not None or not self._direct.finish(body):
            self._offer({"type": "http.response.body", "body": body, "more_body": False}, len(body))

    def _offer(self, message: Message, size: int) -> bool:
        """Drive `send` with one message; true when the server took it at once."""
        if self._task is not None:
            self._queue.append((message, size))
            self._hold(size)
            return False
        if self._broken:
            return True
        coroutine = self._send(message)
        try:
            future = coroutine.send(None)  # type: ignore[attr-defined]  # ASGI's Awaitable is a coroutine in practice
        except StopIteration:
            return True
        except Exception:
            # The server cannot say this. It must not reach the callback, which has other streams to see to.
            log.exception("answer cannot be sent", extra={"request": self._request_id})
            self._broken = True
            self.abort()
            return True
        self._hold(size)
        self._task = asyncio.get_running_loop().create_task(self._drain(coroutine, future, size))  # type: ignore[arg-type]
        return False

    async def _drain(self, coroutine: Coroutine[Any, Any, None], future: object, size: int) -> None:
        """Take over while the client is slow: finish the suspended `send`, then what gathered behind it."""
        await Resumed(coroutine, future)
        self._drained(size)
        while self._queue:
            message, size = self._next_held()
            await self._send(message)
            self._drained(size)
        self._task = None

    def _next_held(self) -> tuple[Message, int]:
        """The next message to send; body bytes that gathered leave as one."""
        message, size = self._queue.popleft()
        if not message.get("more_body") or not self._queue or not self._queue[0][0].get("more_body"):
            return message, size
        pieces = [message["body"]]
        while self._queue and self._queue[0][0].get("more_body"):
            following, more = self._queue.popleft()
            pieces.append(following["body"])
            size += more
        return {"type": "http.response.body", "body": b"".join(pieces), "more_body": True}, size

    def _drained(self, size: int) -> None:
        self._release(size)
        credit = min(self._uncredited, size)
        if credit:
            self._uncredited -= credit
            self._on_consumed(credit)

    # --- Bounds ----------------------------------------------------------------------------------------------------

    def _hold(self, size: int) -> None:
        self._held += size
        self._buffers.hot.buffered_bytes += size

    def _release(self, size: int) -> None:
        self._held -= size
        self._buffers.hot.buffered_bytes -= size


def _nobody(size: int) -> None:
    """Takes the place of who was told of consumed bytes."""
