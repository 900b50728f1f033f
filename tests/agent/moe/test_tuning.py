"""Tuning in the background: a stand-in takes the tuner's place, as a real process."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tests.agent.moe.test_configs import CONFIG, SHAPE
from tests.support.programs import PATIENCE_S, alive, eventually
from xim_agent.moe.configs import ConfigFolder, Found
from xim_agent.moe.tuning import Outcome, TunerCommand, arguments_of, tune
from xim_agent.vllm_plugin import xim_vllm_tuner as tuner

TUNES = f"""
import json, os, sys
print("loading vLLM", file=sys.stderr)
for done in (1, 2):
    print(json.dumps({{"done": done, "of": 2}}), flush=True)
print(json.dumps({{"nice": os.nice(0), "argv": sys.argv[1:]}}))
print(json.dumps({{"result": json.loads({CONFIG!r})}}))
"""


def folder(tmp_path: Path) -> ConfigFolder:
    return ConfigFolder(tmp_path / "own", None, "0.32.0")


def command(code: str) -> TunerCommand:
    return TunerCommand(argv=(sys.executable, "-c", code), environment={"PATH": os.environ["PATH"]})


async def test_what_is_missing_is_made_once(tmp_path: Path) -> None:
    parts: list[float] = []
    configs = folder(tmp_path)
    assert await tune(SHAPE, configs, command(TUNES), parts.append) is Outcome.MADE
    assert parts == [0.5, 1.0]
    assert configs.find(SHAPE) is Found.MADE
    assert json.loads((configs.path / SHAPE.file_name).read_text()) == json.loads(CONFIG)
    assert await tune(SHAPE, configs, command("raise SystemExit(1)")) is Outcome.FOUND


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print('RuntimeError: no GPU is seen'); raise SystemExit(1)", "no GPU is seen"),
        ("pass", "status 0"),
        ("print('{\"result\": {}}')", "no object of batch sizes"),
        ('print(\'{"result": {"1": 5}}\'); print(\'{"done": "x", "of": 0}\')', "batch size '1'"),
        (TUNES + "raise SystemExit(3)", "status 3"),
    ],
)
async def test_a_failure_changes_nothing_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str, told: str
) -> None:
    assert await tune(SHAPE, folder(tmp_path), command(code)) is Outcome.FAILED
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert told in vars(record)["error"]
    assert folder(tmp_path).find(SHAPE) is Found.NOWHERE


async def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("")
    assert await tune(SHAPE, folder(tmp_path), command(TUNES)) is Outcome.FAILED


async def test_a_folder_that_may_not_be_looked_into_is_a_failure(tmp_path: Path) -> None:
    """The system refuses a name of such a length, as it refuses to look where it may not."""
    configs = ConfigFolder(tmp_path / ("x" * 300), None, "0.32.0")
    assert await tune(SHAPE, configs, command(TUNES)) is Outcome.FAILED


async def test_a_tuner_that_never_ends_its_line_is_a_failure(tmp_path: Path) -> None:
    code = "import os\nfor _ in range(64): os.write(1, b'x' * 65536)"
    assert await tune(SHAPE, folder(tmp_path), command(code)) is Outcome.FAILED


async def test_it_gives_way_to_everybody_and_ends_with_the_agent(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    code = (
        "import os, signal, subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        f"pathlib.Path({str(tmp_path / 'new')!r}).write_text(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(tmp_path / 'new')!r}, {str(started)!r})\n"
        "signal.pause()"
    )
    task = asyncio.create_task(tune(SHAPE, folder(tmp_path), command(code)))
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(started.exists):
            await asyncio.wait({task}, timeout=0.02)
    processes = [psutil.Process(int(pid)) for pid in (await asyncio.to_thread(started.read_text)).split()]
    assert processes[0].nice() == 19
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await eventually(lambda: not alive(processes), what="the tuner and its child end")


def test_the_tuner_takes_what_the_agent_passes() -> None:
    args = tuner.parser().parse_args(arguments_of(SHAPE))
    assert (args.experts, args.width, args.hidden, args.experts_per_token) == (8, 64, 128, 2)
    assert (args.dtype, args.block) == (None, None)


BEST = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 256,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 16,
    "num_warps": 8,
    "num_stages": 3,
}


def cost(parameters: Mapping[str, int]) -> float:
    """A bowl with its bottom at BEST, in steps of the space."""
    steps = ((name, values.index(parameters[name]) - values.index(BEST[name])) for name, values in tuner.SPACE.items())
    return 1.0 + sum(step * step for _, step in steps)


def test_the_search_finds_the_fastest_and_leaves_out_what_does_not_run() -> None:
    start = {name: values[0] for name, values in tuner.SPACE.items()}
    assert tuner.search(cost, start, tuner.SPACE) == BEST

    def without(parameters: Mapping[str, int]) -> float | None:
        return None if parameters["num_warps"] == 8 else cost(parameters)

    assert tuner.search(without, start, tuner.SPACE) == {**BEST, "num_warps": 4}


def test_a_difference_within_the_noise_changes_nothing() -> None:
    start = {name: values[0] for name, values in tuner.SPACE.items()}
    assert tuner.search(lambda parameters: 1.0 if parameters == start else 0.995, start, tuner.SPACE) == start


def test_a_kernel_that_never_runs_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no parameters"):
        tuner.search(lambda parameters: None, {}, tuner.SPACE)


def test_tiles_hold_whole_blocks_of_scales() -> None:
    assert tuner.space_for(None) == tuner.SPACE
    assert tuner.space_for((128, 128))["BLOCK_SIZE_K"] == (128, 256)
