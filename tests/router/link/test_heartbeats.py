"""How soon each end of a link notices that the other is silent: both by the lease of that one agent."""

import os
import socket

from zmq.utils import z85

from tests.agent.link.links import Agent, agent
from tests.router.link.rig import Rig, until
from tests.support.chaos_proxy import ChaosProxy
from xim_agent.link.sockets import CurveKeys
from xim_protocol.agent_session import AgentConfig
from xim_protocol.enrollment import RouterAddress
from xim_protocol.ids import InstanceId
from xim_router.link.silence import silent_for_s, too_silent, watch_interval_s

LEASE_S = 6.0
"""Short enough for heartbeats of a second, which are found missing long before the router's own of 5 s are."""


async def test_the_router_gives_up_a_silent_agent_by_that_agents_lease() -> None:
    """Of an agent that vanished without a word the router hears nothing: only missing heartbeats tell it."""
    async with Rig("a") as rig:
        proxies = [ChaosProxy(f"tcp://127.0.0.1:{port}") for port in rig.ports]
        async with proxies[0] as control, proxies[1] as streaming:
            public, secret = rig.agent_keys["a"]
            address = RouterAddress(
                control_addr=f"tcp://127.0.0.1:{control.port}",
                streaming_addr=f"tcp://127.0.0.1:{streaming.port}",
                server_curve_key=z85.decode(rig.server_keys[0]),
            )
            keys = CurveKeys(public=z85.decode(public), secret=z85.decode(secret))
            # Renewed so often that nearly the whole lease is left when the agent vanishes.
            config = AgentConfig(
                instance=InstanceId("one"), agent_version="test", lease_s=LEASE_S, renewal_interval_s=0.5
            )
            async with agent(address, keys=keys, settings=config) as running:
                await vanish(running, rig, control, streaming)
            await until(lambda: losses(rig) != (0, 0))
            assert losses(rig) == (1, 0)
            assert rig.link("a") is not None


async def vanish(running: Agent, rig: Rig, *proxies: ChaosProxy) -> None:
    """Once it serves, nothing of the agent arrives any more, and nobody is told."""
    await running.linked()
    await until(lambda: rig.serving("a"))
    assert [proxy.forget() for proxy in proxies] == [1, 1]


def losses(rig: Rig) -> tuple[float, float]:
    """Links lost while their session lived, and leases that ran out."""
    return rig.count("xim_router_link_lost_total"), rig.count("xim_router_lease_expired_total")


def test_an_agent_with_the_usual_lease_needs_no_watch() -> None:
    assert [watch_interval_s(lease_s) for lease_s in (6.0, 29.9, 30.0, 300.0)] == [1.0, 29.9 / 6, None, None]


async def test_silence_counts_from_the_last_byte_that_came() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            near.send(b"x")
            await until(lambda: (silent_for_s(far.fileno()) or 0) > 1.1)
            assert too_silent(far.fileno(), lease_s=3.0)
            assert not too_silent(far.fileno(), lease_s=300.0)
            # Nothing was sent the other way, and what the far end says is no sign of its peer.
            far.send(b"y")
            assert too_silent(far.fileno(), lease_s=3.0)


def test_of_what_is_no_open_tcp_connection_nothing_is_said() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    try:
        assert silent_for_s(reading) is None
        assert not too_silent(reading, lease_s=3.0)
    finally:
        os.close(reading)
    assert silent_for_s(reading) is None
