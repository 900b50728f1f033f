"""A pooler in front of a real PostgreSQL that passes everything on, and at will no notifications.

That is what a client sees of a pooler in transaction mode: its statements work, and what it listens for is heard by a
server's connection that is nobody's at that moment.
"""

import asyncio
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

_SOCKET = ".s.PGSQL.5432"
_NOTIFICATION = ord("A")


class DeafPooler:
    """Listens in a directory of its own, for `host=`; an async context manager."""

    def __init__(self, server: Path) -> None:
        """`server` is the directory of the server's socket."""
        self._server = server
        # A socket's path may have 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="xim-pooler-")
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self.deaf = True
        """Notifications are dropped."""
        self.dropped = 0
        """How many were so far."""

    @property
    def host(self) -> str:
        """What stands for the server in a URL."""
        return self._folder.name

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_unix_server(self._accept, Path(self.host) / _SOCKET)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._listener is not None
        self._listener.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._folder.cleanup()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._server / _SOCKET)
        for piping in (self._statements(reader, far_writer), self._answers(far_reader, writer)):
            task = asyncio.create_task(piping)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _statements(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        try:
            while data := await client.read(65_536):
                server.write(data)
        finally:
            server.close()

    async def _answers(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await server.readexactly(5)
                # The length counts itself, and not the message's kind before it.
                body = await server.readexactly(int.from_bytes(head[1:]) - 4)
                if head[0] == _NOTIFICATION and self.deaf:
                    self.dropped += 1
                else:
                    client.write(head + body)
        except asyncio.IncompleteReadError:
            pass
        finally:
            client.close()
