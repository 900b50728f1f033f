"""The tables and the verdicts that a run is reported by."""

from dataclasses import replace

import pytest

from bench import aims
from bench.footprint import Footprint
from bench.tables import markdown, spread
from tests.bench.results import cost, first_token, results

SPREAD = "128 streams, spread"
TTFT = "64 paced at 10 ms, lockstep"


def verdicts(*measurements: object, footprints: list[Footprint] | None = None) -> dict[str, tuple[str, str]]:
    run = results([m for group in measurements for m in group], footprints)  # type: ignore[attr-defined]
    return {found.what: (found.measured, found.verdict) for found in aims.judge(run)}


def test_a_cell_has_median_least_and_most() -> None:
    assert spread([3.0, 1.0, 2.0], 3) == "2.0 (1.0 - 3.0)"
    assert spread([], 3) == "-"


def test_a_cell_of_fewer_repeats_says_so() -> None:
    assert spread([3.0], 3) == "3.0 (3.0 - 3.0) **1 of 3 runs**"


def test_a_row_has_every_router_and_the_ratio() -> None:
    text = markdown(results([*cost("xim", SPREAD, 10.0, 12.0), *cost("vllm-router", SPREAD, 20.0, 24.0)]))
    assert f"| {SPREAD} | 11.0 (10.0 - 12.0) | 22.0 (20.0 - 24.0) | - | - | 0.50 | - | - |" in text


def test_no_ratio_from_an_incomplete_set() -> None:
    text = markdown(results([*cost("xim", SPREAD, 10.0, 12.0), *cost("vllm-router", SPREAD, 20.0)]))
    assert f"| {SPREAD} | 11.0 (10.0 - 12.0) | 20.0 (20.0 - 20.0) **1 of 2 runs** | - | - | - | - | - |" in text


def test_added_times_stand_beside_what_the_engine_alone_has() -> None:
    text = markdown(results([*first_token("engine alone", TTFT, 1.0, 2.0), *first_token("xim", TTFT, 2.0, 4.0)]))
    assert f"| {TTFT}, p50 | 1.50 (1.00 - 2.00) | - | - | - | 1.50 (1.00 - 2.00) | 10 |" in text
    assert f"| {TTFT}, p99 | 4.50 (3.00 - 6.00) | - | - | - | 4.50 (3.00 - 6.00) | 10 |" in text


def test_chunks_of_paced_clients_are_counted_against_the_engine_alone() -> None:
    text = markdown(results([*first_token("engine alone", TTFT, 1.0, 1.0), *first_token("xim", TTFT, 1.0, 1.0)]))
    assert f"| {TTFT} | 100 | 100 | - | - | - |" in text


def test_what_a_slow_subject_was_not_asked_is_said() -> None:
    text = markdown(results([*cost("xim", "256 streams, spread", 1.0, 1.0), *cost("xim", SPREAD, 1.0, 1.0)]))
    assert "Not asked of litellm, which cannot carry as many chunks per second: 256 streams, spread." in text
    assert f"litellm has one chunk per stream each 100 ms, a tenth of what the others have, in: {SPREAD}." in text


@pytest.mark.parametrize(("ours", "verdict"), [(17.9, "met"), (18.1, "**not met**")])
def test_a_limit_beside_the_baseline(ours: float, verdict: str) -> None:
    found = verdicts(cost("xim", SPREAD, ours, ours), cost("vllm-router", SPREAD, 20.0, 20.0))
    assert found[f"CPU per chunk beside vllm-router, {SPREAD}"] == (
        f"{ours / 20:.2f} x ({ours} beside 20.0 us)",
        verdict,
    )


@pytest.mark.parametrize(("theirs", "verdict"), [(401.0, "met"), (399.0, "**not met**")])
def test_the_heavy_one_costs_at_least_so_many_times_as_much(theirs: float, verdict: str) -> None:
    found = verdicts(cost("xim", SPREAD, 10.0, 10.0), cost("litellm", SPREAD, theirs, theirs))
    assert found[f"litellm's CPU per chunk beside ours, {SPREAD}"][1] == verdict


def test_a_limit_without_measurements_is_not_judged() -> None:
    assert {verdict for _, verdict in verdicts().values()} == {"not measured"}


