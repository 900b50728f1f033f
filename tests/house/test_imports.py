"""What may import what, as far as import-linter cannot say it; its contracts are run by `make check`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.sources import name_of, parsed, python_files

ONLY_IN = {
    "zmq": {
        "xim_agent/link/sockets.py",
        "xim_router/link/transport.py",
        "xim_router/link/gatekeeper.py",
        "xim_router/app.py",
    },
    "aiohttp": {"xim_agent/link/enrollment.py", "xim_agent/telemetry/server.py"},
    "uvicorn": {"xim_router/app.py", "xim_router/http/direct.py", "xim_router/http/protocol.py"},
    "msgpack": {"xim_protocol/codec.py"},
    "msgspec": {
        "xim_agent/engine/body.py",
        "xim_agent/engine/usage.py",
        "xim_router/http/request.py",
        "xim_router/telemetry/logs.py",
    },
    "httptools": {"xim_agent/engine/http.py"},
    "vllm": set(),
    "xim_agent.app": {"xim_agent/cli.py"},
    "xim_router.app": {"xim_router/cli.py"},
}
"""Libraries that belong to few modules, and the composition roots, which nobody imports but the command line."""

VAGUE = frozenset({"utils", "helpers", "manager", "base", "common", "misc"})

MODULES = python_files("packages")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that the module imports."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def short(path: Path) -> str:
    return name_of(path).partition("/src/")[2]


@pytest.mark.parametrize(("library", "allowed"), ONLY_IN.items())
def test_a_library_is_imported_where_it_belongs(library: str, allowed: set[str]) -> None:
    users = {
        short(path)
        for path in MODULES
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }
    assert users == allowed


def test_no_import_hides_a_cycle_from_the_type_checker_alone() -> None:
    hidden = [name_of(path) for path in MODULES if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]
    assert hidden == []


def test_no_module_has_a_name_for_everything() -> None:
    assert [name_of(path) for path in MODULES if path.stem in VAGUE or path.parent.name in VAGUE] == []
