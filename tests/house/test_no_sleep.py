"""Tests wait for what happens, not for time to pass: a sleep is too long on one machine and too short on another."""

import ast
from collections.abc import Iterator

import pytest

from tests.house.sources import ROOT, name_of, parsed, python_files

MAY_SLEEP = {
    "tests/support/programs.py": "`eventually`, between two looks at what other processes do",
    "tests/support/fake_vllm.py": "a start that takes as long as a test says",
    "tests/support/fake_vllm_engine.py": "writes the streams of one step apart, as a real engine does",
}
SLEEPERS = {("time", "sleep"), ("asyncio", "sleep"), ("anyio", "sleep")}


def sleeps(tree: ast.Module) -> Iterator[int]:
    """Lines that sleep; `asyncio.sleep(0)` only lets others run, so it is none."""
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.module, alias.name) in SLEEPERS
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_sleep(node.func, imported) and not _is_zero(node):
            yield node.lineno


def _is_sleep(called: ast.expr, imported: set[str]) -> bool:
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        return (called.value.id, called.attr) in SLEEPERS
    return isinstance(called, ast.Name) and called.id in imported


def _is_zero(call: ast.Call) -> bool:
    return len(call.args) == 1 and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0


@pytest.mark.parametrize("name", [name for path in python_files("tests") if (name := name_of(path)) not in MAY_SLEEP])
def test_no_test_sleeps(name: str) -> None:
    assert [f"{name}:{line}" for line in sleeps(parsed(ROOT / name))] == []


@pytest.mark.parametrize("name", MAY_SLEEP)
def test_those_that_may_do(name: str) -> None:
    """An exception that nobody needs any more goes."""
    assert list(sleeps(parsed(ROOT / name)))


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import time\ntime.sleep(1)", [2]),
        ("from asyncio import sleep as rest\nasync def f() -> None:\n    await rest(0.1)", [3]),
        ("import asyncio\nasync def f() -> None:\n    await asyncio.sleep(0)", []),
        ("text = 'time.sleep(600)'", []),
    ],
)
def test_the_rule_sees_a_sleep(source: str, lines: list[int]) -> None:
    assert list(sleeps(ast.parse(source))) == lines
