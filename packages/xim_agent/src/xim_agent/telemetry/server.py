"""Serves the agent's metrics, and the engine's after them, on a listener of their own.

It answers from the first moment: while no engine runs, the agent's own metrics are all there is.
"""

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from xim_agent.telemetry.metrics import AgentMetrics

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


@asynccontextmanager
async def metrics_server(
    host: str, port: int, metrics: AgentMetrics, engine_metrics: Callable[[], Awaitable[bytes]]
) -> AsyncIterator[int]:
    """Serve `/metrics` while the context lasts; gives the port, which is chosen when `port` is 0.

    `engine_metrics` gives the engine's text, b"" while it has none; it must not raise and must end by itself.

    Raises:
        MetricsPortTaken: nobody can listen there.
    """

    async def answer(request: web.Request) -> web.Response:
        engine = await engine_metrics()
        return web.Response(body=metrics.text() + engine, headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
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
