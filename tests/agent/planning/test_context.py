"""Context length, batch, concurrency, and whether the model fits."""

from dataclasses import replace

import pytest

from tests.agent.planning.givens import decision, machine, model, planned, vllm, words
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
