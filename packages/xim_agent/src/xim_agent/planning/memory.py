"""Memory that a model needs on one GPU, by component, in bytes.

weights + KV cache + activations (20 % of the weights) + 1.5 GiB for CUDA, and a margin of 5 % on the sum. Weights and
activations are divided by the tensor parallel size; the KV cache is where vLLM shards it (by KV heads, which are copied
when there are fewer heads than GPUs; MLA's latent vector is copied to every GPU). All functions are pure.

What one sequence keeps, by kind of layer:

- full attention: 2 (K and V) × KV heads × head size × dtype, for every token;
- sliding window: the same, for no more tokens than the window and those that are being computed;
- MLA: (kv_lora_rank + qk_rope_head_dim) × dtype for every token (vLLM's `MLAAttentionSpec`);
- linear (gated delta net, Mamba-2): states of fixed size, whatever the length (vLLM's `MambaStateShapeCalculator`), as
  many as prefix caching and speculation need (`MambaSpec.max_memory_usage_bytes`).
"""

from bisect import bisect_right
from dataclasses import dataclass
from math import ceil

from xim_agent.facts.model import LayerFacts, LinearKind, ModelFacts

GIB = 1024**3
ACTIVATION_SHARE = 0.20
"""Activations as a part of the weights: about a fifth, by the published sizing rule."""
CUDA_OVERHEAD_BYTES = 3 * GIB // 2
"""Context, kernels and communication buffers: 1.5 GiB on every GPU, by the same rule."""
MARGIN = 0.05
"""Kept free above the sum of the components."""
HALF_BYTES = 2
"""Of one value in bfloat16 or float16, vLLM's dtype for weights and KV cache unless told otherwise."""
STATE_BYTES = {"float32": 4, "float16": HALF_BYTES, "bfloat16": HALF_BYTES}
"""Of one value of a linear layer's recurrent state, by the dtype that config.json names."""
UNNAMED_STATE_BYTES = {LinearKind.GDN: HALF_BYTES, LinearKind.MAMBA: 4}
"""Where it names none: vLLM takes the model's dtype for gated delta nets and float32 for Nemotron-H. The larger of what
it uses for Mamba-2, so that another family is not underestimated."""

BLOCK_TOKENS = 16
"""Tokens of a block, of which vLLM takes as many times as a linear layer's state needs."""

STATES = {LinearKind.GDN: 2, LinearKind.MAMBA: 3}
"""Copies of a linear layer's state that a running sequence holds where prefixes are cached, which they always are: the
current one, that of the last whole block, and with Mamba-2 a checkpoint of the prompt (vLLM's cache mode `align`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What one GPU has to hold, each part as that GPU's share."""

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    overhead_bytes: int = CUDA_OVERHEAD_BYTES
    tensor_parallel_size: int = 1

    @property
    def total_bytes(self) -> int:
        """The sum of the components, without margin."""
        return self.weights_bytes + self.kv_cache_bytes + self.activations_bytes + self.overhead_bytes

    @property
    def margin_bytes(self) -> int:
        """What is kept free above the sum."""
        return ceil(self.total_bytes * MARGIN)

    @property
    def with_margin_bytes(self) -> int:
        """What the GPU should have for the engine."""
        return self.total_bytes + self.margin_bytes

    def components(self) -> dict[str, int]:
        """Every component by the name it is shown under, in the order in which they add up."""
        return {
            "weights": self.weights_bytes,
            "KV cache": self.kv_cache_bytes,
            "activations": self.activations_bytes,
            "CUDA overhead": self.overhead_bytes,
            "margin": self.margin_bytes,
            "total": self.with_margin_bytes,
        }


def estimate(*, weights_bytes: int, kv_cache_bytes: int = 0, tensor_parallel_size: int = 1) -> Estimate:
    """The estimate for one of `tensor_parallel_size` GPUs.

    `weights_bytes` are those of the whole model, `kv_cache_bytes` those of one GPU already (`kv_cache_bytes`).
    """
    return Estimate(
        weights_bytes=ceil(weights_bytes / tensor_parallel_size),
        kv_cache_bytes=kv_cache_bytes,
        activations_bytes=ceil(weights_bytes * ACTIVATION_SHARE / tensor_parallel_size),
        tensor_parallel_size=tensor_parallel_size,
    )


