"""What is asked of each subject, and what one measurement of it holds. How it is asked: load.py.

Three kinds of load. *Streams*: so many streams run at a constant pace, and the CPU of a window in their middle is
divided by the events that arrived in it. *Requests*: so many clients ask again as soon as they have their answer, and
the CPU of the whole run is divided by the answers. *Paced*: so many clients, each with one stream of an engine's pace
after the other, far below what the machine carries; the latencies of a window in their middle are read.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import product

CHUNK_BYTES = 216
INTERVAL_MS = 10.0
SLOW_INTERVAL_MS = 100.0
SPREAD_SHARES = {"lockstep": 0.0, "spread": 0.7}
"""Share of a step over which the engine writes the chunks of all streams one after the other."""
STREAM_COUNTS = (64, 128, 256)
REQUEST_CHUNKS = 64
PACED = (
    (1, "spread", 10.0),
    (64, "spread", 10.0),
    (64, "lockstep", 10.0),
    (256, "spread", 10.0),
    (1024, "spread", 40.0),
)
"""Clients, mode, and milliseconds between two chunks of a stream.

1,024 streams bring as many chunks per second as 256 do, at the pace of an engine that is that full. With chunks spread
over the step the fake engine reads a new request only when the step is over, up to 7 ms later: the time to first token
at 64 clients is taken in lockstep too, where the engine is in the way for half a millisecond."""
_LONE_CHUNKS = 8
"""One client asks for short streams, so that it asks often enough."""


PERCENTILES = ("p50", "p99")


class Kind(StrEnum):
    """The kinds of load."""

    STREAMS = "streams"
    REQUESTS = "requests"
    PACED = "paced"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One load: `clients` of a kind. Chunks and interval are those of the engine; a JSON answer has neither."""

    name: str
    kind: Kind
    clients: int
    mode: str = "lockstep"
    chunks: int = REQUEST_CHUNKS
    interval_ms: float = INTERVAL_MS
    stream: bool = True
    slow_too: bool = True
    """Asked also of a subject that relays fewer chunks per second than most loads here bring."""

    def paced_for(self, *, slow: bool) -> "Scenario":
        """This load, or for a slow subject one that it carries: as many streams, a tenth of the chunks."""
        fits = not slow or self.kind is not Kind.STREAMS or self.clients == 1
        return self if fits else replace(self, interval_ms=SLOW_INTERVAL_MS)

    @property
    def spread_ms(self) -> float:
        """Time of each step over which the engine writes."""
        return SPREAD_SHARES[self.mode] * self.interval_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """What many times had in common, in seconds."""

    count: int
    p50_s: float
    p99_s: float
    max_s: float

    def ms(self, percentile: str) -> float:
        """`p50` or `p99`, in milliseconds."""
        return 1000 * {"p50": self.p50_s, "p99": self.p99_s}[percentile]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One scenario on one subject, once. Times in seconds; `units` are relayed events, or answered requests."""

    subject: str
    scenario: str
    repeat: int
    window_s: float
    units: int = 0
    expected_units: float | None = None
    cpu_s: dict[str, float] = field(default_factory=dict)
    client_share: float = 0.0
    """CPU of the client itself in the window, as a share of one core: near 1 the client is what is measured."""
    ttft: Latency | None = None
    gaps: Latency | None = None
    """Time between two reads of one stream."""
    faults: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """Relayed events or answered requests per second."""
        return self.units / self.window_s if self.units else None

    def ttft_ms(self, percentile: str) -> float | None:
        """`p50` or `p99` of the time to first token, in milliseconds."""
        return None if self.ttft is None else self.ttft.ms(percentile)

    def gap_ms(self, percentile: str) -> float | None:
        """`p50` or `p99` of the time between two reads of a stream, in milliseconds."""
        return None if self.gaps is None else self.gaps.ms(percentile)

    def cpu_us_per_unit(self, part: str) -> float | None:
        """Microseconds of CPU that this part of the subject spent per relayed event or answered request."""
        return self.cpu_s[part] / self.units * 1e6 if self.units and part in self.cpu_s else None


def all_scenarios() -> list[Scenario]:
    """Every load, in the order in which they run."""
    return [*_stream_scenarios(), *_request_scenarios(), *_paced_scenarios()]


def _stream_scenarios() -> list[Scenario]:
    # One stream alone has nothing to be spread among.
    loads = [(1, "lockstep"), *product(STREAM_COUNTS, SPREAD_SHARES)]
    return [
        Scenario(
            name=f"{streams} streams, {mode}" if streams > 1 else "1 stream",
            kind=Kind.STREAMS,
            clients=streams,
            mode=mode,
            slow_too=streams in (1, 128),
        )
        for streams, mode in loads
    ]


def _request_scenarios() -> list[Scenario]:
    streams = [
        Scenario(
            name=f"stream of {REQUEST_CHUNKS} chunks, 64 clients, {mode}",
            kind=Kind.REQUESTS,
            clients=64,
            mode=mode,
            slow_too=mode == "lockstep",
        )
        for mode in SPREAD_SHARES
    ]
    return [
        *streams,
        Scenario(name="JSON answer of 1 kB, 16 clients", kind=Kind.REQUESTS, clients=16, stream=False),
        Scenario(name="JSON answer of 1 kB, 64 clients", kind=Kind.REQUESTS, clients=64, stream=False),
    ]


def _paced_scenarios() -> list[Scenario]:
    return [
        Scenario(
            name=f"{clients} paced at {interval_ms:.0f} ms, {mode}",
            kind=Kind.PACED,
            clients=clients,
            mode=mode,
            chunks=REQUEST_CHUNKS if clients > 1 else _LONE_CHUNKS,
            interval_ms=interval_ms,
            slow_too=clients == 1,
        )
        for clients, mode, interval_ms in PACED
    ]


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of the values are not above, between two of them where it falls between."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def latency(values: Sequence[float]) -> Latency | None:
    """Their summary, or None if there are none."""
    if not values:
        return None
    return Latency(count=len(values), p50_s=percentile(values, 50), p99_s=percentile(values, 99), max_s=max(values))
