"""What a person reads while a step of the demo runs, in a log as on a terminal."""

import threading

import pytest

from demo import progress
from demo.processes import StopRequested
from demo.progress import step
from tests.support.programs import PATIENCE_S


def test_a_step_that_is_stopped_was_interrupted_and_did_not_fail(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StopRequested), step("Bytecode"):
        raise StopRequested
    assert "Bytecode: interrupted after" in capsys.readouterr().err


def test_a_step_that_fails_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="disk"), step("Bytecode"):
        raise OSError("disk")
    assert "Bytecode: failed after" in capsys.readouterr().err


def test_a_long_step_goes_on_telling_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.01)
    asked = threading.Event()

    def detail() -> str:
        asked.set()
        return "loading weights"

    with step("Starting", detail):
        assert asked.wait(PATIENCE_S)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Starting ..."
    assert lines[1].startswith("Starting ... ")
    assert lines[1].endswith(" s  loading weights")
    assert lines[-1].startswith("Starting: done in ")
