"""Connections that belong to no link: those of a revoked agent are shut with the others, idle ones in a while."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import AgentStub, Dial
from tests.support.programs import PATIENCE_S
from xim_router import descriptors
from xim_router.link import links


class Idle:
    """A connection that finished its handshake and says nothing."""

    def __init__(self, monitor: "zmq.asyncio.Socket") -> None:
        self._monitor = monitor

    async def next_event(self) -> int:
        """The next thing that happens to it."""
        return int(parse_monitor_message(await self._monitor.recv_multipart())["event"])


@contextlib.asynccontextmanager
async def idle(dial: Dial, channel: str) -> AsyncIterator[Idle]:
    """One more connection of an agent's, beside its link or without one."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    socket.curve_publickey, socket.curve_secretkey = dial.keys
    socket.curve_serverkey = dial.server_key
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    try:
        socket.connect(getattr(dial, channel))
        connection = Idle(monitor)
        assert await connection.next_event() == zmq.EVENT_HANDSHAKE_SUCCEEDED
        yield connection
    finally:
        socket.disable_monitor()
        socket.close(linger=0)
        monitor.close(linger=0)
        context.term()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is shut for its age."""
    monkeypatch.setattr(links, "UNATTACHED_S", 3_600.0)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("channel", ["control", "streaming"])
@pytest.mark.parametrize("linked", [True, False], ids=["beside its link", "without a link"])
async def test_every_connection_of_a_revoked_agent_is_shut(channel: str, linked: bool) -> None:
    async with Rig("a", "b") as rig, rig.agent("b"), contextlib.AsyncExitStack() as stack:
        if linked:
            await stack.enter_async_context(rig.agent("a"))
        async with idle(rig.dial("a"), channel) as connection:
            rig.revoke("a")
            assert await connection.next_event() == zmq.EVENT_DISCONNECTED
        assert rig.serving("b")


@pytest.mark.usefixtures("patient")
async def test_a_revocation_costs_no_other_agent_its_link_not_even_one_that_is_dialling() -> None:
    async with Rig("a", "b") as rig, idle(rig.dial("a"), "control") as connection, AgentStub(rig.dial("b")) as b:
        # Its sockets are connecting in this very moment.
        rig.revoke("a")
        await b.opened()
        assert await connection.next_event() == zmq.EVENT_DISCONNECTED
        assert rig.serving("b")
        assert not b.lost


async def test_a_connection_that_never_becomes_part_of_a_link_is_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        # Time enough for a handshake, on whatever machine.
        monkeypatch.setattr(links, "UNATTACHED_S", 2.0)
        async with idle(agent.dial, "control") as control, idle(agent.dial, "streaming") as streaming:
            assert await control.next_event() == zmq.EVENT_DISCONNECTED
            assert await streaming.next_event() == zmq.EVENT_DISCONNECTED
        assert rig.serving("a")
        assert not agent.lost
        await until(lambda: not rig.broker._links.unattached)


def abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def test_of_too_many_connections_the_oldest_are_shut_and_no_agents_link(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(links, "UNATTACHED_S", 3_600.0)
    monkeypatch.setattr(descriptors, "MOST_UNATTACHED", 4)
    async with Rig("a", "b") as rig, rig.agent("a") as before, contextlib.AsyncExitStack() as strangers:
        opened = []
        for number in range(12):
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.ports[number % 2])
            strangers.callback(abort, writer)
            opened.append(reader)
            # One after the other: of two that come at once to the two ports, either may be the older.
            if number < 4:
                await until(lambda number=number: rig.broker._links.unattached == number + 1)  # type: ignore[misc]
            else:
                async with asyncio.timeout(PATIENCE_S):
                    await opened[number - 4].read()  # a greeting, and the end
        assert not any(reader.at_eof() for reader in opened[8:])
        # An agent still comes in, and they are no worse off than before the next stranger.
        async with rig.agent("b"):
            assert rig.serving("a")
            assert rig.serving("b")
        assert not before.lost
        told = [record.getMessage() for record in caplog.records if record.name == links.__name__]
        assert told == ["too many connections of no agent, ending the oldest"]
