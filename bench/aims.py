"""What the project has set itself, and how a run compares: the one table of limits.

A limit is judged only where both sides were measured in every repeat of the same run; anything else is "not measured".
"Not decided" is a difference that came out as nothing or less: what it was taken from varies by more than it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

from bench.record import BASELINE, OURS, Results
from bench.scenario import PERCENTILES, Measurement

RUST_ROUTERS = (BASELINE, "sglang-router")
HEAVY = "litellm"

LOCKSTEP_CHUNK = 0.75
SPREAD_CHUNK = 0.9
SHORT_REQUEST = 1.0
TIMES_CHEAPER_THAN_HEAVY = 40.0
ADDED_TTFT = 1.2
WORKERS_CHUNK = 1.15
IDLE_STREAM_KIB = 40.0

CHUNK_LIMITS = {
    "128 streams, lockstep": LOCKSTEP_CHUNK,
    "128 streams, spread": SPREAD_CHUNK,
    "256 streams, lockstep": LOCKSTEP_CHUNK,
    "256 streams, spread": SPREAD_CHUNK,
}
"""CPU per relayed chunk beside the baseline. One stream alone has no limit; its cost is in the tables."""
SHORT_REQUESTS = ("stream of 64 chunks, 64 clients, lockstep", "stream of 64 chunks, 64 clients, spread")
HEAVY_SCENARIOS = ("128 streams, lockstep", "128 streams, spread")
TTFT_SCENARIOS = ("64 paced at 10 ms, spread", "64 paced at 10 ms, lockstep")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One aim, as the cells of a row."""

    what: str
    limit: str
    measured: str = "-"
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """In words."""
        if self.met is None:
            return "not measured" if self.measured == "-" else "not decided"
        return "met" if self.met else "**not met**"


def judge(results: Results) -> list[Judged]:
    """Every aim, in the order in which the tables have them."""
    return [*_chunks(results), *_workers(results), *_first_token(results), _memory(results)]


def _chunks(results: Results) -> Iterator[Judged]:
    for scenario, limit in [*CHUNK_LIMITS.items(), *product(SHORT_REQUESTS, [SHORT_REQUEST])]:
        unit = "request" if scenario in SHORT_REQUESTS else "chunk"
        ours, theirs = (_median(results, scenario, name, _router_us) for name in (OURS, BASELINE))
        yield _at_most(f"CPU per {unit} beside {BASELINE}, {scenario}", limit, ours, theirs, "us")
    for scenario in HEAVY_SCENARIOS:
        ours, theirs = (_median(results, scenario, name, _router_us) for name in (OURS, HEAVY))
        yield _at_least(
            f"{HEAVY}'s CPU per chunk beside ours, {scenario}", TIMES_CHEAPER_THAN_HEAVY, theirs, ours, "us"
        )


def _workers(results: Results) -> Iterator[Judged]:
    several = [name for name in results.routers if name.startswith(f"{OURS}, ")] or [f"{OURS}, several workers"]
    for name in several:
        for scenario in CHUNK_LIMITS:
            ours, one = (_median(results, scenario, subject, _router_us) for subject in (name, OURS))
            yield _at_most(f"CPU per chunk of {name} beside one, {scenario}", WORKERS_CHUNK, ours, one, "us")


def _first_token(results: Results) -> Iterator[Judged]:
    for scenario, name in product(TTFT_SCENARIOS, PERCENTILES):
        value = partial(Measurement.ttft_ms, percentile=name)
        ours = results.median(results.added(scenario, OURS, value))
        others = [results.median(results.added(scenario, router, value)) for router in RUST_ROUTERS]
        known = [found for found in others if found is not None]
        # Of one alone nobody knows whether it is the better one.
        best = min(known) if len(known) == len(RUST_ROUTERS) else None
        what = f"added time to first token, {name}, beside the better of the Rust routers, {scenario}"
        yield _at_most(what, ADDED_TTFT, ours, best, "ms")


def _memory(results: Results) -> Judged:
    kib = results.median(results.footprint(OURS, lambda found: found.per_idle_stream.get("router", 0.0) / 1024 or None))
    what, limit = "memory of the router per open, idle stream", f"under {IDLE_STREAM_KIB:.0f} KiB"
    if kib is None:
        return Judged(what=what, limit=limit)
    return Judged(what=what, limit=limit, measured=f"{kib:.1f} KiB", met=kib < IDLE_STREAM_KIB)


def _router_us(measurement: Measurement) -> float | None:
    return measurement.cpu_us_per_unit("router")


def _median(
    results: Results, scenario: str, subject: str, value: Callable[[Measurement], float | None]
) -> float | None:
    return results.median(results.series(scenario, subject, value))


def _at_most(what: str, limit: float, ours: float | None, theirs: float | None, unit: str) -> Judged:
    words = f"at most {limit:.2f} x"
    if ours is None or theirs is None:
        return Judged(what=what, limit=words)
    if min(ours, theirs) <= 0:
        # A difference that is nothing, or less, is lost in the spread of what it was taken from.
        return Judged(what=what, limit=words, measured=_beside("no ratio", ours, theirs, unit))
    measured = _beside(f"{ours / theirs:.2f} x", ours, theirs, unit)
    return Judged(what=what, limit=words, measured=measured, met=ours <= limit * theirs)


def _at_least(what: str, limit: float, theirs: float | None, ours: float | None, unit: str) -> Judged:
    words = f"at least {limit:.0f} x"
    if ours is None or theirs is None:
        return Judged(what=what, limit=words)
    return Judged(
        what=what,
        limit=words,
        measured=_beside(f"{theirs / ours:.0f} x", theirs, ours, unit),
        met=theirs >= limit * ours,
    )


def _beside(ratio: str, first: float, second: float, unit: str) -> str:
    digits = 2 if unit == "ms" else 1
    return f"{ratio} ({first:.{digits}f} beside {second:.{digits}f} {unit})"
