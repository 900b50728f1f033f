"""HTTP/1.1 to the engine over its Unix socket, driven from the socket's callback.

An engine writes one small chunk per stream and step, thousands a second in all. A future and a task switch for each
cost more than everything else the agent does with it, so an answer goes from the parser straight to its `Receiver`;
whoever would rather wait for it does so in `engine.client`. Measured with 64 streams: docs in bench/README.md.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import httptools

KEEP_ALIVE_S = 2.0
"""uvicorn closes an idle connection after 5 s; leaving it earlier never races that close with a new request."""
CONNECT_TIMEOUT_S = 5.0
SWITCHING_STATUS = 101
"""Nothing asks for it, and what follows is no HTTP."""
FINAL_STATUS = 200
"""From here on a status is an answer's; those below are interim ones (RFC 9110, section 15.2)."""
HELD_BYTES = 256 * 1024
"""Reading pauses while more than this waits to be taken."""
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]")


class EngineError(Exception):
    """Something between the agent and its engine."""


class EngineUnavailable(EngineError):
    """No status came: the engine refused, or broke, the connection before. Safe to dispatch elsewhere."""


class EngineBroken(EngineError):
    """The engine's answer ended before its end."""


class Receiver(Protocol):
    """Takes one answer as it comes, in the socket's callback; nothing of it raises.

    Either `ended` or `broke` is the last that it hears.
    """

    def headed(self, status: int, content_type: str) -> None:
        """Status and headers have come; `content_type` is the header's whole value."""
        ...

    def take(self, piece: bytes) -> bool:
        """The hot path: a piece of the body. False when nothing more may come until `go_on`."""
        ...

    def ended(self) -> None:
        """The answer is whole."""
        ...

    def broke(self, error: EngineError) -> None:
        """No more will come: EngineUnavailable before the status, EngineBroken after it."""
        ...


