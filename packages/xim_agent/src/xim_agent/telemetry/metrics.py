"""Every metric of the agent as a row, and where its value comes from.

Events are counted where they happen. What the hot path counts are plain integers, read when somebody asks: a counter
with a lock for each chunk would cost as much as sending it.
"""

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from xim_agent.engine.startup import Progress
from xim_agent.lifecycle import AgentState
from xim_agent.telemetry.gpus import GpuReading

PREFIX = "xim_agent_"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricRow:
    """One metric, as the reference page shows it."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


ROWS: tuple[MetricRow, ...] = (
    MetricRow(name="xim_agent_info", kind="gauge", help="Always 1; says which version runs.", labels=("version",)),
    MetricRow(name="xim_agent_state", kind="gauge", help="1 for the state the agent is in.", labels=("state",)),
    MetricRow(name="xim_agent_capacity", kind="gauge", help="Most streams at once."),
    MetricRow(name="xim_agent_streams_total", kind="counter", help="Streams that ended.", labels=("outcome",)),
    MetricRow(name="xim_agent_stream_stalled_total", kind="counter", help="Streams without credit for too long."),
    MetricRow(name="xim_agent_lease_renewals_total", kind="counter", help="Leases renewed by a router."),
    MetricRow(name="xim_agent_lease_expired_total", kind="counter", help="Leases lost before they were renewed."),
    MetricRow(name="xim_agent_refreshes_total", kind="counter", help="Credentials refreshed.", labels=("outcome",)),
    MetricRow(name="xim_agent_engine_starts_total", kind="counter", help="Starts of vLLM."),
    MetricRow(name="xim_agent_engine_restarts_total", kind="counter", help="Starts of vLLM after it ended by itself."),
    MetricRow(name="xim_agent_engine_start_seconds", kind="gauge", help="How long the last start took."),
    MetricRow(name="xim_agent_streams_in_flight", kind="gauge", help="Streams accepted and not yet ended."),
    MetricRow(name="xim_agent_chunks_total", kind="counter", help="Pieces of answers read from the engine."),
    MetricRow(name="xim_agent_chunk_bytes_total", kind="counter", help="Bytes of answers read from the engine."),
    MetricRow(name="xim_agent_messages_total", kind="counter", help="Messages of answers sent to routers."),
    MetricRow(
        name="xim_agent_entries_per_message",
        kind="histogram",
        help="Chunks, starts and ends that one message carried; few messages are what makes streams cheap.",
    ),
    MetricRow(name="xim_agent_links_total", kind="counter", help="Links to routers that came up whole."),
    MetricRow(name="xim_agent_link_paused_total", kind="counter", help="Pauses until a router had received more."),
    MetricRow(name="xim_agent_kept_bytes", kind="gauge", help="Bytes kept for a link that may be lost."),
    MetricRow(
        name="xim_agent_moe_tunings_total",
        kind="counter",
        help="Searches for MoE kernel parameters.",
        labels=("outcome",),
    ),
    MetricRow(name="xim_agent_moe_tuning_ratio", kind="gauge", help="Part of the running search that is done."),
    MetricRow(
        name="xim_agent_engine_start_ratio",
        kind="gauge",
        help="Part of the start's stage, where vLLM tells it.",
        labels=("stage",),
    ),
    MetricRow(
        name="xim_agent_gpu_memory_used_bytes", kind="gauge", help="Memory in use, by anybody.", labels=("gpu", "name")
    ),
    MetricRow(name="xim_agent_gpu_memory_bytes", kind="gauge", help="Memory it has.", labels=("gpu", "name")),
    MetricRow(
        name="xim_agent_gpu_utilization_ratio", kind="gauge", help="Part of the time it worked.", labels=("gpu", "name")
    ),
    MetricRow(name="xim_agent_gpu_power_watts", kind="gauge", help="Power it draws.", labels=("gpu", "name")),
    MetricRow(name="xim_agent_unacknowledged_bytes", kind="gauge", help="Bytes sent and not yet received by a router."),
    MetricRow(
        name="xim_agent_tasks",
        kind="gauge",
        help="Tasks of the event loop: a few of the agent's, and one for each stream that waits for its client.",
    ),
    MetricRow(
        name="xim_agent_memory_blocks",
        kind="gauge",
        help="Blocks of memory that Python uses now, of any size. Resident memory keeps the height of the "
        "highest load; this falls back, and grows from day to day only where something leaks.",
    ),
)
_HELP = {row.name: row.help for row in ROWS}


class WriterReading(Protocol):
    """What a link's writer has sent."""

    @property
    def messages(self) -> int: ...
    @property
    def entries(self) -> int: ...
    @property
    def buckets(self) -> tuple[int, ...]: ...


