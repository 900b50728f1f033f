"""`xerotier-xim-agent plan` as an operator uses it, and what a plan's files and places are on this machine."""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.agent.agent_process import agent_process, granted
from tests.agent.link.enrollments import router as enrollment_router
from tests.agent.planning.givens import given, vllm
from tests.support.router_stub import RouterStub
from xim_agent.facts.hardware import HardwareFacts
from xim_agent.plan_command import read_description
from xim_agent.planning.decision import Wanted
from xim_agent.planning.engine_facts import EngineFacts
from xim_agent.settings_check import load_settings
from xim_agent.surroundings import PlaceUnusable, Surroundings, places_of, write_files

HERE = Path(__file__).parent
MODELS = HERE / "models"
MACHINES = HERE / "machines"
WANTED = Wanted(served_name="m")
TRIES = 3
"""The first may have to compile what it imports, and processors that others use as well are slower."""


def run(tmp_path: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """The command, with nothing of this machine's vLLM in sight."""
    environment = {
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "PYTHONIOENCODING": "utf-8:strict",  # as under a language's locale, and not under C
        **{f"XEROTIER_AGENT_{name}": value for name, value in variables.items()},
    }
    return subprocess.run(
        [sys.executable, "-m", "xim_agent", "plan", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def described(machine: str, model: str) -> tuple[str, ...]:
    return ("--hardware", str(MACHINES / f"{machine}.json"), "--model", str(MODELS / model))


def test_a_described_machine_needs_no_vllm_and_takes_less_than_a_second_of_cpu(tmp_path: Path) -> None:
    cpu_s = []
    for _ in range(TRIES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(tmp_path, *described("a40-x4", "llama-3.1-70b"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if cpu_s[-1] < 1.0:
            break
    assert cpu_s[-1] < 1.0, cpu_s
    for expected in ("--enforce-eager", "--tensor-parallel-size 4", "NVIDIA A40 × 4", "32.85 GiB", "not asked"):
        assert expected in done.stdout
    assert list(tmp_path.rglob("*")) == []


def test_json_describes_everything_and_can_be_planned_again(tmp_path: Path) -> None:
    first = run(tmp_path, *described("h200", "qwen3-30b-a3b"), "--json")
    file = tmp_path / "plan.json"
    file.write_text(first.stdout, encoding="utf-8")
    again = run(tmp_path, "--hardware", str(file), "--model", str(MODELS / "qwen3-30b-a3b"), "--format", "json")
    assert json.loads(again.stdout) == json.loads(first.stdout)


def test_flags_variables_and_the_endpoint_count(tmp_path: Path) -> None:
    words = (*described("h200", "llama-3.1-8b"), "--max-model-len", "4096", "--endpoint-quantization", "fp8")
    done = run(tmp_path, *words, "--task-mode", "embed", "--served-name", "slug", MAX_NUM_SEQS="7")
    for expected in ("--max-model-len 4096", "--quantization fp8", "--runner pooling", "name slug", "--max-num-seqs 7"):
        assert expected in done.stdout


def test_a_plan_that_cannot_start_says_so_by_its_status(tmp_path: Path) -> None:
    done = run(tmp_path, *described("h100-x8", "deepseek-v3"))
    assert done.returncode == 1
    assert "The engine cannot be started like this" in done.stdout


def test_this_machine_is_planned_for_without_a_description(tmp_path: Path) -> None:
    done = run(tmp_path, "--model", str(MODELS / "llama-3.2-1b-instruct"), "--json")
    hardware = HardwareFacts.from_json(json.dumps(json.loads(done.stdout)["hardware"]))
    assert hardware.cpu.logical_cpus == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "No model is named"),
        (("--model", "/nowhere"), "/nowhere is no directory"),
        (("--model", "/" + "x" * 300), "x is no directory"),  # the system refuses to look, as where it may not search
        (("--model", "/tmp"), "config.json"),
        (("--model", str(MODELS / "llama-3.1-8b"), "--hardware", "/nowhere.json"), "/nowhere.json cannot be read"),
        (("--model", str(MODELS / "llama-3.1-8b"), "--vllm-socket-path", "/" + "x" * 200), "VLLM_SOCKET_PATH"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_remedy(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_whose_bytes_are_no_text_is_a_path_like_any_other(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(MODELS / "llama-3.1-8b", folder)
    machine = ("--hardware", str(MACHINES / "h200.json"))
    done = run(tmp_path, "--model", str(folder), *machine, CONFIG_DIR=str(folder / "config"))
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9" in done.stdout


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read"),
        ("[" * 99_999, "cannot be read"),
        ('{"gpu": 1}', "gpu"),
        ("[]", "describe"),
        ('{"cpu_limit": Infinity}', "cpu_limit: input should be a finite number"),
    ],
)
def test_a_description_with_a_mistake_is_told(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(PlaceUnusable, match=told):
        read_description(file)


def surroundings(folder: Path, **values: str) -> Surroundings:
    named = {f"XEROTIER_AGENT_{name}": value for name, value in values.items()}
    settings = load_settings({"XEROTIER_AGENT_HOME": str(folder), **named})
    situation = given("h200")
    return Surroundings(
        settings=settings,
        places=places_of(settings, "/usr/bin/vllm"),
        engine=replace(vllm(), packages=frozenset({"lmcache"})),
        model=situation.model,
        hardware=situation.hardware,
    )


def test_lmcaches_configuration_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    around = surroundings(tmp_path, KV_CACHE_BACKEND="lmcache", LMCACHE_REDIS_URL="redis://:s3cret@cache")
    for _ in range(2):  # a second start replaces it
        plan = write_files(around.plan(WANTED), around, WANTED)
    file = tmp_path / ".config" / "xerotier" / "lmcache_config.yaml"
    assert plan.files[0].path == file
    assert "redis://:s3cret@cache" in file.read_text(encoding="utf-8")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert f"file://{tmp_path}/.cache/lmcache/" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("packages", [frozenset({"lmcache"}), None])
def test_a_configuration_that_cannot_be_written_leaves_lmcache_out(
    tmp_path: Path, packages: frozenset[str] | None
) -> None:
    (tmp_path / ".config").write_text("in the way", encoding="utf-8")
    around = surroundings(tmp_path, KV_CACHE_BACKEND="lmcache")
    around = replace(around, engine=EngineFacts(packages=packages))
    plan = write_files(around.plan(WANTED), around, WANTED)
    assert plan.files == ()
    assert any("LMCache is not used" in sentence for sentence in plan.warnings)


def test_what_outlives_a_start_lies_beside_the_model_cache(tmp_path: Path) -> None:
    own = surroundings(tmp_path, MODEL_CACHE_PATH="/data/models")
    assert own.places.caches == Path("/data")
    assert surroundings(tmp_path).places.caches == tmp_path / ".cache" / "xerotier"


def test_agents_with_config_directories_of_one_relative_name_have_sockets_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One agent for each GPU, each started in a directory of its own: none may take the socket of another."""
    paths = set()
    for name in ("gpu0", "gpu1"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        paths.add(surroundings(tmp_path, CONFIG_DIR="config").places.socket_path)
    assert len(paths) == 2


def test_a_socket_path_that_is_too_long_names_its_setting(tmp_path: Path) -> None:
    with pytest.raises(PlaceUnusable, match="VLLM_SOCKET_PATH"):
        surroundings(tmp_path, VLLM_SOCKET_PATH="/" + "x" * 200).plan(WANTED)


async def test_a_run_logs_the_whole_plan_and_starts_the_engine_by_it(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(tmp_path, enroll, MAX_NUM_SEQS="7") as agent:
            await agent.says("engine plan")
            entries = [json.loads(line) for line in agent.lines if line.startswith("{")]
            (plan,) = (entry["plan"] for entry in entries if entry["message"] == "engine plan")
            for expected in ("decision", "--max-num-seqs 7", "--enable-prefix-caching", "weights", "operator"):
                assert expected in plan
            await router.opened()
            engines = [process.cmdline() for process in agent.children() if "serve" in process.cmdline()]
            assert any("--enable-prefix-caching" in command for command in engines)


async def test_a_run_with_a_model_that_cannot_be_read_names_file_and_remedy(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{", encoding="utf-8")
    async with agent_process(tmp_path, None, INITIAL_MODEL_PATH=str(broken)) as agent:
        assert await agent.ended() == 1
        assert any(str(broken / "config.json") in line for line in agent.lines)
