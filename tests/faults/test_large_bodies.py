"""A request of 20 MB over a link of 2 MB/s: it arrives, and delays nobody."""

import asyncio
import json
import time

from tests.faults.parts import load_on, networked, nothing_left
from tests.support.accounts import ENDPOINT, Accounts
from tests.support.http_client import open_call, request_bytes
from tests.support.load import CHAT, assert_whole, readings
from tests.support.programs import eventually
from tests.support.topology import Topology

BODY_BYTES = 20_000_000
LINK_BYTES_PER_S = 2_000_000
CHARS = 1000


def large_request(topology: Topology) -> bytes:
    messages = [
        {"role": "system", "content": "x" * BODY_BYTES},
        {"role": "user", "content": "fake:" + json.dumps({"chunks": 2, "text_chars": 20, "interval_ms": 1})},
    ]
    body = json.dumps({"model": ENDPOINT, "messages": messages}).encode()
    return request_bytes("POST", CHAT.path, topology.headers() | {"content-type": "application/json"}, body)


async def test_twenty_megabytes_over_a_narrow_link_arrive_and_delay_no_cancel_credit_or_lease(
    accounts: Accounts,
) -> None:
    async with networked(accounts) as net, asyncio.timeout(100):
        topology = net.topology
        # A lease that is over long before the body is through, unless it is renewed meanwhile.
        node = await topology.start_node(LEASE_DURATION_MS="4500", LEASE_RENEWAL_INTERVAL_MS="1500")
        load = load_on(topology)
        for network in net.networks:
            network.weather.bytes_per_s = LINK_BYTES_PER_S
        started = time.monotonic()
        async with await open_call(topology.http_port, large_request(topology)) as large:
            # More than a window each, so that each needs credit while the body is under way.
            clients = await load.open_many(4, chunks=100, text_chars=CHARS, interval_ms=60, timed=True)
            leaving = await load.open(chunks=2000, text_chars=20, interval_ms=20, seed=9)
            await asyncio.gather(leaving.begun, *(client.begun for client in clients))
            await eventually(lambda: leaving.reading.received > 400, what="it runs")
            left = topology.stopwatch()
            leaving.leave()

            async def the_four_alone() -> bool:
                return await topology.engine_metric(node, "vllm:num_requests_running") == 4

            await left.within(1.0, the_four_alone, what="the engine has stopped it; the large one has not reached it")
            seen = await readings(clients)
            assert_whole(seen)
            await large.rest()
            took_s = time.monotonic() - started
            assert large.status == 200
        assert took_s > 0.9 * BODY_BYTES / LINK_BYTES_PER_S
        # Behind the body they would have waited for its end, some six seconds.
        assert max(gap for each in seen for gap in each.gaps) < 3.0
        for metric in ("xim_router_link_lost_total", "xim_router_lease_expired_total", "xim_router_retries_total"):
            assert await topology.router_metric(metric) == 0
        await nothing_left(topology)


async def test_an_answer_of_twenty_megabytes_over_a_narrow_link_arrives_whole(accounts: Accounts) -> None:
    async with networked(accounts) as net, asyncio.timeout(100):
        await net.topology.start_node()
        for network in net.networks:
            network.weather.bytes_per_s = 4 * LINK_BYTES_PER_S
        client = await load_on(net.topology).open(chunks=2000, text_chars=10 * CHARS, interval_ms=0)
        assert_whole(await readings([client]))
        assert await net.topology.router_metric("xim_router_link_lost_total") == 0
