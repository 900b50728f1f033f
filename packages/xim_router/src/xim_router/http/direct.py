"""Writing a chunk of a response past uvicorn's `send`, straight to its transport.

Per chunk, uvicorn's `send` builds a dict, a coroutine and a list to arrive at one `transport.write`: a third of what
the router spends on a relayed chunk (bench/README.md has the number). Only the body's chunks take this way, and only
while nothing is unusual; head, end and everything slow go through `send`, which keeps the connection's state.
All knowledge of uvicorn's inside stands in this module, and `tests/router/http/test_direct.py` holds it.
"""

from typing import Protocol

from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class ChunkWriter(Protocol):
    """Takes body bytes at once, or says that it cannot."""

    def write(self, payload: bytes) -> bool:
        """Write `payload` (not empty) as one chunk; false when it must go through `send`."""

    def waiting_bytes(self) -> int:
        """Bytes that were written and not yet taken by the kernel."""

    def abort(self) -> None:
        """Close the connection now, without flushing."""


class UvicornWriter:
    """The transport behind one uvicorn request."""

    __slots__ = ("_cycle", "_flow", "_transport")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    def write(self, payload: bytes) -> bool:
        """Write one chunk unless the client is slow or gone, or the response is not chunked (HTTP/1.0, HEAD)."""
        cycle = self._cycle
        if self._flow.write_paused or cycle.disconnected or not cycle.chunked_encoding or cycle.response_complete:
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(payload), payload))
        return True

    def waiting_bytes(self) -> int:
        """What the connection's write buffer holds, which may be of an earlier answer too."""
        return 0 if self._cycle.disconnected else self._transport.get_write_buffer_size()

    def abort(self) -> None:
        """Close the connection now, without flushing."""
        # Not asked for its class: uvloop's transports are none of asyncio's.
        self._transport.abort()


class NoDirectWay:
    """For any other server: everything goes through `send`."""

    __slots__ = ()

    def write(self, payload: bytes) -> bool:
        """Never."""
        return False

    def waiting_bytes(self) -> int:
        """Unknown; what `send` does not take is known without it."""
        return 0

    def abort(self) -> None:
        """Nothing is known to close; the server does when the application returns without completing."""


def chunk_writer(send: Send) -> ChunkWriter:
    """The quickest way to the client that `send` belongs to."""
    cycle = getattr(send, "__self__", None)
    return UvicornWriter(cycle) if isinstance(cycle, RequestResponseCycle) else NoDirectWay()
