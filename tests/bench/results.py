"""A run of the bench made of given numbers."""

from typing import Any

from bench.footprint import Footprint
from bench.record import Results
from bench.scenario import Latency, Measurement, all_scenarios

FACTS: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc1234",
    "cpu": "a processor",
    "cores": 2,
    "memory_gib": 8.0,
    "system": "Linux 6",
    "load_before": [0.1, 0.1, 0.1],
    "python": "3.11.0",
    "packages": {"uvloop": "1.0"},
    "took_s": 120,
}
SUBJECTS = ["engine alone", "xim", "vllm-router", "sglang-router", "litellm"]


def results(measurements: list[Measurement], footprints: list[Footprint] | None = None, repeats: int = 2) -> Results:
    """A run of so many repeats with these measurements; its scenarios are those that were measured."""
    measured = {m.scenario for m in measurements}
    return Results(
        facts={**FACTS, "configuration": {"repeats": repeats}},
        versions=dict.fromkeys(SUBJECTS, "1.0"),
        subjects=SUBJECTS,
        scenarios=[scenario for scenario in all_scenarios() if scenario.name in measured],
        measurements=measurements,
        footprints=footprints or [],
        idle={},
        skipped={},
        slow=["litellm"],
    )


def cost(subject: str, scenario: str, *us: float) -> list[Measurement]:
    """One measurement per repeat, in which the router took so many microseconds for each of 1,000 chunks."""
    return [
        Measurement(
            subject=subject, scenario=scenario, repeat=repeat, window_s=1.0, units=1000, cpu_s={"router": value / 1000}
        )
        for repeat, value in enumerate(us)
    ]


def first_token(subject: str, scenario: str, *ms: float, repeats: list[int] | None = None) -> list[Measurement]:
    """One measurement per repeat with that p50; the p99 is three times as long."""
    return [
        Measurement(
            subject=subject,
            scenario=scenario,
            repeat=repeat,
            window_s=1.0,
            units=10,
            ttft=Latency(count=10, p50_s=value / 1000, p99_s=3 * value / 1000, max_s=1.0),
        )
        for repeat, value in zip(repeats or range(len(ms)), ms, strict=True)
    ]
