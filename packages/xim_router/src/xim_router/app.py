"""Composition root of the router: builds every part, starts them in order and stops them in order.

Start: database and catalog, agents' sockets, HTTP's listeners, the mesh, HTTP. Stop: nothing new, running requests get
their grace, clients and agents that are left are told, sockets and database are closed.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import uvicorn
import uvloop
import zmq
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from xim_router import descriptors
from xim_router.control.errors import ControlError
from xim_router.control.plane import ControlPlane
from xim_router.dispatch.dispatcher import Dispatcher
from xim_router.dispatch.roster import Standing
from xim_router.http.crowd import Crowd
from xim_router.http.front import Front
from xim_router.http.inference import Inference, InferenceLimits
from xim_router.http.operations import MetricsApp, Readiness
from xim_router.http.protocol import HttpProtocol
from xim_router.http.response import ResponseBuffers
from xim_router.link.broker import Broker
from xim_router.link.gatekeeper import Gatekeeper
from xim_router.link.journal import Journal
from xim_router.link.transport import Transport
from xim_router.listening import CannotStart, address, cannot_bind, listen, tls_context
from xim_router.settings import RouterSettings
from xim_router.signals import on_stop_signals
from xim_router.supervisor import UNUSABLE_STATUS
from xim_router.telemetry.metrics import ClientPhase, RouterMetrics

log = logging.getLogger(__name__)

LEAVE_S = 2.0
"""How long the database gets to hear that this router leaves the mesh; else its lease says so."""
DATE_S = 1.0
"""The `Date` of an answer is at most so old."""
TELL_S = 0.25
"""How long clients and agents get to take the news that this router ends."""
HANDSHAKE_S = 10.0
"""How long a client's TLS handshake may take: two round trips and a signature. Until then it has no place among the
connections that are bounded, and holds a descriptor all the same."""
CLOSE_S = 5.0
"""How long a client may take to confirm the end of a TLS connection."""
METRICS_CONNECTIONS = 32
"""A scraper needs one; beyond these a newcomer ends the oldest, so that idle ones never keep a scraper away."""


def serve(settings: RouterSettings, worker: int | None = None) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; a second one ends at once, unless `signals` says that it does not.

    `worker` is this process's number where it is one of several: it shares the HTTP port, and ends with its parent.

    Raises:
        SystemExit: with `UNUSABLE_STATUS` where the router cannot start; the reason and the remedy are printed.
    """
    descriptors.raise_limit()
    # Its lines of start and stop say less than ours; its warnings and errors stay.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        router = Router(settings if worker is None else settings.of_worker(worker), worker, _tls(settings))
        uvloop.run(router.run())
    except (CannotStart, ControlError) as error:
        remedy = getattr(error, "remedy", "")
        click.echo(f"Error: {error}" + (f"\n{remedy}" if remedy else ""), err=True)
        raise SystemExit(1 if worker is None else UNUSABLE_STATUS) from None


def settle_memory() -> None:
    """Leave what has been made so far, modules above all, out of every garbage collection from here on.

    It is never garbage, and looking through it stops all streams: 120,000 objects, 40 to 160 ms on a busy machine.
    """
    gc.collect()
    gc.freeze()
    # The next full collection waits for a quarter of what the last one left: let that be nothing.
    gc.collect()


