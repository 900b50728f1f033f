"""One agent with room for one request: who waits, in which order, who is turned away and how that is said."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx2
import openai
import pytest
import pytest_asyncio

from tests.support.accounts import Accounts, command
from tests.support.programs import Beside, clean_environment, eventually
from tests.support.topology import Topology
from tests.topology.scripts import body
from xim_router.dispatch.dispatcher import QUEUE_PLACES

CHAT = "/v1/chat/completions"
QUICK = body(chunks=1, interval_ms=0)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def topology(accounts: Accounts) -> AsyncIterator[Topology]:
    """An agent with capacity 1; who waits, waits for two minutes."""
    async with Topology(accounts, router={"XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S": "120"}) as made:
        await made.start_node(MAX_CONCURRENT="1")
        yield made


@asynccontextmanager
async def the_place_taken(topology: Topology) -> AsyncIterator[None]:
    """The only place is held until the block ends."""
    # Of a client that left just now, the agent may still have to say that its place is free.
    await eventually(partial(runs, topology, 0), what="the place is free")
    holder = asyncio.create_task(ask(topology, body(hang=True)))
    await eventually(partial(runs, topology, 1), what="the holder runs", beside=[holder])
    try:
        yield
    finally:
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)


async def runs(topology: Topology, number: int) -> bool:
    return await topology.router_metric("xim_router_in_flight") == number


async def ask(topology: Topology, sent: dict[str, object]) -> httpx2.Response:
    # A connection of its own: cancelling the task is a client that leaves.
    async with httpx2.AsyncClient(base_url=topology.url, timeout=150.0, trust_env=False) as client:
        return await client.post(CHAT, headers=topology.headers(), json=sent)


async def parked(topology: Topology, number: int, beside: Beside = ()) -> None:
    """Return when so many requests wait; none of `beside` is answered before."""

    async def depth() -> bool:
        return await topology.router_metric("xim_router_queue_depth") == number

    await eventually(depth, what=f"{number} request(s) wait", beside=beside)


async def line_up(topology: Topology, number: int, *, already: int = 0) -> "list[asyncio.Task[httpx2.Response]]":
    """So many requests, each sent when the one before it waits."""
    tasks = []
    for place in range(number):
        tasks.append(asyncio.create_task(ask(topology, QUICK)))
        await parked(topology, already + place + 1, beside=tasks)
    return tasks


async def is_refusal(topology: Topology, answer: httpx2.Response, code: str) -> bool:
    """A 503 with this code, when to come again, and an id that stands in the router's log beside the code."""
    request = answer.headers["x-request-id"]
    (line,) = await topology.request_lines(1, request=request)
    return (
        (answer.status_code, answer.json()["error"]["code"], line["outcome"]) == (503, code, code)
        and answer.json()["error"]["type"] == "server_error"
        and int(answer.headers["retry-after"]) >= 1
    )


async def test_the_second_to_eleventh_wait_and_are_served_in_order_the_twelfth_is_told_at_once(
    topology: Topology,
) -> None:
    assert QUEUE_PLACES == 10
    before = await topology.lines_so_far(outcome="200")
    async with the_place_taken(topology):
        waiting = await line_up(topology, 10)
        asked = topology.stopwatch()
        refused = await ask(topology, QUICK)
        asked.check(1.0, "the twelfth is told")
        assert await is_refusal(topology, refused, "queue_full")
        assert not any(task.done() for task in waiting)
    answers = await asyncio.gather(*waiting)
    assert [answer.status_code for answer in answers] == [200] * 10
    # The order in which they left the queue, by the router's own lines: ids are in the order of arrival.
    served = [line["request"] for line in (await topology.request_lines(before + 10, outcome="200"))[-10:]]
    assert served == [answer.headers["x-request-id"] for answer in answers]


async def test_a_waiting_client_that_leaves_frees_its_place(topology: Topology) -> None:
    noted = await topology.router_metric("xim_router_client_disconnects_total", phase="parked")
    async with the_place_taken(topology):
        waiting = await line_up(topology, 10)
        assert await is_refusal(topology, await ask(topology, QUICK), "queue_full")
        leaving = waiting.pop(4)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await parked(topology, 9)
        waiting += await line_up(topology, 1, already=9)
    answers = await asyncio.gather(*waiting)
    assert [answer.status_code for answer in answers] == [200] * 10
    assert await topology.router_metric("xim_router_client_disconnects_total", phase="parked") == noted + 1


async def test_a_client_of_openai_raises_for_a_full_queue_and_can_read_why(topology: Topology) -> None:
    async with the_place_taken(topology):
        waiting = await line_up(topology, 10)
        with pytest.raises(openai.InternalServerError) as raised:
            await topology.client().chat.completions.create(model="tiny", messages=QUICK["messages"])
        assert (raised.value.status_code, raised.value.code) == (503, "queue_full")
    await asyncio.gather(*waiting)


async def test_who_waited_as_long_as_the_setting_says_is_told_so(topology: Topology) -> None:
    (node,) = topology.nodes
    await topology.router.terminate()
    topology.router.start(XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S="2")
    await topology.ready(program=node.program)
    async with the_place_taken(topology):
        asked = topology.stopwatch()
        answer = await ask(topology, QUICK)
        waited_s = asked.wall_s
        asked.check(3.5, "it is told after two seconds")
    assert await is_refusal(topology, answer, "queue_timeout")
    (line,) = await topology.request_lines(1, request=answer.headers["x-request-id"])
    assert 2.0 <= line["queue_wait_s"] <= waited_s


async def test_an_identity_that_never_connected_takes_no_part_in_who_is_waited_for(accounts: Accounts) -> None:
    """As one that `enroll --again` left behind: the sole real agent is away, and it is plain whom to wait for."""
    async with Topology(accounts, router={"XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S": "120"}) as topology:
        environment = clean_environment(
            XEROTIER_AGENT_CONFIG_DIR=str(topology.folder / "given-up"),
            XEROTIER_AGENT_JOIN_KEY=await topology.join_key(),
            XEROTIER_AGENT_ALLOW_INSECURE="1",
        )
        done = await asyncio.to_thread(command, "xerotier-xim-agent", "enroll", environment=environment)
        assert done.status == 0, done.text
        # Nobody waits for it alone either.
        answer = await ask(topology, QUICK)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_agent_available")

        node = await topology.start_node()
        assert await node.program.terminate() == 0
        waiting = asyncio.create_task(ask(topology, QUICK))
        await parked(topology, 1, beside=[waiting])
        await topology.restart_node(node)
        assert (await waiting).status_code == 200
