"""What a scrape shows."""

from dataclasses import replace
from math import isnan

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.router.dispatch.watched import CHAT, A, B, C, enrolled, req, view
from xim_protocol.ids import AgentId, ProjectId
from xim_protocol.messages import AgentState
from xim_router.dispatch.catalog import Catalog, Endpoint
from xim_router.dispatch.dispatcher import Dispatcher
from xim_router.telemetry.metrics import ClientPhase, QueueOutcome, RetryReason, RouterMetrics
from xim_router.telemetry.rows import ENTRIES_BUCKETS, ROWS, Kind, Row

PROJECT = ProjectId("proj_1")


class Scraped:
    """A router's metrics over a real dispatcher, scraped and parsed as Prometheus does."""

    def __init__(self, *, control_stale_s: float | None = 0.0) -> None:
        self.dispatcher = Dispatcher(queue_timeout_s=30.0)
        self.catalog = Catalog()
        self.metrics = RouterMetrics(
            statistics=self.dispatcher.statistics, catalog=lambda: self.catalog, control_stale_s=lambda: control_stale_s
        )

    def samples(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        text = generate_latest(self.metrics.registry).decode()
        found = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]
        assert len({frozenset(sample.labels.items()) for sample in found}) == len(found), "a series appears twice"
        return {frozenset(sample.labels.items()): sample.value for sample in found}

    def value(self, name: str, **labels: str) -> float:
        return self.samples(name)[frozenset(labels.items())]


def publish(scraped: Scraped, *names: tuple[AgentId, str]) -> None:
    """Agents of `CHAT` under the given names."""
    endpoint = Endpoint(endpoint=CHAT, project=PROJECT, slug="chat", model="tiny")
    agents = {agent: enrolled(agent) for agent, _ in names}
    scraped.catalog = Catalog(
        endpoints={CHAT: endpoint},
        agents={agent: replace(agents[agent], name=name) for agent, name in names},
    )
    scraped.dispatcher.set_registered(scraped.catalog.agents, now=0.0)


