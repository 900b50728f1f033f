"""Modules have at most 500 lines, functions 60 without their docstring, and nine tenths of them fewer than 35."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.sources import name_of, parsed, python_files

MODULE_LINES = 500
FUNCTION_LINES = 60
SHORT_LINES = 35
SHORT_SHARE = 0.9

FILES = [
    path
    for path in python_files("packages", "tests", "bench", "demo", "docs")
    if "migrations/versions" not in str(path)
]
"""A migration is a list of columns and is never changed."""


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name with line, and length without docstring, of every function."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, last = node.lineno, node.end_lineno or node.lineno
            text = node.body[0]
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            docstring = (text.end_lineno or 0) - text.lineno + 1 if is_text and ast.get_docstring(node) else 0
            yield f"{name_of(path)}:{first} {node.name}", last - first + 1 - docstring


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_and_its_functions_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MODULE_LINES
    assert [(name, length) for name, length in functions(path) if length > FUNCTION_LINES] == []


@pytest.mark.parametrize("package", ["xim_protocol", "xim_router", "xim_agent"])
def test_nine_tenths_of_a_packages_functions_are_short(package: str) -> None:
    lengths = [length for path in FILES if package in path.parts for _, length in functions(path)]
    assert sum(length < SHORT_LINES for length in lengths) >= SHORT_SHARE * len(lengths)
