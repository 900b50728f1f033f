"""Metrics: every row is served, and the engine's come after them."""

import re
from dataclasses import dataclass

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from xim_agent.lifecycle import AgentState
from xim_agent.telemetry.metrics import ROWS, AgentMetrics, LinkReading
from xim_agent.telemetry.server import MetricsPortTaken, metrics_server


@dataclass(frozen=True)
class Writer:
    messages: int
    entries: int
    buckets: tuple[int, ...]


@dataclass(frozen=True)
class Session:
    streams: int = 1
    kept_bytes: int = 10
    unacknowledged_bytes: int = 5
    link_pauses: int = 2


def readings() -> list[LinkReading]:
    return [
        LinkReading(writer=Writer(3, 7, (1, 1, 1)), session=Session(), links=1),
        LinkReading(writer=Writer(2, 2, (2, 0, 0)), session=Session(), links=4),
    ]


def samples(text: bytes) -> dict[str, float]:
    """By name and labels, as in `a{b=c}`."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_what_the_hot_path_counted_is_read_when_asked() -> None:
    metrics = AgentMetrics(version="1")
    metrics.read_links(readings)
    metrics.counters.chunks += 9
    read = samples(metrics.text())
    assert read["xim_agent_chunks_total"] == 9
    assert read["xim_agent_messages_total"] == 5
    assert read["xim_agent_links_total"] == 5
    assert read["xim_agent_kept_bytes"] == 20


def test_entries_per_message_is_a_histogram_over_all_links() -> None:
    metrics = AgentMetrics(version="1")
    metrics.read_links(readings)
    read = samples(metrics.text())
    name = "xim_agent_entries_per_message"
    assert [read[f"{name}_bucket{{le={le}}}"] for le in ("1.0", "2.0", "4.0", "+Inf")] == [3, 4, 5, 5]
    assert (read[f"{name}_sum"], read[f"{name}_count"]) == (9, 5)


def test_the_state_is_one_of_all() -> None:
    metrics = AgentMetrics(version="1")
    metrics.entered(AgentState.READY)
    read = samples(metrics.text())
    assert [state for state in AgentState if read[f"xim_agent_state{{state={state}}}"]] == [AgentState.READY]


def test_every_row_is_served_and_nothing_else() -> None:
    metrics = AgentMetrics(version="1")
    metrics.streams.labels("done").inc()
    metrics.refreshes.labels("ok").inc()
    served = set(re.findall(r"^# TYPE (\S+) ", metrics.text().decode(), re.MULTILINE))
    served = {name for name in served if not name.endswith("_created")}
    assert served == {row.name for row in ROWS}


async def fetch(port: int, path: str = "/metrics") -> tuple[int, bytes, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, await response.read(), response.headers.get("Content-Type", "")


async def test_the_engines_metrics_follow_the_agents() -> None:
    async def engine() -> bytes:
        return b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 3.0\n"

    async with metrics_server("127.0.0.1", 0, AgentMetrics(version="1"), engine) as port:
        status, body, kind = await fetch(port)
        assert (await fetch(port, "/other"))[0] == 404
    assert status == 200
    assert kind.startswith("text/plain; version=0.0.4")
    assert samples(body)["vllm:num_requests_running"] == 3
    assert samples(body)["xim_agent_info{version=1}"] == 1


async def test_a_taken_port_names_the_setting() -> None:
    async def engine() -> bytes:
        return b""

    async with metrics_server("127.0.0.1", 0, AgentMetrics(version="1"), engine) as port:
        with pytest.raises(MetricsPortTaken, match="XEROTIER_AGENT_METRICS_PORT"):
            await metrics_server("127.0.0.1", port, AgentMetrics(version="1"), engine).__aenter__()
