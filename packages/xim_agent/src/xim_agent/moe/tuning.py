"""Makes a kernel configuration in the background, at the lowest priority, for the next start of the engine."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from xim_agent.moe.configs import ConfigFolder, Found
from xim_agent.moe.shapes import MoeShape

log = logging.getLogger(__name__)

TUNER = Path(__file__).parents[1] / "vllm_plugin" / "xim_vllm_tuner.py"
LIMIT_S = 4 * 3600.0
"""A tuner that takes longer is stopped; a search takes minutes to an hour."""
KEPT_LINES = 50


class Outcome(StrEnum):
    """How the tuning of one shape ended."""

    FOUND = "found"
    """There is one already."""
    MADE = "made"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Not for this model or machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TunerCommand:
    """How the tuner is started; the shape and the output file come after `argv`."""

    argv: Sequence[str]
    environment: Mapping[str, str]


OnProgress = Callable[[float], None]
"""Told the part that is done, 0 to 1."""


def tuner_command(python: str, environment: Mapping[str, str]) -> TunerCommand:
    """The tuner that comes with the agent, under vLLM's Python."""
    return TunerCommand(argv=(python, str(TUNER)), environment=environment)


async def tune(
    shape: MoeShape, folder: ConfigFolder, command: TunerCommand, on_progress: OnProgress = lambda part: None
) -> Outcome:
    """Make the configuration of `shape` where there is none. Never raises but when it is cancelled, which ends the
    tuner: a node serves without the configuration as well as it did before."""
    started = time.monotonic()
    try:
        found = folder.find(shape)
        if found is not Found.NOWHERE:
            log.info("kernel configuration", extra={"config": shape.file_name, "found": found.value})
            return Outcome.FOUND
        log.info("tuning kernels in the background", extra={"config": shape.file_name, "folder": str(folder.path)})
        text = await _result_of(shape, command, on_progress)
        file = folder.keep(shape, text)
    except (_TunerFailed, ValueError, OSError) as error:  # ValueError: no configuration, or a line without an end
        log.warning(
            "kernels were not tuned; vLLM's defaults stay",
            extra={"config": shape.file_name, "error": str(error), "off": "XEROTIER_AGENT_MOE_CONFIG_ENABLED=0"},
        )
        return Outcome.FAILED
    took_s = round(time.monotonic() - started, 1)
    log.info("kernels tuned; the next start uses it", extra={"file": str(file), "took_s": took_s})
    return Outcome.MADE


class _TunerFailed(Exception):
    """It ended without a result."""


async def _result_of(shape: MoeShape, command: TunerCommand, on_progress: OnProgress) -> str:
    """What the tuner writes to its standard output as `{"result": {...}}`, after lines of `{"done": 3, "of": 18}`."""
    process = await asyncio.create_subprocess_exec(
        *command.argv,
        *arguments_of(shape),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(command.environment),
        start_new_session=True,
        limit=1 << 20,
    )
    try:
        _yield_to_everything(process.pid)
        async with asyncio.timeout(LIMIT_S):
            result, tail = await _listen(process, on_progress)
            status = await process.wait()
    except TimeoutError:
        raise _TunerFailed(f"it took longer than {LIMIT_S:g} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if result is None or status:
        raise _TunerFailed(f"the tuner ended with status {status}: " + " | ".join(tail[-3:]))
    return result


async def _listen(process: asyncio.subprocess.Process, on_progress: OnProgress) -> tuple[str | None, list[str]]:
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=KEPT_LINES)
    result: str | None = None
    async for raw in process.stdout:
        line = raw.decode("utf-8", "replace").rstrip()
        try:
            said = json.loads(line) if line.startswith("{") else None
        except ValueError:
            said = None
        if isinstance(said, dict) and isinstance(said.get("done"), int) and isinstance(said.get("of"), int):
            on_progress(said["done"] / max(1, said["of"]))
            log.info("tuning", extra={"done": said["done"], "of": said["of"]})
        elif isinstance(said, dict) and "result" in said:
            result = json.dumps(said["result"])
        elif line:
            tail.append(line)
    return result, list(tail)


def arguments_of(shape: MoeShape) -> list[str]:
    """The shape as the tuner's arguments."""
    words = [
        *("--experts", str(shape.experts), "--width", str(shape.width), "--hidden", str(shape.hidden)),
        *("--experts-per-token", str(shape.experts_per_token)),
    ]
    if shape.dtype is not None:
        words += ["--dtype", shape.dtype]
    if shape.block is not None:
        words += ["--block", f"{shape.block[0]},{shape.block[1]}"]
    return words


def _yield_to_everything(pid: int) -> None:
    """Give way to the engine and to everybody else, in CPU and, where the system has it, in disk."""
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        process.nice(19)
        if sys.platform == "linux":
            process.ionice(psutil.IOPRIO_CLASS_IDLE)
