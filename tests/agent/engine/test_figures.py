"""Figures of the engine's metrics."""

import asyncio
from pathlib import Path

from tests.agent.engine.engines import States, fake_vllm, policy
from tests.support.programs import PATIENCE_S
from xim_agent.engine.client import EngineClient
from xim_agent.engine.figures import Figures, figures_in, keep_reading
from xim_agent.engine.process import Engine, EngineState

TEXT = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+06
vllm:e2e_request_latency_seconds_bucket{le="0.3"} 4.0
process_cpu_seconds_total 5
"""


def test_counts_are_summed_and_the_fullest_cache_counts() -> None:
    assert figures_in(TEXT) == (
        ("num_requests_running", 5.0),
        ("num_requests_waiting", 1.0),
        ("kv_cache_usage", 0.5),
        ("generation_tokens_total", 1_500_000.0),
    )


def test_an_older_name_of_the_cache_counts_as_well() -> None:
    assert figures_in(b"vllm:gpu_cache_usage_perc 0.75\n") == (("kv_cache_usage", 0.75),)


def test_what_is_no_metrics_has_none() -> None:
    assert figures_in(b"") == figures_in(b"<html>") == figures_in(b"vllm:num_requests_running x\n") == ()


async def test_they_are_read_while_the_engine_is_ready(tmp_path: Path) -> None:
    states, seen = States(), asyncio.Queue[Figures]()
    command = fake_vllm(tmp_path / "e.sock")
    async with EngineClient(command.socket_path) as client, asyncio.timeout(PATIENCE_S):
        engine = Engine(command, client, policy(), states)
        reading = asyncio.create_task(
            keep_reading(client, 0.05, lambda: engine.state is EngineState.READY, seen.put_nowait)
        )
        assert await seen.get() == ()
        running = asyncio.create_task(engine.run())
        while not (figures := await seen.get()):
            pass
        assert dict(figures)["num_requests_running"] == 0.0
        await engine.stop(10.0)
        await running
        while await seen.get():
            pass
        reading.cancel()
        await asyncio.wait({reading})
