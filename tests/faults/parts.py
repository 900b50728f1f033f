"""What the tests under fault share: an installation with bad networks between, and looks at what it holds."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import psutil

from tests.support.accounts import ENDPOINT, Accounts
from tests.support.chaos_proxy import ChaosProxy
from tests.support.load import Load
from tests.support.ports import HOST
from tests.support.programs import PATIENCE_S, Program, eventually
from tests.support.topology import Node, Topology

KIB = 1024
# The router tells agents its own ports: it gets an address of its own, and the proxies have its ports here.
APART = {"XEROTIER_ROUTER_LINK_HOST": "127.0.0.2", "XEROTIER_ROUTER_ADVERTISE_HOST": HOST}


@dataclass(frozen=True, kw_only=True)
class Networked:
    """A topology whose agents reach their router through two bad networks."""

    topology: Topology
    control: ChaosProxy
    streaming: ChaosProxy

    @property
    def networks(self) -> tuple[ChaosProxy, ChaosProxy]:
        """Both."""
        return self.control, self.streaming


@asynccontextmanager
async def networked(
    accounts: Accounts, *, router: Mapping[str, str] | None = None, seed: int = 0
) -> AsyncIterator[Networked]:
    """A running router with proxies before its agents' ports."""
    topology = Topology(accounts, router={**(router or {}), **APART})
    async with AsyncExitStack() as stack:
        # Entered first, left last: an agent that stops wants to hear that its router has everything.
        control, streaming = [
            await stack.enter_async_context(ChaosProxy(f"tcp://127.0.0.2:{port}", port, source=random.Random(seed)))
            for port in (topology.control_port, topology.streaming_port)
        ]
        await stack.enter_async_context(topology)
        yield Networked(topology=topology, control=control, streaming=streaming)


def load_on(topology: Topology) -> Load:
    """Many clients of the topology's first tenant."""
    return Load(topology.http_port, topology.headers(), model=ENDPOINT)


def resident_bytes(program: Program) -> int:
    """Physical memory of the process now."""
    assert program.process is not None
    return int(psutil.Process(program.process.pid).memory_info().rss)


def descriptors(program: Program) -> int:
    """Open files and sockets of the process now."""
    assert program.process is not None
    return int(psutil.Process(program.process.pid).num_fds())


async def metric_is(
    topology: Topology, name: str, number: float, *, within_s: float = PATIENCE_S, **labels: str
) -> None:
    """Return when the router's metric has this value."""

    async def is_so() -> bool:
        return await topology.router_metric(name, **labels) == number

    await eventually(is_so, within_s=within_s, what=f"{name} is {number:g}")


async def engine_runs(topology: Topology, node: Node, number: int, *, within_s: float = PATIENCE_S) -> None:
    """Return when the engine works on so many requests."""

    async def is_so() -> bool:
        return await topology.engine_metric(node, "vllm:num_requests_running") == number

    await eventually(is_so, within_s=within_s, what=f"the engine runs {number} request(s)")


async def all_true(*conditions: Callable[[], Awaitable[bool]], within_s: float = PATIENCE_S, what: str = "") -> None:
    """Return when all of them hold in one look."""

    async def hold() -> bool:
        return all([await condition() for condition in conditions])

    await eventually(hold, within_s=within_s, what=what)


async def nothing_left(topology: Topology, *, within_s: float = PATIENCE_S) -> None:
    """Return when no request holds a place, a slot, a stream or a byte of the router, nor anything of an agent."""
    gauges = ("xim_router_exchanges", "xim_router_streams", "xim_router_in_flight", "xim_router_queue_depth")

    async def router_is_empty() -> bool:
        return not any([await topology.router_metric(name) for name in (*gauges, "xim_router_buffered_bytes")])

    async def agents_are_empty() -> bool:
        running = [node for node in topology.nodes if node.program.running]
        return not any([await topology.agent_metric(node, "xim_agent_streams_in_flight") for node in running])

    await all_true(router_is_empty, agents_are_empty, within_s=within_s, what="nothing is left of any request")
