"""How much memory the engine has, what the model takes of it, and what that leaves for the KV cache."""

from dataclasses import dataclass, replace
from math import ceil

from xim_agent.planning import memory
from xim_agent.planning.decision import Device, Given
from xim_agent.planning.memory import Estimate
from xim_agent.planning.operator_words import number_of

TYPICAL_TOKENS = 2048
"""Prompt and answer of one chat turn: what a place for a request is counted with."""
SHORTEST_CONTEXT_TOKENS = 4096
"""A model that has room for less than this is taken not to fit."""
SYSTEM_SHARE = 0.10
SYSTEM_BYTES = 4 * memory.GIB
"""Memory of a CPU machine that is left to the system and the engine's own code: a tenth, at least 4 GiB. The engine's
processes take 1.4 GiB without weights (vLLM 0.32), the rest is for activations and the file cache."""

BATCH_TOKENS = 2048
LARGE_BATCHES = ((160 * memory.GIB, 16384), (70 * memory.GIB, 8192))
"""vLLM's default batch of a server, and those on a GPU with so much memory."""

ONLINE_BITS = {
    "bitsandbytes": 4.5,
    "fp8": 8.0,
    "fp8_per_tensor": 8.0,
    "fp8_per_block": 8.0,
    "fp8_per_channel": 8.0,
    "mxfp8": 8.25,
}
"""Bits that a weight takes, its scale included, once vLLM has quantised it while loading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The memory of one device, or of the machine where the engine runs on the CPU."""

    estimate: Estimate | None
    """Without KV cache; `None` where the model's size is not known."""
    device_bytes: int | None
    utilization: float
    kv_bytes: int | None
    """What is left for the KV cache, over all stages; `None` where one of the above is not known."""
    kv_dtype_bytes: int
    tensor_parallel_size: int
    guessed_tokens: int = 0
    """By speculative decoding in one step; each has a state of its own in linear attention layers."""
    stages: int = 1
    """Of a pipeline: a device has so large a part of the weights and of every sequence's KV cache."""

    def context_fits(self, given: Given, tokens: int) -> bool | None:
        """Whether one sequence of `tokens` fits, the way vLLM checks it at a start; `None` where it is not known."""
        if self.kv_bytes is None:
            return None
        return 0 < self.kv_bytes >= self.sequence_bytes(given, tokens, in_flight=in_flight_tokens(given))

    def sequences(self, given: Given, tokens: int) -> int:
        """How many sequences of `tokens` tokens fit; 0 where the budget is not known."""
        return memory.concurrency_that_fits(
            given.model,
            self.kv_bytes or 0,
            tokens,
            dtype_bytes=self.kv_dtype_bytes,
            tensor_parallel_size=self.tensor_parallel_size,
            guessed_tokens=self.guessed_tokens,
        )

    def longest(self, given: Given, most: int) -> int:
        """The longest context, up to `most`, that fits once, the way vLLM measures it."""
        return memory.context_that_fits(
            given.model,
            self.kv_bytes or 0,
            most=most,
            dtype_bytes=self.kv_dtype_bytes,
            tensor_parallel_size=self.tensor_parallel_size,
            guessed_tokens=self.guessed_tokens,
            in_flight=in_flight_tokens(given),
        )

    def state_blocks(self, given: Given) -> int | None:
        """Blocks that linear layers draw their states from; `None` where there are none, or it is not known."""
        if self.kv_bytes is None:
            return None
        return memory.state_blocks(
            given.model, self.kv_bytes, dtype_bytes=self.kv_dtype_bytes, tensor_parallel_size=self.tensor_parallel_size
        )

    def sequence_bytes(self, given: Given, tokens: int, *, in_flight: int = 0) -> int:
        """Bytes on one device of one sequence of `tokens` tokens, `in_flight` of them being computed."""
        return memory.sequence_bytes(
            given.model,
            tokens,
            dtype_bytes=self.kv_dtype_bytes,
            tensor_parallel_size=self.tensor_parallel_size,
            guessed_tokens=self.guessed_tokens,
            in_flight=in_flight,
        )

    def with_kv(self, kv_cache_bytes: int) -> Estimate | None:
        """The estimate with so much KV cache over all stages."""
        part = ceil(kv_cache_bytes / self.stages)
        return None if self.estimate is None else replace(self.estimate, kv_cache_bytes=part)