class Router:
    """One router process."""

    def __init__(self, settings: RouterSettings, worker: int | None = None, tls: ssl.SSLContext | None = None) -> None:
        """`settings` are this process's own; `worker` as for `serve`; without `tls` HTTP is plain."""
        self._settings = settings
        self._tls = tls
        self._worker = worker
        self._stopping = asyncio.Event()
        self._stopped_twice = asyncio.Event()

    async def run(self) -> None:
        """Start, serve, stop."""
        settings = self._settings
        dispatcher = Dispatcher(queue_timeout_s=settings.single_agent_queue_timeout_s)
        age: dict[str, ControlPlane] = {}
        # The catalog is asked of the broker, which is built from the metrics: known by the first scrape.
        metrics = RouterMetrics(
            statistics=dispatcher.statistics,
            catalog=lambda: broker.catalog,
            control_stale_s=lambda: age["control"].stale_s if "control" in age else None,
        )
        control = ControlPlane(
            settings,
            lambda catalog: broker.publish(catalog),
            member=self._worker or 0,
            report_dropped=metrics.dropped_reports.inc,
        )
        journal = Journal(metrics)
        broker = Broker(dispatcher=dispatcher, journal=journal, report_seen=control.report_seen)
        metrics.read_links = broker.reading
        async with contextlib.AsyncExitStack() as stack:
            await control.start()
            stack.push_async_callback(control.close)
            age["control"] = control
            stack.callback(journal.settle)
            stack.enter_context(self._link(broker, control))
            listeners = self._listen(stack)
            # Only now that nothing can keep it from serving: agents are told of every member.
            await control.join()
            inference = self._inference(broker, control, metrics)
            front = Front(inference, broker, control.api(), _readiness(broker, control), metrics.refused)
            self._watch = inference.watch
            await self._serve(broker, control, front, metrics, listeners)

    def _inference(self, broker: Broker, control: ControlPlane, metrics: RouterMetrics) -> Inference:
        settings = self._settings
        buffers = ResponseBuffers(
            per_response_bytes=settings.response_buffer_bytes,
            total_bytes=settings.response_buffer_total_bytes,
            hot=metrics.hot,
        )
        limits = InferenceLimits(
            max_body_bytes=settings.max_body_bytes,
            request_timeout_s=settings.request_timeout_s,
            client_stall_timeout_s=settings.client_stall_timeout_s,
        )
        given_up = metrics.client_disconnects.labels(ClientPhase.BODY).inc
        return Inference(broker, hash_key=control.api_key_hash, buffers=buffers, limits=limits, body_given_up=given_up)

    @contextlib.contextmanager
    def _link(self, broker: Broker, control: ControlPlane) -> Iterator[None]:
        """The agents' sockets, from bind to close."""
        settings, loop = self._settings, asyncio.get_running_loop()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # The handler is bound before the sockets are: without one, CURVE admits every key.
        gatekeeper = Gatekeeper(context, broker.admit)
        transport = Transport(context, broker, server_secret_key=control.curve_keypair.secret_key)
        try:
            try:
                transport.bind(settings.resolved_link_host, settings.control_port, settings.streaming_port)
            except zmq.ZMQError as error:
                host = settings.resolved_link_host
                where = f"{address(host, settings.control_port)} or :{settings.streaming_port}, for agents,"
                ports = "XEROTIER_ROUTER_CONTROL_PORT and XEROTIER_ROUTER_STREAMING_PORT"
                hosts = "XEROTIER_ROUTER_HTTP_HOST, or XEROTIER_ROUTER_LINK_HOST for agents alone,"
                named = hosts if settings.link_host is None else "XEROTIER_ROUTER_LINK_HOST"
                raise cannot_bind(where, error, named, ports) from None
            gatekeeper.start(loop)
            transport.start(loop)
            broker.attach(transport)
            yield
        finally:
            transport.close()
            gatekeeper.close(loop)
            context.destroy(linger=0)

    def _listen(self, stack: contextlib.AsyncExitStack) -> list[socket.socket]:
        """What clients reach, and then what a scraper does where metrics are served; closed with `stack`."""
        settings = self._settings
        variables = "XEROTIER_ROUTER_HTTP_HOST", "XEROTIER_ROUTER_HTTP_PORT"
        shared = self._worker is not None
        listeners = [stack.enter_context(listen(settings.http_host, settings.http_port, *variables, shared=shared))]
        if not settings.disable_metrics:
            variables = "XEROTIER_ROUTER_METRICS_HOST", "XEROTIER_ROUTER_METRICS_PORT"
            listeners.append(stack.enter_context(listen(settings.metrics_host, settings.metrics_port, *variables)))
        return listeners

    async def _serve(
        self,
        broker: Broker,
        control: ControlPlane,
        front: Front,
        metrics: RouterMetrics,
        listeners: list[socket.socket],
    ) -> None:
        settings, loop = self._settings, asyncio.get_running_loop()
        crowd = Crowd(descriptors.for_clients(descriptors.limit()))
        configs = _http_config(front, metrics.refused, crowd, self._tls), _metrics_config(metrics.registry)
        # Without metrics the second has no listener, and is not served.
        servers = [(_Server(config), listener) for config, listener in zip(configs, listeners, strict=False)]
        shared = self._worker is not None
        on_stop_signals(loop, lambda _signum: self._on_signal(), worker=shared)
        if shared:
            # The parent holds the other end and writes nothing: what is read is its end, however that came about.
            loop.add_reader(sys.stdin.fileno(), self._on_orphaned)
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(control.run(), name="control")]
            if settings.sse_ping_s:
                background.append(tasks.create_task(_ping(broker, settings.sse_ping_s), name="ping"))
            for server, listener in servers:
                tasks.create_task(server.serve(sockets=[listener]), name="http")
            settle_memory()
            log.info("serving", extra={"http": address(settings.http_host, settings.http_port)})
            await self._stopping.wait()
            await self._stop(broker, control, [server for server, _ in servers])
            for task in background:
                task.cancel()

    async def _stop(self, broker: Broker, control: ControlPlane, servers: list["_Server"]) -> None:
        """Nothing new; grace for what runs; then tell the rest."""
        log.info("stopping", extra={"in_flight": broker.in_flight, "grace_s": self._settings.shutdown_grace_s})
        for server in servers:
            # Where several processes share the port, the others get what comes from here on.
            server.stop_listening()
            server.stop()
        broker.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await control.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.shutdown_grace_s):
                await self._idle(broker)
        broker.shut()
        await asyncio.sleep(TELL_S)
        if sum(server.cut_off() for server in servers):
            await asyncio.sleep(TELL_S)
        for server in servers:
            server.force_exit = True

    async def _idle(self, broker: Broker) -> None:
        """Returns when no request runs and every client has its answer, or at the second signal."""
        while (broker.in_flight or self._watch.unfinished) and not self._stopped_twice.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self._stopped_twice.wait()

    def _on_orphaned(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        log.warning("the parent process is gone")
        # As if it had told this worker: what a service manager tells it too, before or after, hurries nothing.
        signal.raise_signal(signal.SIGTERM)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._stopped_twice.set()
        self._stopping.set()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, for which this process has one place, and without ten looks a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's for sockets that are bound already; it leaves asyncio's minute to whoever begins TLS."""
        config, loop = self.config, asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            return config.http_protocol_class(config=config, server_state=self.server_state, app_state={})  # type: ignore[call-arg]

        times = {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": CLOSE_S}
        for_tls: dict[str, Any] = {} if config.ssl is None else times
        self.servers = [
            await loop.create_server(connection, sock=each, ssl=config.ssl, backlog=config.backlog, **for_tls)
            for each in sockets or ()
        ]
        self.started = True

    def stop(self) -> None:
        """End the connections in order, and then `serve`."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Once a second, for the date in the header of answers, until `stop`."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DATE_S):
                    await self._stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    def cut_off(self) -> int:
        """Close the connections that are left, so that their handlers end by themselves; returns how many."""
        connections = list(self.server_state.connections)
        for connection in connections:
            connection.end()  # type: ignore[union-attr]  # each is an HttpProtocol
        return len(connections)

    def stop_listening(self) -> None:
        """Accept nothing more; connections that are open stay."""
        for server in self.servers if self.started else ():
            server.close()


