"""The few figures of the engine's metrics that a router hears with every renewal."""

import asyncio
import re
from collections.abc import Callable

from xim_agent.engine.client import EngineClient
from xim_agent.engine.http import EngineError

Figures = tuple[tuple[str, float], ...]

NAMES: dict[bytes, str] = {
    b"vllm:num_requests_running": "num_requests_running",
    b"vllm:num_requests_waiting": "num_requests_waiting",
    b"vllm:kv_cache_usage_perc": "kv_cache_usage",
    b"vllm:gpu_cache_usage_perc": "kv_cache_usage",  # its name until 0.10
    b"vllm:prompt_tokens_total": "prompt_tokens_total",
    b"vllm:generation_tokens_total": "generation_tokens_total",
}
"""vLLM's metrics, and the names that travel. Usage is a part, 0 to 1, whatever vLLM's name says."""
SHARES = frozenset({"kv_cache_usage"})
"""Of several engines behind one server the fullest counts; the others are summed."""

_SAMPLE = re.compile(rb"^(vllm:[a-z_]+)(?:\{[^}\n]*\})? ([-+0-9.eE]+)$", re.MULTILINE)


def figures_in(text: bytes) -> Figures:
    """The figures in metrics in Prometheus' text format, in the order of `NAMES`; those that it has."""
    found: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        known = NAMES.get(name)
        if known is None:
            continue
        before, now = found.get(known, 0.0), float(value)
        found[known] = max(before, now) if known in SHARES else before + now
    # Of a list: a tuple of a generator adds to a free list of the interpreter with every renewal (see the codec).
    return tuple([(name, found[name]) for name in dict.fromkeys(NAMES.values()) if name in found])


async def keep_reading(
    client: EngineClient, interval_s: float, ready: Callable[[], bool], take: Callable[[Figures], None]
) -> None:
    """Give `take` the figures every `interval_s`, and none while the engine is not ready. Runs until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            take(figures_in(await client.metrics_text(interval_s)) if ready() else ())
        except EngineError:
            take(())
