"""The running agent: links to every router, the engine, what serves between them, and an orderly end."""

import asyncio
import contextlib
import logging
import os
import platform
import uuid

from xim_agent.assigned_engine import STOP_S, AssignedEngine
from xim_agent.engine.client import EngineClient, EngineError
from xim_agent.engine.figures import Figures, keep_reading
from xim_agent.engine.process import EngineState
from xim_agent.engine.salt import BUILT_IN_SECRET
from xim_agent.joining import version
from xim_agent.lifecycle import AgentState as State
from xim_agent.lifecycle import Step, after
from xim_agent.link.connection import Connection
from xim_agent.link.enrollment import Enroller
from xim_agent.link.sockets import CurveKeys, Transport
from xim_agent.mesh import Mesh
from xim_agent.moe.background import tune_for
from xim_agent.planning.decision import Wanted
from xim_agent.relay import Outcome, ServedModel
from xim_agent.serving import Serving
from xim_agent.settings import AgentSettings
from xim_agent.surroundings import UNASSIGNED, Surroundings
from xim_agent.telemetry.gpus import GpuReader
from xim_agent.telemetry.metrics import AgentMetrics, LinkReading
from xim_agent.telemetry.server import metrics_server
from xim_protocol.agent_session import AgentConfig, AgentReport
from xim_protocol.enrollment import AssignedEndpoint, RouterAddress
from xim_protocol.events import AgentEvent, Assigned, LinkReady, MembersChanged, SessionExpired, Welcomed
from xim_protocol.ids import InstanceId
from xim_protocol.messages import AgentState, Assignment, FlowControl

log = logging.getLogger(__name__)

DRAIN_S = 30.0
"""What is in flight may take so long to finish after the first signal."""
VERSION = version()

_WORDS: dict[State, AgentState] = {
    State.UNENROLLED: AgentState.CONNECTING,
    State.ENROLLING: AgentState.CONNECTING,
    State.CONNECTING: AgentState.CONNECTING,
    State.IDLE: AgentState.CONNECTING,
    State.PULLING: AgentState.PULLING,
    State.STARTING: AgentState.STARTING,
    State.READY: AgentState.READY,
    State.DEGRADED: AgentState.DEGRADED,
    State.FAILED: AgentState.FAILED,
    State.DRAINING: AgentState.DRAINING,
    State.STOPPED: AgentState.DRAINING,
}
"""The agent's state as a router hears of it."""

_STEPS: dict[EngineState, Step] = {
    EngineState.STARTING: Step.ENGINE_STARTED,
    EngineState.READY: Step.ENGINE_READY,
    EngineState.DEGRADED: Step.ENGINE_UNHEALTHY,
    EngineState.RESTARTING: Step.ENGINE_UNHEALTHY,
    EngineState.STOPPING: Step.ENGINE_UNHEALTHY,
    EngineState.STOPPED: Step.ENGINE_STOPPED,
    EngineState.FAILED: Step.GAVE_UP,
}
"""What a state of the engine means for the agent."""


