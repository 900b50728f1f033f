"""uvicorn's HTTP protocol, with bounds for what a request may take to arrive, and the envelope for what is no request.

uvicorn itself takes a head of any length, waits for a head or a body for ever, and tells a client whose bytes it
cannot parse so in plain text. What a client sends after it was told is thrown away for a moment: closing at once would
reset the connection, and the reset could overtake the answer.

A connection has one timer, which runs only while its client owes bytes: none for a request that arrives in one piece
on a connection that is reused, and none per chunk of an answer.

A request that has arrived whole is offered on the spot (`take`), without the task that uvicorn runs an application in;
what nobody takes is uvicorn's to run.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import Scope as HttpScope
from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from xim_router.http.crowd import Crowd
from xim_router.http.direct import break_off, suit
from xim_router.http.errors import REQUEST_ID_HEADER, ApiError, answer, client_request_id, new_request_id

log = logging.getLogger(__name__)
# What a stranger sends is no warning to an operator; `_tell` notes it, with its code.
_uvicorns_log = logging.getLogger("uvicorn.error.connection")
_uvicorns_log.setLevel(logging.ERROR)

MAX_URL_BYTES = 16 * 1024
"""Twice what RFC 9110, section 4.1, wants taken at least; no route of this router needs a tenth."""
MAX_HEAD_BYTES = 64 * 1024
"""URL and headers together, as much as other servers take at most."""
ARRIVAL_S = 60.0
"""A head must be whole so long after it began, or after the connection was made; a body must move meanwhile."""
LEAST_BODY_BYTES = 16 * 1024
"""What moving means: so much of a body in that time, or its end. How long all of it may take the application says."""
_BETWEEN_BYTES = len(b": \r\n")
LINGER_S = 2.0
"""How long a client may go on sending after it was told that its request is none."""


class _HeadTooLarge(Exception):
    """Ends the parser's work on a head; the code says what of it is too large."""


class Taken(Protocol):
    """A request under way."""

    def close(self) -> None:
        """Its client has the whole answer, or left. Called once."""


Take = Callable[[HttpScope, bytes, Send], Taken | None]
"""Takes a request with its whole body, or says by None that its application must run; answers through the `Send`."""


def _take_none(_scope: HttpScope, _body: bytes, _send: Send) -> None:
    return None


def _nothing() -> None:
    pass


