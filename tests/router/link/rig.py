"""A router's data plane in this process: gatekeeper, sockets, broker, front and uvicorn, with a hand-made catalog.

Only the control plane is missing. At its end a rig holds nothing of any request, or the test fails.
"""

import asyncio
import contextlib
import dataclasses
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self

import zmq
from fastapi import FastAPI
from zmq.utils import z85

from tests.router.http.tenants import ACME, CATALOG, CHAT, NOW, hash_key
from tests.support.agent_stub import AgentStub, Dial
from tests.support.http_client import Call, open_call, request_bytes
from tests.support.programs import PATIENCE_S
from tests.support.tcp_proxy import TcpProxy
from xim_protocol.errors import FaultReason
from xim_protocol.ids import AgentId
from xim_router.app import _http_config, _Server
from xim_router.dispatch.catalog import RegisteredAgent, TaskMode
from xim_router.dispatch.dispatcher import Dispatcher
from xim_router.dispatch.reports import AgentSeen
from xim_router.dispatch.roster import Standing
from xim_router.dispatch.statistics import AgentStatistics
from xim_router.http.crowd import Crowd
from xim_router.http.errors import install_error_handlers
from xim_router.http.front import Front
from xim_router.http.inference import Inference, InferenceLimits
from xim_router.http.operations import Readiness
from xim_router.http.response import ResponseBuffers
from xim_router.link.agent_link import AgentLink
from xim_router.link.broker import Broker
from xim_router.link.gatekeeper import Gatekeeper
from xim_router.link.journal import Journal
from xim_router.link.transport import Transport
from xim_router.telemetry.metrics import ClientPhase, RouterMetrics

KEY = "xero_acme_any"
CHAT_PATH = "/v1/chat/completions"


