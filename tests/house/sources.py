"""The files of this repository, for the tests that hold its rules."""

import ast
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@cache
def tracked(*patterns: str) -> tuple[Path, ...]:
    """Every file of the repository that matches one of these patterns, in which `*` stands for slashes too."""
    return tuple(path for path in _files() if not patterns or any(fnmatch(name_of(path), each) for each in patterns))


@cache
def _files() -> tuple[Path, ...]:
    """Every file that git knows or would take; where there is no git, every file outside of hidden folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if not _is_made(path.relative_to(ROOT))]
    # A file that was deleted and not committed yet is still in git's index.
    return tuple(sorted({path for path in paths if path.is_file()}))


def _is_made(path: Path) -> bool:
    """Whether something below a hidden folder, or a tool, made it."""
    return any(part.startswith(".") or part in ("__pycache__", "htmlcov", "build", "dist") for part in path.parts)


def name_of(path: Path) -> str:
    """The path as the repository has it."""
    return path.relative_to(ROOT).as_posix()


def python_files(*folders: str) -> tuple[Path, ...]:
    """Every Python file of these folders."""
    return tracked(*(f"{folder}/*.py" for folder in folders))


def parsed(path: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def names_used(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything of `module` that is used (`os.environ`) or imported (`from os import environ`)."""
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == module
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield node.lineno, node.attr
