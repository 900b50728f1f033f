"""The engine's routes over its Unix socket: bytes in, bytes out.

Bodies are never decoded. Leaving an exchange before the end of the body closes the connection, at which vLLM aborts
the request. `idle`, `connect` and `give_back` are for whoever takes an answer from the socket's callback; `open` is for
whoever can wait for it.
"""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from xim_agent.engine.http import (
    EngineBroken,
    EngineConnection,
    EngineError,
    EnginePool,
    EngineUnavailable,
    request_bytes,
)

__all__ = ["EngineBroken", "EngineClient", "EngineError", "EngineResponse", "EngineUnavailable"]


class EngineResponse:
    """An answer whose status has come, taken piece by piece by one task; a `Receiver`."""

    __slots__ = ("_connection", "_ended", "_error", "_headed", "_piece", "_waiter", "content_type", "status")

    def __init__(self, connection: EngineConnection) -> None:
        self._connection = connection
        self._headed = self._ended = False
        self._piece = b""
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.content_type = ""
        """The header's whole value, parameters included."""

    @property
    def headers(self) -> Mapping[str, str]:
        """By name in lower case."""
        return self._connection.headers

    async def read_chunk(self) -> bytes:
        """Bytes that have come since the last call, waiting for at least one; b"" at the end.

        Raises:
            EngineBroken: the connection was reset, or closed before the end of the body.
        """
        while not self._piece and not self._ended:
            await self._wait()
        piece, self._piece = self._piece, b""
        if piece:
            self._connection.go_on()
        return piece

    async def head(self) -> None:
        """Return when the status has come.

        Raises:
            EngineUnavailable: the connection ended before.
        """
        while not self._headed:
            await self._wait()

    # --- For the connection ----------------------------------------------------------------------------------------

    def headed(self, status: int, content_type: str) -> None:
        """The status has come."""
        self.status, self.content_type, self._headed = status, content_type, True
        self._wake()

    def take(self, piece: bytes) -> bool:
        """One piece at a time; what comes meanwhile waits in the connection."""
        self._piece = piece
        self._wake()
        return False

    def ended(self) -> None:
        """The answer is whole."""
        self._ended = True
        self._wake()

    def broke(self, error: EngineError) -> None:
        """No more will come."""
        self._error = error
        self._wake()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Exchange:
    """One request, as an async context manager."""

    __slots__ = ("_connection", "_pool", "_request")

    def __init__(self, pool: EnginePool, request: bytes) -> None:
        self._pool = pool
        self._request = request
        self._connection: EngineConnection | None = None

    async def __aenter__(self) -> EngineResponse:
        connection = self._connection = self._pool.idle() or await self._pool.connect()
        response = EngineResponse(connection)
        try:
            connection.begin(self._request, response)
            await response.head()
        except BaseException:
            self._pool.give_back(connection)
            raise
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._connection is not None
        self._pool.give_back(self._connection)


class EngineClient:
    """Connections to one engine; an async context manager. The engine need not run yet."""

    def __init__(self, socket_path: Path) -> None:
        self._pool = EnginePool(socket_path)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()

    def open(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> Exchange:
        """One exchange: `async with client.open(...) as response`. Ended by the engine, or by leaving the context.

        `path` is sent as it is. Raises:
            EngineUnavailable: on entering, when no status came.
        """
        return Exchange(self._pool, request_bytes(method, path, headers, body))

    def idle(self) -> EngineConnection | None:
        """A connection that served before, None where none is left."""
        return self._pool.idle()

    async def connect(self) -> EngineConnection:
        """A new connection. Raises: EngineUnavailable."""
        return await self._pool.connect()

    def give_back(self, connection: EngineConnection) -> None:
        """The exchange on `connection` is over, whole or not."""
        self._pool.give_back(connection)

    async def health(self, timeout_s: float) -> bool:
        """Whether `/health` answers 200 within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self.open("GET", "/health", {}, None) as response:
                return response.status == 200
        except (EngineError, TimeoutError):
            return False

    async def metrics_text(self, timeout_s: float = 5.0) -> bytes:
        """The engine's own metrics, in Prometheus' text format.

        Raises:
            EngineError: it gave none in time.
        """
        return await self._fetch("/metrics", timeout_s)

    async def version(self, timeout_s: float = 5.0) -> bytes:
        """The JSON body of `/version`.

        Raises:
            EngineError: it gave none in time.
        """
        return await self._fetch("/version", timeout_s)

    async def fingerprint(self, model: str, timeout_s: float = 30.0) -> str | None:
        """The engine's `system_fingerprint`, the same in all its answers, from one generated token.

        None where it gives none: an engine that embeds, or one told to leave it out.
        """
        body = json.dumps({"model": model, "prompt": "x", "max_tokens": 1}).encode()
        try:
            answer = json.loads(await self._fetch("/v1/completions", timeout_s, body))
        except (EngineError, ValueError):
            return None
        found = answer.get("system_fingerprint") if isinstance(answer, dict) else None
        return found if isinstance(found, str) else None

    async def _fetch(self, path: str, timeout_s: float, body: bytes | None = None) -> bytes:
        method, headers = ("GET", {}) if body is None else ("POST", {"Content-Type": "application/json"})
        try:
            async with asyncio.timeout(timeout_s), self.open(method, path, headers, body) as response:
                answer = bytearray()
                while chunk := await response.read_chunk():
                    answer += chunk
                if response.status != 200:
                    raise EngineUnavailable(f"{path} answered {response.status}")
                return bytes(answer)
        except TimeoutError as error:
            raise EngineUnavailable(f"{path} gave no answer within {timeout_s:g} s") from error
