"""A TCP proxy that records what passes, and that a test can cut, pause and close to new connections."""

import asyncio
import socket
from types import TracebackType
from typing import Self

from tests.support.ports import free_ports


class TcpProxy:
    """Listens on 127.0.0.1 and passes bytes on to `target`; an async context manager."""

    def __init__(self, target: str, port: int = 0) -> None:
        """`target` is `tcp://host:port`, or `host:port`; `port` is where to listen, 0 for any free one."""
        self._host, _, target_port = target.removeprefix("tcp://").rpartition(":")
        self._port = int(target_port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._own_port = port or free_ports(1)[0]
        self._open = asyncio.Event()
        self._open.set()
        self.to_target = bytearray()
        """Everything that came from the dialling side."""
        self.from_target = bytearray()
        """Everything that came from the target."""
        self.connections = 0
        """How many were accepted so far."""

    @property
    def port(self) -> int:
        """The port it listens on, the same for its whole life."""
        return self._own_port

    @property
    def address(self) -> str:
        """Where to dial."""
        return f"tcp://127.0.0.1:{self._own_port}"

    async def __aenter__(self) -> Self:
        await self.restore()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cut()

    async def restore(self) -> None:
        """Listen (again), on the same port, and pass bytes on."""
        self._open.set()
        if self._server is None:
            listener = socket.socket()
            # Its connections inherit the option, and without it they would keep the port from the next listener.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self._own_port))
            self._server = await asyncio.start_server(self._accept, sock=listener)

    async def cut(self) -> None:
        """Reset every connection and refuse new ones until `restore`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.drop()

    async def drop(self) -> None:
        """Reset every connection; new ones are taken."""
        for writer in list(self._writers):
            writer.transport.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def pause(self) -> None:
        """Pass nothing on, in neither direction, until `resume`; connections stay open."""
        self._open.clear()

    def resume(self) -> None:
        """Pass on what waits, and what comes."""
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            self._writers.discard(writer)
            writer.transport.abort()
            return
        self._writers.add(far_writer)
        self.connections += 1
        for source, sink, kept in ((reader, far_writer, self.to_target), (far_reader, writer, self.from_target)):
            task = asyncio.create_task(self._pipe(source, sink, kept))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray) -> None:
        try:
            while data := await source.read(65_536):
                await self._open.wait()
                kept += data
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            self._writers.discard(sink)
            sink.transport.abort()
