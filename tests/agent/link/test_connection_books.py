"""What a connection keeps of its links: one end each, one timer, one warning of a problem that lasts, its renewals."""

import asyncio
import logging

import pytest

from tests.agent.link.links import agent
from tests.support.programs import eventually
from tests.support.router_stub import RouterStub
from tests.support.tcp_proxy import TcpProxy
from xim_agent.link import connection as module
from xim_agent.link.ends import LinkCause, LinkEnd
from xim_protocol.enrollment import RouterAddress
from xim_protocol.events import LinkReady
from xim_protocol.messages import Channel


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the module logs, debug included."""
    caplog.set_level(logging.DEBUG, module.__name__)
    return caplog


def told(said: pytest.LogCaptureFixture, level: int) -> list[str]:
    """The problems of links that ended, as logged with `level`."""
    return [vars(record)["problem"] for record in said.records if record.levelno == level and "problem" in vars(record)]


async def test_a_link_has_one_end_and_what_comes_after_it_is_nothing(said: pytest.LogCaptureFixture) -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        node.connection._end_link(LinkEnd(cause=LinkCause.DISCONNECTED, detail="first"))
        node.connection._end_link(LinkEnd(cause=LinkCause.EXPIRED, detail="second"))
        node.connection._received(Channel.CONTROL, [b"\xc1 no message"])
        await node.told.of_type(LinkReady, 2)
    assert told(said, logging.WARNING) == ["disconnected"]
    assert [record for record in said.records if record.levelno > logging.WARNING] == []


async def test_a_connection_that_ended_leaves_no_timer() -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        node.connection._room = room = asyncio.get_running_loop().call_later(3_600.0, lambda: None)
        node.connection.close()
        await eventually(node.task.done, what="its end")
        assert node.connection._timer is not None
        assert node.connection._timer.cancelled()
        assert room.cancelled()


async def test_there_is_one_timer_and_it_is_the_earliest(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RouterStub() as router, agent(router) as node:
        await node.linked()
        connection = node.connection
        first = connection._timer
        assert first is not None
        monkeypatch.setattr(connection.session, "next_deadline", lambda: connection._timer_at + 1.0)
        connection._rearm()
        assert connection._timer is first
        earlier = connection._timer_at - 1.0
        monkeypatch.setattr(connection.session, "next_deadline", lambda: earlier)
        connection._rearm()
        assert first.cancelled()
        assert connection._timer is not first
        assert connection._timer_at == pytest.approx(earlier)


async def closed_port(router: RouterStub) -> RouterAddress:
    async with TcpProxy(router.address.control_addr) as proxy:
        closed = proxy.address
    address = router.address
    return RouterAddress(
        control_addr=closed, streaming_addr=address.streaming_addr, server_curve_key=address.server_curve_key
    )


async def test_a_problem_that_lasts_is_told_once(said: pytest.LogCaptureFixture) -> None:
    async with RouterStub() as router, agent(await closed_port(router)):
        await eventually(lambda: len(told(said, logging.DEBUG)) >= 2, what="more attempts")
    assert told(said, logging.WARNING) == ["control_port_unreachable"]


async def test_a_problem_that_lasts_long_is_told_again(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPEAT_PROBLEM_S", 0.0)
    async with RouterStub() as router, agent(await closed_port(router)):
        await eventually(lambda: len(told(said, logging.WARNING)) >= 2, what="another warning")


async def test_a_problem_that_comes_again_after_a_link_is_told_again(said: pytest.LogCaptureFixture) -> None:
    async with RouterStub() as router, agent(router) as node:
        for number in (1, 2):
            await node.told.of_type(LinkReady, number)
            node.connection._end_link(LinkEnd(cause=LinkCause.DISCONNECTED))
        await node.told.of_type(LinkReady, 3)
    assert told(said, logging.WARNING) == ["disconnected"] * 2


async def test_every_lease_that_is_granted_is_told_and_nothing_else_is() -> None:
    renewed: list[None] = []
    async with RouterStub() as router, agent(router) as node:
        node.connection._on_renewed = lambda: renewed.append(None)
        await node.linked()
        assert len(renewed) == 1
        await router.submit(b"{}")
        await node.told.request()
        assert len(renewed) == 1
        node.connection.renew()
        await eventually(lambda: len(renewed) == 2, what="the lease that was asked for")
