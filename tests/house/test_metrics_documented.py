"""Every metric stands in the reference page with its type and labels, and no page names one that does not exist."""

import re

import pytest

from tests.house.sources import ROOT, tracked
from xim_agent.telemetry.metrics import ROWS as AGENT_ROWS
from xim_router.telemetry.rows import ROWS as ROUTER_ROWS

PAGE = (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")
METRICS = [
    *((row.name, row.kind.value, row.labels) for row in ROUTER_ROWS),
    *((row.name, row.kind, row.labels) for row in AGENT_ROWS),
]
NAMES = {name for name, _, _ in METRICS}


@pytest.mark.parametrize(("name", "kind", "labels"), METRICS)
def test_a_metric_is_documented(name: str, kind: str, labels: tuple[str, ...]) -> None:
    shown = ", ".join(f"`{label}`" for label in labels)
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` | {kind} | {shown} |")]
    assert len(rows) == 1


def test_pages_name_no_metric_that_does_not_exist() -> None:
    named = {
        (page.name, re.sub(r"_(bucket|sum|count)$", "", found))
        for page in tracked("*.md")
        for found in re.findall(r"xim_(?:router|agent)_[a-z_]+[a-z](?![a-z_./:])", page.read_text(encoding="utf-8"))
    }
    modules = {path.stem for path in tracked("packages/*.py")} | {path.parent.name for path in tracked("packages/*.py")}
    strange = {(page, name) for page, name in named if name not in NAMES}
    assert {(page, name) for page, name in strange if name not in modules} == set()
