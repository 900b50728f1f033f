"""What is measured: the engine alone, and each router in front of one. All of them run through the whole bench."""

import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.client import Target
from bench.process import Part, free_port, running, wait_until_ready

ROOT = Path(__file__).resolve().parent.parent
FAKE_VLLM = ROOT / "tests" / "support" / "bin" / "fake-vllm"
MODEL = "fake"
MAX_STREAMS = 4096
_READY_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A program to send requests to, and whose CPU to read.

    The part named `router` is what is compared.
    """

    name: str
    version: str
    target: Target
    parts: dict[str, Part]
    logs: tuple[Path, ...] = ()
    slow: bool = False
    """It relays fewer chunks per second than most loads here bring, and is asked for few of them."""
    start_s: float = 0.0
    """From the start of the router's process to its first good answer to a health check."""


@asynccontextmanager
async def engine_alone(work: Path) -> AsyncIterator[Subject]:
    """The fake engine on a TCP port, with nothing in front of it."""
    port, log = free_port(), work / "engine.log"
    command = [str(FAKE_VLLM), "serve", "model", "--served-model-name", MODEL, "--port", str(port)]
    env = {"FAKE_VLLM_PYTHON": os.environ.get("FAKE_VLLM_PYTHON", sys.executable)}
    begun = time.monotonic()
    async with running([*command, "--max-num-seqs", str(MAX_STREAMS)], log=log, env=env) as process:
        ready = await wait_until_ready(process, port, "/health", log=log, timeout_s=_READY_S)
        target = Target(host="127.0.0.1", port=port, model=MODEL)
        yield Subject(
            name="engine alone",
            version="-",
            target=target,
            parts={"engine": Part(pid=process.pid)},
            logs=(log,),
            start_s=ready - begun,
        )
