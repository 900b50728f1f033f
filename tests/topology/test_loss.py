"""What clients notice when an agent, a router, an engine or a link between them is lost, and what comes back."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial

import httpx2
import openai
import pytest
from openai import AsyncStream
from openai.types.chat import ChatCompletionChunk

from tests.support.accounts import ENDPOINT, Accounts
from tests.support.fake_vllm_script import expected_text
from tests.support.ports import HOST
from tests.support.programs import Beside, eventually
from tests.support.tcp_proxy import TcpProxy
from tests.support.topology import Node, Topology
from tests.topology.scripts import asking, body

CHAT = "/v1/chat/completions"
LONG_QUEUE = {"XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S": "120"}


@pytest.fixture
async def topology(accounts: Accounts) -> AsyncIterator[Topology]:
    """One router whose queue has patience; each test starts its own agent."""
    async with Topology(accounts, router=LONG_QUEUE) as made:
        yield made


async def ask(topology: Topology, sent: dict[str, object]) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=topology.url, timeout=100.0, trust_env=False) as client:
        return await client.post(CHAT, headers=topology.headers(), json=sent)


async def begun(topology: Topology, **script: object) -> tuple[AsyncStream[ChatCompletionChunk], str]:
    """A stream past its commit point, and the text that has come."""
    stream = await topology.client().chat.completions.create(model=ENDPOINT, messages=asking(**script), stream=True)
    text = ""
    while not text:
        text += (await anext(stream)).choices[0].delta.content or ""
    return stream, text


async def rest(stream: AsyncStream[ChatCompletionChunk]) -> str:
    """What is left of a stream's text."""
    return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])


async def metric_is(topology: Topology, name: str, number: float, beside: Beside = ()) -> None:
    async def is_so() -> bool:
        return await topology.router_metric(name) == number

    await eventually(is_so, what=f"{name} is {number:g}", beside=beside)


async def engine_gone(topology: Topology, node: Node) -> None:
    await eventually(lambda: not topology.engine_processes(node), what="no process of the engine is left")


async def test_a_killed_agent_leaves_no_engine_and_what_had_not_begun_is_answered_by_its_successor(
    topology: Topology,
) -> None:
    node = await topology.start_node(MAX_CONCURRENT="2")
    assert len(topology.engine_processes(node)) >= 2  # guard and engine
    committed, _ = await begun(topology, chunks=4000, interval_ms=10)
    # Without a stream nothing is given to the client before the end: 4 s of work that will be done twice.
    uncommitted = asyncio.create_task(ask(topology, body(chunks=4, text_chars=50, interval_ms=1000, seed=1)))
    await metric_is(topology, "xim_router_in_flight", 2, beside=[uncommitted])
    parked = asyncio.create_task(ask(topology, body(chunks=4, text_chars=50, interval_ms=0, seed=2)))
    await metric_is(topology, "xim_router_queue_depth", 1, beside=[uncommitted, parked])

    await node.program.kill()
    await engine_gone(topology, node)
    await topology.restart_node(node)
    await topology.ready(program=node.program)

    with pytest.raises(openai.APIError) as lost:
        await rest(committed)
    assert lost.value.code == "agent_lost"
    for answer, seed in ((await uncommitted, 1), (await parked, 2)):
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] == expected_text(seed, 200)
    # The engine got the attempt behind the request's id, which it makes the answer's id.
    ids = [answer.json()["id"].removeprefix("chatcmpl-") for answer in (uncommitted.result(), parked.result())]
    asked = [answer.result().headers["x-request-id"] for answer in (uncommitted, parked)]
    assert ids == [f"{asked[0]}-2", f"{asked[1]}-1"]
    lines = await topology.request_lines(3)
    assert sorted(line["outcome"] for line in lines) == ["200", "200", "agent_lost"]
    assert {line["attempts"] for line in lines if line["outcome"] == "200"} == {1, 2}
    # It came back by its stored credentials: one enrollment, one refresh.
    assert len(node.program.lines("enrollment successful")) == 1
    assert len(node.program.lines("credentials refreshed")) == 1


async def test_a_router_that_was_killed_is_found_again_by_its_agent(topology: Topology) -> None:
    node = await topology.start_node()
    stream, _ = await begun(topology, chunks=4000, interval_ms=10)
    await topology.router.kill()
    with pytest.raises((openai.APIError, httpx2.TransportError)):
        await rest(stream)
    topology.router.start()
    await topology.ready(program=node.program)
    answer = await ask(topology, body(chunks=4, text_chars=50, interval_ms=0, seed=3))
    assert answer.json()["choices"][0]["message"]["content"] == expected_text(3, 200)
    assert node.program.starts == 1
    # What the killed router had asked for is not worked on any more.
    await engine_runs(topology, node, 0)


async def engine_runs(topology: Topology, node: Node, number: int, beside: Beside = ()) -> None:
    async def is_so() -> bool:
        return await topology.engine_metric(node, "vllm:num_requests_running") == number

    await eventually(is_so, what=f"the engine runs {number} request(s)", beside=beside)


