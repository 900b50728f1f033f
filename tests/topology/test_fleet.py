"""Several agents: how they share the load, how capacity counts, and what keeps two tenants apart."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from tests.support.accounts import ENDPOINT, PROJECTS, Accounts
from tests.support.programs import eventually
from tests.support.topology import SALT_SECRET, Topology
from tests.topology.scripts import asking, body
from xim_agent.engine.salt import tenant_salt
from xim_protocol.ids import ProjectId

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALPHA, BETA = PROJECTS
CHAT = "/v1/chat/completions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def topology(accounts: Accounts) -> AsyncIterator[Topology]:
    """Two agents of project alpha with three places each, one of project beta."""
    async with Topology(accounts) as made:
        for _ in range(2):
            await made.start_node(MAX_CONCURRENT="3")
        await made.start_node(project=BETA)
        yield made


async def ask(topology: Topology, sent: dict[str, object]) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=topology.url, timeout=60.0, trust_env=False) as client:
        return await client.post(CHAT, headers=topology.headers(), json=sent)


async def in_flight(topology: Topology) -> dict[str, float]:
    names = [node.program.name for node in topology.nodes if node.project == ALPHA]
    return {agent: await topology.router_metric("xim_router_in_flight", agent=agent) for agent in names}


async def test_agents_share_the_load_and_one_request_too_many_is_turned_away_at_once(topology: Topology) -> None:
    for agent in topology.nodes:
        assert await topology.router_metric("xim_router_capacity", agent=agent.program.name) in (3, 16)
    holders = []
    for taken in range(1, 7):
        holders.append(asyncio.create_task(ask(topology, body(hang=True))))

        async def assigned(number: int = taken) -> dict[str, float] | None:
            numbers = await in_flight(topology)
            return numbers if sum(numbers.values()) == number else None

        spread = await eventually(assigned, what=f"{taken} requests run", beside=holders)
        assert max(spread.values()) - min(spread.values()) <= 1
    # With two agents nobody waits.
    answer = await ask(topology, body(chunks=1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_agent_available")
    assert int(answer.headers["retry-after"]) >= 1
    assert "at capacity" in answer.json()["error"]["message"]
    left = topology.stopwatch()
    for holder in holders:
        holder.cancel()
    await asyncio.gather(*holders, return_exceptions=True)

    async def free() -> bool:
        return sum((await in_flight(topology)).values()) == 0

    await left.within(1.0, free, what="all places are free")


async def test_requests_one_after_the_other_reach_both_agents(topology: Topology) -> None:
    answers = [await ask(topology, body(chunks=2, interval_ms=1)) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 6
    agents = Counter(line["agent"] for line in await lines_of(topology, answers))
    assert sorted(agents.values()) == [3, 3]


async def lines_of(topology: Topology, answers: Sequence[httpx2.Response]) -> list[dict[str, Any]]:
    """The router's line of each."""
    requests = [answer.headers["x-request-id"] for answer in answers]
    return [line for each in requests for line in await topology.request_lines(1, request=each)]


async def test_two_tenants_have_different_salts_though_their_agents_share_the_secret(topology: Topology) -> None:
    salts = {}
    for project in PROJECTS:
        answer = await topology.client(project).chat.completions.create(
            model=ENDPOINT, messages=asking(echo=True, interval_ms=0)
        )
        salts[project] = json.loads(answer.choices[0].message.content or "")["cache_salt"]
        assert salts[project] == tenant_salt(SALT_SECRET, ProjectId(topology.accounts.project_ids[project]))
    assert salts[ALPHA] != salts[BETA]


async def test_a_tenants_requests_reach_its_own_agents_only(topology: Topology) -> None:
    own = {node.agent_id for node in topology.nodes if node.project == BETA}
    sent = body(chunks=1, interval_ms=0)
    answers = await asyncio.gather(
        *(topology.http.post(CHAT, headers=topology.headers(BETA), json=sent) for _ in range(4))
    )
    assert {line["agent"] for line in await lines_of(topology, answers)} == own


async def test_when_one_agent_dies_the_other_finishes_its_requests(topology: Topology) -> None:
    first = topology.nodes[0]
    tasks = [
        asyncio.create_task(ask(topology, body(chunks=20, text_chars=10, interval_ms=100, seed=seed)))
        for seed in range(4)
    ]

    async def shared() -> bool:
        return sorted((await in_flight(topology)).values()) == [2, 2]

    await eventually(shared, what="two requests run on each agent", beside=tasks)
    lost = first.agent_id
    await first.program.kill()
    # Its requests wait for the lease or for its next start, which ends its old session.
    await topology.restart_node(first)
    answers = await asyncio.gather(*tasks)
    assert [answer.status_code for answer in answers] == [200] * 4
    attempts = [line["attempts"] for line in await lines_of(topology, answers)]
    assert sorted(attempts) == [1, 1, 2, 2], lost
