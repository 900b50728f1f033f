"""After many requests, cancels and lost links everything is as it was: descriptors, tasks, statistics, memory."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.parts import (
    KIB,
    Networked,
    descriptors,
    engine_runs,
    load_on,
    networked,
    nothing_left,
    resident_bytes,
)
from tests.support.accounts import Accounts
from tests.support.load import GENERATING, Client, Ending
from tests.support.programs import Program, eventually
from tests.support.topology import Node

AT_ONCE = 10
"""No more than may wait for one node while its link is down: none is turned away."""
LEAVING = 0.3
"""So many of the clients leave, each at a moment of its own."""
REQUESTS_PER_BREAK = 100
TEXT_CHARS = 200
"""In each chunk of an answer."""
QUIET_S = 6.0
"""Longer than anybody keeps an idle connection of his own."""
LONG = 10_000
"""From so many requests on memory has a slope, and not only a start."""
SLOPE_BYTES = 1 * KIB
"""Most growth per hundred requests in the last third."""
MOST_BLOCKS = 16
"""Most blocks of Python's memory, of 100 bytes on average, that a hundred requests may add: growth into memory that is
free in the process, which its size does not show. What the interpreter's free lists hold differs by half of that."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What the programs hold while nothing is asked of them."""

    descriptors: tuple[int, int]
    tasks: tuple[float, float]
    statistics: tuple[float, ...]
    processes: int


async def holding(net: Networked, node: Node) -> Holding:
    """A look at router and agent."""
    topology = net.topology
    names = ("xim_router_exchanges", "xim_router_streams", "xim_router_in_flight", "xim_router_queue_depth")
    kept = ("xim_agent_streams_in_flight", "xim_agent_kept_bytes")
    return Holding(
        descriptors=(descriptors(topology.router), descriptors(node.program)),
        tasks=(await topology.router_metric("xim_router_tasks"), await topology.agent_metric(node, "xim_agent_tasks")),
        statistics=(
            *[await topology.router_metric(name) for name in (*names, "xim_router_buffered_bytes")],
            *[await topology.agent_metric(node, name) for name in kept],
            await topology.engine_metric(node, "vllm:num_requests_running"),
        ),
        processes=len(topology.engine_processes(node)),
    )


async def at_rest(net: Networked, node: Node) -> Holding:
    """A look after a time without any: a scrape of the agent keeps its idle connections to the engine alive."""
    await nothing_left(net.topology)
    await net.topology.ready(program=node.program)
    programs = (net.topology.router, node.program)
    looks: list[tuple[float, list[int]]] = []

    def quiet() -> bool:
        now = time.monotonic()
        looks.append((now, [descriptors(program) for program in programs]))
        recent = [found for at, found in looks if at > now - QUIET_S]
        return looks[0][0] < now - QUIET_S and all(found == recent[0] for found in recent)

    await eventually(quiet, within_s=120.0, what="descriptors stay as they are")
    return await holding(net, node)


async def one(net: Networked, source: random.Random, seed: int, text_chars: int) -> Ending | None:
    """One request of any kind; None when its client left."""
    route = source.choice(GENERATING)
    stream = source.random() < 0.7
    client: Client = await load_on(net.topology).open(
        route, stream=stream, seed=seed % 64, chunks=source.randrange(1, 30), text_chars=text_chars, interval_ms=5
    )
    if source.random() < LEAVING:
        # After so many characters, or before any; a short answer may be over by then.
        wanted = source.randrange(0, 4000)
        await eventually(lambda: client.reading.received >= wanted or client.done.done() or not stream)
        client.leave()
        await client.done
        return None
    return (await client.done).ending


async def many(
    net: Networked,
    source: random.Random,
    requests: int,
    sample: Callable[[int], None] = lambda over: None,
    *,
    per_break: int = REQUESTS_PER_BREAK,
    text_chars: int = TEXT_CHARS,
) -> list[Ending]:
    """So many requests, a few at once, while links break; `sample` is told how many are over."""
    endings: list[Ending | None] = []
    left = iter(range(requests))

    async def one_after_the_other() -> None:
        for seed in left:
            endings.append(await one(net, source, seed, text_chars))
            if len(endings) % per_break == per_break // 2:
                for network in net.networks:
                    network.break_all()
            if len(endings) % 100 == 0:
                sample(len(endings))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(one_after_the_other())
    return [ending for ending in endings if ending is not None]