class SessionReading(Protocol):
    """What a link's session holds."""

    @property
    def streams(self) -> int: ...
    @property
    def kept_bytes(self) -> int: ...
    @property
    def unacknowledged_bytes(self) -> int: ...
    @property
    def link_pauses(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkReading:
    """One connection to a router, read now."""

    writer: WriterReading
    session: SessionReading
    links: int


class StreamCounters:
    """Counted per chunk, in the loop's thread alone."""

    __slots__ = ("chunk_bytes", "chunks")

    def __init__(self) -> None:
        self.chunks = 0
        self.chunk_bytes = 0


class AgentMetrics:
    """The metrics of one agent, in a registry of their own. `counters` is for the hot path."""

    def __init__(self, *, version: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.counters = StreamCounters()
        self._links: Callable[[], Sequence[LinkReading]] = tuple
        self.gpus: Sequence[GpuReading] = ()
        """As last read."""
        self._gauge("info", "version").labels(version).set(1)
        self._state = self._gauge("state", "state")
        self.capacity = self._gauge("capacity")
        self.streams = self._counter("streams_total", "outcome")
        self.stalled = self._counter("stream_stalled_total")
        self.renewals = self._counter("lease_renewals_total")
        self.expirations = self._counter("lease_expired_total")
        self.refreshes = self._counter("refreshes_total", "outcome")
        self.engine_starts = self._counter("engine_starts_total")
        self.engine_restarts = self._counter("engine_restarts_total")
        self.engine_start_seconds = self._gauge("engine_start_seconds")
        self.moe_tunings = self._counter("moe_tunings_total", "outcome")
        self.moe_tuning_ratio = self._gauge("moe_tuning_ratio")
        self._start_ratio = self._gauge("engine_start_ratio", "stage")
        self.registry.register(_Readings(self))
        self.entered(AgentState.UNENROLLED)

    def entered(self, state: AgentState) -> None:
        """The agent is in `state` now."""
        for each in AgentState:
            self._state.labels(each.value).set(1 if each is state else 0)

    def start_progress(self, progress: Progress | None) -> None:
        """How far the engine's start is; None when it does not start."""
        self._start_ratio.clear()
        if progress is not None and progress.percent is not None:
            self._start_ratio.labels(progress.stage.value).set(progress.percent / 100)

    def read_links(self, source: Callable[[], Sequence[LinkReading]]) -> None:
        """Where the readings of the links come from; called at every scrape, in the loop's thread."""
        self._links = source

    def links(self) -> Sequence[LinkReading]:
        """The links' readings now."""
        return self._links()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, _HELP[PREFIX + name], labels, registry=self.registry)

    def _counter(self, name: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, _HELP[PREFIX + name], labels, registry=self.registry)


class _Readings:
    """Turns plain integers into metrics when somebody asks."""

    def __init__(self, metrics: AgentMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        counters, links = self._metrics.counters, self._metrics.links()
        yield _counted("chunks_total", counters.chunks)
        yield _counted("chunk_bytes_total", counters.chunk_bytes)
        yield _counted("messages_total", sum(link.writer.messages for link in links))
        yield _counted("links_total", sum(link.links for link in links))
        yield _counted("link_paused_total", sum(link.session.link_pauses for link in links))
        yield _measured("streams_in_flight", sum(link.session.streams for link in links))
        yield _measured("kept_bytes", sum(link.session.kept_bytes for link in links))
        yield _measured("unacknowledged_bytes", sum(link.session.unacknowledged_bytes for link in links))
        yield _measured("tasks", _tasks())
        yield _measured("memory_blocks", sys.getallocatedblocks())
        yield _entries_per_message([link.writer for link in links])
        yield from _gpu_metrics(self._metrics.gpus)


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0  # read outside of any loop


def _counted(name: str, value: int) -> Metric:
    return CounterMetricFamily(PREFIX + name, _HELP[PREFIX + name], value=value)


def _measured(name: str, value: int) -> Metric:
    return GaugeMetricFamily(PREFIX + name, _HELP[PREFIX + name], value=value)


def _gpu_metrics(gpus: Sequence[GpuReading]) -> Iterator[Metric]:
    """One family per figure, with a sample for every GPU that tells it."""
    figures: dict[str, Callable[[GpuReading], float | None]] = {
        "gpu_memory_used_bytes": lambda gpu: gpu.memory_used_bytes,
        "gpu_memory_bytes": lambda gpu: gpu.memory_total_bytes,
        "gpu_utilization_ratio": lambda gpu: gpu.utilization,
        "gpu_power_watts": lambda gpu: gpu.power_watts,
    }
    for name, figure in figures.items():
        family = GaugeMetricFamily(PREFIX + name, _HELP[PREFIX + name], labels=("gpu", "name"))
        for gpu in gpus:
            value = figure(gpu)
            if value is not None:
                family.add_metric((gpu.gpu, gpu.name), value)
        yield family


def _entries_per_message(writers: Iterable[WriterReading]) -> Metric:
    """Bucket i of a writer counts messages with at most 2^i entries and more than the bucket before."""
    name = PREFIX + "entries_per_message"
    writers = list(writers)
    sizes = max((len(writer.buckets) for writer in writers), default=0)
    total, buckets = 0, []
    for size in range(sizes):
        total += sum(writer.buckets[size] for writer in writers if size < len(writer.buckets))
        buckets.append((f"{2**size:.1f}", float(total)))
    buckets.append(("+Inf", float(sum(writer.messages for writer in writers))))
    return HistogramMetricFamily(name, _HELP[name], buckets=buckets, sum_value=sum(each.entries for each in writers))