@pytest.mark.parametrize("streaming_socket", ["1", "0"])
async def test_a_link_that_breaks_and_returns_within_the_lease_costs_a_stream_nothing(
    accounts: Accounts, streaming_socket: str
) -> None:
    async with AsyncExitStack() as stack:
        # The router tells agents its own ports: it gets an address of its own, and the proxies have its ports here.
        apart = {"XEROTIER_ROUTER_LINK_HOST": "127.0.0.2", "XEROTIER_ROUTER_ADVERTISE_HOST": HOST}
        topology = Topology(accounts, router=LONG_QUEUE | apart)
        control, streaming = [
            await stack.enter_async_context(TcpProxy(f"tcp://127.0.0.2:{port}", port))
            for port in (topology.control_port, topology.streaming_port)
        ]
        # Entered last: an agent that is asked to stop says goodbye through the proxies.
        await stack.enter_async_context(topology)
        node = await topology.start_node(STREAMING_SOCKET_ENABLED=streaming_socket)
        stream, text = await begun(topology, chunks=500, text_chars=700, interval_ms=4, seed=4)
        whole = asyncio.create_task(ask(topology, body(chunks=20, text_chars=50, interval_ms=100, seed=5)))
        for cuts in (1, 2):
            await control.cut()
            await streaming.cut()
            await metric_is(topology, "xim_router_link_lost_total", cuts)
            # In this order: a link half of which can be dialled would be lost once more.
            await streaming.restore()
            await control.restore()
            # Of a link that is cut before the agent knows that it has one, the router alone would have known.
            await eventually(partial(has_made, topology, node, 1 + cuts), what="the agent has a link again")
            await topology.ready(program=node.program)
        text += await rest(stream)
        assert text == expected_text(4, 500 * 700)
        assert (await whole).json()["choices"][0]["message"]["content"] == expected_text(5, 1000)
        assert [line["attempts"] for line in await topology.request_lines(2, outcome="200")] == [1, 1]
        assert await has_made(topology, node, 3)


async def has_made(topology: Topology, node: Node, links: int) -> bool:
    return await topology.agent_metric(node, "xim_agent_links_total") == links


async def test_an_engine_that_dies_is_started_again_and_clients_are_told_what_happened(topology: Topology) -> None:
    node = await topology.start_node(MAX_CONCURRENT="4")
    committed, _ = await begun(topology, chunks=4000, interval_ms=10)
    uncommitted = asyncio.create_task(ask(topology, body(chunks=3, text_chars=50, interval_ms=1000, seed=6)))
    await engine_runs(topology, node, 2, beside=[uncommitted])
    engine = next(p for p in topology.engine_processes(node) if "guard.py" not in " ".join(p.cmdline()))
    engine.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError) as broken:
        await rest(committed)
    assert broken.value.code == "engine_error"
    late = asyncio.create_task(ask(topology, body(chunks=3, text_chars=50, interval_ms=0, seed=11)))
    # Before its commit point a request is tried once more; the sole agent's engine is on its way, so both wait.
    for answer, seed in ((await uncommitted, 6), (await late, 11)):
        assert answer.json()["choices"][0]["message"]["content"] == expected_text(seed, 150)
    await topology.ready(program=node.program)
    assert await topology.agent_metric(node, "xim_agent_engine_restarts_total") == 1
    outcomes = [(line["outcome"], line["attempts"]) for line in await topology.request_lines(3)]
    assert outcomes[0] == ("engine_error", 1)
    assert sorted(outcomes[1:]) == [("200", 1), ("200", 2)]


async def test_an_agent_that_is_asked_to_stop_finishes_what_it_has_and_takes_nothing_new(topology: Topology) -> None:
    node = await topology.start_node()
    stream, text = await begun(topology, chunks=100, text_chars=20, interval_ms=20, seed=7)
    node.program.send(signal.SIGTERM)
    await eventually(lambda: node.program.lines("draining"), what="the agent drains")
    late = asyncio.create_task(ask(topology, body(chunks=2, text_chars=20, interval_ms=0, seed=8)))
    await metric_is(topology, "xim_router_queue_depth", 1, beside=[late])
    text += await rest(stream)
    assert text == expected_text(7, 2000)
    assert await node.program.ended() == 0
    await engine_gone(topology, node)
    # A request that came meanwhile waits for the node's next start.
    await topology.restart_node(node)
    assert (await late).json()["choices"][0]["message"]["content"] == expected_text(8, 40)


async def test_a_router_that_is_asked_to_stop_lets_streams_end_and_turns_new_ones_away(topology: Topology) -> None:
    node = await topology.start_node()
    stream, text = await begun(topology, chunks=100, text_chars=20, interval_ms=20, seed=9)
    topology.router.send(signal.SIGTERM)
    await eventually(lambda: topology.router.lines("stopping"), what="the router stops")
    text += await rest(stream)
    assert text == expected_text(9, 2000)
    assert await topology.router.ended() == 0
    assert node.program.running


async def test_an_agent_that_stands_still_longer_than_its_lease_loses_it_and_comes_back(topology: Topology) -> None:
    node = await topology.start_node(LEASE_DURATION_MS="1500", LEASE_RENEWAL_INTERVAL_MS="500")
    stream, _ = await begun(topology, chunks=4000, interval_ms=10)
    node.program.send(signal.SIGSTOP)
    with pytest.raises(openai.APIError) as lost:
        await rest(stream)
    assert lost.value.code == "agent_lost"
    assert topology.router.lines("lease expired")
    parked = asyncio.create_task(ask(topology, body(chunks=2, text_chars=20, interval_ms=0, seed=10)))
    await metric_is(topology, "xim_router_queue_depth", 1, beside=[parked])
    node.program.send(signal.SIGCONT)
    assert (await parked).json()["choices"][0]["message"]["content"] == expected_text(10, 40)
    await engine_runs(topology, node, 0)
