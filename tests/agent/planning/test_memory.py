"""The memory estimate against the published figures, and its laws."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.facts.model import LayerFacts, LinearAttention, LinearKind, MlaFacts, ModelFacts, QuantizationFacts
from xim_agent.facts.read_model import read_model
from xim_agent.planning.memory import (
    CUDA_OVERHEAD_BYTES,
    GIB,
    Estimate,
    concurrency_that_fits,
    context_that_fits,
    estimate,
    filled,
    group_layers,
    kv_budget_bytes,
    kv_bytes_per_token,
    kv_cache_bytes,
    quantized_weights_bytes,
    sequence_bytes,
    state_blocks,
    state_bytes,
    stored_bits,
    weights_bytes,
)

MODELS = Path(__file__).parents[1] / "models"


def published(name: str) -> ModelFacts:
    return read_model(MODELS / name)


models = st.builds(
    ModelFacts,
    path=st.just(Path("/m")),
    architectures=st.just(("X",)),
    model_type=st.just("x"),
    text_model_type=st.just("x"),
    hidden_size=st.integers(64, 8192),
    layers=st.builds(LayerFacts, full=st.integers(0, 80), sliding=st.integers(0, 80), linear=st.integers(0, 80)),
    attention_heads=st.just(64),
    kv_heads=st.sampled_from([1, 2, 8, 64]),
    head_dim=st.sampled_from([64, 128, 256]),
    vocab_size=st.integers(1000, 300_000),
    parameters=st.integers(10**6, 10**12),
    sliding_window=st.none() | st.integers(1, 8192),
    mla=st.none() | st.just(MlaFacts(kv_lora_rank=512, qk_rope_head_dim=64)),
    linear=st.none()
    | st.just(
        LinearAttention(
            kind=LinearKind.GDN, key_heads=16, value_heads=32, key_head_dim=128, value_head_dim=128, conv_kernel=4
        )
    ),
)
sizes = st.sampled_from([1, 2, 4, 8])
tokens = st.integers(0, 300_000)


@pytest.mark.parametrize(
    ("parameters", "without", "with_margin", "digits"),
    [(7e9, 17.1, 18.0, 0.06), (13e9, 30.5, 32.1, 0.06), (70e9, 158, 166, 0.5)],
)
def test_the_published_figures(parameters: float, without: float, with_margin: float, digits: float) -> None:
    figures = estimate(weights_bytes=int(parameters * 2))
    assert figures.total_bytes / GIB == pytest.approx(without, abs=digits)
    assert figures.with_margin_bytes / GIB == pytest.approx(with_margin, abs=digits)


@given(weights=st.integers(0, 1 << 45), kv=st.integers(0, 1 << 40), gpus=sizes)
def test_the_components_always_add_up(weights: int, kv: int, gpus: int) -> None:
    figures = estimate(weights_bytes=weights, kv_cache_bytes=kv, tensor_parallel_size=gpus)
    parts = figures.components()
    assert sum(size for name, size in parts.items() if name != "total") == parts["total"] == figures.with_margin_bytes
    assert parts["CUDA overhead"] == CUDA_OVERHEAD_BYTES
    assert list(parts) == ["weights", "KV cache", "activations", "CUDA overhead", "margin", "total"]


@given(weights=st.integers(1, 1 << 45), gpus=sizes)
def test_no_byte_is_lost_in_sharing_out(weights: int, gpus: int) -> None:
    figures = estimate(weights_bytes=weights, tensor_parallel_size=gpus)
    assert weights <= figures.weights_bytes * gpus < weights + gpus
    assert figures.tensor_parallel_size == gpus


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama-3.1-8b", 128 * 1024),  # 2 x 32 layers x 8 heads x 128 x 2
        ("llama-3.1-70b", 320 * 1024),
        ("mammoth-7b-awq", 512 * 1024),  # as many KV heads as attention heads
        ("deepseek-v3", 61 * 576 * 2),  # one latent vector
        ("qwen3-next-80b-a3b", 12 * 2 * 2 * 256 * 2),  # 12 of 48 layers
        ("gemma-3-27b-it", 62 * 2 * 16 * 128 * 2),
    ],
)
def test_bytes_per_token_of_published_models(name: str, size: int) -> None:
    assert kv_bytes_per_token(published(name)) == size


def test_grouped_queries_and_fp8_lower_the_cache() -> None:
    grouped, whole = published("llama-3.1-8b"), published("mammoth-7b-awq")
    assert kv_bytes_per_token(grouped) * 4 == kv_bytes_per_token(whole)
    assert kv_bytes_per_token(grouped, dtype_bytes=1) * 2 == kv_bytes_per_token(grouped)


def test_kv_heads_are_shared_out_until_there_is_one_each() -> None:
    facts = published("qwen3-30b-a3b")  # 4 KV heads
    sizes = [kv_bytes_per_token(facts, tensor_parallel_size=gpus) for gpus in (1, 2, 4, 8)]
    assert sizes == [sizes[0], sizes[0] // 2, sizes[0] // 4, sizes[0] // 4]


def test_a_latent_vector_is_on_every_gpu() -> None:
    facts = published("deepseek-v3")
    assert kv_bytes_per_token(facts, tensor_parallel_size=8) == kv_bytes_per_token(facts)


def test_a_window_bounds_its_layers() -> None:
    facts = published("gemma-3-27b-it")  # 10 full layers, 52 with a window of 1024
    layer = 2 * 16 * 128 * 2
    # 52 layers are six groups of 10, as many as have full attention; vLLM fills the last one up.
    assert sequence_bytes(facts, 1024) == 70 * 1024 * layer
    assert sequence_bytes(facts, 8192) == (10 * 8192 + 60 * 1024) * layer
    assert sequence_bytes(facts, 8192, in_flight=4096) == (10 * 8192 + 60 * 5120) * layer
    assert sequence_bytes(facts, 2048, in_flight=4096) == 70 * 2048 * layer


@pytest.mark.parametrize(
    ("layers", "size", "counted"),
    [
        (LayerFacts(full=32), 32, 32),
        (LayerFacts(full=10, sliding=52), 10, 70),
        (LayerFacts(full=13, sliding=12), 13, 26),
        (LayerFacts(full=8, linear=24), 8, 32),
        (LayerFacts(full=0), 1, 0),
    ],
)
def test_layers_are_grouped_as_vllm_groups_them(layers: LayerFacts, size: int, counted: int) -> None:
    assert group_layers(layers) == size
    assert sum(filled(layers, count) for count in (layers.full, layers.sliding, layers.linear)) == counted


@pytest.mark.parametrize(
    ("name", "gpus", "block"),
    [("qwen3.5-9b", 1, 17301504), ("qwen3.5-27b", 1, 51380224), ("qwen3.5-35b-a3b", 8, 2785280)],
)
def test_a_block_of_linear_attention_is_as_large_as_vllm_makes_it(name: str, gpus: int, block: int) -> None:
    # The sizes are those of vLLM 0.32's own `_pool_bytes_per_block` for these models.
    facts = published(name)
    blocks = [state_blocks(facts, 12 * block + more, tensor_parallel_size=gpus) for more in (-1, 0)]
    assert blocks == [11, 12]


def test_without_linear_attention_there_are_no_such_blocks() -> None:
    assert state_blocks(published("llama-3.1-8b"), GIB) is None
    unknown = published("qwen3.5-9b")
    assert unknown.linear is not None
    shapeless = replace(unknown, linear=replace(unknown.linear, key_heads=None))
    assert state_blocks(shapeless, GIB) is None
    pure = replace(unknown, layers=LayerFacts(full=0, linear=24))
    assert state_blocks(pure, 24 * 2146304) == 1


def test_a_linear_layers_state_does_not_grow() -> None:
    facts = published("qwen3.5-9b")
    per_layer = (2 * 16 * 128 + 32 * 128) * 3 * 2 + 32 * 128 * 128 * 4
    assert state_bytes(facts) == 2 * 24 * per_layer  # the current one and that of the last whole block
    assert sequence_bytes(facts, 0) == state_bytes(facts)
    assert state_bytes(facts, tensor_parallel_size=2) * 2 == state_bytes(facts)


def test_a_state_has_the_dtype_that_vllm_gives_it() -> None:
    said, unsaid = published("qwen3.5-9b"), published("qwen3-next-80b-a3b")
    assert (said.linear and said.linear.state_dtype, unsaid.linear and unsaid.linear.state_dtype) == ("float32", None)
    # vLLM's MambaSpec for one layer on one of four GPUs: 274,432 bytes, all of them bfloat16
    assert state_bytes(unsaid, tensor_parallel_size=4) == 2 * 36 * 274_432
    assert said.linear is not None
    half = replace(said, linear=replace(said.linear, state_dtype="bfloat16"))
    assert state_bytes(half) < state_bytes(said)


def test_a_mamba_2_layer_keeps_one_state_more() -> None:
    facts = published("nemotron-h-56b")
    per_layer = (2 * 8 * 256 + 256 * 64) * 3 * 2 + 256 * 256 * 64 * 4
    assert state_bytes(facts) == 3 * 54 * per_layer


def test_every_guessed_token_has_a_state() -> None:
    facts = published("qwen3-next-80b-a3b")
    assert state_bytes(facts, guessed_tokens=2) == 2 * state_bytes(facts)
    more = concurrency_that_fits(facts, 10 * GIB, 2048), context_that_fits(facts, GIB, most=262144)
    fewer = (
        concurrency_that_fits(facts, 10 * GIB, 2048, guessed_tokens=2),
        context_that_fits(facts, GIB, most=262144, guessed_tokens=2),
    )
    assert fewer < more
    assert fewer[1] < more[1]
    assert sequence_bytes(published("llama-3.1-8b"), 9, guessed_tokens=2) == sequence_bytes(
        published("llama-3.1-8b"), 9
    )


def test_a_state_of_unknown_shape_is_not_guessed() -> None:
    assert state_bytes(published("llama-3.1-8b")) == 0


@given(facts=models, first=tokens, more=tokens, gpus=sizes)
def test_a_longer_sequence_never_needs_less(facts: ModelFacts, first: int, more: int, gpus: int) -> None:
    assert sequence_bytes(facts, first, tensor_parallel_size=gpus) <= sequence_bytes(
        facts, first + more, tensor_parallel_size=gpus
    )


@given(facts=models, length=tokens)
def test_more_gpus_never_need_more_each(facts: ModelFacts, length: int) -> None:
    each = [sequence_bytes(facts, length, tensor_parallel_size=gpus) for gpus in (1, 2, 4, 8)]
    assert each == sorted(each, reverse=True)


@given(facts=models, budget=st.integers(0, 1 << 38), most=st.integers(1, 200_000), concurrent=st.integers(1, 64))
def test_the_context_that_fits_fits_and_no_longer_one_does(
    facts: ModelFacts, budget: int, most: int, concurrent: int
) -> None:
    length = context_that_fits(facts, budget, most=most, concurrent=concurrent)
    assert 0 <= length <= most
    if length > 0:
        assert kv_cache_bytes(facts, length, concurrent=concurrent) <= budget
    if length < most:
        assert kv_cache_bytes(facts, length + 1, concurrent=concurrent) > budget


@given(facts=models, budget=st.integers(0, 1 << 38), length=st.integers(1, 200_000))
def test_the_concurrency_that_fits_fits_and_no_more_does(facts: ModelFacts, budget: int, length: int) -> None:
    concurrent = concurrency_that_fits(facts, budget, length)
    assert kv_cache_bytes(facts, length, concurrent=concurrent) <= budget
    if sequence_bytes(facts, length):
        assert kv_cache_bytes(facts, length, concurrent=concurrent + 1) > budget


@given(
    weights=st.integers(0, 1 << 40),
    memory=st.integers(1, 1 << 40),
    utilization=st.floats(0.1, 1.0),
    kv=st.integers(0, 1 << 38),
)
def test_the_budget_keeps_the_margin(weights: int, memory: int, utilization: float, kv: int) -> None:
    figures = estimate(weights_bytes=weights, kv_cache_bytes=kv)
    budget = kv_budget_bytes(memory, utilization, figures)
    assert budget >= 0
    if budget:
        filled = estimate(weights_bytes=weights, kv_cache_bytes=budget)
        assert filled.with_margin_bytes <= memory * utilization + 2


def test_a_model_of_8b_on_24_gib_leaves_room_for_its_whole_context_once() -> None:
    facts = published("llama-3.1-8b")
    weights = weights_bytes(facts)
    assert weights == 8_030_261_248 * 2
    budget = kv_budget_bytes(24 * GIB, 0.95, estimate(weights_bytes=weights))
    assert budget / GIB == pytest.approx(24 * 0.95 / 1.05 - 14.958 * 1.2 - 1.5, abs=0.01)
    assert context_that_fits(facts, budget, most=131072) == budget // (128 * 1024)


@pytest.mark.parametrize(
    ("name", "gib"),
    [("deepseek-v3", 626.7), ("gpt-oss-20b", 12.8), ("mammoth-7b-awq", 3.6), ("llama-3.1-70b-fp8", 67.7)],
)
def test_a_quantised_checkpoint_takes_its_own_width(name: str, gib: float) -> None:
    weights = weights_bytes(published(name))
    assert weights is not None
    assert weights / GIB == pytest.approx(gib, abs=0.1)


def facts_of(**changes: object) -> ModelFacts:
    values: dict[str, object] = {
        "path": "/m",
        "architectures": ["X"],
        "model_type": "x",
        "text_model_type": "x",
        "hidden_size": 10,
        "layers": {"full": 1},
        "attention_heads": 1,
        "kv_heads": 1,
        "head_dim": 10,
        "vocab_size": 100,
        "parameters": 10_000,
    }

    return ModelFacts.from_json(json.dumps({**values, **changes}))


def test_weights_in_half_precision_whatever_the_files_have() -> None:
    facts = facts_of(dtype="float32", checkpoint_bytes=40_000)
    assert (weights_bytes(facts), weights_bytes(facts, dtype_bytes=4)) == (20_000, 40_000)


def test_a_quantised_checkpoint_at_hand_takes_what_its_files_take() -> None:
    assert weights_bytes(facts_of(checkpoint_bytes=7_000, quantization={"method": "awq", "bits": 4})) == 7_000


def test_what_nothing_tells_is_none() -> None:
    assert weights_bytes(facts_of(parameters=None)) is None
    assert weights_bytes(facts_of(quantization={"method": "hqq"})) is None
    assert quantized_weights_bytes(facts_of(parameters=None), bits=4) is None


def test_embeddings_keep_their_width() -> None:
    assert quantized_weights_bytes(facts_of(), bits=4) == 2_000 * 2 + 8_000 // 2
    assert quantized_weights_bytes(facts_of(parameters=500), bits=4) == 1_000
    assert quantized_weights_bytes(facts_of(tied_embeddings=True), bits=4) == 1_000 * 2 + 9_000 // 2


def test_a_groups_scale_is_shared_by_the_group() -> None:
    quantization = QuantizationFacts(method="awq", bits=4, group_size=128)
    assert stored_bits(4, quantization.group_size) == 4 + 20 / 128
    assert stored_bits(8, None) == 8


def test_an_estimate_has_one_gpus_overhead_by_default() -> None:
    assert Estimate(weights_bytes=1, kv_cache_bytes=2, activations_bytes=3).total_bytes == 6 + CUDA_OVERHEAD_BYTES
