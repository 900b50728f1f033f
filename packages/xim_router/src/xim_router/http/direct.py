"""Writing a response past uvicorn's `send`, straight to its transport.

Per chunk, uvicorn's `send` builds a dict, a coroutine and a list to arrive at one `transport.write`: a third of what
the router spends on a relayed chunk; and it writes a head by itself, which costs a system call and wakes the client for
nothing (bench/README.md has the numbers). This way is taken while nothing is unusual; everything slow goes through
`send`. Both leave the same bytes and the same state of the connection.
All knowledge of uvicorn's inside stands in this module, and `tests/router/http/test_direct.py` holds it.
"""

import array
import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Iterable
from typing import Any, Protocol

from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

Headers = Iterable[tuple[bytes, bytes]]
"""Lower-case names, and values without line breaks: nobody looks at them again."""

BODYLESS = frozenset({204, 304})
"""Statuses of answers that end with their head, and have no length (RFC 9110, sections 6.4.1 and 8.6)."""


class ChunkWriter(Protocol):
    """Takes a response at once, or says that it cannot; what it did not take must go through `send`."""

    def begin(self, status: int, headers: Headers, payload: bytes) -> bool:
        """Write the head of a chunked response and `payload` (not empty) as its first chunk."""

    def whole(self, status: int, headers: Headers, body: bytes) -> bool:
        """Write a whole response; `headers` have its length."""

    def write(self, payload: bytes) -> bool:
        """Write `payload` (not empty) as one chunk."""

    def finish(self, payload: bytes) -> bool:
        """End a chunked response, with `payload` as its last chunk unless it is empty."""

    def waiting_bytes(self) -> int:
        """Bytes that were written and not yet taken by the kernel."""

    def unacknowledged_bytes(self) -> int:
        """Bytes that the kernel has taken, and the client's kernel has not said that it has; 0 where nobody knows."""

    def abort(self) -> None:
        """Close the connection now, without flushing."""


class CloseDelimitedCycle(RequestResponseCycle):
    """A request of HTTP/1.0. An answer without a length ends with the connection (RFC 9112, sections 6.1 and 6.3).

    uvicorn alone would send it in chunks, which such a client takes for the body.
    """

    _unframed = False

    async def send(self, message: Any) -> None:
        """As uvicorn's, which is told of each piece that it is all that it waits for."""
        if message["type"] == "http.response.start":
            self._unframed = all(name != b"content-length" for name, _ in message.get("headers", ()))
            if self._unframed:
                self.chunked_encoding = False
        elif self._unframed:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


def suit(cycle: RequestResponseCycle) -> None:
    """Make of a request what its version of HTTP needs; before it is answered."""
    if cycle.scope["http_version"] == "1.0":
        cycle.__class__ = CloseDelimitedCycle
        cycle.waiting_for_100_continue = False  # it knows no such answer (RFC 9110, section 15.2)


def break_off(cycle: RequestResponseCycle | None, transport: asyncio.Transport) -> None:
    """Close a connection now, without flushing; `cycle` is the request whose answer it may be in the middle of."""
    if isinstance(cycle, CloseDelimitedCycle) and (not transport.is_closing() or transport.get_write_buffer_size()):
        # To this client an ordinary end would be the end of a whole answer: reset the connection.
        reset = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    # Not asked for its class: uvloop's transports are none of asyncio's.
    transport.abort()


class UvicornWriter:
    """The transport behind one uvicorn request."""

    __slots__ = ("_cycle", "_flow", "_transport")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    def begin(self, status: int, headers: Headers, payload: bytes) -> bool:
        """Write head and first chunk with one call, unless `send` would do anything else than write them."""
        cycle = self._cycle
        if not self._may_begin() or status in BODYLESS or isinstance(cycle, CloseDelimitedCycle):
            return False
        head = self._head(status, headers, b"transfer-encoding: chunked\r\n")
        cycle.chunked_encoding = True
        self._transport.write(b"%b%x\r\n%b\r\n" % (head, len(payload), payload))
        return True

    def whole(self, status: int, headers: Headers, body: bytes) -> bool:
        """Write head and body with one call, unless `send` would do anything else than write them."""
        if not self._may_begin():
            return False
        head = self._head(status, headers, b"")
        self._cycle.chunked_encoding = False
        self._transport.write(head + body)
        self._complete()
        return True

    def _may_begin(self) -> bool:
        cycle = self._cycle
        return not (
            self._flow.write_paused
            or cycle.disconnected
            or cycle.response_started
            or cycle.access_log
            or cycle.scope["method"] == "HEAD"
        )

    def _head(self, status: int, headers: Headers, framing: bytes) -> bytes:
        cycle = self._cycle
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        return b"%b%b%b\r\n" % (STATUS_LINE[status], b"".join(lines), framing)

    def finish(self, payload: bytes) -> bool:
        """Write the end of a chunked body, and have uvicorn go on with the connection."""
        cycle = self._cycle
        if self._flow.write_paused or cycle.disconnected or not cycle.chunked_encoding or cycle.response_complete:
            return False
        last = b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""
        self._transport.write(last + b"0\r\n\r\n")
        self._complete()
        return True

    def _complete(self) -> None:
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()

    def write(self, payload: bytes) -> bool:
        """Write one chunk unless the client is slow or gone, or the response is not chunked (HEAD)."""
        cycle = self._cycle
        if self._flow.write_paused or cycle.disconnected or not cycle.chunked_encoding or cycle.response_complete:
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(payload), payload))
        return True

    def waiting_bytes(self) -> int:
        """What the connection's write buffer holds, which may be of an earlier answer too."""
        return 0 if self._cycle.disconnected else self._transport.get_write_buffer_size()

    def unacknowledged_bytes(self) -> int:
        """The length of the socket's send queue (SIOCOUTQ in tcp(7), which is TIOCOUTQ by another name)."""
        queued = array.array("i", [0])
        try:
            fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        except OSError:
            return 0  # closed, or a kernel that does not say so of sockets
        return queued[0]

    def abort(self) -> None:
        """Close the connection now, without flushing."""
        break_off(self._cycle, self._transport)


class NoDirectWay:
    """For any other server: everything goes through `send`."""

    __slots__ = ()

    def begin(self, status: int, headers: Headers, payload: bytes) -> bool:
        """Never."""
        return False

    def whole(self, status: int, headers: Headers, body: bytes) -> bool:
        """Never."""
        return False

    def finish(self, payload: bytes) -> bool:
        """Never."""
        return False

    def write(self, payload: bytes) -> bool:
        """Never."""
        return False

    def waiting_bytes(self) -> int:
        """Unknown; what `send` does not take is known without it."""
        return 0

    def unacknowledged_bytes(self) -> int:
        """Unknown."""
        return 0

    def abort(self) -> None:
        """Nothing is known to close; the server does when the application returns without completing."""


def chunk_writer(send: Send) -> ChunkWriter:
    """The quickest way to the client that `send` belongs to."""
    cycle = getattr(send, "__self__", None)
    return UvicornWriter(cycle) if isinstance(cycle, RequestResponseCycle) else NoDirectWay()
