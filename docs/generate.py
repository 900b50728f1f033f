"""Writes the pages that come from tables in the code, so that they cannot say anything else.

python -m docs.generate            write them
python -m docs.generate --check    write nothing; exit with 1 and the names of those that are stale
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from docs.generator import commands, errors, http_api, machine, metrics, settings

ROOT = Path(__file__).resolve().parent.parent

PAGES: Mapping[str, Callable[[], str]] = {
    "docs/reference/router-settings.md": settings.router_page,
    "docs/reference/agent-settings.md": settings.agent_page,
    "docs/reference/described-machine.md": machine.machine_page,
    "docs/reference/errors.md": errors.errors_page,
    "docs/reference/metrics.md": metrics.metrics_page,
    "docs/reference/cli.md": commands.commands_page,
    "docs/reference/http-api.md": http_api.http_api_page,
    "deploy/env/router.env.example": settings.router_environment,
    "deploy/env/agent.env.example": settings.agent_environment,
}
"""Each generated file, relative to the repository, and what makes it."""


def stale_pages(root: Path = ROOT) -> list[str]:
    """The generated files under `root` that are missing or not as the code has them."""
    return [name for name, made in PAGES.items() if _read(root / name) != made()]


def write_pages(root: Path = ROOT) -> None:
    """Write all of them."""
    for name, made in PAGES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made(), encoding="utf-8")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    if not parser.parse_args().check:
        write_pages()
        return 0
    stale = stale_pages()
    if not stale:
        return 0
    listed = "\n".join(f"  {name}" for name in stale)
    sys.stderr.write(f"Generated files are not as the code has them:\n{listed}\nWrite them anew: make docs\n")
    return 1


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