class Node:
    """The agent once it is enrolled; `stop` is set when an orderly end is asked for."""

    def __init__(
        self,
        settings: AgentSettings,
        surroundings: Surroundings,
        transport: Transport,
        enroller: Enroller,
        stop: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._surroundings = surroundings
        self._transport = transport
        self._enroller = enroller
        self._stop = stop
        self._state = after(State.UNENROLLED, Step.ENROLLED)
        self._config = session_config(settings, surroundings)
        self._report = AgentReport(capacity=surroundings.plan(UNASSIGNED).max_concurrent)
        self._metrics = AgentMetrics(version=VERSION)
        self._metrics.capacity.set(self._report.capacity)
        self._metrics.read_links(self._read_links)
        self._ended_as = {outcome: self._metrics.streams.labels(outcome.value) for outcome in Outcome}
        """Looked up once: to find a labelled counter costs more than to count."""
        self._metrics.entered(self._state)
        self._mesh = Mesh(dial=self._dial, given_up=self._router_left, remember=enroller.remember_mesh)
        self._past_links: list[LinkReading] = []
        """Last readings of routers that left the mesh: counters never go back."""
        self._degraded: asyncio.TimerHandle | None = None
        self._tuning: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._gpus = GpuReader(surroundings.hardware.gpus)
        self._client = EngineClient(surroundings.places.socket_path)

    async def run(self) -> None:
        """Serve until asked to stop."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._client)
            if not self._settings.disable_metrics_server:
                host, port = self._settings.metrics_host, self._settings.metrics_port
                server = metrics_server(host, port, self._metrics, self._engine_metrics)
                log.info("metrics", extra={"host": host, "port": await stack.enter_async_context(server)})
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._serving = self._new_serving()
            self._engine = AssignedEngine(
                self._settings, self._surroundings, self._client, self._engine_told, tasks=self._tasks
            )
            self._start()

    def _start(self) -> None:
        """Every long-lived task."""
        assert self._enroller.stored is not None
        enrollment = self._enroller.stored.enrollment
        log.info("agent", extra={"agent_id": enrollment.agent_id, "agent_name": enrollment.name, "version": VERSION})
        self._mesh.start(enrollment.mesh)
        if enrollment.assignment is not None:
            self._engine.assign(wanted_by(enrollment.assignment))
        refreshing = self._tasks.create_task(self._enroller.keep_fresh(), name="refresh")
        reading = keep_reading(self._client, self._config.renewal_interval_s, self._engine_ready, self._figures)
        self._reading = self._tasks.create_task(reading, name="figures")
        self._tasks.create_task(self._run_engine(), name="engine")
        self._tasks.create_task(self._leave_when_asked(refreshing), name="end")

    def _new_serving(self) -> Serving:
        secret = self._settings.vllm_salt_secret
        return Serving(
            engine=self._client,
            tasks=self._tasks,
            capacity=self._report.capacity,
            salt_secret=BUILT_IN_SECRET if secret is None else secret.get_secret_value(),
            counters=self._metrics.counters,
            on_in_flight=self._in_flight,
            on_outcome=self._ended,
        )

    # --- Links -----------------------------------------------------------------------------------------------------

    def _dial(self, router: RouterAddress) -> Connection:
        """A link to a router of the mesh, kept up by a task of its own."""
        keys = self._enroller.keys
        connection = Connection(
            transport=self._transport,
            router=router,
            keys=CurveKeys(public=keys.curve_public, secret=keys.curve_secret),
            config=self._config,
            report=self._report,
            on_event=self._link_told,
            on_down=self._link_lost,
            elsewhere=lambda: self._mesh.has_other_than(connection),
            on_renewed=self._metrics.renewals.inc,
            coalesce_s=self._settings.stream_coalesce_ms / 1000,
        )
        self._tasks.create_task(connection.run(), name=f"link {router.control_addr}")
        return connection

    def _router_left(self, connection: Connection) -> None:
        self._serving.unlink(connection.writer)
        self._past_links.append(_reading(connection))

    def _link_told(self, connection: Connection, event: AgentEvent) -> None:
        match event:
            case Welcomed():
                if event.assignment is not None:
                    self._engine.assign(wanted_by(event.assignment))
                self._mesh.told(connection, event.routers)
            case MembersChanged():
                self._mesh.told(connection, event.routers)
            case LinkReady():
                self._mesh.review()
                self._serving.linked()
                self._linked()
            case Assigned():
                self._engine.assign(None if event.assignment is None else wanted_by(event.assignment))
            case SessionExpired():
                self._metrics.expirations.inc()
                if not self._mesh.is_leased:
                    self._step(Step.LEASE_LOST)
                self._mesh.review()
            case _:
                self._serving.receive(connection.writer, event)

    def _linked(self) -> None:
        self._step(Step.LINKED)
        # Only the lease was missing, for however long: an engine that was ready all the time says so no second time.
        if self._state in (State.DEGRADED, State.FAILED) and self._engine.ready:
            self._step(Step.ENGINE_READY)

    def _link_lost(self) -> None:
        self._mesh.review()
        if not self._mesh.is_linked:
            self._step(Step.LINK_LOST)

    def _read_links(self) -> list[LinkReading]:
        return [*self._past_links, *map(_reading, self._mesh)]

    # --- State -----------------------------------------------------------------------------------------------------

    def _step(self, step: Step) -> None:
        before, self._state = self._state, after(self._state, step)
        if self._state is not before:
            self._entered(before)
        word = _WORDS[self._state]
        if word is not self._report.state:
            self._report.state = word
            for connection in self._mesh:
                connection.renew()

    def _entered(self, before: State) -> None:
        log.info("state", extra={"state": self._state.value, "before": before.value})
        self._metrics.entered(self._state)
        if self._degraded is not None:
            self._degraded.cancel()
            self._degraded = None
        if self._state is State.DEGRADED:
            patience_s = float(self._settings.degraded_to_failed_timeout_seconds)
            self._degraded = asyncio.get_running_loop().call_later(patience_s, self._step, Step.DEGRADED_TOO_LONG)

    def _engine_told(self, state: EngineState, reason: str) -> None:
        log.info("engine", extra={"state": state.value, "reason": reason})
        wanted = self._engine.wanted
        if state is EngineState.READY and wanted is not None:
            self._report.served_model = wanted.served_name
            self._metrics.engine_start_seconds.set(self._engine.start_s)
            self._serving.engine_ready(ServedModel(name=wanted.served_name, fingerprint=self._engine.fingerprint))
            if self._tuning is None:  # once is enough: the next start of the agent uses it
                self._tuning = self._tasks.create_task(self._tune_kernels(wanted), name="kernel tuning")
        else:
            self._report.served_model = None
            self._serving.engine_unready()
        if state is EngineState.STARTING:
            self._metrics.engine_starts.inc()
            self._serving.engine_emptied()
        elif state is EngineState.RESTARTING:
            self._metrics.engine_restarts.inc()
        # While the agent drains, it drains, whatever the engine does.
        if self._state is not State.DRAINING:
            self._step(_STEPS[state])
            if state is EngineState.STOPPED and not self._mesh.is_linked:
                self._step(Step.LINK_LOST)  # that was said while there was an engine to wait for

    def _engine_ready(self) -> bool:
        return self._engine.ready

    def _figures(self, figures: Figures) -> None:
        self._report.statistics = figures  # the next renewal tells it

    def _in_flight(self, number: int) -> None:
        self._report.in_flight = number

    def _ended(self, outcome: Outcome) -> None:
        self._ended_as[outcome].inc()
        if outcome is Outcome.STALLED:
            self._metrics.stalled.inc()

    async def _engine_metrics(self) -> bytes:
        self._metrics.start_progress(self._engine.progress)
        self._metrics.gpus = await asyncio.to_thread(self._gpus.read)
        try:
            return await self._client.metrics_text()
        except EngineError:
            return b""

    async def _tune_kernels(self, wanted: Wanted) -> None:
        outcome = await tune_for(self._surroundings.plan(wanted), self._metrics.moe_tuning_ratio.set)
        self._metrics.moe_tunings.labels(outcome.value).inc()

    # --- The end ---------------------------------------------------------------------------------------------------

    async def _run_engine(self) -> None:
        try:
            await self._engine.run()
        except Exception:
            # The routers hear of it now, and not when the lease is over.
            for connection in self._mesh:
                connection.close(message="the engine was given up")
            raise

    async def _leave_when_asked(self, refreshing: "asyncio.Task[None]") -> None:
        """Finish what is in flight, say Goodbye, stop the engine."""
        await self._stop.wait()
        self._serving.take_nothing_new()
        before, self._state = self._state, after(self._state, Step.DRAIN_ASKED)
        self._entered(before)
        for connection in self._mesh:
            connection.announce_draining()
        in_flight = self._serving.statistics().in_flight
        log.info("draining", extra={"in_flight": in_flight, "grace_s": DRAIN_S})
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._serving.all_ended()
                await asyncio.gather(*(connection.settle() for connection in self._mesh))
        except TimeoutError:
            log.warning("leaving with requests in flight", extra={"in_flight": self._serving.statistics().in_flight})
        self._mesh.close()
        refreshing.cancel()
        for task in (self._tuning, self._reading):
            if task is not None:
                task.cancel()
        await self._engine.stop(STOP_S)
        log.info("stopped")


def _reading(connection: Connection) -> LinkReading:
    return LinkReading(writer=connection.writer.statistics(), session=connection.statistics(), links=connection.links)


def wanted_by(assignment: Assignment | AssignedEndpoint) -> Wanted:
    """What the engine serves under an assignment."""
    return Wanted(
        served_name=assignment.served_name, quantization=assignment.quantization, task_mode=assignment.task_mode
    )


def session_config(settings: AgentSettings, surroundings: Surroundings) -> AgentConfig:
    """What this process asks every router for."""
    return AgentConfig(
        instance=InstanceId(uuid.uuid4().hex),
        agent_version=VERSION,
        accelerator=(
            ("kind", "gpu" if surroundings.hardware.gpus else "cpu"),
            ("machine", platform.machine()),
            ("cpus", str(os.cpu_count() or 0)),
        ),
        lease_s=settings.lease_duration_ms / 1000,
        renewal_interval_s=settings.lease_renewal_interval_ms / 1000,
        flow=FlowControl(
            enabled=settings.flow_control_enabled,
            window_bytes=settings.flow_control_window_bytes,
            replenish_threshold=settings.flow_control_replenish_threshold,
            pause_threshold_bytes=settings.flow_control_pause_threshold_bytes,
            stall_timeout_ms=settings.flow_control_timeout_seconds * 1000,
        ),
        streaming_socket=settings.streaming_socket_enabled,
    )
