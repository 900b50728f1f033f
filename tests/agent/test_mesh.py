"""Which routers an agent is linked to, shown with real links: who is dialled, who is kept, who is given up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.agent.link.links import config, curve_keys
from tests.support.programs import PATIENCE_S
from tests.support.router_stub import RouterStub
from xim_agent.link.connection import Connection
from xim_agent.link.sockets import Transport
from xim_agent.mesh import Mesh
from xim_protocol.agent_session import AgentReport
from xim_protocol.enrollment import RouterAddress
from xim_protocol.events import AgentEvent, LinkReady, MembersChanged, SessionExpired, Welcomed
from xim_protocol.messages import AgentState, GoodbyeCode


class Agent:
    """A mesh with real connections, and what it did."""

    def __init__(self, transport: Transport, tasks: asyncio.TaskGroup, lease_s: float) -> None:
        self._transport, self._tasks, self._lease_s = transport, tasks, lease_s
        self._keys = curve_keys()
        self._report = AgentReport(capacity=4, state=AgentState.READY)
        self._changed = asyncio.Event()
        self.remembered: list[set[str]] = []
        self.given_up: list[str] = []
        self.mesh = Mesh(dial=self._dial, given_up=self._gave_up, remember=self._remember)

    def _dial(self, router: RouterAddress) -> Connection:
        connection = Connection(
            transport=self._transport,
            router=router,
            keys=self._keys,
            config=config(lease_s=self._lease_s),
            report=self._report,
            on_event=self._told,
            on_down=self._down,
        )
        self._tasks.create_task(connection.run())
        return connection

    def _told(self, connection: Connection, event: AgentEvent) -> None:
        match event:
            case Welcomed() | MembersChanged():
                self.mesh.told(connection, event.routers)
            case LinkReady() | SessionExpired():
                self.mesh.review()
        self._changed.set()

    def _down(self) -> None:
        self.mesh.review()
        self._changed.set()

    def _gave_up(self, connection: Connection) -> None:
        self.given_up.append(connection.name)

    def _remember(self, routers: tuple[RouterAddress, ...]) -> None:
        self.remembered.append({each.control_addr for each in routers})

    @property
    def linked(self) -> set[str]:
        """Control addresses of the open links."""
        return {connection.name for connection in self.mesh if connection.is_open}

    @property
    def tried(self) -> set[str]:
        """Control addresses of all that are dialled."""
        return {connection.name for connection in self.mesh}

    async def until_linked(self, *routers: RouterStub) -> None:
        """Return when these links are open, and no other."""
        wanted = {router.address.control_addr for router in routers}
        async with asyncio.timeout(PATIENCE_S):
            while self.linked != wanted:
                await self.changed()

    async def until_tried_no_more(self, router: str) -> None:
        """Return when the router at this control address is given up."""
        async with asyncio.timeout(PATIENCE_S):
            while router in self.tried:
                await self.changed()

    async def changed(self) -> None:
        """Return when anything happened."""
        self._changed.clear()
        await self._changed.wait()


@asynccontextmanager
async def agent(*, lease_s: float = 30.0) -> AsyncIterator[Agent]:
    async with AsyncExitStack() as stack:
        transport = stack.enter_context(Transport())
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        made = Agent(transport, tasks, lease_s)
        yield made
        made.mesh.close()


@asynccontextmanager
async def router(*others: RouterStub) -> AsyncIterator[RouterStub]:
    """A router that names itself and `others`."""
    async with RouterStub() as made:
        made.admit_all = True
        made.name_routers(*(each.member for each in (made, *others)))
        yield made


async def test_a_router_that_joins_is_dialled_and_remembered() -> None:
    async with router() as first, router(first) as second, agent() as node:
        node.mesh.start([first.address])
        await node.until_linked(first)
        assert node.remembered == []
        await first.tell_routers(first.member, second.member)
        await node.until_linked(first, second)
        assert node.remembered == [{first.address.control_addr, second.address.control_addr}]


async def test_a_dead_router_is_tried_until_it_is_named_no_more_and_its_lease_is_over() -> None:
    async with router() as first, agent(lease_s=1.0) as node:
        async with router(first) as second:
            first.name_routers(first.member, second.member)
            dead = second.address.control_addr
            node.mesh.start([first.address, second.address])
            await node.until_linked(first, second)
        await node.until_linked(first)
        assert dead in node.tried, "another router still names it"
        await first.tell_routers(first.member)
        await node.until_tried_no_more(dead)
        assert node.given_up == [dead]
        await node.until_linked(first)


async def test_a_router_that_leaves_keeps_its_link_until_its_own_end() -> None:
    async with router() as first, agent() as node, router(first) as second:
        first.name_routers(first.member, second.member)
        node.mesh.start([first.address])
        await node.until_linked(first, second)
        await first.tell_routers(first.member)
        await first.tell_routers(first.member)
        assert node.linked == {first.address.control_addr, second.address.control_addr}
        leaving = second.address.control_addr
        await second.goodbye(GoodbyeCode.SHUTDOWN)
        await node.until_tried_no_more(leaving)
        assert node.given_up == [leaving]
        assert node.linked == {first.address.control_addr}


async def test_while_no_link_is_open_nobody_is_given_up() -> None:
    async with agent(lease_s=1.0) as node:
        async with router() as first, router(first) as second:
            first.name_routers(first.member, second.member)
            both = {first.address.control_addr, second.address.control_addr}
            node.mesh.start([first.address])
            await node.until_linked(first, second)
        await node.until_linked()
        async with asyncio.timeout(PATIENCE_S):
            while node.mesh.is_leased:
                await node.changed()
        assert node.tried == both
        assert node.given_up == []
