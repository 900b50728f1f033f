"""The router's metrics: a registry of its own, filled from three sources.

Events that are rare, once per request at most, go to `prometheus_client` objects. The hot path adds to plain integers
(`HotCounters`), since a call into the client costs as much as relaying a chunk does. What the dispatcher and the
publisher know is asked for at scrape time. Rows, labels and buckets stand in `rows.py`.
"""

import asyncio
import sys
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from xim_protocol.ids import AgentId, EndpointId
from xim_protocol.messages import AgentState
from xim_router.dispatch.catalog import Catalog
from xim_router.dispatch.statistics import DispatcherStatistics
from xim_router.telemetry import rows
from xim_router.telemetry.rows import Row

DISCONNECTED = "disconnected"
"""The `state` of an agent without a session, beside those of `AgentState`."""

UNKNOWN = "unknown"
"""Stands for a project, endpoint or agent that left the catalog while requests were still there."""


class QueueOutcome(StrEnum):
    """How a parked request left its queue."""

    ASSIGNED = "assigned"
    TIMED_OUT = "timed_out"
    WITHDRAWN = "withdrawn"
    REJECTED = "rejected"


class RetryReason(StrEnum):
    """Why a request was dispatched again."""

    AGENT_LOST = "agent_lost"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    FAILED = "failed"
    REFUSED = "refused"


class ClientPhase(StrEnum):
    """How far a request was when its client left."""

    BODY = "body"
    PARKED = "parked"
    DISPATCHED = "dispatched"
    """In flight, before the commit point."""
    ANSWERING = "answering"


class StallCause(StrEnum):
    """What a request that stands still waits for."""

    CLIENT = "client"
    """Bytes wait and the client takes none."""
    LINK = "link"
    """The link to the agent is lost and its lease is not over."""
    ENGINE = "engine"
    """The link is up and nothing comes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkReading:
    """What requests and the sessions with agents hold now."""

    exchanges: int = 0
    streams: int = 0
    credit_owed_bytes: int = 0


class HotCounters:
    """Plain integers for what happens per chunk or per message; read at scrape time. One event loop writes them."""

    __slots__ = (
        "buffered_bytes",
        "entries_by_bucket",
        "entries_total",
        "fenced_messages",
        "relayed_bytes",
        "relayed_chunks",
        "stalled_s",
        "unsent_bytes",
        "wire_messages_received",
        "wire_messages_sent",
    )

    def __init__(self) -> None:
        self.relayed_chunks = 0
        self.relayed_bytes = 0
        self.wire_messages_received = 0
        self.wire_messages_sent = 0
        self.fenced_messages = 0
        self.buffered_bytes = 0
        """Held by responses."""
        self.unsent_bytes: Callable[[], int] = lambda: self.buffered_bytes
        """All that waits, what connections hold included; asked at scrape time."""
        self.stalled_s = dict.fromkeys(StallCause, 0.0)
        self.entries_total = 0
        self.entries_by_bucket = [0] * (len(rows.ENTRIES_BUCKETS) + 1)

    def count_entries(self, entries: int) -> None:
        """Note one message of chunks with `entries` entries, at least 1."""
        self.entries_total += entries
        # The buckets are powers of two: 1, 2, 3-4, 5-8 ... and the rest.
        self.entries_by_bucket[min((entries - 1).bit_length(), len(self.entries_by_bucket) - 1)] += 1


class RouterMetrics:
    """Every row, ready to be counted; one per router process."""

    def __init__(
        self,
        *,
        statistics: Callable[[], DispatcherStatistics],
        catalog: Callable[[], Catalog],
        control_stale_s: Callable[[], float | None],
    ) -> None:
        """The three callables are asked at every scrape and must be cheap and not wait."""
        # Process-wide, and meant so: the extra `_created` series double the size of a scrape and nothing reads them.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client has no types here
        self.registry = CollectorRegistry()
        self.before_scrape: Callable[[], None] = lambda: None
        """Called first at every scrape: by then everything is to be counted."""
        self.registry.register(_First(self))
        self.hot = HotCounters()
        self.requests = self._counter(rows.REQUESTS)
        self.requests_refused = self._counter(rows.REQUESTS_REFUSED)
        self._refused = cache(self.requests_refused.labels)
        self.request_seconds = self._histogram(rows.REQUEST_SECONDS)
        self.ttft_seconds = self._histogram(rows.TTFT_SECONDS)
        self.queue_wait_seconds = self._histogram(rows.QUEUE_WAIT_SECONDS)
        self.retries = self._counter(rows.RETRIES)
        self.lease_expired = self._counter(rows.LEASE_EXPIRED)
        self.link_lost = self._counter(rows.LINK_LOST)
        self.credit_stalled = self._counter(rows.CREDIT_STALLED)
        self.client_stalled = self._counter(rows.CLIENT_STALLED)
        self.protocol_faults = self._counter(rows.PROTOCOL_FAULTS)
        self.handshakes_refused = self._counter(rows.HANDSHAKES_REFUSED)
        self.dropped_reports = self._counter(rows.DROPPED_REPORTS)
        self.client_disconnects = self._counter(rows.CLIENT_DISCONNECTS)
        self.read_links: Callable[[], LinkReading] = LinkReading
        """Set by who has the broker, which is built from the metrics."""
        self.registry.register(_HotCollector(self.hot))
        self.registry.register(_LinkCollector(self))
        self.registry.register(_StateCollector(statistics, catalog, control_stale_s))
        ProcessCollector(registry=self.registry)

    def refused(self, code: str) -> None:
        """A request that no endpoint was given was answered with the error `code` of the one table."""
        self._refused(code).inc()

    def _counter(self, row: Row) -> Counter:
        return Counter(row.name, row.help, row.labels, registry=self.registry)

    def _histogram(self, row: Row) -> Histogram:
        return Histogram(row.name, row.help, row.labels, buckets=row.buckets, registry=self.registry)


class _First(Collector):
    """Registered before all others, so that it is asked before them."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        """Nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        self._metrics.before_scrape()
        yield from ()


