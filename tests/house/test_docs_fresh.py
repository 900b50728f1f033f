"""The generated pages say what the code says, whatever machine writes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generate import PAGES, stale_pages, write_pages
from tests.house.sources import ROOT


def test_no_generated_page_is_stale(tmp_path: Path) -> None:
    """Asked in another home, with other variables: nothing of the machine may be in a page."""
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith(("XEROTIER_", "XDG_"))}
    elsewhere |= {"HOME": str(tmp_path), "COLUMNS": "40", "XEROTIER_AGENT_MAX_NUM_SEQS": "7"}
    elsewhere |= {"XEROTIER_ROUTER_HTTP_PORT": "7", "LC_ALL": "C"}
    command = [sys.executable, "-m", "docs.generate", "--check"]
    checked = subprocess.run(command, cwd=ROOT, env=elsewhere, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_that_was_changed_by_hand_is_named(name: str, tmp_path: Path) -> None:
    write_pages(tmp_path)
    assert stale_pages(tmp_path) == []
    page = tmp_path / name
    page.write_text(page.read_text(encoding="utf-8") + "by hand\n", encoding="utf-8")
    assert stale_pages(tmp_path) == [name]
    page.unlink()
    assert stale_pages(tmp_path) == [name]