async def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Return when `condition` holds; looked at every few milliseconds, since nothing announces what it reads.

    Raises:
        TimeoutError: it does not hold within `patience_s`.
    """
    nothing = asyncio.Event()
    async with asyncio.timeout(patience_s):
        while not condition():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(nothing.wait(), 0.003)


class Rig:
    """See the module's docstring."""

    def __init__(
        self,
        *agents: str,
        secure: bool = True,
        queue_timeout_s: float = 30.0,
        request_timeout_s: float = 60.0,
        client_stall_timeout_s: float = 30.0,
        response_buffer_bytes: int = 262_144,
        response_buffer_total_bytes: int = 1 << 30,
        max_body_bytes: int = 33_554_432,
        most_connections: int = 10_000,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`agents` are enrolled, and assigned to the endpoint `chat`."""
        self.server_keys = zmq.curve_keypair()
        self.agent_keys = {name: zmq.curve_keypair() for name in agents}
        self.catalog = CATALOG
        self.dispatcher = Dispatcher(queue_timeout_s=queue_timeout_s)
        self.metrics = RouterMetrics(
            statistics=self.dispatcher.statistics, catalog=lambda: self.catalog, control_stale_s=lambda: 0.0
        )
        self.seen: list[AgentSeen] = []
        """What the control plane would be told of agents."""
        self.journal = Journal(self.metrics)
        self.broker = Broker(
            dispatcher=self.dispatcher, journal=self.journal, report_seen=lambda seen: self.seen.append(seen)
        )
        buffers = ResponseBuffers(
            per_response_bytes=response_buffer_bytes, total_bytes=response_buffer_total_bytes, hot=self.metrics.hot
        )
        limits = InferenceLimits(
            max_body_bytes=max_body_bytes,
            request_timeout_s=request_timeout_s,
            client_stall_timeout_s=client_stall_timeout_s,
        )
        self.inference = Inference(
            self.broker,
            hash_key=hash_key,
            buffers=buffers,
            limits=limits,
            body_given_up=self.metrics.client_disconnects.labels(ClientPhase.BODY).inc,
            clock=lambda: NOW,
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        plain = None if secure else AgentId(agents[0])
        self.gatekeeper = Gatekeeper(self._context, self.broker.admit, plain_agent=plain)
        self.transport = Transport(
            self._context, self.broker, server_secret_key=z85.decode(self.server_keys[1]), secure=secure
        )
        self._secure = secure
        self.ports = self.transport.bind("127.0.0.1", 0, 0)
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.http_port: int = self._listener.getsockname()[1]
        self._server = _Server(_http_config(self._front(), self.metrics.refused, Crowd(most_connections), tls))
        self._serving: asyncio.Task[None] | None = None
        self._calls: list[Call] = []
        self.publish()
        for name in agents:
            self.register(name)

    @property
    def connections(self) -> int:
        """Of HTTP clients."""
        return len(self._server.server_state.connections)

    def _front(self) -> Front:
        return Front(self.inference, self.broker, self._control(), self._readiness, self.metrics.refused)

    def _control(self) -> FastAPI:
        """In place of the control plane's application: one without routes."""
        control = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        install_error_handlers(control)
        return control

    def _readiness(self) -> Readiness:
        statistics = self.broker.statistics()
        return Readiness(
            control_stale_s=0.0,
            agents_ready=statistics.agents_serving,
            endpoints_ready=statistics.agents_serving,
            shutting_down=statistics.shutting_down,
        )

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self.gatekeeper.start(loop)
        self.transport.start(loop)
        self.broker.attach(self.transport)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        await until(lambda: self._server.started)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.idle()
        finally:
            # A failed test leaves its clients where they are, and an open connection keeps the loop from closing.
            for call in self._calls:
                call.leave()
            self.broker.shut()
            self._server.force_exit = True
            self._server.stop()
            assert self._serving is not None
            await self._serving
            self.journal.settle()
            self.transport.close()
            self.gatekeeper.close(asyncio.get_running_loop())
            self._context.destroy(linger=0)

    async def idle(self) -> None:
        """Return when nothing is left of any request: no place, no slot, no stream, no byte."""
        await until(lambda: not self.leftovers())

    def leftovers(self) -> dict[str, object]:
        """What requests still hold."""
        statistics = self.broker.statistics()
        held = {
            "exchanges": self.broker.open_exchanges,
            "in flight": statistics.in_flight,
            "parked": statistics.parked,
            "slots": sum(agent.in_flight for agent in statistics.agents.values()),
            "bytes": self.metrics.hot.buffered_bytes,
            "watched": len(self.inference.watch._entries),
            "streams": sum(link.session.statistics().streams for link in self.links.values()),
        }
        return {name: count for name, count in held.items() if count}

    # --- Catalog ---------------------------------------------------------------------------------------------------

    def publish(self, **changes: Any) -> None:
        self.catalog = dataclasses.replace(self.catalog, version=self.catalog.version + 1, **changes)
        self.broker.publish(self.catalog)

    def register(self, name: str, *, suspended: bool = False) -> None:
        """Enroll `name`, or change it."""
        public, _ = self.agent_keys.setdefault(name, zmq.curve_keypair())
        key = z85.decode(public)
        registered = RegisteredAgent(
            agent=AgentId(name),
            name=name,
            project=ACME,
            curve_public_key=key,
            endpoint=CHAT.endpoint,
            suspended=suspended,
        )
        self.publish(
            agents=MappingProxyType({**self.catalog.agents, AgentId(name): registered}),
            agents_by_curve_key=MappingProxyType({**self.catalog.agents_by_curve_key, key: AgentId(name)}),
        )

    def set_task_mode(self, mode: TaskMode) -> None:
        """Make the endpoint `chat` one of this task mode."""
        endpoint = dataclasses.replace(CHAT, task_mode=mode)
        self.publish(endpoints=MappingProxyType({**self.catalog.endpoints, CHAT.endpoint: endpoint}))

    def revoke(self, name: str) -> None:
        """Revoke the credentials of `name`."""
        key = self.catalog.agents[AgentId(name)].curve_public_key
        self.publish(
            agents=_without(self.catalog.agents, AgentId(name)),
            agents_by_curve_key=_without(self.catalog.agents_by_curve_key, key),
            revoked_curve_keys=self.catalog.revoked_curve_keys | {key},
        )

    # --- Agents ----------------------------------------------------------------------------------------------------

    def dial(self, name: str, *, control: TcpProxy | None = None, streaming: TcpProxy | None = None) -> Dial:
        """How `name` connects, by way of proxies where they are given."""
        return Dial(
            control=control.address if control else f"tcp://127.0.0.1:{self.ports[0]}",
            streaming=streaming.address if streaming else f"tcp://127.0.0.1:{self.ports[1]}",
            server_key=self.server_keys[0],
            keys=self.agent_keys.setdefault(name, zmq.curve_keypair()),
            secure=self._secure,
        )

    @contextlib.asynccontextmanager
    async def agent(
        self, name: str, *, control: TcpProxy | None = None, streaming: TcpProxy | None = None, **options: Any
    ) -> AsyncIterator[AgentStub]:
        """A connected agent that the dispatcher knows; `options` are `AgentStub`'s."""
        async with AgentStub(self.dial(name, control=control, streaming=streaming), **options) as agent:
            await agent.opened()
            yield agent
            # What clients left is the agent's to give back, which it cannot when it is gone.
            await until(lambda: not (self._linked(agent) and self.agent_statistics(name).in_flight))

    def _linked(self, agent: AgentStub) -> bool:
        return not agent.lost and agent.session.session in {link.session.session for link in self.links.values()}

    @property
    def links(self) -> dict[AgentId, AgentLink]:
        return {link.agent: link for link in self.broker._links}

    def link(self, name: str) -> AgentLink | None:
        return self.links.get(AgentId(name))

    def agent_statistics(self, name: str) -> AgentStatistics:
        return self.broker.statistics().agents[AgentId(name)]

    def serving(self, name: str) -> bool:
        return self.agent_statistics(name).standing is Standing.SERVING

    def faults(self, reason: FaultReason) -> float:
        """Protocol faults counted so far."""
        return self.count("xim_router_protocol_faults_total", reason=reason.value)

    def count(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where it was never counted."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    # --- Clients ---------------------------------------------------------------------------------------------------

    async def call(
        self,
        body: Mapping[str, object] | bytes | None = None,
        *,
        path: str = CHAT_PATH,
        method: str = "POST",
        key: str | None = KEY,
        receive_buffer_bytes: int | None = None,
        **headers: str,
    ) -> Call:
        """Send one request on a connection of its own; underscores of `headers` are hyphens."""
        if body is None:
            body = {"model": "chat", "messages": []}
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if raw:
            fields.setdefault("content-type", "application/json")
        if key is not None:
            fields["authorization"] = f"Bearer {key}"
        request = request_bytes(method, path, fields, raw)
        call = await open_call(self.http_port, request, receive_buffer_bytes=receive_buffer_bytes)
        self._calls.append(call)
        return call

    async def ask(self, body: Mapping[str, object] | bytes | None = None, **options: Any) -> Call:
        """Send one request and read its whole answer."""
        async with await self.call(body, **options) as call, asyncio.timeout(PATIENCE_S):
            return await call.rest()

    async def parked(self, count: int) -> None:
        """Return when so many requests wait."""
        await until(lambda: self.broker.statistics().parked == count)


def _without(mapping: Mapping[Any, Any], key: object) -> Mapping[Any, Any]:
    return MappingProxyType({name: value for name, value in mapping.items() if name != key})


__all__ = ["ACME", "CHAT", "CHAT_PATH", "KEY", "Rig", "until"]
