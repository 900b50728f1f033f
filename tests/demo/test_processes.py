"""The demo's children: stopped in order, killed when they do not listen, and nothing below them left."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from demo.processes import Child, DemoFailed, Signals, StopRequested
from tests.support.programs import PATIENCE_S, alive

# Says when it is ready, and starts a program below itself in a session of its own, as the agent does with the engine.
PARENT = """
import signal, subprocess, sys, time
{before}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def started(tmp_path: Path, before: str = "") -> tuple[Child, psutil.Process]:
    """A running child and the process below it."""
    child = Child("parent", [sys.executable, "-c", PARENT.format(before=before)], os.environ, tmp_path / "log")
    deadline = time.monotonic() + PATIENCE_S
    while not (text := (tmp_path / "log").read_text()).endswith("\n"):
        child.require_alive()
        assert time.monotonic() < deadline
    return child, psutil.Process(int(text))


def test_a_stopped_child_leaves_nothing_below_it(tmp_path: Path) -> None:
    child, grandchild = started(tmp_path)
    # The grandchild does not hear of the end of its parent and would live on: after the wait it is killed.
    child.stop(grace_s=20.0, hurried=threading.Event())
    assert not alive([grandchild])


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child, grandchild = started(tmp_path, DEAF)
    child.stop(grace_s=0.3, hurried=threading.Event())
    assert not alive([grandchild])
    assert "did not end in time" in capsys.readouterr().err


def test_a_second_signal_cuts_the_wait_short(tmp_path: Path) -> None:
    child, grandchild = started(tmp_path, DEAF)
    hurried = threading.Event()
    hurried.set()
    before = time.monotonic()
    child.stop(grace_s=60.0, hurried=hurried)
    assert time.monotonic() - before < 30.0
    assert not alive([grandchild])


def test_an_ended_child_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = Child(
        "router", [sys.executable, "-c", "raise SystemExit('no such database')"], os.environ, tmp_path / "log"
    )
    with pytest.raises(DemoFailed, match=r"(?s)router has ended by itself \(exit code 1\).*no such database"):
        until_dead(child)
    child.stop(grace_s=1.0, hurried=threading.Event())


def test_a_missing_program_is_told(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match="agent cannot be started"):
        Child("agent", [str(tmp_path / "nothing")], os.environ, tmp_path / "log")


def until_dead(child: Child) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        child.require_alive()


@pytest.fixture
def signals() -> Signals:
    return Signals()


def test_a_signal_while_a_child_starts_waits_for_the_block_to_end(signals: Signals) -> None:
    reached: list[str] = []

    def start() -> None:
        with signals.held():
            signals.receive(signal.SIGINT, None)
            reached.append("after the signal")

    with pytest.raises(StopRequested):
        start()
    assert reached == ["after the signal"]


def test_after_the_end_has_begun_a_signal_only_hurries_it(signals: Signals) -> None:
    with pytest.raises(StopRequested):
        signals.receive(signal.SIGTERM, None)
    assert not signals.hurried.is_set()
    signals.shield()
    signals.receive(signal.SIGTERM, None)
    assert signals.hurried.is_set()


def test_ctrl_c_reaches_a_real_program_as_a_stop() -> None:
    program = (
        "from demo.processes import Signals, StopRequested\nimport time\n"
        "Signals().install()\n"
        "try:\n    print('up', flush=True)\n    time.sleep(60)\nexcept StopRequested:\n    print('stopped')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert output == "stopped\n"