class HttpProtocol(HttpToolsProtocol):
    """One client's connection."""

    url = b""
    """Of the head that came last; uvicorn has none before the first head begins, and an empty line may come by then."""
    _arriving = False
    """Bytes are parsed right now."""
    _unstarted: tuple[RequestResponseCycle, Any] | None = None
    """A request whose head was among them; its body may be too."""
    _taken: Taken | None = None
    """The request under way, where it was taken on the spot."""

    _heading = False
    """A head has begun and is not whole."""
    _began = False
    """A head began in the bytes that are parsed now."""
    _head_bytes = 0
    """Of an unfinished head, without the piece that it began in."""
    _piece_bytes = 0
    """Of what is parsed now."""
    _told = False
    """The connection is past saving: what still comes is dropped."""
    _code = "invalid_request"
    """The error that the client is told."""
    _overdue: asyncio.TimerHandle | None = None
    """Runs while the client owes the rest of a head or body."""
    _running: RequestResponseCycle | None = None
    """The request whose turn it is, or was last; `cycle` is the one that came last."""
    _spoke = False
    """What is parsed now holds a part of a body, or begins a request."""
    _aside_bytes = 0
    """Of what came since the last of those: trailers, and extensions of chunks."""
    _received = 0
    """Bytes so far, and"""
    _received_before = 0
    """so many when the timer began to run."""

    def __init__(
        self,
        *uvicorns: Any,
        refused: Callable[[str], None] = lambda _code: None,
        crowd: Crowd,
        take: Take = _take_none,
        **more: Any,
    ) -> None:
        """`refused` is told the code of every error that is answered here; `crowd` bounds the connections; `take` is
        offered each request that has arrived whole."""
        super().__init__(*uvicorns, **more)
        self.logger = _uvicorns_log
        self._refused = refused
        self._crowd = crowd
        self._take = take

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came, and owes a request."""
        super().connection_made(transport)
        self._wait()
        self._crowd.came(self, len(self.connections))

    def end(self) -> None:
        """Close now, without flushing."""
        break_off(self._running, self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._wait_no_more()
        self._crowd.left(self)
        running, self._running = self._running, None
        if running is not None and not running.response_complete:
            # uvicorn tells the request that came last, which may wait behind this one.
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)
        if self.cycle is not None:
            # They hold each other else, and only a full collection would find them.
            self.cycle.on_response = _nothing
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.close()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self._told:
            return
        heading, self._began, self._piece_bytes = self._heading, False, len(data)
        self._arriving, self._spoke = True, False
        super().data_received(data)
        self._arriving = False
        if self._unstarted is not None:
            self._start(*self._unstarted)
        if self._heading and not self._told:
            # A piece may hold the end of a body too, so of the one in which the head began nothing is counted.
            self._head_bytes = self._head_bytes + len(data) if heading and not self._began else 0
            self._check(self._head_bytes)
        elif not self._told:
            self._aside_bytes = 0 if self._spoke else self._aside_bytes + len(data)
            self._check(self._aside_bytes)
        self._received += len(data)
        if not self._owes():
            self._wait_no_more()
        elif self._overdue is None:
            self._wait()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._heading = self._began = self._spoke = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, for which nobody asked."""
        if self._heading:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._spoke = True
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._heading = False
        # The body, or the next head, has its own time.
        self._wait_no_more()
        too_large = self._too_large(self._whole_head_bytes())
        if too_large is not None:
            self._code = too_large
            raise _HeadTooLarge(too_large)
        self._crowd.busy(self)
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """A head is whole, or a request that came behind another one has its turn."""
        suit(cycle)
        self._running = cycle
        if self._arriving:
            self._unstarted = cycle, app
        else:
            super()._start_asgi_task(cycle, app)

    def _start(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._unstarted = None
        taken = None
        if not (cycle.more_body or cycle.disconnected or self.flow.read_paused):
            taken = self._take(cycle.scope, bytes(cycle.body), cycle.send)  # type: ignore[arg-type]
        if taken is None:
            super()._start_asgi_task(cycle, app)
        elif cycle.response_complete:
            taken.close()
        else:
            self._taken = taken
            cycle.body = bytearray()  # its bytes have gone on, and the answer may take long

    def on_response_complete(self) -> None:
        """An answer is whole; of several requests in a row the last one counts."""
        taken, self._taken = self._taken, None
        if taken is not None:
            # Not now: whoever ended the answer has to take note of that first.
            self.loop.call_soon(taken.close)
        super().on_response_complete()
        if self.cycle is not None and self.cycle.response_complete:
            self._crowd.idle(self)

    def send_400_response(self, msg: str) -> None:
        """Tell the client, unless its bytes come behind a request whose answer is still to come: that one is last."""
        self._told = True
        if self.pipeline and self.cycle.more_body:
            # It cannot be read to its end and its turn never comes: the answers to those before it are the last ones.
            self.pipeline.popleft()
            before = self.pipeline[0][0] if self.pipeline else self._running
            assert before is not None, "what waits, waits behind one that runs"
            self.cycle = before
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:
                cycle.keep_alive = False
                return
            # The body of this very request cannot be read to its end: nobody else may answer it.
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        self._tell()

    def _owes(self) -> bool:
        """Whether it is the client's turn: it has begun and not ended a request, or sent something beside one."""
        cycle = self.cycle
        return not self._told and (self._heading or cycle is None or cycle.more_body or cycle.response_complete)

    def _wait(self) -> None:
        self._received_before = self._received
        self._overdue = self.loop.call_later(ARRIVAL_S, self._on_overdue)

    def _wait_no_more(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _on_overdue(self) -> None:
        """The client had its time: go on waiting where that is not its fault or a body moves, or else end it."""
        self._wait_no_more()
        if self.transport.is_closing():
            return
        unanswered = self.cycle is not None and not self.cycle.response_complete
        moves = unanswered and not self._heading and self._received - self._received_before >= LEAST_BODY_BYTES
        if moves or self.flow.read_paused:
            self._wait()
        elif self._heading or unanswered:
            self._code = "request_incomplete"
            self.send_400_response("")
        else:
            self.transport.close()

    def _whole_head_bytes(self) -> int:
        """Of the head that is whole now; a small one is not measured but taken for as much as came with it."""
        if self._began and self._piece_bytes <= MAX_HEAD_BYTES:
            return self._piece_bytes
        return len(self.url) + sum(len(name) + len(value) + _BETWEEN_BYTES for name, value in self.headers)

    def _check(self, head_bytes: int) -> None:
        too_large = self._too_large(head_bytes)
        if too_large is not None:
            self._code = too_large
            self.send_400_response("")

    def _too_large(self, head_bytes: int) -> str | None:
        if len(self.url) > MAX_URL_BYTES:
            return "url_too_long"
        return "headers_too_large" if head_bytes > MAX_HEAD_BYTES else None

    def _tell(self) -> None:
        """Answer, and close when the client has done so or in a moment."""
        sent = next((value for name, value in self.headers or () if name == REQUEST_ID_HEADER), None)
        own, client = new_request_id(), client_request_id(sent)
        log.info("request refused", extra={"request": own, "client_request": client, "code": self._code})
        self._refused(self._code)
        made = answer(ApiError(self._code), client or own)
        headers = [*made.headers, (b"connection", b"close")]
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[made.status] + head + b"\r\n" + made.body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
