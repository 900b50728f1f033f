"""Context length, batch, concurrency, and whether the model fits."""

from dataclasses import replace

import pytest

from tests.agent.planning.givens import decision, machine, model, planned, vllm, words
from xim_agent.facts.model import RopeFacts
from xim_agent.planning.budget import in_flight_tokens
from xim_agent.planning.decision import Source
from xim_agent.planning.engine_facts import EngineFacts
from xim_agent.planning.plan import EnginePlan
from xim_agent.settings import MOST_CONCURRENT

GIB = 1024**3
LENGTH = "context length"


def values(plan: EnginePlan, *options: str) -> list[str]:
    return [decision(plan, option).value for option in options]


def test_the_models_own_length_is_left_to_vllm_where_it_fits() -> None:
    found = decision(planned("h200"), LENGTH)
    assert (found.value, found.source, words(found)) == ("131072", Source.MODEL, "")


def test_a_rope_scaling_makes_the_length_longer_that_vllm_checks_at_its_start() -> None:
    """DeepSeek-Coder: 16384 positions and a factor of 4. vLLM wants room for 65536 unless it is told otherwise."""
    scaled = replace(model("llama-3.1-8b"), max_position_embeddings=16384, rope=RopeFacts(kind="linear", factor=4.0))
    assert words(decision(planned("rtx-3090", scaled), LENGTH)) == "--max-model-len auto"
    roomy = decision(planned("h200", scaled), LENGTH)
    assert (roomy.value, roomy.arguments) == ("65536", ())
    assert "times the factor of its rope scaling" in roomy.reason
    plain = replace(scaled, rope=None)
    assert decision(planned("rtx-3090", plain), LENGTH).value == "16384"
    asked = {"MAX_MODEL_LEN": "65536"}
    assert "refuses a context above" in decision(planned("h200", plain, **asked), LENGTH).warning
    assert not decision(planned("h200", scaled, **asked), LENGTH).warning


def test_a_length_that_does_not_fit_is_measured_by_vllm_or_cut() -> None:
    assert words(decision(planned("rtx-3090"), LENGTH)) == "--max-model-len auto"
    older = decision(planned("rtx-3090", engine=replace(vllm(), fits_context=False)), LENGTH)
    assert older.value == "18432"
    assert int(older.value) % 1024 == 0
    nothing = decision(
        planned("rtx-3090", "gemma-3-27b-it", engine=EngineFacts(fits_context=False, packages=frozenset())), LENGTH
    )
    assert nothing.value == "1024"


def test_without_automatic_choices_the_length_is_the_models() -> None:
    assert words(decision(planned("rtx-3090", AUTO_CONFIG="0"), LENGTH)) == ""


def test_a_window_is_judged_with_the_tokens_that_vllm_computes_at_a_time() -> None:
    gemma = model("gemma-3-27b-it")
    layer = 2 * 16 * 128 * 2
    whole = (10 * 131072 + 60 * (1024 + 2 * 2048)) * layer  # two batches are under way
    budget = replace(planned("l40s", gemma).budget, kv_bytes=whole)
    situation = planned("l40s", gemma).given
    assert budget.context_fits(situation, 131072)
    assert budget.longest(situation, 131072) == 131072
    smaller = replace(budget, kv_bytes=whole - 1)
    assert not smaller.context_fits(situation, 131072)
    assert smaller.longest(situation, 131072) == 131071


@pytest.mark.parametrize(
    ("machine_name", "model_name", "more", "tokens"),
    [
        ("l40s", "gemma-3-27b-it", {}, 4096),
        ("h200", "gemma-3-27b-it", {}, 16384),
        ("a100-80g-x4", "gemma-3-27b-it", {}, 4096),
        ("mi300x-x8", "gemma-3-27b-it", {}, 32768),
        ("h200", "qwen3-embedding-0.6b", {}, 8192),
        ("l40s", "gemma-3-27b-it", {"VLLM_ARGS": "--max-num-batched-tokens 8k"}, 16000),
        ("epyc-9454-96gb", "gemma-3-4b-it", {}, 2048),
        ("epyc-9454-96gb", "gemma-3-4b-it", {"VLLM_ARGS": "--max-num-batched-tokens=512"}, 512),
    ],
)
def test_tokens_under_way_are_those_of_vllms_batches(
    machine_name: str, model_name: str, more: dict[str, object], tokens: int
) -> None:
    assert in_flight_tokens(planned(machine_name, model_name, **more).given) == tokens