class _HotCollector(Collector):
    """Reads the plain integers."""

    def __init__(self, hot: HotCounters) -> None:
        self._hot = hot

    def collect(self) -> Iterator[Metric]:
        hot = self._hot
        yield _counted(rows.RELAYED_CHUNKS, hot.relayed_chunks)
        yield _counted(rows.RELAYED_BYTES, hot.relayed_bytes)
        yield _counted(rows.FENCED_MESSAGES, hot.fenced_messages)
        messages = CounterMetricFamily(
            rows.WIRE_MESSAGES.name, rows.WIRE_MESSAGES.help, labels=rows.WIRE_MESSAGES.labels
        )
        messages.add_metric(["received"], hot.wire_messages_received)
        messages.add_metric(["sent"], hot.wire_messages_sent)
        yield messages
        yield _measured(rows.BUFFERED_BYTES, hot.unsent_bytes())
        stalled = CounterMetricFamily(
            rows.STALLED_SECONDS.name, rows.STALLED_SECONDS.help, labels=rows.STALLED_SECONDS.labels
        )
        for cause, seconds in hot.stalled_s.items():
            stalled.add_metric([cause], seconds)
        yield stalled
        yield self._entries()

    def _entries(self) -> Metric:
        row = rows.ENTRIES_PER_MESSAGE
        bounds = [str(bound) for bound in row.buckets] + ["+Inf"]
        buckets, total = [], 0
        for bound, count in zip(bounds, self._hot.entries_by_bucket, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return HistogramMetricFamily(row.name, row.help, buckets=buckets, sum_value=self._hot.entries_total)


class _LinkCollector(Collector):
    """Asks the broker, and counts the loop's tasks and the process's memory."""

    def __init__(self, metrics: "RouterMetrics") -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask parts that are not built yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        reading = self._metrics.read_links()
        yield _measured(rows.CREDIT_OWED_BYTES, reading.credit_owed_bytes)
        yield _measured(rows.EXCHANGES, reading.exchanges)
        yield _measured(rows.STREAMS, reading.streams)
        yield _measured(rows.TASKS, _tasks())
        yield _measured(rows.MEMORY_BLOCKS, sys.getallocatedblocks())


class _StateCollector(Collector):
    """Asks the dispatcher, the catalog and the publisher."""

    def __init__(
        self,
        statistics: Callable[[], DispatcherStatistics],
        catalog: Callable[[], Catalog],
        control_stale_s: Callable[[], float | None],
    ) -> None:
        self._statistics, self._catalog, self._control_stale_s = statistics, catalog, control_stale_s

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask parts that are not built yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        statistics, catalog = self._statistics(), self._catalog()
        depth: Tally[tuple[str, ...]] = Tally()
        for endpoint, parked in statistics.parked_by_endpoint.items():
            depth[_endpoint_names(catalog, endpoint)] += parked
        yield _tallied(rows.QUEUE_DEPTH, depth)
        # Names are an operator's and may repeat, where a scrape must not: equal ones are added up.
        in_flight: Tally[tuple[str, ...]] = Tally()
        capacity: Tally[tuple[str, ...]] = Tally()
        states: Tally[tuple[str, ...]] = Tally({(state,): 0 for state in (*AgentState, DISCONNECTED)})
        for agent, node in statistics.agents.items():
            in_flight[_agent_names(catalog, agent)] += node.in_flight
            capacity[_agent_names(catalog, agent)] += node.capacity
            states[(node.state or DISCONNECTED,)] += 1
        yield _tallied(rows.IN_FLIGHT, in_flight)
        yield _tallied(rows.CAPACITY, capacity)
        yield _tallied(rows.AGENTS, states)
        yield _measured(rows.AGENTS_HELD_BACK, sum(node.held_back for node in statistics.agents.values()))
        stale_s = self._control_stale_s()
        yield _measured(rows.CONTROL_STALE_SECONDS, float("nan") if stale_s is None else stale_s)


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0  # scraped outside of any loop


def _counted(row: Row, value: float) -> Metric:
    return CounterMetricFamily(row.name, row.help, value=value)


def _measured(row: Row, value: float) -> Metric:
    return GaugeMetricFamily(row.name, row.help, value=value)


def _tallied(row: Row, tally: Tally[tuple[str, ...]]) -> Metric:
    family = GaugeMetricFamily(row.name, row.help, labels=row.labels)
    for names, value in tally.items():
        family.add_metric(names, value)
    return family


def _endpoint_names(catalog: Catalog, endpoint: EndpointId) -> tuple[str, ...]:
    found = catalog.endpoints.get(endpoint)
    return (UNKNOWN, UNKNOWN) if found is None else (found.project, found.slug)


def _agent_names(catalog: Catalog, agent: AgentId) -> tuple[str, ...]:
    found = catalog.agents.get(agent)
    return (UNKNOWN, UNKNOWN) if found is None else (found.project, found.name)
