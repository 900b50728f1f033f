"""The reference page of the metrics, from both programs' rows."""

from collections.abc import Iterable, Sequence

from docs.generator.markdown import code, page, table
from xim_agent.telemetry.metrics import ROWS as AGENT_ROWS
from xim_agent.telemetry.server import MOST_CONNECTIONS
from xim_router.app import METRICS_CONNECTIONS
from xim_router.telemetry.rows import ROWS as ROUTER_ROWS

_INTRO = """\
Both programs serve Prometheus' text format at `/metrics` on a listener of their own, on loopback unless told
otherwise, because labels name tenants: the router at `127.0.0.1:9095` (`XEROTIER_ROUTER_METRICS_HOST`,
`_METRICS_PORT`, `_DISABLE_METRICS`), the agent at `127.0.0.1:9094` (`XEROTIER_AGENT_METRICS_HOST`, `_METRICS_PORT`,
`_DISABLE_METRICS_SERVER`).

These listeners ask for no key. Each holds at most {connections} connections, of which a newcomer ends the oldest, and
closes one that has sent no whole request head for 60 s. A scraper needs one, and may keep it.

Base units stand in the names. Label values come from enumerations, from [the table of errors](errors.md), or are
names that an operator configured, so their number is bounded. A histogram has `_bucket`, `_sum` and `_count` as
usual."""

_AGENT = """\
The agent's page ends with the metrics of vLLM itself, unchanged, while the engine answers."""


def metrics_page() -> str:
    """docs/reference/metrics.md"""
    router = [(row.name, row.kind.value, row.labels, row.help) for row in ROUTER_ROWS]
    agent = [(row.name, row.kind, row.labels, row.help) for row in AGENT_ROWS]
    assert METRICS_CONNECTIONS == MOST_CONNECTIONS
    intro = _INTRO.format(connections=MOST_CONNECTIONS)
    return page("Metrics", intro, "## Router", _table(router), "## Agent", _AGENT, _table(agent))


def _table(rows: Iterable[tuple[str, str, Sequence[str], str]]) -> str:
    cells = [(code(name), kind, ", ".join(code(label) for label in labels), text) for name, kind, labels, text in rows]
    return table(("metric", "type", "labels", "what it counts"), cells)
