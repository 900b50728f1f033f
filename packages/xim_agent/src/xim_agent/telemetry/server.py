"""Serves the agent's metrics, and the engine's after them, on a listener of their own.

It answers from the first moment: while no engine runs, the agent's own metrics are all there is. Nobody needs a key
here, so what a connection may take is bounded: aiohttp's own limits of a head, a time for it, and their number.
"""

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from xim_agent.telemetry.metrics import AgentMetrics

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 32
"""A scraper needs one; beyond these a newcomer ends the oldest, so that idle ones never keep a scraper away."""
IDLE_S = 60.0
"""A connection that has no whole request head for so long is closed."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsPortTaken(Exception):
    """The metrics server cannot listen; `remedy` says what to do."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        self.message = f"the metrics server cannot listen on {host}:{port}: {reason}"
        self.remedy = (
            "Choose another port (--metrics-port, XEROTIER_AGENT_METRICS_PORT; every agent of a machine needs its "
            "own), or serve none: XEROTIER_AGENT_DISABLE_METRICS_SERVER=1"
        )
        super().__init__(f"{self.message}. {self.remedy}")


class _QuietLog(logging.LoggerAdapter[logging.Logger]):
    """aiohttp's log of a server, in which a client that speaks no HTTP is no fault of ours.

    aiohttp logs each with a traceback, mostly as an error, and quotes what was sent, which may be a key.
    """

    def log(self, level: int, msg: object, *args: object, **more: Any) -> None:
        """One line without the client's words, or the record as it is."""
        cause = more.get("exc_info")
        if isinstance(cause, HttpProcessingError):
            self.logger.debug("no HTTP on the metrics port", extra={"cause": type(cause).__name__})
        else:
            super().log(level, msg, *args, **more)


class _FewConnections(web.Server):
    """A server of at most `MOST_CONNECTIONS` connections."""

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """A connection more, and the oldest ones fewer."""
        super().connection_made(handler, transport)
        open_ones = [each.transport for each in self.connections if each.transport is not None]
        for oldest in open_ones[:-MOST_CONNECTIONS]:
            oldest.abort()


@asynccontextmanager
async def metrics_server(
    host: str, port: int, metrics: AgentMetrics, engine_metrics: Callable[[], Awaitable[bytes]]
) -> AsyncIterator[int]:
    """Serve `/metrics` while the context lasts; gives the port, which is chosen when `port` is 0.

    `engine_metrics` gives the engine's text, b"" while it has none; it must not raise and must end by itself.

    Raises:
        MetricsPortTaken: nobody can listen there.
    """

    async def answer(request: web.BaseRequest) -> web.Response:
        if request.path != "/metrics":
            raise web.HTTPNotFound(text="Metrics are at /metrics.\n")
        if request.method not in ("GET", "HEAD"):
            raise web.HTTPMethodNotAllowed(request.method, ("GET", "HEAD"))
        engine = await engine_metrics()
        return web.Response(body=metrics.text() + engine, headers={"Content-Type": CONTENT_TYPE})

    # A scrape that is given up gives up its question to the engine too.
    server = _FewConnections(
        answer, handler_cancellation=True, logger=_QuietLog(log), access_log=None, keepalive_timeout=IDLE_S
    )
    runner = web.ServerRunner(server, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            reason = "the port is taken" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
            raise MetricsPortTaken(host, port, reason) from error
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
