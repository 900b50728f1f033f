"""The engine's routes over its Unix socket: bytes in, bytes out.

Bodies are never decoded. Leaving the context before the end of the body closes the connection, at which vLLM aborts
the request.
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
    Take,
)

__all__ = ["EngineBroken", "EngineClient", "EngineError", "EngineResponse", "EngineUnavailable"]


class EngineResponse:
    """An answer whose status has come."""

    __slots__ = ("_connection", "content_type", "headers", "status")

    def __init__(self, connection: EngineConnection) -> None:
        self._connection = connection
        self.status: int = connection.status
        self.headers: Mapping[str, str] = connection.headers
        """By name in lower case."""
        self.content_type: str = connection.headers.get("content-type", "")
        """The header's whole value, parameters included."""

    async def read_chunk(self) -> bytes:
        """All bytes that have come since the last call, waiting for at least one; b"" at the end.

        Raises:
            EngineBroken: the connection was reset, or closed before the end of the body.
        """
        return await self._connection.read()

    async def deliver(self, take: Take) -> bytes | None:
        """Hand the body to `take` as it comes, without a task switch per piece.

        Returns None at its end, or what `take` could not take. Raises as `read_chunk`, and what `take` raises.
        """
        return await self._connection.deliver(take)


class Exchange:
    """One request, as an async context manager."""

    __slots__ = ("_body", "_connection", "_headers", "_method", "_path", "_pool")

    def __init__(
        self, pool: EnginePool, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> None:
        self._pool = pool
        self._method, self._path, self._headers, self._body = method, path, headers, body
        self._connection: EngineConnection | None = None

    async def __aenter__(self) -> EngineResponse:
        connection = self._connection = await self._pool.take()
        try:
            connection.begin(self._method, self._path, self._headers, self._body)
            await connection.head()
        except BaseException:
            self._pool.give_back(connection)
            raise
        return EngineResponse(connection)

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
        return Exchange(self._pool, method, path, headers, body)

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
