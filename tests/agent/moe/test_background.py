"""From a plan to the tuner: what is found on the machine, and what is no work."""

import os
import stat
import sys
from pathlib import Path

import pytest

from tests.agent.planning.givens import planned
from xim_agent.moe.background import find_vllm, shape_for, tune_for
from xim_agent.moe.shapes import MoeShape, NotTuned
from xim_agent.moe.tuning import Outcome


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment's program `vllm`, whose Python has a package of that name."""
    package = tmp_path / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('vLLM is looked for, not imported')")
    python = program(
        tmp_path / "bin" / "python3", f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n'
    )
    return program(tmp_path / "bin" / "vllm", f"#!{python}\n")


def test_vllm_is_found_by_its_program_and_by_the_wrapper(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "vllm"
    assert find_vllm(environment) == (str(tmp_path / "bin" / "python3"), package)
    wrapper = program(tmp_path / "elsewhere" / "xerotier-vllm", f"#!{sys.executable}\n")
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    assert find_vllm(wrapper) is None
    monkeypatch.setenv("PATH", str(environment.parent) + os.pathsep + os.environ["PATH"])
    assert find_vllm(wrapper) == (str(tmp_path / "bin" / "python3"), package)
    assert find_vllm(tmp_path / "nothing") is None


def test_a_plan_says_what_is_tuned_and_why_not() -> None:
    shape = shape_for(planned("h100-x8", "qwen3-30b-a3b"))
    assert isinstance(shape, MoeShape)
    assert shape.file_name.startswith("E=128,N=")
    assert shape_for(planned("h200", "llama-3.1-8b")) == NotTuned("a dense model has no experts")
    off = shape_for(planned("h100-x8", "qwen3-30b-a3b", MOE_CONFIG_ENABLED="0"))
    assert off == NotTuned("switched off by XEROTIER_AGENT_MOE_CONFIG_ENABLED")
    shared = shape_for(planned("h100-x8", "qwen3-30b-a3b", VLLM_ARGS="-dp 8 --enable-expert-parallel"))
    assert isinstance(shared, NotTuned)
    assert "shared out whole" in shared.reason
    cpu = shape_for(planned("epyc-9454-96gb", "qwen3-30b-a3b"))
    assert isinstance(cpu, NotTuned)
    assert "CPU" in cpu.reason


@pytest.mark.parametrize("machine", ["two-core-24gb", "h200"])
async def test_on_other_models_and_machines_it_is_no_work_with_a_reason(
    machine: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert await tune_for(planned(machine, "llama-3.2-1b-instruct"), lambda part: None) is Outcome.SKIPPED
    (record,) = caplog.records
    assert record.message == "kernels are not tuned"
    assert vars(record)["reason"]