def test_an_incomplete_set_is_not_judged() -> None:
    found = verdicts(cost("xim", SPREAD, 1.0), cost("vllm-router", SPREAD, 20.0, 20.0))
    assert found[f"CPU per chunk beside vllm-router, {SPREAD}"] == ("-", "not measured")


def first_token_of(ours: float, vllm: float, sglang: float) -> tuple[str, str]:
    found = verdicts(
        first_token("engine alone", TTFT, 1.0, 1.0),
        first_token("xim", TTFT, ours, ours),
        first_token("vllm-router", TTFT, vllm, vllm),
        first_token("sglang-router", TTFT, sglang, sglang),
    )
    return found[f"added time to first token, p50, beside the better of the Rust routers, {TTFT}"]


def test_the_first_token_is_compared_with_the_better_one() -> None:
    assert first_token_of(2.1, 2.0, 40.0) == ("1.10 x (1.10 beside 1.00 ms)", "met")
    assert first_token_of(2.1, 40.0, 1.5) == ("2.20 x (1.10 beside 0.50 ms)", "**not met**")


def test_a_difference_below_nothing_decides_nothing() -> None:
    assert first_token_of(1.5, 0.9, 40.0) == ("no ratio (0.50 beside -0.10 ms)", "not decided")


def test_one_rust_router_alone_is_not_the_better_one() -> None:
    found = verdicts(
        *(
            first_token(name, TTFT, ms, ms)
            for name, ms in [("engine alone", 1.0), ("xim", 2.1), ("sglang-router", 40.0)]
        )
    )
    assert found[f"added time to first token, p50, beside the better of the Rust routers, {TTFT}"] == (
        "-",
        "not measured",
    )


def test_what_went_wrong_counts_for_nothing() -> None:
    cheap = [replace(m, faults=["cut off before its end"]) for m in cost("xim", SPREAD, 1.0, 1.0)]
    run = [*cheap, *cost("vllm-router", SPREAD, 20.0, 20.0)]
    assert verdicts(run)[f"CPU per chunk beside vllm-router, {SPREAD}"] == ("-", "not measured")
    assert f"| {SPREAD} | - | 20.0 (20.0 - 20.0) |" in markdown(results(run))


def test_a_start_that_went_wrong_counts_for_nothing() -> None:
    starts = [
        Footprint(
            subject="xim",
            repeat=repeat,
            empty={"router": 2**20},
            per_idle_stream={"router": 1024.0},
            per_active_stream={"router": 1024.0},
            faults=faults,
        )
        for repeat, faults in enumerate([[], ["status 503"]])
    ]
    assert verdicts(footprints=starts)["memory of the router per open, idle stream"] == ("-", "not measured")
    assert "| 1.0 (1.0 - 1.0) **1 of 2 runs** |" in markdown(results([], starts))


@pytest.mark.parametrize(("kib", "verdict"), [(39.0, "met"), (41.0, "**not met**")])
def test_memory_of_an_idle_stream(kib: float, verdict: str) -> None:
    starts = [
        Footprint(subject="xim", repeat=repeat, start_s=1.0, streams=10, per_idle_stream={"router": kib * 1024})
        for repeat in range(2)
    ]
    found = verdicts(footprints=starts)
    assert found["memory of the router per open, idle stream"] == (f"{kib:.1f} KiB", verdict)


def test_start_up_and_memory_of_every_part() -> None:
    start = Footprint(
        subject="xim",
        repeat=0,
        start_s=1.25,
        streams=10,
        empty={"router": 64 * 2**20, "agent": 32 * 2**20},
        per_idle_stream={"router": 2048.0, "agent": 1024.0},
        per_active_stream={"router": 4096.0, "agent": 512.0},
    )
    text = markdown(results([], [start], repeats=1))
    assert "| xim, router | 1.25 (1.25 - 1.25) | 64 (64 - 64) | 2.0 (2.0 - 2.0) | 4.0 (4.0 - 4.0) | 10 |" in text
    assert "| xim, agent | - | 32 (32 - 32) | 1.0 (1.0 - 1.0) | 0.5 (0.5 - 0.5) | 10 |" in text


def test_a_fault_is_counted_and_shown() -> None:
    broken = Footprint(subject="litellm", repeat=0, faults=["no measurement"])
    text = markdown(results([], [broken, broken]))
    assert "Fault: litellm, in 2 measurements: no measurement" in text
    assert "Every byte of every answer was the expected one." not in text
