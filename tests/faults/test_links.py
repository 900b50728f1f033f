"""Links that break, go silent, are forgotten and change their address: within the lease no client notices."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import pytest_asyncio

from tests.faults.parts import Networked, load_on, metric_is, networked, nothing_left
from tests.support.accounts import Accounts
from tests.support.load import Client, assert_whole, raise_descriptor_limit, readings
from tests.support.programs import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

BREAKS = 30
CHARS = 1000


@pytest_asyncio.fixture(loop_scope="module")
async def net(accounts: Accounts) -> AsyncIterator[Networked]:
    """A router and two networks; each test starts its agent."""
    async with networked(accounts) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installation(accounts: Accounts) -> AsyncIterator[Networked]:
    """An agent that sends heartbeats every second, so that a link that went silent is found within two."""
    async with networked(accounts) as made:
        await made.topology.start_node(LEASE_DURATION_MS="6000", LEASE_RENEWAL_INTERVAL_MS="2000")
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def linked(installation: Networked) -> AsyncIterator[Networked]:
    """The same, whose networks are good again after each test."""
    yield installation
    for network in installation.networks:
        network.change_address = False
        network.clear()


@pytest.mark.parametrize("streams", [100, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
async def test_links_that_break_thirty_times_at_random_cost_no_byte_of_any_stream(
    net: Networked, streams: int, record_property: Callable[[str, object], None]
) -> None:
    raise_descriptor_limit()
    source = random.Random(streams)
    chunks = 100
    async with asyncio.timeout(500):
        node = await net.topology.start_node(MAX_CONCURRENT=str(streams), MAX_NUM_SEQS=str(streams))
        interval_ms = max(50, streams // 4)
        clients = await load_on(net.topology).open_many(
            streams, chunks=chunks, text_chars=CHARS, interval_ms=interval_ms
        )
        # Moments are places in the answers, so that none of them falls where nothing is under way.
        moments = sorted(source.uniform(0.01, 0.9) * streams * chunks * CHARS for _ in range(BREAKS))
        broken = 0
        for moment in moments:
            await eventually(partial(has_come, clients, moment), within_s=60.0, what="streams go on")
            broken += await break_at_random(net, source)
        assert_whole(await readings(clients))
        lost = await net.topology.router_metric("xim_router_link_lost_total")
        record_property("connections_broken", broken)
        record_property("links_lost", lost)
        assert broken >= BREAKS
        # The slower the machine, the more breaks fall into the making of a link, and lose none.
        assert lost >= BREAKS // 3
        await nothing_left(net.topology)
        # Each request was given out once: nothing was saved by asking the engine again.
        assert await net.topology.router_metric("xim_router_retries_total") == 0
        assert await net.topology.agent_metric(node, "xim_agent_lease_expired_total") == 0


def received(clients: list[Client]) -> int:
    return sum(client.reading.received for client in clients)


def has_come(clients: list[Client], characters: float) -> bool:
    return received(clients) >= characters


async def break_at_random(net: Networked, source: random.Random) -> int:
    """Break both connections of the link, or one; wait for there to be one first. Returns how many were broken."""
    chosen = source.choice([net.networks, net.networks, (net.control,), (net.streaming,)])
    return int(await eventually(lambda: sum(network.break_all() for network in chosen), what="there is a link"))


async def links_lost(net: Networked) -> float:
    return await net.topology.router_metric("xim_router_link_lost_total")


async def lost_and_back(net: Networked, lost: float) -> None:
    """Return when so many links were lost since the router's start, and there is one again."""
    await metric_is(net.topology, "xim_router_link_lost_total", lost)
    await net.topology.ready(program=net.topology.nodes[0].program)


async def one_link(net: Networked) -> None:
    """Return when each network carries one connection: those of earlier links are closed."""
    await eventually(lambda: [network.carried for network in net.networks] == [1, 1], what="there is one link")


