"""A client that leaves, on every route, at every moment: its place is free and the engine idle within a second."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from enum import StrEnum
from typing import Any

import pytest
import pytest_asyncio

from tests.faults.parts import all_true, engine_runs, load_on, metric_is
from tests.support.accounts import ENDPOINT, PROJECTS, Accounts
from tests.support.http_client import Call, open_call, request_bytes
from tests.support.load import GENERATING, Client, Route
from tests.support.stopwatch import Stopwatch
from tests.support.topology import Node, Topology
from xim_protocol.routes import ROUTES
from xim_router.dispatch.catalog import TaskMode
from xim_router.http.task_mode import TASK_MODES

pytestmark = pytest.mark.asyncio(loop_scope="module")

FREE_S = 1.0
CHUNKS, CHARS = 40, 100
NEAR_THE_END = 34

COMPUTING: dict[str, dict[str, Any]] = {
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "text"}]},
    "/v1/embeddings": {"input": "text"},
    "/v1/rerank": {"query": "text", "documents": ["text"]},
    "/v1/score": {"text_1": "text", "text_2": "text"},
    "/pooling": {"input": "text"},
    "/classify": {"input": "text"},
    "/tokenize": {"prompt": "text"},
    "/detokenize": {"tokens": [1]},
}
"""The routes that never stream, with the least that the engine takes."""


class Moment(StrEnum):
    """When the client leaves."""

    PARKED = "parked"
    BEFORE_THE_FIRST_BYTE = "before the first byte"
    MID_STREAM = "mid-stream"
    NEAR_THE_END = "near the end"


class Leaving(StrEnum):
    """How it leaves."""

    CLOSES = "closes"
    HALF_CLOSES = "half-closes"
    """It says that it sends nothing more. To a server that is a client that left: which of the two, it cannot know."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def topology(accounts: Accounts) -> AsyncIterator[Topology]:
    """One agent with one place, so that a place that is not free shows."""
    async with Topology(accounts) as made:
        await made.start_node(MAX_CONCURRENT="1")
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def topologies(
    topology: Topology, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[TaskMode, Topology]]:
    """The same for each task mode: an agent serves one endpoint, and an endpoint the routes of its task mode."""
    made = {TaskMode.GENERATE: topology}
    async with AsyncExitStack() as stack:
        for mode in (TaskMode.EMBED, TaskMode.SCORE):
            folder = tmp_path_factory.mktemp(mode.value) / "router"
            accounts = Accounts.prepare(folder, projects=PROJECTS[:1], task_mode=mode)
            made[mode] = await stack.enter_async_context(Topology(accounts))
            await made[mode].start_node(MAX_CONCURRENT="1")
        yield made


def task_mode_of(path: str) -> TaskMode:
    """The first task mode that answers `path`."""
    return next(mode for mode in TaskMode if mode in TASK_MODES[path])


async def in_use(topology: Topology) -> None:
    """Return when the one place is taken and the engine works on the request."""
    (node,) = topology.nodes
    await engine_runs(topology, node, 1)


async def free_at_once(topology: Topology, since: Stopwatch) -> None:
    """Place, slot, stream and engine are free within a second of the client's leaving."""
    (node,) = topology.nodes

    async def router_is_free() -> bool:
        names = ("xim_router_in_flight", "xim_router_queue_depth", "xim_router_exchanges")
        return not any([await topology.router_metric(name) for name in names])

    async def all_free() -> bool:
        return await router_is_free() and await topology.engine_metric(node, "vllm:num_requests_running") == 0

    await since.within(FREE_S, all_free, what="slot and engine are free")


async def all_left(topology: Topology, before: int, count: int = 1) -> None:
    """The new lines of the router's log, so many, say that the client left."""
    lines = (await topology.request_lines(before + count))[before:]
    assert [line["outcome"] for line in lines] == ["client_closed_request"] * count