def test_the_batch_is_no_larger_than_the_blocks_of_linear_attention() -> None:
    option = "max num seqs"
    small = planned("rx-7900-xtx", "qwen3.5-9b", engine=vllm("+rocm700"))
    blocks = small.budget.state_blocks(small.given)
    assert blocks is not None
    assert blocks < 64
    found = decision(small, option)
    assert (words(found), found.source) == (f"--max-num-seqs {blocks}", Source.AUTOMATIC)
    assert f"{blocks} fit" in found.reason
    assert decision(planned("h200", "qwen3.5-27b"), option).source is Source.DEFAULT
    for more in ({"MAX_NUM_SEQS": "64"}, {"AUTO_CONFIG": "0"}):
        kept = decision(planned("rx-7900-xtx", "qwen3.5-9b", engine=vllm("+rocm700"), **more), option)
        assert words(kept) == "--max-num-seqs 64"
        assert f"MAX_NUM_SEQS to {blocks}" in kept.warning
    fewer = planned("rx-7900-xtx", "qwen3.5-9b", engine=vllm("+rocm700"), MAX_NUM_SEQS=str(blocks))
    assert decision(fewer, option).warning == ""
    eager = planned("rx-7900-xtx", "qwen3.5-9b", engine=vllm("+rocm700"), VLLM_DISABLE_CUDA_GRAPHS="1")
    assert words(decision(eager, option)) == "--max-num-seqs 64"
    unknown = replace(machine("h200"), gpus=tuple(replace(gpu, memory_bytes=None) for gpu in machine("h200").gpus))
    assert words(decision(planned(unknown, "qwen3.5-27b"), option)) == "--max-num-seqs 64"
    assert words(decision(planned("epyc-9454-96gb", "qwen3.5-9b"), option)) == "--max-num-seqs 64"


def test_a_model_that_keeps_nothing_is_bounded_by_the_batch_alone() -> None:
    plan = planned("rtx-3090", "bge-base-en-v1.5")
    assert values(plan, "memory", "max concurrent") == ["fits", "64"]
    assert "keeps no KV cache" in decision(plan, "max concurrent").reason


def test_the_operators_length_is_passed_and_judged() -> None:
    found = decision(planned("rtx-3090", MAX_MODEL_LEN="8192"), LENGTH)
    assert (words(found), found.source, found.warning) == ("--max-model-len 8192", Source.OPERATOR, "")
    assert "does not fit" in decision(planned("rtx-3090", MAX_MODEL_LEN="100000"), LENGTH).warning
    assert (
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in decision(planned("h200", "qwen3-8b", MAX_MODEL_LEN="50000"), LENGTH).warning
    )
    assert decision(planned("h200", MAX_MODEL_LEN="140000"), LENGTH).warning == ""  # its rope is scaled
    assert decision(planned("h200", VLLM_ARGS="--max-model-len auto"), LENGTH).warning == ""
    assert decision(planned("h200", VLLM_ARGS="--max-model-len 8k"), LENGTH).value == "8k"


def test_a_config_that_names_no_length_leaves_it_to_vllm() -> None:
    unnamed = replace(model("llama-3.1-8b"), max_position_embeddings=None)
    plan = planned("h200", unnamed, MAX_CONCURRENT="3")
    assert values(plan, LENGTH) == ["vLLM's own"]
    assert planned("h200", replace(unnamed, parameters=None)).max_concurrent == 64
    assert decision(planned("h200", unnamed, MAX_MODEL_LEN="9000"), LENGTH).warning == ""


@pytest.mark.parametrize(
    ("machine_name", "model_name", "more", "concurrent"),
    [
        ("h200", "llama-3.1-8b", {}, 64),
        ("h200", "llama-3.1-8b", {"MAX_NUM_SEQS": "32"}, 32),
        ("h200", "llama-3.1-8b", {"MAX_NUM_SEQS": "256"}, 64),
        ("h100-x8", "llama-3.1-8b", {"MAX_NUM_SEQS": "256"}, 256),
        ("h200", "llama-3.1-8b", {"VLLM_ARGS": "--max-num-seqs 16"}, 16),
        ("rtx-3090", "llama-3.1-8b", {}, 9),
        ("rtx-3090", "gemma-3-27b-it", {}, 1),
        ("epyc-9454-96gb", "llama-3.2-1b-instruct", {}, 5),
        ("epyc-9454-96gb", "llama-3.2-1b-instruct", {"MAX_NUM_SEQS": "3"}, 3),
        ("rtx-3090", "gemma-3-27b-it", {"MAX_CONCURRENT": "100"}, 100),
    ],
)
def test_concurrency_is_what_fits_within_its_bounds(
    machine_name: str, model_name: str, more: dict[str, object], concurrent: int
) -> None:
    assert planned(machine_name, model_name, **more).max_concurrent == concurrent


