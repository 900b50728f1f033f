"""The guard: whatever becomes of the agent, nothing of the engine stays behind."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.programs import PATIENCE_S
from xim_agent.engine import guard

ROOT = Path(__file__).parents[3]
FAKE_VLLM = ROOT / "tests" / "support" / "bin" / "fake-vllm"

AGENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""
"""Stands for the agent: holds the guard's standard input, and no handler of its own runs on SIGKILL."""

DAEMON = """
import json, os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(writer, str(os.getpid()).encode())
        signal.pause()
    os._exit(0)
print(json.dumps([os.getpid(), int(os.read(reader, 20))]), flush=True)
signal.pause()
"""
"""Ignores SIGTERM and has a grandchild in a session of its own, whose parent is gone."""


def guarded(*command: str, grace_s: float = 0.2) -> list[str]:
    return [sys.executable, "-I", "-S", guard.__file__, str(grace_s), "--", *command]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Poll: other processes tell nobody when they end."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        select.select([], [], [], 0.01)


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a program with pipes; its whole session is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def popen(command: list[str]) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        for pid in guard.members_of(process.pid, guard.processes()):
            with contextlib.suppress(ProcessLookupError):  # gone since it was listed
                os.kill(pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        process.communicate()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def close_stdin(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None


def tell(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word)
    process.stdin.flush()


Start = Callable[[list[str]], "subprocess.Popen[str]"]


def test_a_killed_agent_leaves_nothing_of_an_engine_that_ignores_sigterm(start: Start, tmp_path: Path) -> None:
    engine = (str(FAKE_VLLM), "serve", "m", "--uds", str(tmp_path / "s"))
    agent = start([*python(AGENT), *guarded(*engine, "--fake-spawn-child", "--fake-ignore-sigterm")])
    leader = int(line_of(agent))
    wait_until((tmp_path / "s").exists, "the engine's socket")
    family = [psutil.Process(pid) for pid in guard.members_of(leader, guard.processes())]
    assert len(family) >= 2, "the engine and its child"

    agent.send_signal(signal.SIGKILL)

    gone, alive = psutil.wait_procs([*family, psutil.Process(leader)], timeout=PATIENCE_S)
    assert not alive
    assert len(gone) == len(family) + 1


def test_a_daemonised_grandchild_is_ended_too(start: Start) -> None:
    process = start(guarded(*python(DAEMON)))
    pids = json.loads(line_of(process))
    assert os.getsid(pids[1]) != os.getsid(pids[0])
    close_stdin(process)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("status", [0, 1, 2, 77])
def test_the_exit_status_is_the_engines(start: Start, status: int) -> None:
    assert start(guarded(*python(f"raise SystemExit({status})"))).wait(PATIENCE_S) == status


def test_an_engine_ended_by_a_signal_is_told_from_an_exit(start: Start) -> None:
    process = start(guarded(*python("import os; os.kill(os.getpid(), 11)")))
    assert process.wait(PATIENCE_S) == 128 + signal.SIGSEGV


def test_a_program_that_does_not_exist_is_127(start: Start) -> None:
    assert start(guarded("/nowhere/vllm")).wait(PATIENCE_S) == 127


def test_a_program_that_may_not_be_run_is_126(start: Start, tmp_path: Path) -> None:
    plain = tmp_path / "vllm"
    plain.write_text("no program")
    assert start(guarded(str(plain))).wait(PATIENCE_S) == 126


def test_t_asks_the_main_process_and_gives_it_all_the_time_it_needs(start: Start) -> None:
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(5)); print('up', flush=True); signal.pause()"
    process = start(guarded(*python(code), grace_s=0.0))
    line_of(process)
    tell(process, "T")
    assert process.wait(PATIENCE_S) == 5


def test_k_ends_what_ignores_everything_else(start: Start) -> None:
    process = start(guarded(*python(DAEMON), grace_s=600.0))
    pids = json.loads(line_of(process))
    tell(process, "TK")
    assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_what_remains_after_the_main_process_is_ended(start: Start) -> None:
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']);"
        "print(child.pid, flush=True); raise SystemExit(3)"
    )
    process = start(guarded(*python(code)))
    child = int(line_of(process))
    assert process.wait(PATIENCE_S) == 3
    assert not psutil.pid_exists(child)


def test_the_engine_dies_with_a_killed_guard(start: Start) -> None:
    process = start(guarded(*python("import os, signal; print(os.getpid(), flush=True); signal.pause()")))
    engine = psutil.Process(int(line_of(process)))
    process.kill()
    engine.wait(PATIENCE_S)


def test_the_engine_inherits_no_ignored_signal(start: Start) -> None:
    code = "import signal; print([str(n) for n in (1, 2, 15, 17) if signal.getsignal(n) is signal.SIG_IGN], flush=True)"
    assert line_of(start(guarded(*python(code)))).strip() == "[]"


def test_members_are_descendants_and_the_group_and_the_session_without_the_leader() -> None:
    everyone = [(10, 1, 10, 10), (11, 10, 10, 10), (12, 11, 12, 12), (13, 1, 10, 10), (14, 1, 99, 10), (20, 1, 20, 20)]
    assert guard.members_of(10, everyone) == [11, 12, 13, 14]
