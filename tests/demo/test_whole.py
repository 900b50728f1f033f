"""The whole demo as a newcomer runs it, as a process: with a stand-in for vLLM, and once with a real one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest
from openai import OpenAI

from demo.model.page import read_page
from demo.prepare_engine import ROOT
from demo.state import Folder, State
from tests.demo.test_state import free_ports

FAKE_VLLM = ROOT / "tests" / "support" / "bin" / "fake-vllm"
SLOW = """
import builtins, runpy, time
real = builtins.__import__
def slowly(name, *rest, **more):
    if name == "demo.demo":
        print("importing", flush=True)
        time.sleep(600)
    return real(name, *rest, **more)
builtins.__import__ = slowly
runpy.run_module("demo", run_name="__main__")
"""
MARK = "XIM_DEMO_TEST_MARK"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder whose first run takes ports that nobody else has."""
    folder = Folder(path=tmp_path / "state")
    folder.path.mkdir()
    folder.save(State(ports=free_ports()))
    return folder.path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model; the stand-in loads nothing."""
    folder = tmp_path / "Own_Model"
    folder.mkdir()
    shutil.copy(ROOT / "demo" / "model" / "xim-tiny" / "config.json", folder)
    return folder


def environment(state: Path, **more: str) -> dict[str, str]:
    """What the demo runs in: nothing of this machine's XIM settings, and a mark that its processes inherit."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XEROTIER_", "DEMO_"))}
    return {**kept, MARK: str(state), **more}


def command(state: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "demo", "--state", str(state), *more]


def marked_processes(state: Path) -> list[str]:
    """Every process that was started by, or below, a demo in `state`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(state):
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def run_once(state: Path, *more: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(state, *more),
        env=environment(state, DEMO_ONCE="1", **variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_it_answers_once_then_runs_again_and_serves_until_it_is_stopped(state: Path, model: Path) -> None:
    first = run_once(state, "--model", str(model), XEROTIER_AGENT_VLLM_PATH=str(FAKE_VLLM))
    assert first.returncode == 0, first.stderr
    assert f"Starting the agent and its engine (log: {os.path.relpath(state / 'agent.log', ROOT)})" in first.stderr
    assert "time to first token" in first.stdout
    assert marked_processes(state) == []
    identity, kept = agent_id(state), Folder(path=state).load()

    with serving(state, "--model", str(model), XEROTIER_AGENT_VLLM_PATH=str(FAKE_VLLM)) as (process, printed):
        exported = dict(re.findall(r"export (\w+)=(\S+)", (state / "env").read_text()))
        assert (state / "env").stat().st_mode & 0o777 == 0o600
        assert exported["OPENAI_BASE_URL"] in printed
        assert exported["OPENAI_API_KEY"] in printed
        with OpenAI(base_url=exported["OPENAI_BASE_URL"], api_key=exported["OPENAI_API_KEY"], max_retries=0) as client:
            answer = client.chat.completions.create(
                model="own-model", messages=[{"role": "user", "content": "Are you there?"}]
            )
        assert answer.choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    assert marked_processes(state) == []
    assert (agent_id(state), Folder(path=state).load()) == (identity, kept)


def agent_id(state: Path) -> str:
    enrollment = json.loads((state / "agents" / "own-model" / "enrollment.json").read_text())
    return str(enrollment["enrollment"]["agent_id"])


def test_a_model_that_is_none_is_refused_before_anything_starts(state: Path) -> None:
    refused = run_once(state, "--model", str(state))
    assert refused.returncode == 1
    assert "must be a folder with a config.json" in refused.stderr
    assert not (state / "router.log").exists()


def test_an_engine_that_does_not_start_is_told_and_leaves_no_process(state: Path, model: Path) -> None:
    failed = run_once(
        state,
        *("--model", str(model)),
        XEROTIER_AGENT_VLLM_PATH=str(FAKE_VLLM),
        XEROTIER_AGENT_VLLM_ARGS="--fake-start-fail 3",
    )
    assert failed.returncode == 1
    assert f"The end of {state / 'agent.log'}" in failed.stderr
    assert marked_processes(state) == []


def test_a_proxy_of_the_users_is_not_asked_for_this_machine(state: Path, model: Path) -> None:
    nowhere = "http://127.0.0.1:9"  # the discard port, where nobody listens
    answered = run_once(
        state,
        *("--model", str(model)),
        XEROTIER_AGENT_VLLM_PATH=str(FAKE_VLLM),
        **{"http_proxy": nowhere, "HTTP_PROXY": nowhere, "all_proxy": nowhere, "NO_PROXY": "corp.example"},
    )
    assert answered.returncode == 0, answered.stderr
    assert "time to first token" in answered.stdout


def test_ctrl_c_before_the_demo_is_loaded_prints_no_traceback() -> None:
    # Its imports take half a second; here the first of them never ends.
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


@contextmanager
def serving(state: Path, *more: str, **variables: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A demo that has answered and goes on serving, and what it printed until then; killed if the test fails."""
    errors = state / "stderr.log"
    with open(errors, "wb") as stderr:
        process = subprocess.Popen(
            command(state, *more),
            env=environment(state, **variables),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdout is not None
    with process.stdout as output:
        try:
            printed = read_until(output, "Stop: Ctrl-C")
            assert printed, errors.read_text()
            yield process, printed
        finally:
            process.kill()
            process.wait()


def read_until(stream: IO[str], text: str) -> str:
    """Every line up to the one that holds `text`, or nothing when the stream ends before; the test's timeout ends a
    wait that is in vain."""
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if text in line:
            return "".join(lines)
    return ""


@pytest.mark.engine
def test_a_real_vllm_gives_the_answer_of_the_page(state: Path) -> None:
    answered = run_once(state, XEROTIER_AGENT_VLLM_PATH=os.environ["XEROTIER_AGENT_VLLM_PATH"])
    assert answered.returncode == 0, answered.stderr
    assert read_page()[0].answer in answered.stdout
    assert marked_processes(state) == []