def weights_bytes(model: ModelFacts, *, dtype_bytes: int = HALF_BYTES) -> int | None:
    """Bytes of the weights once vLLM has loaded them; `None` where neither files nor config tell.

    A quantised checkpoint takes what its files take. Any other is loaded with `dtype_bytes` a weight: vLLM's `auto`
    turns float32 checkpoints into half precision (`_get_and_verify_dtype`).
    """
    if model.quantization is None:
        return None if model.parameters is None else model.parameters * dtype_bytes
    if model.checkpoint_bytes is not None:
        return model.checkpoint_bytes
    if model.quantization.bits is None:
        return None
    return quantized_weights_bytes(model, bits=stored_bits(model.quantization.bits, model.quantization.group_size))


def quantized_weights_bytes(model: ModelFacts, *, bits: float) -> int | None:
    """Bytes of the weights when every linear layer takes `bits` a weight and the embeddings two bytes.

    vLLM quantises linear layers and experts; the input embedding and the output head keep the model's dtype
    (`modules_to_not_convert`, `ParallelLMHead` in its quantisation methods).
    """
    if model.parameters is None:
        return None
    kept = min((1 if model.tied_embeddings else 2) * model.vocab_size * model.hidden_size, model.parameters)
    return kept * HALF_BYTES + ceil((model.parameters - kept) * bits / 8)


def stored_bits(bits: int, group_size: int | None) -> float:
    """Bits a weight takes together with its group's scale (16 bits) and zero point (`bits`)."""
    return bits + (16 + bits) / group_size if group_size is not None and group_size > 0 else float(bits)


def kv_bytes_per_token(model: ModelFacts, *, dtype_bytes: int = HALF_BYTES, tensor_parallel_size: int = 1) -> int:
    """Bytes that one more token adds on one GPU while every sliding window still has room."""
    layers = model.layers.full + model.layers.sliding
    return layers * _layer_token_bytes(model, dtype_bytes, tensor_parallel_size)


def sequence_bytes(
    model: ModelFacts,
    tokens: int,
    *,
    dtype_bytes: int = HALF_BYTES,
    tensor_parallel_size: int = 1,
    guessed_tokens: int = 0,
    in_flight: int = 0,
) -> int:
    """Bytes that one sequence of `tokens` tokens keeps on one GPU, over all layers, `guessed_tokens` a step.

    While `in_flight` tokens of it are computed they are kept beside the window (`SlidingWindowSpec`). Layers that fill
    up a group count as well.
    """
    layers = model.layers
    windowed = tokens if model.sliding_window is None else min(tokens, model.sliding_window + in_flight)
    kept = filled(layers, layers.full) * tokens + filled(layers, layers.sliding) * windowed
    states = state_bytes(
        model, dtype_bytes=dtype_bytes, tensor_parallel_size=tensor_parallel_size, guessed_tokens=guessed_tokens
    )
    padded = ceil(states * filled(layers, layers.linear) / max(layers.linear, 1))
    return kept * _layer_token_bytes(model, dtype_bytes, tensor_parallel_size) + padded


def group_layers(layers: LayerFacts) -> int:
    """Layers that share one table of blocks: as many as the rarest kind has, or the most frequent where they are nearly
    as many (vLLM's `_get_kv_cache_groups_uniform_page_size`)."""
    counts = [count for count in (layers.full, layers.sliding, layers.linear) if count]
    least, most = min(counts, default=1), max(counts, default=1)
    return most if most < least * 1.5 else least


def filled(layers: LayerFacts, count: int) -> int:
    """`count` layers of one kind and those that vLLM puts beside them to fill up the last group."""
    return ceil(count / group_layers(layers)) * group_layers(layers)


def state_blocks(
    model: ModelFacts, budget_bytes: int, *, dtype_bytes: int = HALF_BYTES, tensor_parallel_size: int = 1
) -> int | None:
    """Blocks in `budget_bytes` of one GPU where linear layers draw from the same pool as attention.

    One holds a state for each layer of a group, or as many tokens as need no less (`_align_hybrid_block_size`). `None`
    where there are no such layers or their state's shape is not known.
    """
    page = _layer_state_bytes(model, dtype_bytes, tensor_parallel_size)
    if not page:
        return None
    if model.layers.full:
        step = BLOCK_TOKENS * _layer_token_bytes(model, dtype_bytes, tensor_parallel_size)
        page = ceil(page / step) * step
    return budget_bytes // (page * group_layers(model.layers))


