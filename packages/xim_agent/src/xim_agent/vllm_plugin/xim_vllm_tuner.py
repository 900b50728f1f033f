"""Searches kernel parameters for one mixture of experts on this GPU; runs in vLLM's environment, by path.

Writes `{"done": n, "of": m}` after every batch size and at the end `{"result": {batch size: parameters}}`. The
parameters are those of vLLM's Triton kernel, and the search starts from what vLLM would take without a configuration:
one parameter at a time, as long as that makes it faster. vLLM's own tuner tries every combination, which takes hours.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
"""Those that vLLM's shipped files have; vLLM takes the nearest."""
SPACE: dict[str, tuple[int, ...]] = {
    "BLOCK_SIZE_M": (16, 32, 64, 128, 256),
    "BLOCK_SIZE_N": (32, 64, 128, 256),
    "BLOCK_SIZE_K": (64, 128, 256),
    "GROUP_SIZE_M": (1, 16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
"""As in vLLM's benchmark of these kernels."""
ROUNDS = 3
GAIN = 0.99
"""A change has to take less than this part of the time: smaller differences are noise."""
WARM_UPS, REPEATS = 3, 10

Measure = Callable[[Mapping[str, int]], float | None]
"""Milliseconds with these parameters; None where the kernel does not run with them."""


def search(measure: Measure, start: Mapping[str, int], space: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The fastest parameters found from `start`, changing one at a time."""
    best = {**start, **{name: values[0] for name, values in space.items() if name not in start}}
    best_ms = measure(best)
    for _ in range(ROUNDS):
        before = dict(best)
        for name, values in space.items():
            for value in values:
                if value == best[name]:
                    continue
                tried_ms = measure({**best, name: value})
                if tried_ms is not None and (best_ms is None or tried_ms < best_ms * GAIN):
                    best, best_ms = {**best, name: value}, tried_ms
        if best == before:
            break
    if best_ms is None:
        raise RuntimeError("the kernel runs with no parameters that were tried")
    return best


def space_for(block: tuple[int, int] | None) -> dict[str, tuple[int, ...]]:
    """With block-wise scales a tile of K must hold whole blocks."""
    if block is None:
        return SPACE
    return {**SPACE, "BLOCK_SIZE_K": tuple(k for k in SPACE["BLOCK_SIZE_K"] if k % block[1] == 0) or (block[1],)}


class Bench:
    """The kernel with random weights of one shape. Imports vLLM and PyTorch."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._torch = torch = importlib.import_module("torch")
        if not torch.cuda.is_available():  # ROCm's PyTorch says cuda as well
            raise RuntimeError("no GPU is seen")
        self._moe = importlib.import_module("vllm.model_executor.layers.fused_moe")
        self._kernels = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
        experts, width, hidden = args.experts, args.width, args.hidden
        self._w1 = self._weights(experts, 2 * width, hidden)
        self._w2 = self._weights(experts, hidden, width)
        self._config = self._quantized(experts, width, hidden) if args.dtype else None

    def _weights(self, *shape: int) -> Any:
        torch = self._torch
        weights = torch.randn(*shape, dtype=torch.bfloat16, device="cuda") / 10
        return weights.to(self._eight_bits()) if self._args.dtype else weights

    def _eight_bits(self) -> Any:
        platform = importlib.import_module("vllm.platforms").current_platform
        return platform.fp8_dtype()

    def _quantized(self, experts: int, width: int, hidden: int) -> Any:
        torch, block = self._torch, self._args.block
        make = importlib.import_module("vllm.model_executor.layers.fused_moe.config").fp8_w8a8_moe_quant_config
        if block is None:
            scales = [torch.rand(experts, dtype=torch.float32, device="cuda") for _ in range(2)]
            return make(w1_scale=scales[0], w2_scale=scales[1])
        tiles = [
            (experts, -(-rows // block[0]), -(-columns // block[1]))
            for rows, columns in ((2 * width, hidden), (hidden, width))
        ]
        scales = [torch.rand(*shape, dtype=torch.float32, device="cuda") for shape in tiles]
        return make(w1_scale=scales[0], w2_scale=scales[1], block_shape=list(block))

    def default(self, tokens: int) -> dict[str, int]:
        """What vLLM takes without a configuration."""
        args = self._args
        block = list(args.block) if args.block else None
        found = self._kernels.get_default_config(
            tokens, args.experts, args.width, args.hidden, args.experts_per_token, args.dtype, block
        )
        return {name: value for name, value in found.items() if name in SPACE}

    def measure(self, tokens: int) -> Measure:
        """A function that runs the kernel for `tokens` tokens."""
        torch, args = self._torch, self._args
        states = torch.randn(tokens, args.hidden, dtype=torch.bfloat16, device="cuda")
        gates = torch.rand(tokens, args.experts, dtype=torch.float32, device="cuda").softmax(-1)
        weights, chosen = gates.topk(args.experts_per_token, dim=-1)
        chosen = chosen.to(torch.int32)

        def run() -> None:
            self._kernels.fused_experts(states, self._w1, self._w2, weights, chosen, quant_config=self._config)

        def timed(parameters: Mapping[str, int]) -> float | None:
            try:
                with self._moe.override_config(dict(parameters)):
                    return self._time(run)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # Triton says in many ways that a tile does not fit
                return None

        return timed

    def _time(self, run: Callable[[], None]) -> float:
        torch = self._torch
        for _ in range(WARM_UPS):
            run()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(REPEATS):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / REPEATS


def _block(text: str) -> tuple[int, int]:
    rows, columns = (int(part) for part in text.split(","))
    return rows, columns


def parser() -> argparse.ArgumentParser:
    """The shape, as the agent passes it."""
    made = argparse.ArgumentParser(description="Searches kernel parameters for one mixture of experts on this GPU.")
    for name in ("experts", "width", "hidden", "experts-per-token"):
        made.add_argument(f"--{name}", type=int, required=True)
    made.add_argument("--dtype", choices=["fp8_w8a8"])
    made.add_argument("--block", type=_block, help="rows,columns of weights that share a scale")
    return made


def main() -> int:
    """Search, and write the result."""
    args = parser().parse_args()
    bench = Bench(args)
    result: dict[str, dict[str, int]] = {}
    for done, tokens in enumerate(BATCH_SIZES, start=1):
        result[str(tokens)] = search(bench.measure(tokens), bench.default(tokens), space_for(args.block))
        sys.stdout.write(json.dumps({"done": done, "of": len(BATCH_SIZES)}) + "\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps({"result": result}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
