"""What the bench makes of many times: percentiles, gaps, differences to the engine alone."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.client import Answer
from bench.footprint import Footprint
from bench.record import as_json
from bench.scenario import Kind, all_scenarios, latency, percentile
from tests.bench.results import cost, first_token, results
from tests.support.fake_vllm_script import expected_text

TTFT = "64 paced at 10 ms, spread"


def answer(seed: int = 0) -> Answer:
    loop = asyncio.new_event_loop()
    try:
        return Answer(seed, loop.create_future())
    finally:
        loop.close()


@given(st.lists(st.integers(0, 1000), min_size=1), st.integers(1, 99))
def test_a_percentile_is_always_among_the_values(values: list[int], percent: int) -> None:
    assert min(values) <= percentile(values, percent) <= max(values)


def test_percentiles_of_a_hundred() -> None:
    found = latency([float(value) for value in range(101)])
    assert found is not None
    assert (found.count, found.p50_s, found.p99_s, found.max_s) == (101, 50.0, 99.0, 100.0)
    assert (found.ms("p50"), found.ms("p99")) == (50_000.0, 99_000.0)


def test_no_values_have_no_latency() -> None:
    assert latency([]) is None


def test_gaps_are_those_of_reads_within_the_window() -> None:
    one = answer()
    one.read_at = [0.5, 1.0, 1.25, 2.0, 3.5]
    assert one.gaps_s(1.0, 2.0) == [0.25, 0.75]
    assert one.gaps_s(3.0, 3.25) == []


@pytest.mark.parametrize(
    ("status", "complete", "text", "end", "whole", "fault"),
    [
        (200, True, expected_text(3, 20), "data: [DONE]\n\n", True, None),
        (200, True, expected_text(3, 20), "", True, "no terminal event"),
        (200, False, expected_text(3, 20), "", True, "cut off before its end"),
        (200, False, expected_text(3, 20), "", False, None),
        (200, False, expected_text(4, 20), "", False, "the text is not the one that was sent"),
        (200, False, "", "", False, None),
        (200, True, "", "data: [DONE]\n\n", True, "no text"),
        (503, True, "", "", False, "status 503: "),
        (0, False, "", "", False, "status 0: "),
    ],
)
def test_what_is_wrong_with_an_answer(
    status: int, complete: bool, text: str, end: str, whole: bool, fault: str | None
) -> None:
    one = answer(3)
    one.status, one.complete = status, complete
    if text:
        one.pieces = [
            f'data: {{"content": "{text[:7]}"}}\n\n'.encode(),
            f'data: {{"content": "{text[7:]}"}}\n\n'.encode(),
        ]
    one.pieces.append(end.encode())
    assert one.fault(stream=True, whole=whole) == fault


def test_added_is_the_difference_within_a_repeat() -> None:
    """The machine was slower in the second repeat; what the router added was the same."""
    run = results([*first_token("engine alone", TTFT, 1.0, 5.0), *first_token("xim", TTFT, 3.0, 7.0)])
    assert run.added(TTFT, "xim", lambda m: m.ttft_ms("p50")) == pytest.approx([2.0, 2.0])


def test_added_leaves_out_a_repeat_without_the_engine_alone() -> None:
    run = results([*first_token("engine alone", TTFT, 5.0, repeats=[1]), *first_token("xim", TTFT, 3.0, 7.0)])
    assert run.added(TTFT, "xim", lambda m: m.ttft_ms("p50")) == pytest.approx([2.0])


def test_a_median_of_fewer_than_all_repeats_is_none() -> None:
    run = results(cost("xim", "1 stream", 1.0, 3.0))
    assert run.median([1.0, 3.0]) == 2.0
    assert run.median([1.0]) is None


def test_every_fault_is_found() -> None:
    broken = Footprint(subject="litellm", repeat=0, faults=["no measurement", "x"])
    assert results(cost("xim", "1 stream", 1.0, 3.0), [broken]).faults() == [("litellm", "no measurement")]


def test_every_measurement_is_written_as_json() -> None:
    written = json.loads(as_json(results([*cost("xim", "1 stream", 1.0, 3.0), *first_token("xim", TTFT, 1.0)])))
    assert [m["cpu_s"] for m in written["measurements"]] == [{"router": 0.001}, {"router": 0.003}, {}]
    assert written["measurements"][2]["ttft"]["p50_s"] == 0.001


def test_scenarios_have_names_of_their_own() -> None:
    names = [scenario.name for scenario in all_scenarios()]
    assert len(set(names)) == len(names)


def test_the_paced_loads_bring_as_many_chunks_as_the_machine_carries() -> None:
    rates = {s.name: s.clients * 1000 / s.interval_ms for s in all_scenarios() if s.kind is Kind.PACED}
    assert max(rates.values()) == 25_600.0


def test_a_slow_subject_has_as_many_streams_and_a_tenth_of_the_chunks() -> None:
    (load,) = [s for s in all_scenarios() if s.name == "128 streams, spread"]
    slower = load.paced_for(slow=True)
    assert (slower.clients, slower.interval_ms) == (128, 100.0)
    assert slower.spread_ms == pytest.approx(70.0)
    assert load.paced_for(slow=False) == load