def test_every_row_is_scraped_under_its_name_and_kind_and_nothing_else_is() -> None:
    scraped = Scraped()
    metrics = scraped.metrics
    metrics.requests.labels("p", "e", "200").inc()
    families = {
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type, family.documentation)
        for family in metrics.registry.collect()
        if family.name.startswith("xim_")
    }
    assert families == {(row.name, str(row.kind), row.help) for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_names_carry_the_program_and_the_unit(row: Row) -> None:
    assert row.name.startswith("xim_router_")
    assert row.name.endswith("_total") == (row.kind is Kind.COUNTER)
    assert bool(row.buckets) == (row.kind is Kind.HISTOGRAM)
    assert list(row.buckets) == sorted(row.buckets)
    assert row.help.endswith(".")


def test_no_series_tells_when_it_was_made() -> None:
    scraped = Scraped()
    scraped.metrics.requests.labels("p", "e", "200").inc()
    assert b"_created" not in generate_latest(scraped.metrics.registry)


def test_two_routers_in_one_process_count_apart() -> None:
    one, two = Scraped(), Scraped()
    one.metrics.lease_expired.inc()
    assert one.value("xim_router_lease_expired_total") == 1.0
    assert two.value("xim_router_lease_expired_total") == 0.0


def test_events_are_counted_by_their_labels() -> None:
    scraped = Scraped()
    metrics = scraped.metrics
    metrics.requests.labels(PROJECT, "chat", "queue_full").inc()
    metrics.retries.labels(RetryReason.AGENT_LOST).inc()
    metrics.queue_wait_seconds.labels(QueueOutcome.ASSIGNED).observe(0.7)
    metrics.client_disconnects.labels(ClientPhase.PARKED).inc(2)
    assert scraped.value("xim_router_requests_total", project=PROJECT, endpoint="chat", code="queue_full") == 1.0
    assert scraped.value("xim_router_retries_total", reason="agent_lost") == 1.0
    assert scraped.value("xim_router_queue_wait_seconds_bucket", outcome="assigned", le="0.5") == 0.0
    assert scraped.value("xim_router_queue_wait_seconds_bucket", outcome="assigned", le="1.0") == 1.0
    assert scraped.value("xim_router_client_disconnects_total", phase="parked") == 2.0


def test_the_hot_path_adds_to_plain_integers() -> None:
    scraped = Scraped()
    hot = scraped.metrics.hot
    hot.relayed_chunks += 3
    hot.relayed_bytes += 600
    hot.wire_messages_received += 2
    hot.wire_messages_sent += 1
    hot.fenced_messages += 4
    hot.buffered_bytes += 500
    hot.buffered_bytes -= 100
    assert scraped.value("xim_router_relayed_chunks_total") == 3.0
    assert scraped.value("xim_router_relayed_bytes_total") == 600.0
    assert scraped.value("xim_router_wire_messages_total", direction="received") == 2.0
    assert scraped.value("xim_router_wire_messages_total", direction="sent") == 1.0
    assert scraped.value("xim_router_fenced_messages_total") == 4.0
    assert scraped.value("xim_router_buffered_bytes") == 400.0


def test_entries_fall_into_the_bucket_that_holds_them() -> None:
    scraped = Scraped()
    sizes = [1, 1, 2, 3, 4, 5, 8, 9, 256, 257, 5_000]
    for entries in sizes:
        scraped.metrics.hot.count_entries(entries)
    for bound in ENTRIES_BUCKETS:
        expected = sum(size <= bound for size in sizes)
        assert scraped.value("xim_router_entries_per_message_bucket", le=str(bound)) == expected
    assert scraped.value("xim_router_entries_per_message_bucket", le="+Inf") == len(sizes)
    assert scraped.value("xim_router_entries_per_message_count") == len(sizes)
    assert scraped.value("xim_router_entries_per_message_sum") == sum(sizes)


def test_what_the_dispatcher_holds_is_asked_for_at_the_scrape() -> None:
    scraped = Scraped()
    publish(scraped, (A, "node-1"))
    dispatcher = scraped.dispatcher
    dispatcher.agent_up(view(A, capacity=2), now=0.0)
    for number in range(5):
        dispatcher.submit(req(number), CHAT, now=0.0)
    assert scraped.value("xim_router_queue_depth", project=PROJECT, endpoint="chat") == 3.0
    assert scraped.value("xim_router_in_flight", project=PROJECT, agent="node-1") == 2.0
    assert scraped.value("xim_router_capacity", project=PROJECT, agent="node-1") == 2.0
    assert scraped.value("xim_router_agents", state="ready") == 1.0
    assert scraped.value("xim_router_agents_held_back") == 0.0
    dispatcher.refused(req(0), 2, now=0.0)
    assert scraped.value("xim_router_agents_held_back") == 1.0


def test_every_state_has_a_series_from_the_start() -> None:
    scraped = Scraped()
    publish(scraped, (A, "node-1"))
    states = scraped.samples("xim_router_agents")
    assert {dict(labels)["state"] for labels in states} == {*AgentState, "disconnected"}
    assert scraped.value("xim_router_agents", state="disconnected") == 1.0


def test_agents_of_one_name_are_added_up() -> None:
    scraped = Scraped()
    publish(scraped, (A, "node"), (B, "node"))
    for agent in (A, B):
        scraped.dispatcher.agent_up(view(agent, capacity=4), now=0.0)
    assert scraped.value("xim_router_capacity", project=PROJECT, agent="node") == 8.0


def test_what_left_the_catalog_is_counted_as_unknown() -> None:
    scraped = Scraped()
    publish(scraped, (A, "node"))
    scraped.dispatcher.submit(req(1), CHAT, now=0.0)
    scraped.catalog = Catalog()
    scraped.dispatcher.agent_up(view(C), now=0.0)
    assert scraped.value("xim_router_queue_depth", project="unknown", endpoint="unknown") == 1.0
    assert scraped.value("xim_router_in_flight", project="unknown", agent="unknown") == 0.0


def test_the_age_of_the_catalog_is_nan_before_there_is_one() -> None:
    assert isnan(Scraped(control_stale_s=None).value("xim_router_control_stale_seconds"))
    assert Scraped(control_stale_s=42.0).value("xim_router_control_stale_seconds") == 42.0


def test_the_process_itself_is_measured() -> None:
    assert Scraped().value("process_cpu_seconds_total") > 0.0