def state_bytes(
    model: ModelFacts, *, dtype_bytes: int = HALF_BYTES, tensor_parallel_size: int = 1, guessed_tokens: int = 0
) -> int:
    """Bytes of the fixed-size states of one sequence on one GPU; 0 where the state's shape is not known.

    A state is a convolution's window over queries, keys and values, and one matrix per value head. Each linear layer
    keeps `STATES` of them, and one more for every token that is guessed in a step.
    """
    layers = model.layers.linear
    if not layers or model.linear is None:
        return 0
    states = STATES.get(model.linear.kind, 1) + guessed_tokens
    return states * layers * _layer_state_bytes(model, dtype_bytes, tensor_parallel_size)


def _layer_state_bytes(model: ModelFacts, dtype_bytes: int, tensor_parallel_size: int) -> int:
    """Bytes of one state of one linear layer on one GPU; 0 where its shape is not known or there is no such layer."""
    shape = model.linear
    if shape is None or None in (shape.key_heads, shape.value_heads, shape.key_head_dim, shape.value_head_dim):
        return 0
    assert shape.key_heads is not None
    assert shape.value_heads is not None
    assert shape.key_head_dim is not None
    assert shape.value_head_dim is not None
    channels = 2 * shape.key_heads * shape.key_head_dim + shape.value_heads * shape.value_head_dim
    window = channels * max((shape.conv_kernel or 1) - 1, 0) * dtype_bytes
    value_bytes = STATE_BYTES.get(shape.state_dtype or "", UNNAMED_STATE_BYTES.get(shape.kind, 4))
    matrices = shape.value_heads * shape.key_head_dim * shape.value_head_dim * value_bytes
    return ceil((window + matrices) / tensor_parallel_size)


def kv_cache_bytes(
    model: ModelFacts,
    tokens: int,
    *,
    concurrent: int,
    dtype_bytes: int = HALF_BYTES,
    tensor_parallel_size: int = 1,
    guessed_tokens: int = 0,
    in_flight: int = 0,
) -> int:
    """Bytes on one GPU for `concurrent` sequences of `tokens` tokens each."""
    return concurrent * sequence_bytes(
        model,
        tokens,
        dtype_bytes=dtype_bytes,
        tensor_parallel_size=tensor_parallel_size,
        guessed_tokens=guessed_tokens,
        in_flight=in_flight,
    )


def kv_budget_bytes(memory_bytes: int, utilization: float, without_kv: Estimate) -> int:
    """What `utilization` of a GPU leaves for the KV cache beside `without_kv`, margin kept; never below 0."""
    usable = memory_bytes * utilization / (1 + MARGIN)
    return max(int(usable) - without_kv.total_bytes + without_kv.kv_cache_bytes, 0)


def concurrency_that_fits(
    model: ModelFacts,
    budget_bytes: int,
    tokens: int,
    *,
    dtype_bytes: int = HALF_BYTES,
    tensor_parallel_size: int = 1,
    guessed_tokens: int = 0,
) -> int:
    """How many sequences of `tokens` tokens fit into `budget_bytes` of one GPU's memory."""
    one = sequence_bytes(
        model,
        tokens,
        dtype_bytes=dtype_bytes,
        tensor_parallel_size=tensor_parallel_size,
        guessed_tokens=guessed_tokens,
    )
    return budget_bytes // one if one else 0


def context_that_fits(
    model: ModelFacts,
    budget_bytes: int,
    *,
    most: int,
    concurrent: int = 1,
    dtype_bytes: int = HALF_BYTES,
    tensor_parallel_size: int = 1,
    guessed_tokens: int = 0,
    in_flight: int = 0,
) -> int:
    """The longest sequence, up to `most` tokens, that fits `concurrent` times into `budget_bytes`; 0 when none does."""

    def needed(tokens: int) -> int:
        return kv_cache_bytes(
            model,
            tokens,
            concurrent=concurrent,
            dtype_bytes=dtype_bytes,
            tensor_parallel_size=tensor_parallel_size,
            guessed_tokens=guessed_tokens,
            in_flight=in_flight,
        )

    # Bytes never shrink with tokens, so the border is found by bisection rather than by one formula per kind of layer.
    return bisect_right(range(1, most + 1), budget_bytes, key=needed)


def _layer_token_bytes(model: ModelFacts, dtype_bytes: int, tensor_parallel_size: int) -> int:
    """Bytes of one token in one attention layer on one GPU."""
    if model.mla is not None:
        return (model.mla.kv_lora_rank + model.mla.qk_rope_head_dim) * dtype_bytes
    heads = max(model.kv_heads // tensor_parallel_size, 1)
    return 2 * heads * model.head_dim * dtype_bytes
