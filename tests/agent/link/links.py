"""Builders: an agent's connection to a router stub, and a record of what it was told."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import zmq
from zmq.utils import z85

from tests.support.programs import PATIENCE_S
from tests.support.router_stub import RouterStub
from xim_agent.link.connection import Connection
from xim_agent.link.sockets import CurveKeys, Transport
from xim_protocol.agent_session import AgentConfig, AgentReport
from xim_protocol.enrollment import RouterAddress
from xim_protocol.events import AgentEvent, LinkReady, RequestReceived
from xim_protocol.ids import InstanceId
from xim_protocol.messages import AgentState, FlowControl, Submit


def curve_keys() -> CurveKeys:
    public, secret = zmq.curve_keypair()
    return CurveKeys(public=z85.decode(public), secret=z85.decode(secret))


def config(
    *, lease_s: float = 30.0, flow: FlowControl | None = None, streaming: bool = True, instance: str = "instance-1"
) -> AgentConfig:
    return AgentConfig(
        instance=InstanceId(instance),
        agent_version="test",
        lease_s=lease_s,
        renewal_interval_s=lease_s / 3,
        flow=flow or FlowControl(),
        streaming_socket=streaming,
    )


class Told:
    """What a connection told its owner."""

    def __init__(self) -> None:
        self.events: list[AgentEvent] = []
        self._changed = asyncio.Event()

    def __call__(self, connection: Connection, event: AgentEvent) -> None:
        self.events.append(event)
        self._changed.set()

    async def of_type(self, kind: type, count: int = 1) -> AgentEvent:
        """The `count`-th event of this type, as soon as it is there."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = [event for event in self.events if isinstance(event, kind)]
                if len(found) >= count:
                    return found[count - 1]
                self._changed.clear()
                await self._changed.wait()

    async def request(self, count: int = 1) -> Submit:
        event = await self.of_type(RequestReceived, count)
        assert isinstance(event, RequestReceived)
        return event.submit


class Agent:
    """A running connection."""

    def __init__(self, connection: Connection, told: Told, task: "asyncio.Task[None]") -> None:
        self.connection, self.told, self.task = connection, told, task
        self.writer = connection.writer

    async def linked(self) -> None:
        """Return when requests may come."""
        await self.told.of_type(LinkReady)


@asynccontextmanager
async def agent(
    router: RouterStub | RouterAddress,
    *,
    keys: CurveKeys | None = None,
    settings: AgentConfig | None = None,
    secure: bool = True,
    admit: bool = True,
    coalesce_s: float = 0.002,
) -> AsyncIterator[Agent]:
    """A connection whose `run` is a task; cancelled at the end if it still runs."""
    keys = keys or curve_keys()
    address = router
    if isinstance(router, RouterStub):
        address = router.address
        if admit:
            router.admitted[keys.public] = b"200"
    assert isinstance(address, RouterAddress)
    told = Told()
    with Transport(secure=secure) as transport:
        connection = Connection(
            transport=transport,
            router=address,
            keys=keys,
            config=settings or config(),
            report=AgentReport(capacity=4, state=AgentState.READY),
            on_event=told,
            coalesce_s=coalesce_s,
            source=random.Random(1),
        )
        task = asyncio.create_task(connection.run())
        try:
            yield Agent(connection, told, task)
        except BaseException as error:
            if task.done() and not task.cancelled():
                error.add_note(f"the connection has ended: {task.exception()!r}")
            raise
        finally:
            task.cancel()
            await asyncio.wait({task})
