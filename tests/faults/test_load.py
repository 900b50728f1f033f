"""Many streams through one router and one agent: every byte arrives, and memory stays within what is stated."""

import asyncio
import time
from collections.abc import Callable

import pytest

from tests.faults.parts import KIB, engine_runs, load_on, metric_is, nothing_left, resident_bytes
from tests.support.accounts import Accounts
from tests.support.load import assert_whole, raise_descriptor_limit, readings
from tests.support.topology import Topology

MANY = pytest.mark.soak
IDLE_BYTES = 40 * KIB
"""What an open stream may cost the router while nothing moves on it."""
FIXED_BYTES = 8 * 1024 * KIB
"""What the first load costs once and for all: code paths, pools of the allocator."""


@pytest.mark.parametrize("streams", [200, pytest.param(4000, marks=[MANY, pytest.mark.timeout(600)])])
async def test_every_byte_of_many_streams_arrives_and_an_idle_one_costs_little_memory(
    accounts: Accounts, streams: int, record_property: Callable[[str, object], None]
) -> None:
    raise_descriptor_limit()
    async with Topology(accounts) as topology, asyncio.timeout(500):
        node = await topology.start_node(MAX_CONCURRENT=str(streams), MAX_NUM_SEQS=str(streams))
        load = load_on(topology)
        assert_whole(await readings(await load.open_many(20, chunks=4, text_chars=100, interval_ms=5)))
        before = resident_bytes(topology.router)

        # Open and idle: the first chunk came, and no other follows.
        idle = await load.open_many(streams, chunks=32, text_chars=100, hang_after=1)
        await asyncio.gather(*(client.begun for client in idle))
        await metric_is(topology, "xim_router_in_flight", streams)
        cost = (resident_bytes(topology.router) - before - FIXED_BYTES) / streams
        record_property("bytes_per_idle_stream", round((resident_bytes(topology.router) - before) / streams))
        assert cost < IDLE_BYTES
        for client in idle:
            client.leave()
        await nothing_left(topology)
        await engine_runs(topology, node, 0)

        # 64 KiB each, all of them at once: the first is not over before the last has begun.
        started = time.monotonic()
        interval_ms = max(100, streams // 4)
        clients = await load.open_many(streams, chunks=32, text_chars=2048, interval_ms=interval_ms)
        await metric_is(topology, "xim_router_in_flight", streams, within_s=60.0)
        held = resident_bytes(topology.router) - await topology.router_metric("xim_router_buffered_bytes")
        assert held - before - FIXED_BYTES < streams * IDLE_BYTES
        assert_whole(await readings(clients))
        record_property("seconds", round(time.monotonic() - started, 1))
        await nothing_left(topology)
        assert not topology.router.lines(level="error")
