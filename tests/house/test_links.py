"""Every relative link of every page leads somewhere, to the heading as well."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.house.sources import ROOT, name_of, tracked

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


def links_of(page: Path) -> list[str]:
    """The targets of a page's links, those of the web left out."""
    prose = _CODE.sub("", _FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for target in _LINK.findall(prose) if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def anchors_of(page: Path) -> set[str]:
    """A page's headings as links name them: lower case, without punctuation, with hyphens."""
    anchors: set[str] = set()
    for line in _FENCE.sub("", page.read_text(encoding="utf-8")).splitlines():
        if found := re.match(r"#{1,6}\s+(.*)", line):
            words = re.sub(r"[^\w\- ]", "", found[1].strip().lower()).replace(" ", "-")
            anchors.add(words)
    return anchors


@pytest.mark.parametrize("name", [name_of(page) for page in tracked("*.md")])
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    broken = []
    for target in links_of(page):
        path, _, anchor = unquote(target).partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors_of(found)):
            broken.append(target)
    assert broken == []


def test_every_page_of_the_documentation_can_be_reached_from_its_index() -> None:
    index = ROOT / "docs/index.md"
    reached, waiting = {index}, [index]
    while waiting:
        page = waiting.pop()
        for target in links_of(page):
            found = (page.parent / target.partition("#")[0]).resolve()
            if found.suffix == ".md" and found.is_file() and found not in reached:
                reached.add(found)
                waiting.append(found)
    assert {name_of(page) for page in tracked("docs/*.md") if page not in reached} == set()
