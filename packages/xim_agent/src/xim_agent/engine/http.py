"""HTTP/1.1 to the engine over its Unix socket, driven from the socket's callback.

An engine writes one small chunk per stream and step, thousands a second in all. A future and a task switch for each
cost more than everything else the agent does with it, so a body's bytes go from the parser straight to whoever takes
them (`deliver`), and only who has to wait for something is woken. Measured with 64 streams: docs in bench/README.md.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import httptools

KEEP_ALIVE_S = 2.0
"""uvicorn closes an idle connection after 5 s; leaving it earlier never races that close with a new request."""
CONNECT_TIMEOUT_S = 5.0
HELD_BYTES = 256 * 1024
"""Reading pauses while more than this waits to be taken."""
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]")

Take = Callable[[bytes], bytes | None]
"""Takes a piece of a body at once; what it could not take comes back, None when nothing is left over."""


class EngineError(Exception):
    """Something between the agent and its engine."""


class EngineUnavailable(EngineError):
    """No status came: the engine refused, or broke, the connection before. Safe to dispatch elsewhere."""


class EngineBroken(EngineError):
    """The engine's answer ended before its end."""


class EngineConnection(asyncio.Protocol):
    """One connection; carries one exchange at a time."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.closed = False
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._take: Take | None = None
        self._rest: bytes | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._paused = False
        self._headed = False
        self._complete = False
        self._reusable = False
        self._error: Exception | None = None
        """Why no more will come; raised to whoever waits."""

    # --- The exchange ----------------------------------------------------------------------------------------------

    def begin(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> None:
        """Send one request; the answer's head and body follow."""
        self._parser = httptools.HttpResponseParser(self)
        self.status, self.headers = 0, {}
        self._headed = self._complete = self._reusable = False
        self._rest = None
        lines = [f"{method} {path} HTTP/1.1", "host: engine", "accept-encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers.items() if not _UNSAFE.search(name + value)]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        self._opened().write("\r\n".join((*lines, "", "")).encode("latin-1", "replace") + (body or b""))

    async def head(self) -> None:
        """Return when status and headers have come. Ended by the engine, or by cancelling.

        Raises:
            EngineUnavailable: the connection ended before.
        """
        while not self._headed:
            if self._error is not None:
                raise EngineUnavailable(f"the engine gave no answer: {self._error}") from self._error
            await self._wait()

    async def read(self) -> bytes:
        """All bytes of the body that wait, or the next that come; b"" at its end.

        Raises:
            EngineBroken: the answer ended before its end.
        """
        while not self._held:
            if self._finished():
                return b""
            await self._wait()
        return self._take_held()

    async def deliver(self, take: Take) -> bytes | None:
        """Hand the body to `take` as it comes, from the socket's callback.

        Returns None at the body's end, or what `take` could not take; then nothing more is handed over until the next
        call. An exception of `take` ends the call.

        Raises:
            EngineBroken: the answer ended before its end.
        """
        while True:
            if self._held:
                rest = take(self._take_held())
                if rest is not None:
                    return rest
            if self._finished():
                return None
            self._take = take
            try:
                await self._wait()
            finally:
                self._take = None
            if isinstance(self._error, _Taker):
                raise self._error.raised
            if self._rest is not None:
                rest, self._rest = self._rest, None
                return rest

    def finish(self) -> bool:
        """The exchange is over: true when the connection may carry another, else it is closed, which aborts it."""
        if self._complete and self._reusable and not self.closed and not self._held:
            self.idle_since = self._loop.time()
            return True
        self.close()
        return False

    def close(self) -> None:
        """Close now, without flushing."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio's callbacks ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is connected."""
        # What `create_unix_connection` gives reads and writes; of uvloop's transports asyncio's classes say nothing.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer."""
        if self._parser is None or self._complete:
            self.close()  # nothing was asked: not a connection to go on with
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine closed the connection, or it broke."""
        self.closed = True
        if not self._complete and self._headed and exc is None and not self._framed():
            self._complete = True  # a body without length or chunks ends with its connection (RFC 9112, section 6.3)
            self._wake()
        elif not self._complete:
            self._break(exc or ConnectionError("the engine closed the connection"))

    # --- httptools' callbacks --------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header of the answer."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Status and headers are whole."""
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        self._reusable = self._parser.should_keep_alive()
        self._headed = True
        self._wake()

    def on_body(self, body: bytes) -> None:
        """The hot path: a piece of the body."""
        if self._take is not None:
            try:
                rest = self._take(body)
            except Exception as error:
                self._take = None
                self._break(_Taker(error))
                return
            if rest is not None:
                # Already through the taker's hands: apart from what it has not seen yet.
                self._take, self._rest = None, rest
                self._wake()
            return
        self._held.append(body)
        self._held_bytes += len(body)
        if self._held_bytes > HELD_BYTES and not self._paused:
            self._paused = True
            self._opened().pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        """The body is whole."""
        self._complete = True
        self._wake()

    # --- Waiting ---------------------------------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Ended by whatever the callbacks bring."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _break(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self.close()
        self._wake()

    def _finished(self) -> bool:
        if self._complete:
            return True
        if self._error is not None:
            raise EngineBroken(f"the engine's answer broke off: {self._error}") from self._error
        return False

    def _take_held(self) -> bytes:
        held = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._held.clear()
        self._held_bytes = 0
        if self._paused and not self.closed:
            self._paused = False
            self._opened().resume_reading()
        return held

    def _framed(self) -> bool:
        return "content-length" in self.headers or "transfer-encoding" in self.headers

    def _opened(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport


class _Taker(Exception):
    """Carries what a `Take` raised from the parser's callback to the waiting task."""

    def __init__(self, raised: Exception) -> None:
        super().__init__("who took the body ended it")
        self.raised = raised


class EnginePool:
    """Connections to one Unix socket; idle ones are used again."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = str(socket_path)
        self._idle: deque[EngineConnection] = deque()
        self._busy: set[EngineConnection] = set()

    async def take(self) -> EngineConnection:
        """A connection, perhaps one that served before.

        Raises:
            EngineUnavailable: nobody listens, or takes the connection in time.
        """
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and loop.time() - connection.idle_since < KEEP_ALIVE_S:
                self._busy.add(connection)
                return connection
            connection.close()
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
        if connection.finish():
            self._idle.append(connection)

    def close(self) -> None:
        """Close every connection; exchanges under way break."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()
