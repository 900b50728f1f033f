"""The reference page of the metrics, from both programs' rows."""

from collections.abc import Iterable, Sequence

from docs.generator.markdown import code, page, table
from xim_agent.telemetry.metrics import ROWS as AGENT_ROWS
from xim_router.telemetry.rows import ROWS as ROUTER_ROWS

_INTRO = """\
Both programs serve Prometheus' text format at `/metrics` on a listener of their own, on loopback unless told
otherwise, because labels name tenants: the router at `127.0.0.1:9095` (`XEROTIER_ROUTER_METRICS_HOST`,
`_METRICS_PORT`, `_DISABLE_METRICS`), the agent at `127.0.0.1:9094` (`XEROTIER_AGENT_METRICS_HOST`, `_METRICS_PORT`,
`_DISABLE_METRICS_SERVER`).

Base units stand in the names. Label values come from enumerations, from [the table of errors](errors.md), or are
names that an operator configured, so their number is bounded. A histogram has `_bucket`, `_sum` and `_count` as
usual."""

_AGENT = """\
The agent's page ends with the metrics of vLLM itself, unchanged, while the engine answers."""


def metrics_page() -> str:
    """docs/reference/metrics.md"""
    router = [(row.name, row.kind.value, row.labels, row.help) for row in ROUTER_ROWS]
    agent = [(row.name, row.kind, row.labels, row.help) for row in AGENT_ROWS]
    return page("Metrics", _INTRO, "## Router", _table(router), "## Agent", _AGENT, _table(agent))


def _table(rows: Iterable[tuple[str, str, Sequence[str], str]]) -> str:
    cells = [(code(name), kind, ", ".join(code(label) for label in labels), text) for name, kind, labels, text in rows]
    return table(("metric", "type", "labels", "what it counts"), cells)
