"""HTTP/1.1 for the fake engine: one small server protocol, written for few system calls.

Bodies are read whole, answers are written to the socket at once (not gathered by the event loop), connections
are kept alive. No pipelining: a request that arrives before the last one is answered ends the connection.
"""

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

import httptools

from tests.support.fake_vllm_engine import Run


class Request:
    """One request, read completely."""

    __slots__ = ("body", "headers", "method", "path")

    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body


def response_head(status: int, content_type: str, length: int | None) -> bytes:
    """Status line and headers; without a length the body is chunked."""
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    phrase = HTTPStatus(status).phrase
    return (
        f"HTTP/1.1 {status} {phrase}\r\nserver: uvicorn\r\ncontent-type: {content_type}\r\n{framing}\r\n\r\n".encode()
    )


def http_chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


class Connection(asyncio.Protocol):
    """One client. `handle` is called with each complete request and answers by `respond` or by a `Run`."""

    def __init__(self, handle: Callable[["Connection", Request], None], gone: Callable[[Run], None]) -> None:
        self._handle, self._gone = handle, gone
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._socket = -1
        self._slow = False
        self._busy = False
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self.run: Run | None = None

    # -- asyncio ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._socket = transport.get_extra_info("socket").fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        run, self.run = self.run, None
        if run is not None:
            self._gone(run)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(400)
        except httptools.HttpParserError:
            self._fail(400)

    def pause_writing(self) -> None:
        self._slow = True

    def resume_writing(self) -> None:
        self._slow = False

    # -- httptools ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", {}, []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._headers.get("expect", "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._busy:
            self.reset()
            return
        self._busy = True
        method = self._parser.get_method().decode("latin-1")
        path = self._url.decode("latin-1").partition("?")[0]
        self._handle(self, Request(method, path, self._headers, b"".join(self._body)))

    # -- answers ------------------------------------------------------------------------------------------------

    def respond(self, status: int, content_type: str, body: bytes) -> None:
        """Answer at once and whole."""
        self.finish(response_head(status, content_type, len(body)) + body)

    def writable(self) -> bool:
        return not self._slow

    def write(self, data: bytes) -> None:
        """Write now. The event loop would hold the bytes until its next turn, and a step would leave all at once."""
        transport = self._transport
        if transport is None:
            return
        if not transport.get_write_buffer_size():
            try:
                written = os.write(self._socket, data)
            except BlockingIOError:
                written = 0
            except OSError:
                transport.abort()
                return
            if written == len(data):
                return
            data = data[written:]
        transport.write(data)

    def finish(self, data: bytes) -> None:
        self.write(data)
        self._busy, self.run = False, None
        if self._transport is not None and not self._parser.should_keep_alive():
            self._transport.close()

    def reset(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            # With no time to linger a TCP connection ends in a reset, not in an orderly end.
            plain = cast(socket.socket, transport.get_extra_info("socket"))
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()

    def _fail(self, status: int) -> None:
        if not self._busy:
            self.write(response_head(status, "text/plain; charset=utf-8", 0))
        if self._transport is not None:
            self._transport.close()
