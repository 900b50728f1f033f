"""A raw HTTP/1.1 client for what ordinary clients hide: broken ends, slow reading, leaving at a chosen moment."""

import asyncio
import json
import socket
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 60.0


class Unfinished(Exception):
    """The connection ended in the middle of the answer."""


@dataclass(kw_only=True, eq=False)
class Call:
    """One request on a connection of its own; a context manager that closes it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Close the connection now, whatever waits on it."""
        self.writer.transport.abort()

    @property
    def code(self) -> str:
        """The `code` of an error answer."""
        return str(self.json()["error"]["code"])

    def json(self) -> Any:
        return json.loads(self.body)

    async def head(self) -> Self:
        """Read status and headers, and skip a `100 Continue`."""
        try:
            status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Unfinished(f"{type(error).__name__} before the headers were whole") from None
        self.status = int(status.split()[1])
        if self.status == 100:
            return await self.head()
        self.headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
        }
        return self

    async def piece(self) -> bytes:
        """The next piece of a chunked body as the server cut it; empty at its end."""
        try:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = (await self.reader.readexactly(size + 2))[:-2]
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Unfinished(f"{len(self.body)} bytes came, then {type(error).__name__}") from None
        self.body += data
        return data

    async def until(self, text: bytes) -> None:
        """Read until `text` stands in the body."""
        while text not in self.body:
            if not await self.piece():
                raise Unfinished(f"the body ended without {text!r}")

    async def rest(self) -> Self:
        """Read the answer to its end.

        Raises:
            Unfinished: the connection ended before it.
        """
        async with asyncio.timeout(PATIENCE_S):
            return await self._rest()

    async def _rest(self) -> Self:
        if not self.status:
            await self.head()
        if self.headers.get("transfer-encoding") == "chunked":
            while await self.piece():
                pass
            return self
        try:
            self.body += await self.reader.readexactly(int(self.headers["content-length"]))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Unfinished(type(error).__name__) from None
        return self


async def open_call(port: int, request: bytes, *, receive_buffer_bytes: int | None = None) -> Call:
    """Connect to 127.0.0.1 and send `request` as it is.

    With `receive_buffer_bytes` the kernel takes about so much, and this end reads nothing that is not asked for.
    """
    connection = socket.socket()
    connection.setblocking(False)
    if receive_buffer_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=receive_buffer_bytes or 2**16)
    writer.write(request)
    return Call(reader=reader, writer=writer)


def request_bytes(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """A whole request; `Content-Length` is added where there is a body and it is not given."""
    lines = [f"{method} {path} HTTP/1.1", "host: router"]
    if body and "content-length" not in headers:
        lines.append(f"content-length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