async def paced(net: Networked, **script: int) -> list[Client]:
    """Twelve streams of some seconds, all of which have begun."""
    clients = await load_on(net.topology).open_many(
        12, **{"chunks": 90, "text_chars": CHARS, "interval_ms": 50, **script}
    )
    await asyncio.gather(*(client.begun for client in clients))
    return clients


async def test_a_network_that_is_silent_for_less_than_a_heartbeat_costs_no_link(linked: Networked) -> None:
    await one_link(linked)
    lost_before = await links_lost(linked)
    clients = await paced(linked, chunks=40)
    for network in linked.networks:
        network.blackhole()
    # Not what clients have: of what passed before, more or less is on its way to them.
    passed = [network.passed_bytes for network in linked.networks]
    silent_until = time.monotonic() + 0.5
    await eventually(lambda: time.monotonic() > silent_until)
    assert [network.passed_bytes for network in linked.networks] == passed
    for network in linked.networks:
        network.clear()
    assert_whole(await readings(clients))
    assert await links_lost(linked) == lost_before


async def test_a_mapping_that_a_nat_forgot_is_found_by_heartbeats_and_dialled_anew(linked: Networked) -> None:
    await one_link(linked)
    lost_before = await links_lost(linked)
    dialled_before = [network.connections for network in linked.networks]
    clients = await paced(linked)
    # Neither end is told, and whatever either sends goes nowhere.
    assert sum(network.forget() for network in linked.networks) == 2
    await lost_and_back(linked, lost_before + 1)
    assert_whole(await readings(clients))
    assert [network.connections for network in linked.networks] == [before + 1 for before in dialled_before]


async def test_the_idle_streaming_connection_alone_may_be_forgotten(linked: Networked) -> None:
    await one_link(linked)
    lost_before = await links_lost(linked)
    assert linked.streaming.forget() == 1
    await lost_and_back(linked, lost_before + 1)
    assert_whole(await readings(await paced(linked, chunks=4)))


async def test_an_agent_that_comes_back_from_another_address_goes_on_where_it_was(linked: Networked) -> None:
    await one_link(linked)
    lost_before = await links_lost(linked)
    seen_before = len(linked.control.addresses)
    clients = await paced(linked)
    for network in linked.networks:
        network.change_address = True
    for moves in (1, 2, 3):
        for network in linked.networks:
            network.break_all()
        await lost_and_back(linked, lost_before + moves)
    assert_whole(await readings(clients))
    assert len(set(linked.control.addresses[seen_before:])) == 3


async def test_a_network_that_swallows_everything_is_found_by_heartbeats_and_survived_when_it_is_back(
    linked: Networked,
) -> None:
    await one_link(linked)
    clients = await paced(linked)
    dialled_before = linked.control.connections
    for network in linked.networks:
        network.blackhole()
    # The agent found it and dials again, which goes nowhere either.
    await eventually(lambda: linked.control.connections > dialled_before, what="the agent dials again")
    assert [client.done.result() for client in clients if client.done.done()] == []
    for network in linked.networks:
        network.clear()
    assert_whole(await readings(clients))


@pytest.mark.parametrize("slice_bytes", [1, 7], ids=["one byte", "seven bytes"])
async def test_bytes_that_come_in_crumbs_are_the_same_bytes(net: Networked, slice_bytes: int) -> None:
    for network in net.networks:
        network.weather.slice_bytes = slice_bytes
    await net.topology.start_node()
    assert_whole(await readings(await paced(net, chunks=4, interval_ms=10)))


async def test_a_slow_and_unsteady_network_changes_no_answer(net: Networked) -> None:
    for network in net.networks:
        network.weather.latency_s, network.weather.jitter_s = 0.05, 0.1
    await net.topology.start_node()
    assert_whole(await readings(await paced(net, chunks=30, interval_ms=20)))
    assert await net.topology.router_metric("xim_router_link_lost_total") == 0
