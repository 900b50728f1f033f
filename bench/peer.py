"""Routers of others, from PyPI, each in an environment of its own: .venvs/bench-NAME, from requirements-NAME.txt."""

import asyncio
import hashlib
import platform
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.process import Part, compile_bytecode, free_port, running, wait_until_ready
from bench.subject import MODEL, ROOT, Subject

_INSTALL_S = 600.0
_READY_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """How one peer is started in front of one engine."""

    name: str
    distribution: str
    command: Callable[[Path, int, int, Path], list[str]]
    """From its `bin` folder, its port, the engine's port and a folder for files to the command line."""
    health: str
    env: dict[str, str] = field(default_factory=dict)
    key_variable: str | None = None
    """The variable that gives it its bearer key, for a peer that starts only with one."""
    slow: bool = False
    """See `Subject.slow`."""

    @property
    def environment(self) -> Path:
        """Its own virtual environment."""
        return ROOT / ".venvs" / f"bench-{self.name}"

    @property
    def requirements(self) -> Path:
        """The pinned versions of it and of all it needs."""
        return ROOT / "bench" / f"requirements-{self.name}.txt"


def _vllm_router(binaries: Path, port: int, engine_port: int, _work: Path) -> list[str]:
    engine = f"http://127.0.0.1:{engine_port}"
    options = ["--policy", "round_robin", "--log-level", "error", "--max-concurrent-requests", "4096"]
    metrics = ["--prometheus-port", str(free_port()), "--prometheus-host", "127.0.0.1"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", engine]
    return [str(binaries / "vllm-router"), *where, *options, *metrics]


def _sglang_router(binaries: Path, port: int, engine_port: int, _work: Path) -> list[str]:
    engine = f"http://127.0.0.1:{engine_port}"
    options = ["--policy", "round_robin", "--log-level", "error", "--max-concurrent-requests", "4096"]
    metrics = ["--prometheus-port", str(free_port()), "--prometheus-host", "127.0.0.1"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", engine]
    return [str(binaries / "sglang-router"), "launch", *where, *options, *metrics]


def _litellm(binaries: Path, port: int, engine_port: int, work: Path) -> list[str]:
    config = work / "litellm.yaml"
    config.write_text(
        "model_list:\n"
        f"  - model_name: {MODEL}\n"
        "    litellm_params:\n"
        f"      model: hosted_vllm/{MODEL}\n"
        f"      api_base: http://127.0.0.1:{engine_port}/v1\n"
        "      api_key: none\n"
        "litellm_settings:\n"
        "  telemetry: false\n"
    )
    return [str(binaries / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(name="vllm-router", distribution="vllm-router", command=_vllm_router, health="/health"),
        Peer(name="sglang-router", distribution="sglang-router", command=_sglang_router, health="/health"),
        Peer(
            name="litellm",
            distribution="litellm",
            command=_litellm,
            health="/health/liveliness",
            env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_DOCS": "True"},
            key_variable="LITELLM_MASTER_KEY",
            slow=True,
        ),
    )
}


class NotInstalled(RuntimeError):
    """The peer cannot be measured here; the message says why."""


async def ensure_installed(peer: Peer) -> str:
    """Make the peer's environment if it is not there, whole and of today's pins; returns the peer's version.

    Raises: NotInstalled when the installer fails (no network, no build for this machine).
    """
    stamp, wanted = peer.environment / ".installed", _fingerprint(peer)
    if not stamp.exists() or stamp.read_text() != wanted:
        # Half an environment, left by an install that failed, is in the way of the next one.
        shutil.rmtree(peer.environment, ignore_errors=True)
        await _install(peer)
        stamp.write_text(wanted)
    await compile_bytecode(str(peer.environment / "bin" / "python"), peer.environment / "lib")
    # By its own Python: the metadata of an environment is read best from inside.
    code = f"import importlib.metadata as m; print(m.version({peer.distribution!r}))"
    return (await _output_of(str(peer.environment / "bin" / "python"), "-c", code)).strip()


def _fingerprint(peer: Peer) -> str:
    """What the environment is made from: the pins and the Python."""
    return f"{hashlib.sha256(peer.requirements.read_bytes()).hexdigest()} {platform.python_version()}\n"


async def _install(peer: Peer) -> None:
    python, requirements = peer.environment / "bin" / "python", str(peer.requirements)
    # Only builds that are ready: a router that compiles for minutes is no part of a benchmark.
    options = ["--only-binary", ":all:", "--require-hashes", "-r", requirements]
    uv = shutil.which("uv")
    if uv:
        await _output_of(uv, "venv", "--quiet", "--python", sys.executable, str(peer.environment))
        await _output_of(uv, "pip", "install", "--quiet", "--python", str(python), *options)
    else:
        await _output_of(sys.executable, "-m", "venv", "--clear", str(peer.environment))
        await _output_of(str(python), "-m", "pip", "install", "--quiet", *options)


async def _output_of(*command: str) -> str:
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(_INSTALL_S):
            output, _ = await child.communicate()
    except TimeoutError as error:
        child.kill()
        raise NotInstalled(f"{command[0]} took more than {_INSTALL_S:.0f} s") from error
    text = output.decode(errors="replace")
    if child.returncode != 0:
        raise NotInstalled(f"{Path(command[0]).name} exited with {child.returncode}: {text[-500:].strip()}")
    return text


@asynccontextmanager
async def peer_router(peer: Peer, version: str, engine: Subject, work: Path) -> AsyncIterator[Subject]:
    """The peer in front of `engine`."""
    port, log = free_port(), work / f"{peer.name}.log"
    command = peer.command(peer.environment / "bin", port, engine.target.port, work)
    key = "sk-" + secrets.token_hex(32) if peer.key_variable else None
    env = {**peer.env, peer.key_variable: key} if peer.key_variable and key else peer.env
    begun = time.monotonic()
    async with running(command, log=log, env=env) as process:
        ready = await wait_until_ready(process, port, peer.health, log=log, timeout_s=_READY_S)
        target = replace(engine.target, port=port, api_key=key)
        parts = {"router": Part(pid=process.pid)}
        yield Subject(
            name=peer.name,
            version=version,
            target=target,
            parts=parts,
            logs=(log,),
            slow=peer.slow,
            start_s=ready - begun,
        )
