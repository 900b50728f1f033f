"""How a run begins: what it is asked for, and what it takes from its surroundings."""

import asyncio
import sys
from pathlib import Path

import pytest

from bench.__main__ import arguments
from bench.process import compile_bytecode, environment_with
from bench.xim import _set_up


async def test_the_users_own_database_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real.db"
    monkeypatch.setenv("XEROTIER_ROUTER_DATABASE_URL", f"sqlite+aiosqlite:///{real}")
    await _set_up({"XEROTIER_ROUTER_DATA_DIR": str(tmp_path / "bench")})
    assert not real.exists()


def test_programs_start_from_bytecode_whatever_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)  # the tests' own, elsewhere
    (tmp_path / "module.py").write_text("x = 1\n")
    (tmp_path / "template.py").write_text("{{ no Python }}\n")
    asyncio.run(compile_bytecode(sys.executable, tmp_path))
    assert [path.name.partition(".")[0] for path in tmp_path.glob("__pycache__/*.pyc")] == ["module"]
    assert "PYTHONDONTWRITEBYTECODE" not in environment_with({})


@pytest.mark.parametrize("words", [["--only", "12 streams"], ["--only", "128", "--skip", "128"]])
def test_a_run_of_nothing_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(words)
    assert "no scenario is left" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--only", "idle"], ["--only", "memory"], ["--only", "128"], []])
def test_whatever_is_left_is_run(words: list[str]) -> None:
    arguments(words)
