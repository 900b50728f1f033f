"""The engine's owner with a real vLLM under it, by way of `xerotier-vllm`: what it tells, and what it leaves."""

import asyncio
import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from demo.engine import choose_engine
from tests.agent.engine.engines import States, policy
from tests.support.topology import MODEL
from xim_agent.engine.client import EngineClient
from xim_agent.engine.process import Engine, EngineFailed, EngineState
from xim_agent.planning.command import EngineCommand

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
WRAPPER = Path(sys.executable).with_name("xerotier-vllm")
FAST = (
    *("--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni", "--block-size", "32"),
    *("--kv-cache-memory-bytes", "128M", "--max-model-len", "4096"),
)


def served(model: Path, socket_path: Path) -> EngineCommand:
    """The wrapper in vLLM's place; it finds vLLM by PATH."""
    path = f"{Path(choose_engine().path).parent}{os.pathsep}{os.environ['PATH']}"
    return EngineCommand(
        argv=(str(WRAPPER), "serve", str(model), "--served-model-name", "tiny", "--uds", str(socket_path), *FAST),
        environment={
            "PATH": path,
            "HOME": os.environ.get("HOME", "/"),
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        socket_path=socket_path,
        served_name="tiny",
    )


def left(socket_path: Path) -> list[psutil.Process]:
    """Processes that name this test's socket."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(socket_path) in " ".join(p.info["cmdline"] or ())]


async def given_up(model: Path, socket_path: Path) -> tuple[EngineFailed, States]:
    """Run until the engine is given up; nothing of it is left."""
    states = States()
    async with EngineClient(socket_path) as client:
        with pytest.raises(EngineFailed) as failed:
            await Engine(served(model, socket_path), client, policy(), states).run()
    assert left(socket_path) == []
    return failed.value, states


async def test_a_path_that_is_no_model_is_told_and_not_tried_again(tmp_path: Path) -> None:
    failed, states = await given_up(tmp_path / "nowhere", tmp_path / "e.sock")
    assert states.seen == [EngineState.STARTING, EngineState.FAILED]
    assert "the model is not there" in failed.reason
    assert "XEROTIER_AGENT_INITIAL_MODEL_PATH" in failed.remedy


async def test_cut_weights_are_told_though_vllms_last_line_says_nothing_of_them(tmp_path: Path) -> None:
    model = tmp_path / "model"
    await asyncio.to_thread(shutil.copytree, MODEL, model)
    weights = model / "model.safetensors"
    whole = await asyncio.to_thread(weights.read_bytes)
    await asyncio.to_thread(weights.write_bytes, whole[: len(whole) // 2])
    failed, states = await given_up(model, tmp_path / "e.sock")
    assert states.seen == [EngineState.STARTING, EngineState.FAILED]
    assert "the model's weights are damaged or incomplete" in failed.reason
    assert "safetensors" not in failed.tail[-1].lower()


async def test_it_starts_by_the_wrapper_answers_and_stops_without_a_trace(tmp_path: Path) -> None:
    socket_path, states = tmp_path / "e.sock", States()
    async with EngineClient(socket_path) as client:
        engine = Engine(served(MODEL, socket_path), client, policy(), states)
        task = asyncio.create_task(engine.run())
        try:
            async with asyncio.timeout(200):
                while EngineState.READY not in states.seen and not task.done():
                    await asyncio.wait({task}, timeout=0.2)
            assert states.seen == [EngineState.STARTING, EngineState.READY]
            assert engine.process_group is not None
            assert any("xim_vllm_launch.py" in " ".join(process.cmdline()) for process in left(socket_path))
            assert await client.health(10.0)
        finally:
            await engine.stop(20.0)
            await task
    assert left(socket_path) == []
    assert states.seen[-1] is EngineState.STOPPED
