"""A whole installation on 127.0.0.1: one router, agents and their engines as real processes, set up by the real CLIs.

What a test gets: programs to signal and start again, `openai` clients, plain HTTP, metrics and log lines. What is left
of it at the end is killed, and a process that outlived an orderly stop fails the test.
"""

import asyncio
import json
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import psutil
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.support.accounts import BINARIES, PROJECTS, Accounts, Done, command
from tests.support.ports import HOST, free_ports
from tests.support.programs import MARK, NeverHappened, Program, clean_environment, described, eventually, marked
from tests.support.stopwatch import Stopwatch
from xim_protocol.join_key import JoinKey

ROOT = Path(__file__).parents[2]
FAKE_VLLM = ROOT / "tests" / "support" / "bin" / "fake-vllm"
MODEL = ROOT / "demo" / "model" / "xim-tiny"
"""The fake engine loads nothing; the agent reads what kind of model it is."""
SALT_SECRET = "salt secret of the tests, 0123456789abcdef"
START_S = 90.0

_alive: list["Topology"] = []
_buried: list[tuple[str, str]] = []
"""Logs of topologies that ended in a failure before it was reported."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One agent: its program and where its things are."""

    program: Program
    config_dir: Path
    engine_socket: Path
    metrics_port: int
    project: str

    @property
    def agent_id(self) -> str:
        """The id that enrollment gave it."""
        stored = json.loads((self.config_dir / "enrollment.json").read_text(encoding="utf-8"))
        return str(stored["enrollment"]["agent_id"])


