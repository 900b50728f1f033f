"""`xerotier-vllm` as a program: it becomes vLLM, ready for local models, in every process of the engine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.agent.planning.givens import decision, given
from xim_agent.planning.plan import plan_engine
from xim_agent.wrapper import LAUNCH, interpreter_of

VLLM = """
import json, multiprocessing, os, sys, warnings
from importlib.metadata import entry_points

NAMES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "VLLM_PLUGINS", "PYTHONWARNINGS")

def look(queue=None):
    from huggingface_hub import HfApi, get_safetensors_metadata
    found = {
        "argv": sys.argv,
        "environment": {name: os.environ.get(name) for name in NAMES},
        "plugins": [point.name for point in entry_points(group="vllm.general_plugins")],
        "local": [HfApi().get_safetensors_metadata("/"), get_safetensors_metadata("/")],
        "remote": HfApi().get_safetensors_metadata("org/model", revision="x"),
    }
    queue.put(found) if queue else None
    return found

def main():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=look, args=(queue,))
    child.start()
    spawned = queue.get(timeout=60)
    child.join()
    eval(compile("'\\\\d'", "escape.py", "eval"))
    print(json.dumps([look(), spawned]))
"""
HUB = """
class HfApi:
    def get_safetensors_metadata(self, repo_id, *, revision=None):
        return f"asked {repo_id} {revision}"

api = HfApi()
get_safetensors_metadata = api.get_safetensors_metadata
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A directory of packages with stand-ins for vLLM's command line and for the hub's client."""
    packages = tmp_path / "packages"
    for name, text in {
        "vllm/__init__.py": "",
        "vllm/entrypoints/__init__.py": "",
        "vllm/entrypoints/cli/__init__.py": "",
        "vllm/entrypoints/cli/main.py": VLLM,
        "huggingface_hub/__init__.py": "from huggingface_hub.hf_api import HfApi, get_safetensors_metadata\n",
        "huggingface_hub/hf_api.py": HUB,
    }.items():
        path = packages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return packages


def wrapped(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `xerotier-vllm`."""
    environment = {"PATH": os.environ["PATH"], **variables}
    program = [sys.executable, "-c", "from xim_agent.wrapper import main; main()", *arguments]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_it_becomes_vllm_with_its_arguments_in_every_process(installed: Path) -> None:
    done = wrapped("serve", "/model", "--uds", "x", PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    main, spawned = json.loads(done.stdout)
    assert main["argv"] == ["vllm", "serve", "/model", "--uds", "x"]
    for process in (main, spawned):
        variables = process["environment"]
        assert (variables["HF_HUB_OFFLINE"], variables["TRANSFORMERS_OFFLINE"]) == ("1", "1")
        assert variables["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert variables["VLLM_PLUGINS"] is None
        assert process["plugins"] == ["xim_short_prompts"]
        assert process["local"] == [None, None]
        assert process["remote"] == "asked org/model x"
    assert "invalid escape" not in done.stderr


@pytest.mark.parametrize("rule", ["error", "ignore"])
def test_what_the_operator_set_stays(installed: Path, rule: str) -> None:
    done = wrapped("serve", PYTHONPATH=str(installed), HF_HUB_OFFLINE="0", VLLM_PLUGINS="zentorch", PYTHONWARNINGS=rule)
    _, spawned = json.loads(done.stdout)
    assert spawned["environment"]["HF_HUB_OFFLINE"] == "0"
    assert spawned["environment"]["VLLM_PLUGINS"] == "zentorch,xim_short_prompts"
    assert spawned["environment"]["PYTHONWARNINGS"].endswith(f",{rule}")


def test_vllm_in_another_environment_is_found_by_the_program_on_path(installed: Path, tmp_path: Path) -> None:
    """The Python named in the program's first line runs it; this one has no vLLM."""
    other = tmp_path / "bin" / "python-of-vllm"
    other.parent.mkdir()
    other.write_text(f'#!/bin/sh\nPYTHONPATH={installed} exec {sys.executable} "$@"\n')
    program = other.parent / "vllm"
    program.write_text(f"#!{other}\n")
    for path in (other, program):
        path.chmod(0o755)
    done = wrapped("serve", PATH=f"{other.parent}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["argv"] == ["vllm", "serve"]


def test_without_vllm_it_says_what_to_do(tmp_path: Path) -> None:
    done = wrapped("serve", PATH=str(tmp_path))
    assert done.returncode == 127
    assert "XEROTIER_AGENT_VLLM_PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_interpreter_of_a_console_script_is_read_from_it(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\n")
    assert interpreter_of(program) == sys.executable
    program.write_text(f"""#!/bin/sh\n'''exec' "{sys.executable}" "$0" "$@"\n' '''\n""")
    assert interpreter_of(program) == sys.executable
    program.write_bytes(b"\x7fELF")
    assert interpreter_of(program) is None
    (tmp_path / "python3").symlink_to(sys.executable)
    assert interpreter_of(program) == str(tmp_path / "python3")
    assert interpreter_of(tmp_path / "nothing") is None


def test_what_goes_into_vllms_environment_imports_the_standard_library_alone() -> None:
    """It runs under a Python that has nothing of the agent."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import xim_vllm_gdn, xim_vllm_hooks, xim_vllm_tuner"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(LAUNCH.parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_plan_that_needs_its_guard_asks_for_it() -> None:
    needs = given("mi300x-x8", "qwen3.5-35b-a3b")
    assert decision(plan_engine(needs), "short prompts").warning == ""
    bare = replace(needs, places=replace(needs.places, executable="/usr/bin/vllm"))
    assert "xerotier-vllm" in decision(plan_engine(bare), "short prompts").warning
