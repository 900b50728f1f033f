"""A router, an agent and a real vLLM with the demo's tiny model, once per session: a start takes half a minute.

Beside it the same vLLM asked directly: the very command line of the agent's engine, but on a TCP port and with a key.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest
import pytest_asyncio

from demo.engine import choose_engine, start_options
from tests.support.accounts import Accounts
from tests.support.ports import HOST, free_ports
from tests.support.programs import MARK, Program, eventually
from tests.support.topology import Node, Topology, pytest_runtest_makereport

__all__ = ["engine_settings", "pytest_runtest_makereport"]

ENGINE_START_S = 240.0
DIRECT_KEY = "key-of-the-engine-asked-directly"
MORE_FLAGS = (
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # Without it a model of this size writes white space until the limit.
    *("--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}'),
)


@dataclass(frozen=True, kw_only=True)
class Direct:
    """A vLLM without us in front of it."""

    url: str
    program: Program


def engine_settings(*, multiprocessing: bool = False) -> dict[str, str]:
    """The agent's settings that start the tiny model fast, as the demo does."""
    options = start_options(choose_engine(), tiny=True)
    switched = [f"VLLM_ENABLE_V1_MULTIPROCESSING={int(multiprocessing)}"]
    variables = [each for each in options.variables if "MULTIPROCESSING" not in each] + switched
    return {
        "VLLM_ARGS": " ".join((*options.arguments, *MORE_FLAGS)),
        "VLLM_ENV": " ".join(variables),
        **{name.removeprefix("XEROTIER_AGENT_"): value for name, value in options.settings},
    }


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def topology(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Topology]:
    """Router and agent with a real engine, ready."""
    accounts = Accounts.prepare(Path(tmp_path_factory.mktemp("accounts")) / "router")
    patience = {"XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S": "240"}
    async with Topology(accounts, router=patience) as made:
        await made.start_node(
            vllm=choose_engine().path,
            within_s=ENGINE_START_S,
            MAX_CONCURRENT="64",
            **engine_settings(),
        )
        yield made


@pytest.fixture(scope="session")
def node(topology: Topology) -> Node:
    """The agent of project alpha."""
    return topology.nodes[0]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def direct(topology: Topology, node: Node) -> AsyncIterator[Direct]:
    """The same vLLM, asked without router and agent."""
    engine = next(each for each in topology.engine_processes(node) if is_server(each))
    words = engine.cmdline()
    at = words.index("--uds")
    (port,) = free_ports(1)
    words[at : at + 2] = ["--host", HOST, "--port", str(port), "--api-key", DIRECT_KEY]
    environment = engine.environ()
    assert environment[MARK] == topology.mark
    program = Program("direct", words, environment, topology.folder / "direct.log")
    program.start()

    async def answers() -> bool:
        assert program.running, f"vLLM ended: {program.tail()}"
        try:
            return (await topology.http.get(f"http://{HOST}:{port}/health")).status_code == 200
        except httpx2.TransportError:
            return False

    try:
        await eventually(answers, within_s=ENGINE_START_S, what="the engine asked directly answers")
        yield Direct(url=f"http://{HOST}:{port}", program=program)
    finally:
        await program.terminate(60)


def is_server(process: psutil.Process) -> bool:
    """It is vLLM's API server: not the guard, whose command line has the engine's in it."""
    words = process.cmdline()
    return "--uds" in words and not any(word.endswith("guard.py") for word in words)