@pytest.mark.parametrize("leaving", Leaving, ids=str)
@pytest.mark.parametrize("moment", [each for each in Moment if each is not Moment.PARKED], ids=str)
@pytest.mark.parametrize("choices", [1, 3], ids=["n=1", "n=3"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("route", GENERATING, ids=lambda route: route.path)
async def test_leaving_a_generating_route(
    topology: Topology, route: Route, stream: bool, choices: int, moment: Moment, leaving: Leaving
) -> None:
    if choices > 1 and route not in GENERATING[:2]:
        pytest.skip("the route has no `n`")
    if not stream and moment is Moment.NEAR_THE_END:
        pytest.skip("of a whole answer the router sees nothing before its end")
    before = await topology.lines_so_far()
    first_ms = 60_000 if moment is Moment.BEFORE_THE_FIRST_BYTE else 0
    client = (
        await load_on(topology).open(
            route,
            stream=stream,
            n=choices,
            chunks=CHUNKS,
            text_chars=CHARS,
            interval_ms=20,
            first_ms=first_ms,
            hang_after=NEAR_THE_END if moment is Moment.NEAR_THE_END else CHUNKS // 2,
        )
        if stream
        else await load_on(topology).open(
            route, stream=False, n=choices, chunks=600, text_chars=CHARS, interval_ms=100, first_ms=first_ms
        )
    )
    with left_at_the_end(client):
        await in_use(topology)
        if stream and moment is not Moment.BEFORE_THE_FIRST_BYTE:
            wanted = choices * CHARS * (NEAR_THE_END if moment is Moment.NEAR_THE_END else 1)
            await all_true(lambda: has_received(client.reading, wanted), what="the answer is so far")
        left = topology.stopwatch()
        if leaving is Leaving.CLOSES:
            client.leave()
        else:
            client.half_close()
        await free_at_once(topology, left)
        await all_left(topology, before)


@contextmanager
def left_at_the_end(client: Client | Call) -> Iterator[None]:
    """Whatever becomes of the test: a client that stayed would hold the one place, and fail those after it."""
    try:
        yield
    finally:
        client.leave()


async def has_received(reading: Any, characters: int) -> bool:
    return bool(reading.received >= characters)


async def call(topology: Topology, path: str, fields: dict[str, Any], **script: Any) -> Call:
    """A request of any route; the script goes in `user`."""
    body = {"model": ENDPOINT, "user": json.dumps(script), **fields}
    headers = topology.headers() | {"content-type": "application/json"}
    return await open_call(topology.http_port, request_bytes("POST", path, headers, json.dumps(body).encode()))


@pytest.mark.parametrize("path", COMPUTING)
async def test_leaving_a_route_that_computes(topologies: dict[TaskMode, Topology], path: str) -> None:
    topology = topologies[task_mode_of(path)]
    before = await topology.lines_so_far()
    async with await call(topology, path, COMPUTING[path], first_ms=60_000):
        await in_use(topology)
        left = topology.stopwatch()
    await free_at_once(topology, left)
    await all_left(topology, before)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", [route.path for route in ROUTES])
async def test_leaving_while_parked(topologies: dict[TaskMode, Topology], path: str, stream: bool) -> None:
    topology = topologies[task_mode_of(path)]
    bodies = {route.path: route.body("hello") for route in GENERATING} | COMPUTING
    (node,) = topology.nodes
    lines_before = await topology.lines_so_far()
    holder = await call(topology, path, bodies[path], first_ms=60_000)
    with left_at_the_end(holder):
        await in_use(topology)
        before = await topology.engine_metric(node, "vllm:prompt_tokens_total")
        async with await call(topology, path, {**bodies[path], "stream": stream}):
            await metric_is(topology, "xim_router_queue_depth", 1)
            left = topology.stopwatch()

        async def nobody_waits() -> bool:
            return await topology.router_metric("xim_router_queue_depth") == 0

        await left.within(FREE_S, nobody_waits, what="its place in the queue is free")
        # It never reached the engine, and the one that has the place keeps it.
        assert await topology.engine_metric(node, "vllm:prompt_tokens_total") == before
        assert await topology.router_metric("xim_router_in_flight") == 1
        left = topology.stopwatch()
        holder.leave()
        await free_at_once(topology, left)
        await all_left(topology, lines_before, 2)


async def test_every_relayed_route_is_in_the_matrix() -> None:
    assert {route.path for route in ROUTES} == {route.path for route in GENERATING} | COMPUTING.keys()


async def test_a_hundred_that_leave_at_once_leave_nothing(accounts: Accounts) -> None:
    async with Topology(accounts) as topology, asyncio.timeout(200):
        node: Node = await topology.start_node(MAX_CONCURRENT="128", MAX_NUM_SEQS="128")
        clients = await load_on(topology).open_many(100, chunks=CHUNKS, text_chars=CHARS, interval_ms=50)
        await asyncio.gather(*(client.begun for client in clients))
        left = topology.stopwatch()
        for client in clients:
            client.leave()
        await free_at_once(topology, left)
        assert node.program.running