class Topology:
    """See the module's docstring; an async context manager."""

    def __init__(self, accounts: Accounts, *, database_url: str = "", router: Mapping[str, str] | None = None) -> None:
        """`router` are further variables of the router; `database_url` names an account's own database, if it is not
        the SQLite file in its data directory, which is copied."""
        self.accounts = accounts
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="xim-t-"))
        self.http_port, self.control_port, self.streaming_port, self.metrics_port = free_ports(4)
        # Every topology has its own copy: making the accounts costs more than all the rest of a start.
        shutil.copytree(accounts.data_dir, self.folder / "router")
        self.router_environment = clean_environment(
            **{
                MARK: self.mark,
                "XEROTIER_ROUTER_DATA_DIR": str(self.folder / "router"),
                "XEROTIER_ROUTER_DATABASE_URL": database_url,
                "XEROTIER_ROUTER_HTTP_PORT": str(self.http_port),
                "XEROTIER_ROUTER_CONTROL_PORT": str(self.control_port),
                "XEROTIER_ROUTER_STREAMING_PORT": str(self.streaming_port),
                "XEROTIER_ROUTER_METRICS_PORT": str(self.metrics_port),
                **(router or {}),
            }
        )
        self.router = self.program("router", "xerotier-router", "serve", environment=self.router_environment)
        self.nodes: list[Node] = []
        # The router's metrics close a connection that was idle for five seconds: one that is used again is far from it.
        limits = httpx2.Limits(keepalive_expiry=1.0)
        self.http = httpx2.AsyncClient(base_url=self.url, timeout=60.0, trust_env=False, limits=limits)
        self._clients: list[AsyncOpenAI] = []

    @property
    def url(self) -> str:
        """Of the router, without a path."""
        return f"http://{HOST}:{self.http_port}"

    @property
    def programs(self) -> list[Program]:
        """The router and every agent, started or not."""
        return [self.router, *(node.program for node in self.nodes)]

    # --- Life ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        _alive.append(self)
        self.router.start()
        try:
            await self.router_answers()
        except BaseException:
            await self.__aexit__(*sys.exc_info())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            await client.close()
        await self.http.aclose()
        whole = False
        try:
            if error is None:  # after a failure nothing need end in order, and the failure is what counts
                await self._stop()
                whole = True
        finally:
            if not whole:
                _buried.extend(self.logs())
            await self._remove()

    async def _remove(self) -> None:
        """Kill what is left, and delete the folder."""
        for process in marked(self.mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await eventually(lambda: not marked(self.mark), what="the killed processes end")
        for program in self.programs:
            program.reap()
        _alive.remove(self)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _stop(self) -> None:
        """An orderly stop, agents first; nothing of the topology may be left then."""
        for program in self.programs:
            if program.running:
                program.send(signal.SIGCONT)  # a test may have stopped it
        agents = [node.program for node in self.nodes if node.program.running]
        await asyncio.gather(*(agent.terminate() for agent in agents))
        if self.router.running:
            await self.router.terminate()
        # The guard of an agent that was killed may need a moment for its engine.
        try:
            await eventually(lambda: not marked(self.mark), what="no process is left")
        except NeverHappened:
            raise AssertionError(f"processes outlived an orderly stop: {described(marked(self.mark))}") from None

    def program(self, name: str, *words: str, environment: Mapping[str, str]) -> Program:
        """One of our programs, not yet started; `words` begins with its file's name."""
        path = [str(BINARIES / words[0]), *words[1:]]
        return Program(name, path, environment, self.folder / f"{name}.log")

    def logs(self) -> list[tuple[str, str]]:
        """Name and end of each log."""
        return [(each.name, each.tail()) for each in self.programs]

    # --- Setting up ------------------------------------------------------------------------------------------------

    async def cli(self, *words: str, **variables: str) -> Done:
        """Run `xerotier-router WORDS` beside the running router."""
        environment = {**self.router_environment, **variables}
        return await asyncio.to_thread(command, "xerotier-router", *words, environment=environment)

    async def join_key(self, *options: str, project: str = PROJECTS[0]) -> str:
        """A fresh join key, made by the CLI."""
        done = await self.cli("join-key", "create", "--project", project, "--json", *options)
        assert done.status == 0, done.text
        return str(done.made["key"])

    def node(
        self,
        *,
        join_key: str = "",
        project: str = PROJECTS[0],
        vllm: Path | str = FAKE_VLLM,
        **settings: str,
    ) -> Node:
        """An agent with a config directory of its own, not yet started; `settings` are its variables, unprefixed."""
        name = f"agent-{len(self.nodes)}"
        folder = self.folder / name
        folder.mkdir()
        (metrics_port,) = free_ports(1)
        given = {
            "CONFIG_DIR": str(folder / "config"),
            "NAME": name,
            "ALLOW_INSECURE": "1",
            "JOIN_KEY": join_key,
            "INITIAL_MODEL_PATH": str(MODEL),
            "MODEL_CACHE_PATH": str(folder / "cache" / "models"),
            "VLLM_PATH": str(vllm),
            "VLLM_SOCKET_PATH": str(folder / "engine.sock"),
            "VLLM_SALT_SECRET": SALT_SECRET,
            "METRICS_PORT": str(metrics_port),
            "MAX_CONCURRENT": "16",
            **settings,
        }
        environment = clean_environment(
            **{MARK: self.mark}, **{f"XEROTIER_AGENT_{variable}": value for variable, value in given.items()}
        )
        node = Node(
            program=self.program(name, "xerotier-xim-agent", "run", environment=environment),
            config_dir=folder / "config",
            engine_socket=folder / "engine.sock",
            metrics_port=metrics_port,
            project=project,
        )
        self.nodes.append(node)
        return node

    async def start_node(
        self,
        *,
        join_key: str = "",
        project: str = PROJECTS[0],
        vllm: Path | str = FAKE_VLLM,
        within_s: float = START_S,
        **settings: str,
    ) -> Node:
        """An agent that serves: enrolled with `join_key`, or with the account's own key."""
        # Where to enroll stands in the key and nowhere else: an account's key serves each of its topologies.
        own = replace(JoinKey.parse(self.accounts.join_keys[project]), enroll_url=self.url).encode()
        key = join_key or own
        node = self.node(join_key=key, project=project, vllm=vllm, **settings)
        before = await self.agents_ready()
        node.program.start()
        await self.ready(before + 1, within_s=within_s, program=node.program)
        return node

    async def restart_node(self, node: Node, **settings: str) -> None:
        """Start a killed agent again, without a join key."""
        more = {f"XEROTIER_AGENT_{variable}": value for variable, value in settings.items()}
        node.program.start(**{"XEROTIER_AGENT_JOIN_KEY": "", **more})

    # --- Waiting ---------------------------------------------------------------------------------------------------

    async def router_answers(self) -> None:
        """Return when the router's HTTP answers."""

        async def answers() -> bool:
            assert self.router.running, f"the router ended: {self.router.tail()}"
            with suppress(httpx2.TransportError):
                return (await self.http.get("/healthz")).status_code == 200
            return False

        await eventually(answers, within_s=START_S, what="the router answers")

    async def agents_ready(self) -> int:
        """How many agents the router says are serving."""
        return int((await self.http.get("/readyz")).json()["agents_ready"])

    async def ready(self, agents: int = 1, *, within_s: float = START_S, program: Program | None = None) -> None:
        """Return when the router is ready with so many agents; an end of `program` is told at once."""

        async def enough() -> bool:
            assert program is None or program.running, f"{program and program.name} ended: {program and program.tail()}"
            with suppress(httpx2.TransportError):
                return await self.agents_ready() == agents
            return False

        await eventually(enough, within_s=within_s, what=f"{agents} agent(s) serve")

    async def request_lines(self, count: int, **facts: object) -> list[dict[str, Any]]:
        """The router's lines of requests with these facts, in its order, once there are as many as there must be.

        A client has its answer's last byte before the router has written the line.
        """
        found: list[dict[str, Any]] = []

        def enough() -> bool:
            found[:] = self.router.lines("request", **facts)
            return len(found) >= count

        await eventually(enough, what=f"{count} request(s) with {facts} are in the log")
        assert len(found) == count, found
        return found

    async def lines_so_far(self, **facts: object) -> int:
        """How many such lines there are, that of every request that is over among them."""
        # The router writes them together, a moment later, but for who reads its metrics.
        await self.router_metric("xim_router_requests_total")
        return len(self.router.lines("request", **facts))

    def stopwatch(self) -> Stopwatch:
        """Started now, for what the processes that run now do."""
        return Stopwatch(each.pid for each in marked(self.mark))

    # --- Asking ----------------------------------------------------------------------------------------------------

    def client(
        self, project: str = PROJECTS[0], *, api_key: str | None = None, url: str = "", timeout_s: float = 60.0
    ) -> AsyncOpenAI:
        """An `openai` client that does not repeat anything by itself; of the router, unless `url` says otherwise."""
        key = self.accounts.api_keys[project] if api_key is None else api_key
        made = AsyncOpenAI(base_url=f"{url or self.url}/v1", api_key=key, max_retries=0, timeout=timeout_s)
        self._clients.append(made)
        return made

    def headers(self, project: str = PROJECTS[0]) -> dict[str, str]:
        """What plain HTTP needs to be let in."""
        return {"Authorization": f"Bearer {self.accounts.api_keys[project]}"}

    async def router_metric(self, name: str, **labels: str) -> float:
        """The sum of the router's samples of this name that have these labels; 0 when there is none."""
        answer = await self.http.get(f"http://{HOST}:{self.metrics_port}/metrics")
        return sample_sum(answer.text, name, labels)

    async def agent_metric(self, node: Node, name: str, **labels: str) -> float:
        """The same of an agent's metrics, which include its engine's."""
        answer = await self.http.get(f"http://{HOST}:{node.metrics_port}/metrics")
        return sample_sum(answer.text, name, labels)

    async def engine_metric(self, node: Node, name: str, **labels: str) -> float:
        """The same of the engine's own metrics, asked over its socket."""
        # Reading the certificates of the world takes longer than all the rest of it.
        transport = httpx2.AsyncHTTPTransport(uds=str(node.engine_socket), verify=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://engine", timeout=60.0) as engine:
            return sample_sum((await engine.get("/metrics")).text, name, labels)

    def engine_processes(self, node: Node) -> list[psutil.Process]:
        """The engine's processes, its guard included: what has the engine's socket on its command line, and below."""
        wanted: dict[int, psutil.Process] = {}
        for process in marked(self.mark):
            with suppress(psutil.NoSuchProcess):
                if str(node.engine_socket) in process.cmdline():
                    wanted |= {each.pid: each for each in (process, *process.children(recursive=True))}
        return list(wanted.values())


def sample_sum(text: str, name: str, labels: Mapping[str, str]) -> float:
    """The sum of the samples named `name` with `labels` in a text of Prometheus' format."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the ends of all logs into the report of a failed test."""
    report = yield
    if report.failed:
        logs = [*_buried, *(log for topology in _alive for log in topology.logs())]
        report.sections += [(f"log of {name}", text) for name, text in logs]
    if report.when == "call" or report.failed:
        _buried.clear()
    return report
