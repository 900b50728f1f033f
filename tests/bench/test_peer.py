"""When a peer's environment is made, and made anew."""

import sys
from pathlib import Path

import pytest

from bench import peer
from bench.peer import NotInstalled, Peer, ensure_installed


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A peer of a checkout of its own; what is installed is click, which is here already."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "requirements-one.txt").write_text("click==1\n")
    monkeypatch.setattr(peer, "ROOT", tmp_path)
    return Peer(name="one", distribution="click", command=lambda *_: [], health="/")


@pytest.fixture
def installs(one: Peer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pins of every install so far; the one that is asked for "none" fails half-way."""
    made: list[str] = []

    async def install(asked: Peer) -> None:
        asked.environment.mkdir(parents=True)  # not where there is one: no more does uv
        (asked.environment / "bin").mkdir()
        made.append(asked.requirements.read_text())
        for name in ("one", "python"):
            program = asked.environment / "bin" / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
            program.chmod(0o755)
        if "none" in made[-1]:
            raise NotInstalled("no network")

    monkeypatch.setattr(peer, "_install", install)
    return made


async def test_it_is_installed_once(one: Peer, installs: list[str]) -> None:
    assert await ensure_installed(one) == await ensure_installed(one)
    assert installs == ["click==1\n"]


async def test_other_pins_are_installed_anew(one: Peer, installs: list[str]) -> None:
    await ensure_installed(one)
    one.requirements.write_text("click==2\n")
    await ensure_installed(one)
    assert installs == ["click==1\n", "click==2\n"]


async def test_half_an_environment_is_made_anew(one: Peer, installs: list[str]) -> None:
    pins = one.requirements.read_text()
    one.requirements.write_text("none\n")
    with pytest.raises(NotInstalled):
        await ensure_installed(one)
    one.requirements.write_text(pins)
    await ensure_installed(one)
    await ensure_installed(one)
    assert installs == ["none\n", pins]
