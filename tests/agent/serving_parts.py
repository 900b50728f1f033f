"""Builders: a router stub, a connection, a `Serving` and a real fake engine, joined as in the agent."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.agent.engine.engines import States, fake_vllm, policy
from tests.agent.link.links import config, curve_keys
from tests.support.programs import PATIENCE_S
from tests.support.router_stub import RouterStub
from tests.support.stopwatch import Stopwatch
from xim_agent.engine import guard
from xim_agent.engine.client import EngineClient
from xim_agent.engine.process import Engine, EngineState
from xim_agent.link.connection import Connection
from xim_agent.link.sockets import Transport
from xim_agent.relay import Outcome, ServedModel
from xim_agent.serving import Serving
from xim_agent.telemetry.metrics import StreamCounters
from xim_protocol.agent_session import AgentReport
from xim_protocol.enrollment import RouterAddress
from xim_protocol.events import AgentEvent
from xim_protocol.ids import InstanceId
from xim_protocol.messages import AgentState, FlowControl


def chat(script: dict[str, object] | None = None, **fields: object) -> bytes:
    """A streaming chat request with a script for the fake engine."""
    content = "hi" if script is None else "fake:" + json.dumps(script)
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": "whatever", "stream": True, "messages": messages, **fields}).encode()


class Parts:
    """What a test looks at."""

    def __init__(self, serving: Serving, client: EngineClient, engine: Engine, states: States) -> None:
        self.serving, self.client, self.engine, self.states = serving, client, engine, states
        self.connections: list[Connection] = []
        self.outcomes: list[Outcome] = []

    async def running(self) -> int:
        """Requests the engine works on, by its own account."""
        for line in (await self.client.metrics_text()).splitlines():
            if line.startswith(b"vllm:num_requests_running"):
                return int(float(line.rsplit(b" ", 1)[1]))
        raise AssertionError("the engine does not say")

    def stopwatch(self) -> Stopwatch:
        """Started now, for this process, which is the agent, and the engine's."""
        group = self.engine.process_group
        return Stopwatch([] if group is None else [group, *guard.members_of(group, guard.processes())])

    async def idle_engine(self, since: Stopwatch) -> None:
        """Return when the engine works on nothing, which is to be within a second of `since`."""

        async def idle() -> bool:
            return await self.running() == 0

        await since.within(1.0, idle, what="the engine works on nothing")


def _serving(
    client: EngineClient, tasks: asyncio.TaskGroup, report: AgentReport, capacity: int, outcomes: list[Outcome]
) -> Serving:
    return Serving(
        engine=client,
        tasks=tasks,
        capacity=capacity,
        salt_secret="a secret",
        counters=StreamCounters(),
        on_in_flight=lambda number: setattr(report, "in_flight", number),
        on_outcome=outcomes.append,
    )


@asynccontextmanager
async def node(
    tmp_path: Path,
    *routers: RouterStub | RouterAddress,
    capacity: int = 4,
    flags: tuple[str, ...] = (),
    flow: FlowControl | None = None,
    coalesce_s: float = 0.002,
    ready: bool = True,
) -> AsyncIterator[Parts]:
    """A node that serves the routers with a running engine; all links are open."""
    keys = curve_keys()
    report = AgentReport(capacity=capacity, state=AgentState.READY)
    states = States()
    async with AsyncExitStack() as stack:
        transport = stack.enter_context(Transport())
        client = await stack.enter_async_context(EngineClient(tmp_path / "s"))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        outcomes: list[Outcome] = []
        serving = _serving(client, tasks, report, capacity, outcomes)
        engine = Engine(fake_vllm(tmp_path / "s", *flags), client, policy(), states)
        running = [tasks.create_task(engine.run())]
        parts = Parts(serving, client, engine, states)
        parts.outcomes = outcomes
        linked = asyncio.Event()

        def told(connection: Connection, event: AgentEvent) -> None:
            serving.receive(connection.writer, event)
            if all(each.is_open for each in parts.connections):
                linked.set()

        for number, router in enumerate(routers):
            if isinstance(router, RouterStub):
                router.admitted[keys.public] = b"200"
            connection = Connection(
                transport=transport,
                router=router.address if isinstance(router, RouterStub) else router,
                keys=keys,
                config=config(flow=flow, instance=InstanceId(f"instance-{number}")),
                report=report,
                on_event=told,
                coalesce_s=coalesce_s,
            )
            parts.connections.append(connection)
            running.append(tasks.create_task(connection.run()))
        try:
            async with asyncio.timeout(PATIENCE_S):
                await linked.wait()
            if ready:
                await states.reach(EngineState.READY)
                serving.engine_ready(ServedModel(name="served"))
            yield parts
        finally:
            for task in running:
                task.cancel()
