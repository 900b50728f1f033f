"""What only a real engine can show: its processes, its aborts, its caches, its pace."""

import asyncio

import httpx2
import pytest

from demo.engine import choose_engine
from demo.model.page import read_page
from tests.engine.conftest import ENGINE_START_S, engine_settings
from tests.support.accounts import ENDPOINT, PROJECTS
from tests.support.programs import alive, eventually
from tests.support.topology import ROOT, Node, Topology

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

ALPHA, BETA = PROJECTS
CHAT = "/v1/chat/completions"
BORROWED = ROOT / "tests" / "support" / "bin" / "borrowed-vllm"
ENDLESS = {
    "model": ENDPOINT,
    "messages": [{"role": "user", "content": "Go on."}],
    "max_tokens": 4000,
    "min_tokens": 4000,
    "ignore_eos": True,
}


async def test_the_model_tells_its_page_through_the_router(topology: Topology) -> None:
    entries = {entry.question: entry.answer for entry in read_page()}
    for question in ("What is XIM?", "What happens when a lease expires?"):
        stream = await topology.client().chat.completions.create(
            model=ENDPOINT,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=128,
            stream=True,
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        assert entries[question] in text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_engine_within_a_second(
    topology: Topology, node: Node, stream: bool
) -> None:
    async def occupied(number: int) -> bool:
        running = await topology.engine_metric(node, "vllm:num_requests_running")
        return running == await topology.router_metric("xim_router_in_flight") == number

    async with httpx2.AsyncClient(base_url=topology.url, timeout=60.0, trust_env=False) as client:
        asked = client.build_request("POST", CHAT, headers=topology.headers(), json={**ENDLESS, "stream": stream})
        sending = asyncio.create_task(client.send(asked, stream=True))
        await eventually(lambda: occupied(1), what="the engine works")
        if stream:
            answer = await sending
            pieces = answer.aiter_bytes()
            assert await anext(pieces)
            left = topology.stopwatch()
            await answer.aclose()
        else:
            assert not sending.done()
            left = topology.stopwatch()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        await left.within(1.0, lambda: occupied(0), what="engine and slot are free")


async def test_many_streams_share_messages(topology: Topology, node: Node) -> None:
    name = "xim_agent_entries_per_message"

    async def counted() -> tuple[float, float]:
        return await topology.agent_metric(node, f"{name}_count"), await topology.agent_metric(node, f"{name}_sum")

    async def one(number: int) -> int:
        stream = await topology.client().chat.completions.create(
            model=ENDPOINT,
            messages=[{"role": "user", "content": f"Count from {number}."}],
            max_tokens=64,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return len([chunk async for chunk in stream])

    messages, entries = await counted()
    events = await asyncio.gather(*(one(number) for number in range(32)))
    messages_after, entries_after = await counted()
    assert min(events) > 1
    assert (entries_after - entries) / (messages_after - messages) > 1.5


async def test_one_tenant_hits_the_prefix_cache_and_another_does_not(topology: Topology, node: Node) -> None:
    # Two agents, hence two tenants, on one engine: the second agent's `vllm` hands everything to the first one's.
    borrower = await topology.start_node(
        project=BETA, vllm=BORROWED, VLLM_ENV=f"BORROWED_ENGINE_SOCKET={node.engine_socket}"
    )
    prompt = " ".join(f"The {number}th sentence of a long prompt." for number in range(40))

    async def cached(project: str, **more: str) -> int:
        answer = await topology.client(project).chat.completions.create(
            model=ENDPOINT, messages=[{"role": "user", "content": prompt}], max_tokens=1, extra_body=more
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 320
        details = answer.usage.prompt_tokens_details
        return (details.cached_tokens or 0) if details is not None else 0

    assert await cached(ALPHA) == 0
    assert await cached(ALPHA) >= 320
    assert await cached(BETA) == 0
    assert await cached(BETA) >= 320
    # A client may divide its own cache further, and can name nobody else's.
    assert await cached(ALPHA, cache_salt="mine") == 0
    assert await cached(ALPHA, cache_salt="mine") >= 320
    assert await borrower.program.terminate() == 0


async def test_the_agent_passes_the_engines_metrics_on(topology: Topology, node: Node) -> None:
    for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total"):

        async def equal(name: str = name) -> bool:
            # The engine may still count what it answered last.
            return await topology.agent_metric(node, name) == await topology.engine_metric(node, name) > 0

        await eventually(equal, what=f"both say the same of {name}")


async def test_a_killed_agent_leaves_nothing_of_an_engine_of_two_processes(topology: Topology) -> None:
    node = await topology.start_node(
        project=BETA,
        vllm=choose_engine().path,
        within_s=ENGINE_START_S,
        **engine_settings(multiprocessing=True),
    )
    processes = topology.engine_processes(node)
    # Guard, API server and engine core at the least; the core renames itself.
    assert len(processes) >= 3
    assert any("EngineCore" in " ".join(each.cmdline()) for each in processes)
    stream = await topology.client(BETA).chat.completions.create(
        model=ENDPOINT,
        messages=[{"role": "user", "content": "Go on."}],
        max_tokens=4000,
        stream=True,
        extra_body={"min_tokens": 4000, "ignore_eos": True},
    )
    assert await anext(stream)
    await node.program.kill()
    await eventually(lambda: not alive(processes), what="the engine is gone")
    await stream.close()