class EngineConnection(asyncio.Protocol):
    """One connection; carries one exchange at a time."""

    def __init__(self) -> None:
        self.closed = False
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._held: list[bytes] = []
        self._stopped = False
        """The receiver takes nothing for now."""
        self._paused = False
        self._headed = False
        self._interim = False
        """What comes now is not the answer yet."""
        self._complete = False
        self._reusable = False
        self._error: Exception | None = None
        """Why no more will come."""

    # --- The exchange ----------------------------------------------------------------------------------------------

    def begin(self, request: bytes, receiver: Receiver) -> None:
        """Send one request, as `request_bytes` makes it; the answer goes to `receiver`."""
        self._receiver = receiver
        self._headers = []
        self._headed = self._complete = self._reusable = self._stopped = False
        if self._error is not None:
            self._tell_end()  # it broke since it was chosen
            return
        self._opened().write(request)

    def go_on(self) -> None:
        """The receiver takes again, first what came meanwhile."""
        self._stopped = False
        self._pass_on()

    def release(self) -> bool:
        """The exchange is over: true when the connection may carry another, else it is closed, which aborts it."""
        self._receiver = None
        self._held.clear()
        if self._complete and self._reusable and not self.closed:
            self._resume()  # nobody took this answer to its end, but whoever asks next wants his
            self.idle_since = time.monotonic()
            return True
        self.close()
        return False

    def close(self) -> None:
        """Close now, without flushing. A receiver hears nothing more."""
        self.closed = True
        self._receiver = None
        if self._transport is not None:
            self._transport.abort()

    @property
    def headers(self) -> Mapping[str, str]:
        """The answer's, by name in lower case."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self._headers}

    # --- asyncio's callbacks ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is connected."""
        # What `create_unix_connection` gives reads and writes; of uvloop's transports asyncio's classes say nothing.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer."""
        if self._receiver is None:
            self.close()  # nothing was asked: not a connection to go on with
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:  # the second is no kind of the first
            self._break(error)
        self._pass_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine closed the connection, or it broke."""
        self.closed = True
        if not self._complete and self._headed and exc is None and not self._framed():
            self._complete = True  # a body without length or chunks ends with its connection (RFC 9112, section 6.3)
        elif not self._complete:
            self._break(exc or ConnectionError("the engine closed the connection"))
        self._pass_on()
        # Nothing is parsed any more. The parser holds this connection's methods: as a circle both would wait for the
        # garbage collector, and every request whose client left would take memory until then.
        del self._parser

    # --- httptools' callbacks --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first bytes of an answer."""
        if self._complete:  # a second one, which nobody asked for
            self._reusable = False
            if self._receiver is None:
                self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header of the answer, or a trailer, which is none and of no use here."""
        if not self._headed:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Status and headers are whole."""
        if self._complete or self._receiver is None:
            return
        status = self._parser.get_status_code()
        if status < FINAL_STATUS:
            self._interim = True
            self._headers = []
            if status == SWITCHING_STATUS:
                self._break(ConnectionError("the engine switched protocols"))
            return
        self._reusable = self._parser.should_keep_alive()
        self._headed = True
        self._receiver.headed(status, self._content_type())

    def on_body(self, body: bytes) -> None:
        """A piece of the body; all that one read of the socket brings is passed on together."""
        if not self._complete:
            self._held.append(body)

    def on_message_complete(self) -> None:
        """The body is whole."""
        if self._interim:
            self._interim = False
            return
        self._complete = True

    # --- Passing on ------------------------------------------------------------------------------------------------

    def _pass_on(self) -> None:
        """The hot path: what has come goes to the receiver, unless it takes nothing for now."""
        receiver, held = self._receiver, self._held
        if receiver is None:
            held.clear()
        elif self._stopped:
            if not self._paused and sum(map(len, held)) > HELD_BYTES and not self.closed:
                self._paused = True
                self._opened().pause_reading()
        else:
            if held:
                piece = held[0] if len(held) == 1 else b"".join(held)
                held.clear()
                self._stopped = not receiver.take(piece)
            if self._paused:
                self._resume()
            if self._complete or self._error is not None:
                self._tell_end()

    def _resume(self) -> None:
        if self._paused and not self.closed:
            self._paused = False
            self._opened().resume_reading()

    def _break(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self.closed = True
        self._opened().abort()

    def _tell_end(self) -> None:
        """Tell the receiver how the answer ended, once it has, and everything before was taken."""
        receiver = self._receiver
        if receiver is None or self._stopped:
            return
        if self._complete:
            self._receiver = None
            receiver.ended()
        elif self._error is not None:
            self._receiver = None
            receiver.broke(self._ending(self._error))

    def _ending(self, cause: Exception) -> EngineError:
        error: EngineError = (
            EngineBroken(f"the engine's answer broke off: {cause}")
            if self._headed
            else EngineUnavailable(f"the engine gave no answer: {cause}")
        )
        error.__cause__ = cause
        return error

    def _content_type(self) -> str:
        for name, value in self._headers:
            if name.lower() == b"content-type":
                return value.decode("latin-1")
        return ""

    def _framed(self) -> bool:
        return any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self._headers)

    def _opened(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport


def request_bytes(method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """A whole request, to leave in one write; a header that could forge another is left out."""
    lines = [f"{method} {path} HTTP/1.1", "host: engine", "accept-encoding: identity"]
    lines += [f"{name}: {value}" for name, value in headers.items() if not _UNSAFE.search(name + value)]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode("latin-1", "replace") + (body or b"")


class EnginePool:
    """Connections to one Unix socket; idle ones are used again."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = str(socket_path)
        self._idle: deque[EngineConnection] = deque()
        self._busy: set[EngineConnection] = set()

    def idle(self) -> EngineConnection | None:
        """A connection that served before, None where none is left."""
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if self._usable(connection, now):
                self._busy.add(connection)
                return connection
            connection.close()
        return None

    @staticmethod
    def _usable(connection: EngineConnection, now: float) -> bool:
        return not connection.closed and now - connection.idle_since < KEEP_ALIVE_S

    async def connect(self) -> EngineConnection:
        """A new connection.

        Raises:
            EngineUnavailable: nobody listens, or takes the connection in time.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_unix_connection(EngineConnection, self._socket_path)
        except (OSError, TimeoutError) as error:
            raise EngineUnavailable(f"the engine takes no connection: {error!r}") from error
        self._busy.add(connection)
        return connection

    def give_back(self, connection: EngineConnection) -> None:
        """The exchange on `connection` is over."""
        self._busy.discard(connection)
        if connection.release():
            self._idle.append(connection)
            # The newest is used first, so the old ones are not come by in `idle` while there is always a new one.
            while not self._usable(self._idle[0], connection.idle_since):
                self._idle.popleft().close()

    def close(self) -> None:
        """Close every connection; who waits for an answer hears nothing more."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()
