"""What the links' books hold of connections that come, go and get each other's numbers; no socket, and no clock."""

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from tests.support.wire import Wire
from xim_protocol.codec import Frames
from xim_protocol.ids import AgentId
from xim_protocol.messages import Channel
from xim_protocol.router_session import RouterSession
from xim_router import descriptors
from xim_router.link.agent_link import AgentLink
from xim_router.link.exchange import Exchange
from xim_router.link.links import Links
from xim_router.link.transport import RoutingId, SendResult, Transport


class Sockets:
    """In the transport's place."""

    def __init__(self) -> None:
        self.results: list[SendResult] = []
        """What the next sends come to; after them all are taken."""
        self.sent: list[RoutingId] = []
        self.shut: list[int] = []
        self.happened: Callable[[], None] = lambda: None
        """What the monitors have to say."""
        self.arrived: Callable[[], None] = lambda: None
        """What waits to be received."""

    def send(self, channel: Channel, routing_id: RoutingId, frames: Frames) -> SendResult:
        result = self.results.pop(0) if self.results else SendResult.SENT
        if result is SendResult.SENT:
            self.sent.append(routing_id)
        return result

    def after_sends(self) -> None:
        pass

    def drain(self) -> None:
        self.arrived()

    def read_monitors(self) -> None:
        self.happened()

    def shut_connection(self, descriptor: int) -> None:
        self.shut.append(descriptor)


class Case:
    """The books, one agent's link over connections 7 and 8, and who lost it."""

    def __init__(self) -> None:
        self.lost: list[AgentLink] = []
        self.links = Links(asyncio.get_running_loop(), self.lost.append)
        self.sockets = Sockets()
        self.links.attach(cast(Transport, self.sockets))
        self.wire = Wire().connect()
        self.link = AgentLink(agent=AgentId("a"), session=cast(RouterSession[Exchange], self.wire.router))
        self.links.add(self.link)
        self.bind(b"one")

    def bind(self, routing_id: RoutingId) -> None:
        self.links.bind(self.link, Channel.CONTROL, routing_id, 7)
        self.links.bind(self.link, Channel.STREAMING, routing_id, 8)


async def test_a_link_that_was_given_up_is_nobodys_and_has_nothing_to_send() -> None:
    case = Case()
    case.sockets.results = [SendResult.FULL]
    case.wire.submit("r")
    case.link.flush(cast(Transport, case.sockets))
    assert case.link.queue
    case.links.unbind(case.link)
    assert (len(case.link.queue), case.link.queued_bytes) == (0, 0)
    assert case.links.bound(Channel.CONTROL, b"one") is None
    assert case.links.bound(Channel.STREAMING, b"one") is None
    case.links._shut(Channel.CONTROL, 7)
    case.links._shut(Channel.STREAMING, 8)
    assert case.sockets.shut == [7, 8]


async def test_a_connection_that_is_gone_is_not_shut_under_the_next_one_of_its_number() -> None:
    case = Case()
    case.links.unbind(case.link)
    case.links.disconnected(Channel.CONTROL, 7)
    case.links._shut(Channel.CONTROL, 7)
    assert case.sockets.shut == []


async def test_a_connection_that_never_became_a_link_is_forgotten_with_its_end() -> None:
    case = Case()
    case.links.accepted(Channel.CONTROL, 9)
    timer = case.links._unattached[Channel.CONTROL, 9]
    case.links.disconnected(Channel.CONTROL, 9)
    assert (case.links.unattached, timer.cancelled()) == (0, True)


async def test_the_time_of_a_connection_is_not_that_of_the_next_one_of_its_number() -> None:
    case = Case()
    case.links.accepted(Channel.CONTROL, 9)

    def another() -> None:
        case.links.disconnected(Channel.CONTROL, 9)
        case.links.accepted(Channel.CONTROL, 9)

    case.sockets.happened = another
    case.links._shut_unattached(Channel.CONTROL, 9)
    assert (case.sockets.shut, case.links.unattached) == ([], 1)


async def test_what_a_full_socket_did_not_take_is_tried_again() -> None:
    case = Case()
    case.sockets.results = [SendResult.FULL, SendResult.FULL]
    case.wire.submit("r")
    case.links.touch(case.link)
    async with asyncio.timeout(60.0):
        while not case.sockets.sent:
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)
    assert case.sockets.sent == [b"one"]
    assert not case.lost


async def test_a_link_whose_peer_is_gone_is_given_up() -> None:
    case = Case()
    case.sockets.results = [SendResult.UNREACHABLE]
    case.wire.submit("r")
    case.links._touched = {case.link: None}
    case.links._flush()
    assert case.lost == [case.link]


async def test_an_old_link_is_not_looked_after_once_there_is_a_new_one() -> None:
    case = Case()
    watched: list[RoutingId] = []
    case.links._watch = lambda link, control: watched.append(control)  # type: ignore[method-assign]
    case.bind(b"two")
    case.links._look_after(case.link, b"one")
    case.link.descriptors.clear()
    case.links._look_after(case.link, b"two")
    assert watched == [b"two", b"two"]


async def test_a_connection_whose_first_word_has_come_is_not_among_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MOST_UNATTACHED", 2)
    case = Case()
    case.sockets.arrived = lambda: case.links.bind(case.link, Channel.CONTROL, b"two", 10)
    for descriptor in (10, 11, 12, 13):
        case.links.accepted(Channel.CONTROL, descriptor)
    turn = asyncio.Event()
    asyncio.get_running_loop().call_soon(turn.set)
    await turn.wait()
    assert case.sockets.shut == [11]
    assert case.links.unattached == 2