async def reach_heights(net: Networked, source: random.Random, requests: int) -> None:
    """So many requests, harder than those that are judged: what is made once, at first use, belongs to the start.

    A heap is as high as the most that it ever held, and its parts reach that by chance, each at a moment of its own,
    most of them where a link is lost. Left to what is judged they would do so for 20,000 requests, and then no more.
    """
    endings = await many(net, source, requests, per_break=REQUESTS_PER_BREAK // 4, text_chars=2 * TEXT_CHARS)
    assert set(endings) == {Ending.WHOLE}, Counter(endings)


async def blocks(net: Networked, node: Node) -> dict[str, float]:
    """Python's memory in use in router and agent."""
    return {
        "router": await net.topology.router_metric("xim_router_memory_blocks"),
        "agent": await net.topology.agent_metric(node, "xim_agent_memory_blocks"),
    }


async def stand_still(net: Networked, node: Node, program: Program) -> None:
    """Let router or agent stand still in the middle of answers, as a busy machine does to it at any moment.

    What arrives meanwhile is a backlog, whose place in the heap is made once and kept.
    """
    clients = await load_on(net.topology).open_many(2 * AT_ONCE, chunks=30, text_chars=200, interval_ms=20)
    await asyncio.gather(*(client.begun for client in clients))
    program.send(signal.SIGSTOP)
    try:
        await engine_runs(net.topology, node, 0)
    finally:
        program.send(signal.SIGCONT)
    assert {(await client.done).ending for client in clients} == {Ending.WHOLE}


async def keep_bytecode(accounts: Accounts, where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have router and agent find their modules compiled, in any environment.

    Compiling leaves free memory in a process, 15 MB in the agent: what grows afterwards goes into it unseen.
    """
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(where))
    async with networked(accounts) as net:
        await net.topology.start_node()


def slope(samples: Sequence[tuple[int, int]]) -> float:
    """Bytes per hundred requests, by least squares over (requests, bytes)."""
    mean_x = sum(x for x, _ in samples) / len(samples)
    mean_y = sum(y for _, y in samples) / len(samples)
    over = sum((x - mean_x) * (y - mean_y) for x, y in samples)
    return 100 * over / sum((x - mean_x) ** 2 for x, _ in samples)


@pytest.mark.parametrize("requests", [500, pytest.param(LONG, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
async def test_after_many_requests_cancels_and_lost_links_everything_is_as_it_was(
    accounts: Accounts,
    requests: int,
    record_property: Callable[[str, object], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = random.Random(requests)
    if requests >= LONG:
        await keep_bytecode(accounts, tmp_path / "bytecode", monkeypatch)
    async with networked(accounts) as net, asyncio.timeout(1100):
        topology = net.topology
        node = await topology.start_node(MAX_CONCURRENT=str(2 * AT_ONCE), MAX_NUM_SEQS=str(2 * AT_ONCE))
        programs: dict[str, Program] = {"router": topology.router, "agent": node.program}
        samples: dict[str, list[tuple[int, int]]] = {name: [] for name in programs}

        def sample(over: int) -> None:
            for name, program in programs.items():
                samples[name].append((over, resident_bytes(program)))

        await reach_heights(net, source, max(100, requests * 6 // 10))
        for program in programs.values():
            await stand_still(net, node, program)
        before = await at_rest(net, node)
        used = await blocks(net, node)
        lost = await topology.router_metric("xim_router_link_lost_total")
        endings = await many(net, source, requests, sample)
        assert set(endings) == {Ending.WHOLE}, Counter(endings)
        assert await at_rest(net, node) == before
        added = {name: 100 * (now - used[name]) / requests for name, now in (await blocks(net, node)).items()}
        record_property("links_lost", await topology.router_metric("xim_router_link_lost_total") - lost)
        record_property("links_lost_before", lost)
        record_property("clients_left", requests - len(endings))
        for name in programs:
            last_third = samples[name][len(samples[name]) * 2 // 3 :]
            record_property(f"{name}_bytes", [size for _, size in samples[name]][:: max(1, len(samples[name]) // 10)])
            if requests >= LONG:
                growth = slope(last_third)
                record_property(f"{name}_bytes_per_100_requests", round(growth))
                record_property(f"{name}_blocks_per_100_requests", round(added[name], 1))
                assert growth <= SLOPE_BYTES, f"{name}: {growth:.0f} bytes per 100 requests"
                assert added[name] <= MOST_BLOCKS, f"{name}: {added[name]:.1f} blocks per 100 requests"
