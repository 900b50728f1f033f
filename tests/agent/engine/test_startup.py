"""Starts and restarts as the clock tells them."""

import pytest

from xim_agent.engine.restart import RestartBackoff, RestartPolicy
from xim_agent.engine.startup import (
    Progress,
    ProgressTold,
    Stage,
    Startup,
    StartupWatch,
    is_milestone,
    progress_of,
)


def watch() -> StartupWatch:
    return StartupWatch(now=100.0, ceiling_s=600.0, inactivity_grace_s=300.0)


def test_a_start_waits_until_it_has_been_silent_for_the_grace() -> None:
    start = watch()
    assert start.verdict(399.9) is Startup.WAITING
    assert start.verdict(400.0) is Startup.STUCK


def test_any_output_is_a_sign_of_life() -> None:
    start = watch()
    start.heard(390.0)
    assert start.verdict(689.0) is Startup.WAITING


def test_the_ceiling_holds_whatever_is_written() -> None:
    start = watch()
    start.heard(699.0)
    assert start.verdict(700.0) is Startup.TIMED_OUT


def test_the_next_deadline_is_the_earlier_of_the_two() -> None:
    start = watch()
    assert start.next_deadline() == 400.0
    start.heard(650.0)
    assert start.next_deadline() == 700.0


SHARDS = "Loading safetensors checkpoint shards:"


@pytest.mark.parametrize(
    ("line", "stage", "percent"),
    [
        ("(EngineCore pid=9) INFO 01-01 [gpu_model_runner.py:3] Starting to load model /m...", Stage.LOADING, None),
        (f"{SHARDS}   0% Completed | 0/2 [00:00<?, ?it/s]", Stage.LOADING, 0),
        (f"{SHARDS}  50% Completed | 1/2 [00:01<00:01]", Stage.LOADING, 50),
        (f"{SHARDS} 100% Completed | 2/2 [00:02<00:00]", Stage.LOADING, 100),
        ("INFO 01-01 [default_loader.py:268] Loading weights took 3.21 seconds", Stage.LOADING, 100),
        ("INFO [backends.py:559] Dynamo bytecode transform time: 4.61 s", Stage.COMPILING, None),
        ("INFO [backends.py:197] Compiling a graph for compile range (1, 2048) takes 20 s", Stage.COMPILING, None),
        ("INFO [monitor.py:34] torch.compile took 19.67 s in total", Stage.COMPILING, 100),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  45%|####  | 30/67", Stage.CAPTURING, 45),
        ("INFO [gpu_model_runner.py:2650] Graph capturing finished in 7 secs, took 0.37 GiB", Stage.CAPTURING, 100),
    ],
)
def test_a_line_of_a_start_says_stage_and_percent(line: str, stage: Stage, percent: int | None) -> None:
    assert progress_of(line) == Progress(stage, percent)


@pytest.mark.parametrize("line", ['INFO:     127.0.0.1 - "GET /health HTTP/1.1" 200 OK', "GPU use 45% | fine", ""])
def test_other_lines_are_no_progress(line: str) -> None:
    assert progress_of(line) is None


def test_a_stage_is_told_once_and_then_every_ten_points() -> None:
    told = ProgressTold()
    lines = [f"{SHARDS} {percent}% Completed | x" for percent in (0, 3, 9, 12, 15, 95, 99, 100, 100)]
    lines += ["Compiling a graph", "Compiling a graph", "torch.compile took 3 s"]
    found = [progress for line in lines if (progress := told.heard(line))]
    assert [(each.stage, each.percent) for each in found] == [
        *[(Stage.LOADING, percent) for percent in (0, 12, 95, 100)],
        *[(Stage.COMPILING, percent) for percent in (None, 100)],
    ]


def test_a_line_without_a_number_keeps_the_number() -> None:
    told = ProgressTold()
    told.heard(f"{SHARDS} 50% Completed | x")
    assert told.heard("Loading weights from a cache") is None
    assert told.latest == Progress(Stage.LOADING, 50)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("INFO:     Application startup complete.", True),
        ("INFO [kv_cache_utils.py:864] GPU KV cache size: 43,296 tokens", True),
        ("INFO [api_utils.py:347]", False),
    ],
)
def test_milestones_are_shown_as_they_stand(line: str, wanted: bool) -> None:
    assert is_milestone(line) is wanted


def test_the_delay_doubles_up_to_its_cap() -> None:
    backoff = RestartBackoff(RestartPolicy(base_s=1.0, cap_s=5.0, attempts=6))
    assert [backoff.ended(served_s=0.0) for _ in range(6)] == [1.0, 2.0, 4.0, 5.0, 5.0, None]


def test_a_crash_after_long_service_is_a_first_one() -> None:
    backoff = RestartBackoff(RestartPolicy(attempts=2, settled_s=300.0))
    assert [backoff.ended(served_s=300.0) for _ in range(3)] == [1.0, 1.0, 1.0]
    assert backoff.ended(served_s=299.0) is None
