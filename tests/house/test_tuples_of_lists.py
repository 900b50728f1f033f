"""Where requests pass, a tuple is made of something whose length is known, not of a generator.

CPython makes a tuple of a generator with ten places and cuts it to size: it is taken from one of the interpreter's free
lists and put into another, each of which grows to 2,000 tuples that only a full collection gives back.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.house.sources import ROOT, name_of, parsed, python_files

PATHS_OF_REQUESTS = (
    "packages/xim_protocol/src/xim_protocol/",
    "packages/xim_router/src/xim_router/dispatch/",
    "packages/xim_router/src/xim_router/http/",
    "packages/xim_router/src/xim_router/link/",
    "packages/xim_agent/src/xim_agent/engine/",
    "packages/xim_agent/src/xim_agent/link/",
    "packages/xim_agent/src/xim_agent/mesh.py",
    "packages/xim_agent/src/xim_agent/places.py",
    "packages/xim_agent/src/xim_agent/relay.py",
    "packages/xim_agent/src/xim_agent/serving.py",
)
WITHOUT_LENGTH = {"map", "filter", "zip", "enumerate"}


def tuples_of_generators(tree: ast.Module) -> Iterator[int]:
    """Lines that make a tuple of what does not say how long it is."""
    # At a module's own level it happens once.
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    calls = {node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)}
    for call in sorted(calls, key=lambda call: call.lineno):
        if isinstance(call.func, ast.Name) and call.func.id == "tuple" and call.args and _is_lazy(call.args[0]):
            yield call.lineno


def _is_lazy(made_of: ast.expr) -> bool:
    if isinstance(made_of, ast.Call) and isinstance(made_of.func, ast.Name):
        return made_of.func.id in WITHOUT_LENGTH
    return isinstance(made_of, ast.GeneratorExp)


@pytest.mark.parametrize(
    "name", [name for path in python_files("packages") if (name := name_of(path)).startswith(PATHS_OF_REQUESTS)]
)
def test_where_requests_pass_no_tuple_is_made_of_a_generator(name: str) -> None:
    assert [f"{name}:{line}" for line in tuples_of_generators(parsed(ROOT / name))] == []


@pytest.mark.parametrize("path", PATHS_OF_REQUESTS)
def test_the_paths_are_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f(a):\n    return tuple(b for b in a)", [2]),
        ("f = lambda a:\\\n tuple(map(str, a))", [2]),
        ("async def f(a):\n    def g():\n        return tuple(zip(a, a))\n    return g()", [3]),
        ("def f(a):\n    return tuple([b for b in a]), tuple(a), tuple(sorted(a)), tuple()", []),
        ("A = tuple(b for b in 'abc')", []),
    ],
)
def test_the_rule_sees_one(source: str, lines: list[int]) -> None:
    assert list(tuples_of_generators(ast.parse(source))) == lines