def _tls(settings: RouterSettings) -> ssl.SSLContext | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return tls_context(settings.tls_cert, settings.tls_key)


def _http_config(
    front: Front, refused: Callable[[str], None], crowd: Crowd, tls: ssl.SSLContext | None = None
) -> uvicorn.Config:
    return _config(
        front,
        partial(HttpProtocol, refused=refused, crowd=crowd, take=front.take),
        # Longer than the usual idle timeout of a proxy in front, so that it is never we who close a reused connection.
        timeout_keep_alive=75,
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
    )


def _metrics_config(registry: CollectorRegistry) -> uvicorn.Config:
    # What waits to be accepted is accepted at once, before any of it is ended.
    few = partial(HttpProtocol, crowd=Crowd(METRICS_CONNECTIONS, spares_requests=False))
    return _config(MetricsApp(registry), few, backlog=METRICS_CONNECTIONS)


def _config(app: ASGIApp, protocol: Callable[..., HttpProtocol], **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]  # uvicorn calls it, and no more
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        # The broker writes one line per request, at its end.
        access_log=False,
        server_header=False,
        # Nothing here asks for the client's address or scheme, so nobody need be believed about them.
        proxy_headers=False,
        **more,
    )


def _readiness(broker: Broker, control: ControlPlane) -> Callable[[], Readiness]:
    def read() -> Readiness:
        statistics = broker.statistics()
        serving = [agent for agent in statistics.agents.values() if agent.standing is Standing.SERVING]
        return Readiness(
            control_stale_s=control.stale_s,
            agents_ready=len(serving),
            endpoints_ready=len({agent.endpoint for agent in serving}),
            shutting_down=statistics.shutting_down,
        )

    return read


async def _ping(broker: Broker, interval_s: float) -> None:
    """Two silent looks make a ping: a stream is pinged between one and one and a half intervals after its last byte."""
    while True:
        await asyncio.sleep(interval_s / 2)
        broker.ping()