def budget_of(
    given: Given,
    *,
    quantization: str | None,
    dtype: str,
    tensor_parallel_size: int,
    utilization: float,
    guessed_tokens: int = 0,
    stages: int = 1,
) -> Budget:
    """The budget under these decisions; `utilization` counts on GPUs only."""
    weights = loaded_bytes(given, quantization=quantization, dtype=dtype)
    needed = None
    if weights is not None:
        needed = memory.estimate(weights_bytes=ceil(weights / stages), tensor_parallel_size=tensor_parallel_size)
        if given.device is Device.CPU:
            needed = replace(needed, overhead_bytes=0)
    on_cpu = given.device is Device.CPU
    device = (
        cpu_memory_bytes(given, tensor_parallel_size)
        if on_cpu
        else gpu_memory_bytes(given, tensor_parallel_size * stages)
    )
    kv_bytes = None
    if needed is not None and device is not None:
        kv_bytes = _left_on_cpu(device, needed) if on_cpu else memory.kv_budget_bytes(device, utilization, needed)
        kv_bytes *= stages
    return Budget(
        estimate=needed,
        device_bytes=device,
        utilization=utilization,
        kv_bytes=kv_bytes,
        kv_dtype_bytes=kv_dtype_bytes(given, dtype),
        tensor_parallel_size=tensor_parallel_size,
        guessed_tokens=guessed_tokens,
        stages=stages,
    )


def in_flight_tokens(given: Given) -> int:
    """Most tokens that are being computed at a time: two batches on a GPU, one for a model that embeds and on a CPU
    (`VllmConfig.max_in_flight_tokens`, with the batches that `get_batch_defaults` gives a server)."""
    said = number_of(given.words.value("--max-num-batched-tokens") or "")
    if given.device is Device.CPU:
        return said or BATCH_TOKENS
    first = given.gpus[0]
    fitting = [tokens for memory_bytes, tokens in LARGE_BATCHES if (first.memory_bytes or 0) >= memory_bytes]
    # vLLM leaves the A100 out of this middle step.
    batch = said or (fitting[0] if fitting and "A100" not in first.name else BATCH_TOKENS)
    return batch if given.pooling else 2 * batch


def shortest_context(given: Given) -> int:
    """Tokens that there has to be room for, in one sequence."""
    return min(SHORTEST_CONTEXT_TOKENS, given.model.max_position_embeddings or SHORTEST_CONTEXT_TOKENS)


def loaded_bytes(given: Given, *, quantization: str | None, dtype: str) -> int | None:
    """Bytes of the whole model's weights as vLLM holds them; `None` where the model's size is not known."""
    model = given.model
    if model.quantization is not None:
        return memory.weights_bytes(model)
    bits = ONLINE_BITS.get(quantization or "")
    if bits is not None:
        return memory.quantized_weights_bytes(model, bits=bits)
    if model.parameters is None:
        return memory.weights_bytes(model)
    return model.parameters * (4 if dtype == "float32" else memory.HALF_BYTES)


def kv_dtype_bytes(given: Given, dtype: str) -> int:
    """Bytes of one value in the KV cache: by --kv-cache-dtype, by the checkpoint's scales, else by the dtype."""
    word = given.words.value("--kv-cache-dtype") or "auto"
    if word.startswith(("fp8", "int8")):
        return 1
    quantization = given.model.quantization
    if word == "auto" and quantization is not None and quantization.kv_cache_bits == 8:
        return 1
    return 4 if word == "auto" and dtype == "float32" else memory.HALF_BYTES


def gpu_memory_bytes(given: Given, tensor_parallel_size: int) -> int | None:
    """Of the smallest GPU among those that share the model."""
    sizes = [gpu.memory_bytes for gpu in given.gpus[:tensor_parallel_size]]
    known = [size for size in sizes if size is not None]
    return min(known, default=None) if len(known) == len(sizes) else None


def cpu_memory_bytes(given: Given, tensor_parallel_size: int = 1) -> int | None:
    """Memory of one rank: what the process may use, but no more than one NUMA node has, since vLLM keeps a rank's
    memory on one. A node that does not say has its equal part, and so have ranks that share a node."""
    usable = given.hardware.usable_ram_bytes
    nodes = given.hardware.cpu.numa_nodes or ()
    if usable is None:
        return None
    node = nodes[0].memory_bytes if len(nodes) > 1 else None
    return min(node or usable, usable // max(tensor_parallel_size, 1 if node else len(nodes), 1))


def _left_on_cpu(device_bytes: int, needed: Estimate) -> int:
    system = max(SYSTEM_BYTES, int(device_bytes * SYSTEM_SHARE))
    return max(device_bytes - needed.weights_bytes - system, 0)
