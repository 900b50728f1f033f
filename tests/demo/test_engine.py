"""Which vLLM is chosen, and the parts of the one that is prepared."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from demo import engine, prepare_engine
from demo.engine import Engine, EngineUnusable, choose_engine, start_options
from tests.support.programs import PATIENCE_S

Program = Callable[[str, str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Writes a program into a folder of its own; what was seen of others is forgotten."""
    monkeypatch.setattr(engine, "SEEN", tmp_path / "seen" / "seen.json")
    monkeypatch.delenv(engine.VARIABLE, raising=False)

    def write(folder: str, body: str) -> Path:
        path = tmp_path / folder / "vllm"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return write


def test_the_named_vllm_wins_over_the_one_on_path(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    named, found = program("named", "echo 0.32.0"), program("found", "echo 0.31.0")
    monkeypatch.setenv("PATH", str(found.parent), prepend=":")
    monkeypatch.setenv(engine.VARIABLE, str(named))
    assert choose_engine() == Engine(path=str(named), version="0.32.0")


def test_a_named_vllm_that_does_not_run_is_an_error_and_no_reason_to_take_another(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(engine.VARIABLE, str(program("named", "exit 3")))
    with pytest.raises(EngineUnusable, match="does not run"):
        choose_engine()


def test_a_version_is_asked_once_until_the_program_changes(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program("found", 'echo asked >> "$0.asked"; echo noise; echo 0.32.0+cpu')
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    assert choose_engine() == choose_engine() == Engine(path=str(path), version="0.32.0+cpu")
    assert path.with_name("vllm.asked").read_text() == "asked\n"
    program("found", "echo 0.33.0")
    assert choose_engine().version == "0.33.0"


def test_a_broken_vllm_on_path_is_passed_over(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program("found", "exit 1")
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    monkeypatch.setattr(engine, "prepare", lambda: Path("/prepared/vllm"))
    assert choose_engine() == Engine(path="/prepared/vllm", version=prepare_engine.VLLM_VERSION)


def test_checkouts_that_share_their_environments_by_a_link_share_the_prepared_vllm(tmp_path: Path) -> None:
    shared = tmp_path / "environments"
    shared.mkdir()
    seen = {name: seen_from(tmp_path / name, shared) for name in ("one", "two")}
    assert seen["one"] == seen["two"] == f"{shared / 'engine-cpu'}\n"


def seen_from(checkout: Path, environments: Path) -> str:
    """What a checkout whose `.venvs` leads to `environments` calls the prepared vLLM's environment."""
    shutil.copytree(
        prepare_engine.ROOT / "demo", checkout / "demo", ignore=shutil.ignore_patterns("__pycache__", "model")
    )
    (checkout / ".venvs").symlink_to(environments)
    code = "from demo import prepare_engine; print(prepare_engine.ENVIRONMENT)"
    return subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True).stdout


def test_only_the_tiny_model_on_a_cpu_is_started_with_its_own_small_cache() -> None:
    cpu, gpu = Engine(path="v", version="0.32.0+cpu"), Engine(path="v", version="0.32.0")
    assert "--kv-cache-memory-bytes" in start_options(cpu, tiny=True).arguments
    assert "--kv-cache-memory-bytes" not in start_options(cpu, tiny=False).arguments
    assert start_options(gpu, tiny=False) == engine.StartOptions()
    assert start_options(gpu, tiny=True).as_environment()["XEROTIER_AGENT_GPU_MEMORY_UTILIZATION"] == "0.3"


def test_the_metadata_wheel_makes_vllm_a_known_distribution(tmp_path: Path) -> None:
    wheel = prepare_engine.write_metadata_wheel(tmp_path)
    assert all(name.startswith("vllm-0.32.0+cpu.dist-info/") for name in zipfile.ZipFile(wheel).namelist())
    asked = "import importlib.metadata as m; print(m.version('vllm'))"
    answer = subprocess.run(
        [sys.executable, "-c", asked], env={"PYTHONPATH": str(wheel)}, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "0.32.0+cpu"


def test_a_failed_step_is_told_with_its_remedy_and_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_engine, "LOG", tmp_path / "log")
    ways = [[sys.executable, "-c", f"raise SystemExit('way {n}')"] for n in (1, 2)]
    with pytest.raises(prepare_engine.PreparationFailed, match=r"(?s)Making it failed. Do that.*way 1.*way 2"):
        prepare_engine._first_that_works(ways, "Making it", "Do that.")


# A step as `make demo` runs it, with a worker below it that does not hear Ctrl-C, as those of compileall do not.
STEP = """
import sys
from pathlib import Path
from demo import prepare_engine
from demo.processes import Signals, StopRequested
prepare_engine.LOG = Path(sys.argv[1])
Signals().install()
try:
    prepare_engine._logged([sys.executable, "-c", sys.argv[2]])
except StopRequested:
    print("stopped")
"""
LEADER = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True)
worker.stdout.readline()
print("worker", worker.pid, "is up", flush=True)
time.sleep(600)
"""


def test_a_step_that_is_stopped_leaves_no_worker_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    program = subprocess.Popen(
        [sys.executable, "-c", STEP, str(log), LEADER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (lines := [line for line in log.read_text().splitlines() if line.endswith("is up")]):
        assert program.poll() is None
        assert time.monotonic() < deadline
    worker = psutil.Process(int(lines[0].split()[1]))
    try:
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does
        output, _ = program.communicate(timeout=PATIENCE_S)
        assert output == "stopped\n"
        _, left = psutil.wait_procs([worker], timeout=PATIENCE_S)
        assert left == []
    finally:
        if worker.is_running():
            worker.kill()