def test_without_memory_facts_concurrency_is_the_batch() -> None:
    unknown = replace(machine("h200"), gpus=tuple(replace(gpu, memory_bytes=None) for gpu in machine("h200").gpus))
    plan = planned(unknown)
    assert plan.max_concurrent == 64
    assert values(plan, "memory", LENGTH) == ["not known", "131072"]
    assert plan.estimate is not None


@pytest.mark.parametrize("memory_known", [True, False])
def test_concurrency_stays_within_what_a_link_carries(memory_known: bool) -> None:
    board = machine("h100-x8")
    memory_bytes = 1 << 50 if memory_known else None
    wide = replace(board, gpus=tuple(replace(gpu, memory_bytes=memory_bytes) for gpu in board.gpus * 16))
    plan = planned(wide, TENSOR_PARALLEL_SIZE="128", MAX_NUM_SEQS="100000")
    assert plan.max_concurrent == MOST_CONCURRENT
    assert decision(plan, "max concurrent").reason.endswith("; a link carries no more than 4096")


def test_the_memory_is_that_of_the_smallest_gpu() -> None:
    board = machine("a40-x4")
    uneven = replace(board, gpus=(*board.gpus[:3], replace(board.gpus[3], memory_bytes=24 * GIB)))
    assert planned(uneven).budget.device_bytes == 24 * GIB
    assert planned(uneven, TENSOR_PARALLEL_SIZE="2").budget.device_bytes == 48 * GIB


def test_weights_that_are_too_large_by_themselves_stop_the_start() -> None:
    plan = planned("h100-x8", "deepseek-v3")
    assert values(plan, "memory") == ["too large"]
    (problem,) = plan.problems
    assert "78.3 GiB of weights in 76.0 GiB" in problem
    assert "more GPUs" in problem
    assert "a machine with more memory" in planned("two-core-24gb", "llama-3.1-70b").problems[0]


def test_weights_that_the_operator_puts_elsewhere_only_warn() -> None:
    for word in ("--cpu-offload-gb 100", "--offload-backend uva"):
        plan = planned("h100-x8", "deepseek-v3", VLLM_ARGS=word)
        assert plan.problems == ()
        assert values(plan, "memory") == ["tight"]


def test_a_tight_model_is_warned_of_with_the_levers() -> None:
    plan = planned("rtx-3090", "llama-3.1-8b", GPU_MEMORY_UTILIZATION="0.8")
    tight = planned("rtx-3090", "llama-3.1-8b", GPU_MEMORY_UTILIZATION="0.8", VLLM_QUANTIZATION="none")
    assert plan.warnings == ()
    assert "leaves no room for 4096 tokens" in tight.warnings[0]


@pytest.mark.parametrize("word", ["nan", "inf", "-1", "95"])
def test_a_utilization_that_vllm_refuses_is_not_planned_with(word: str) -> None:
    plan = planned("h200", VLLM_ARGS=f"--gpu-memory-utilization {word}")
    assert plan.budget.utilization == 0.95


def test_utilization_is_passed_on_gpus_and_where_it_was_set() -> None:
    option = "GPU memory utilization"
    assert words(decision(planned("h200"), option)) == "--gpu-memory-utilization 0.95"
    assert words(decision(planned("h200", GPU_MEMORY_UTILIZATION="0.8"), option)) == "--gpu-memory-utilization 0.8"
    assert words(decision(planned("epyc-9454-96gb"), option)) == ""
    on_cpu = planned("epyc-9454-96gb", GPU_MEMORY_UTILIZATION="0.5")
    assert words(decision(on_cpu, option)) == "--gpu-memory-utilization 0.5"
    assert planned("h200", VLLM_ARGS="--device-memory-utilization 0.5").budget.utilization == 0.5


@pytest.mark.parametrize(
    ("args", "size"),
    [("--kv-cache-dtype fp8", 1), ("--kv-cache-dtype bfloat16", 2), ("--kv_cache_dtype=int8_per_token_head", 1)],
)
def test_the_kv_caches_dtype_counts(args: str, size: int) -> None:
    assert planned("h200", VLLM_ARGS=args).budget.kv_dtype_bytes == size


def test_scales_in_the_checkpoint_make_the_kv_cache_smaller() -> None:
    fp8 = model("llama-3.1-70b-fp8")
    assert fp8.quantization is not None
    scaled = replace(fp8, quantization=replace(fp8.quantization, kv_cache_bits=8))
    assert planned("h200", scaled).budget.kv_dtype_bytes == 1
    assert planned("h200", scaled, VLLM_ARGS="--kv-cache-dtype bfloat16").budget.kv_dtype_bytes == 2
