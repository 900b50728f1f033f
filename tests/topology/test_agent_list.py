"""`xerotier-router agent list` beside running agents: what it says of one is true, or it says that it does not know."""

import asyncio
import json
import signal

from tests.support.accounts import Accounts
from tests.support.programs import eventually
from tests.support.topology import Node, Topology
from tests.topology.scripts import body


async def listed(topology: Topology, node: Node) -> tuple[str, str | None]:
    done = await topology.cli("agent", "list", "--json")
    assert done.status == 0, done.text
    (row,) = (row for row in json.loads(done.stdout) if row["id"] == node.agent_id)
    return row["status"], row["state"]


async def shows(topology: Topology, node: Node, status: str, state: str | None) -> None:
    async def found() -> bool:
        return await listed(topology, node) == (status, state)

    await eventually(found, what=f"the list says {status} and {state}")


async def test_the_list_follows_an_agent_from_its_start_to_its_end(accounts: Accounts) -> None:
    async with Topology(accounts) as topology:
        node = await topology.start_node()
        await shows(topology, node, "active", "ready")

        await node.program.kill()
        await shows(topology, node, "disconnected", None)
        await topology.restart_node(node)
        await topology.ready()
        await shows(topology, node, "active", "ready")

        holder = asyncio.create_task(
            topology.http.post("/v1/chat/completions", headers=topology.headers(), json=body(hang=True))
        )

        async def runs() -> bool:
            return await topology.router_metric("xim_router_in_flight", agent=node.program.name) == 1

        await eventually(runs, what="a request runs", beside=[holder])
        # The first signal drains; the request holds the drain up for as long as it takes to look.
        node.program.send(signal.SIGTERM)
        await shows(topology, node, "active", "draining")
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)
        assert await node.program.ended() == 0
        await shows(topology, node, "disconnected", None)

        await topology.restart_node(node)
        await topology.ready()
        await topology.cli("agent", "suspend", node.agent_id)
        await shows(topology, node, "suspended", None)
        await topology.cli("agent", "revoke", node.agent_id)
        await shows(topology, node, "revoked", None)


async def test_a_router_that_stopped_leaves_no_agent_that_seems_ready(accounts: Accounts) -> None:
    async with Topology(accounts) as topology:
        node = await topology.start_node()
        await shows(topology, node, "active", "ready")
        topology.router.send(signal.SIGTERM)
        await topology.router.ended()
        assert await listed(topology, node) == ("disconnected", None)
        topology.router.start()
        await topology.ready()
