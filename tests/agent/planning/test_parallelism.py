"""On how many GPUs a model is spread."""

from dataclasses import replace
from typing import Any

import pytest

from tests.agent.planning.givens import decision, given, machine, model, planned, words
from xim_agent.facts.hardware import HardwareFacts
from xim_agent.planning.decision import Decision, Device, Source
from xim_agent.planning.engine_facts import EngineFacts
from xim_agent.planning.parallelism import size_of

OPTION = "tensor parallel size"
GIB = 1024**3


def chosen(*names: str, **values: Any) -> Decision:
    return decision(planned(*names, **values), OPTION)


@pytest.mark.parametrize(
    ("machine_name", "model_name", "size"),
    [
        ("rtx-3090", "llama-3.1-8b", "1"),
        ("a30-x2", "llama-3.1-8b", "2"),
        ("h100-x8", "llama-3.1-70b", "8"),
        ("h100-x8", "gemma-3-4b-it", "8"),  # 8 attention heads, 4 KV heads: each is copied once
        ("h100-x8", "deepseek-v3", "8"),
        ("h100-x8", "bge-base-en-v1.5", "4"),  # 12 heads
        ("no-gpu", "llama-3.1-8b", "1"),
    ],
)
def test_it_is_the_largest_power_of_two_that_divides_the_heads(machine_name: str, model_name: str, size: str) -> None:
    assert chosen(machine_name, model_name).value == size


def test_three_gpus_leave_one_out() -> None:
    three = first(machine("a40-x4"), 3)
    found = decision(planned(three, "llama-3.1-8b"), OPTION)
    assert found.value == "2"
    assert (
        found.reason == "3 GPUs visible; the largest power of two that divides 32 attention heads and suits 8 KV heads"
    )


def test_a_latent_cache_is_copied_and_limits_nothing() -> None:
    odd = replace(model("deepseek-v3"), kv_heads=3)
    assert decision(planned("h100-x8", odd), OPTION).value == "8"
    three = first(machine("h100-x8"), 3)
    assert decision(planned(three, odd), OPTION).reason.endswith("divides 128 attention heads")


def test_kv_heads_that_cannot_be_spread_limit_it() -> None:
    odd = replace(model("llama-3.1-8b"), kv_heads=6, attention_heads=48)
    assert decision(planned("h100-x8", odd), OPTION).value == "2"


def test_heads_of_linear_attention_limit_it_too() -> None:
    linear = model("qwen3-next-80b-a3b").linear
    assert linear is not None
    odd = replace(model("qwen3-next-80b-a3b"), linear=replace(linear, key_heads=2, value_heads=None))
    assert decision(planned("h100-x8", odd), OPTION).value == "2"


def test_an_explicit_number_is_never_changed() -> None:
    found = chosen("h100-x8", "llama-3.1-8b", TENSOR_PARALLEL_SIZE="1")
    assert (found.value, found.source, words(found)) == ("1", Source.OPERATOR, "--tensor-parallel-size 1")
    off = chosen("a40-x4", "llama-3.1-8b", TENSOR_PARALLEL_SIZE="4", AUTO_CONFIG="0", AUTO_CONFIGURE_GPU="0")
    assert off.value == "4"


def test_an_explicit_number_that_vllm_will_refuse_is_warned_of() -> None:
    assert "sees 2 of the 4 GPUs" in chosen("a30-x2", "llama-3.1-8b", TENSOR_PARALLEL_SIZE="4").warning
    assert "cannot be divided by 3" in chosen("a40-x4", "llama-3.1-8b", TENSOR_PARALLEL_SIZE="3").warning


def test_vllm_args_count_too() -> None:
    plan = planned("a40-x4", "llama-3.1-8b", VLLM_ARGS="-tp 2")
    found = decision(plan, OPTION)
    assert (found.value, found.source, words(found), plan.tensor_parallel_size) == ("2", Source.OPERATOR, "", 2)
    assert size_of(chosen("a40-x4", "llama-3.1-8b", VLLM_ARGS="--tensor-parallel-size=two")) == 1


@pytest.mark.parametrize("switch", ["AUTO_CONFIG", "AUTO_CONFIGURE_GPU"])
def test_switched_off_it_is_one(switch: str) -> None:
    found = chosen("h100-x8", "llama-3.1-8b", **{switch: "0"})
    assert (found.value, found.source) == ("1", Source.DEFAULT)
    assert found.reason == f"XEROTIER_AGENT_{switch} is off, and no number is set"


def test_mig_slices_share_no_model() -> None:
    slices = machine("a100-mig-3g.40gb")
    two = replace(slices, gpus=slices.gpus * 2)
    assert decision(planned(two, "llama-3.1-8b"), OPTION).value == "1"


def test_gpus_of_two_vendors_are_not_counted_together() -> None:
    both = replace(machine("h200"), gpus=machine("h200").gpus + machine("rx-7900-xtx").gpus)
    assert given(both).device is Device.CUDA
    assert decision(planned(both, "llama-3.1-8b"), OPTION).value == "1"


def first(hardware: HardwareFacts, count: int) -> HardwareFacts:
    return replace(hardware, gpus=hardware.gpus[:count])


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ("--pipeline-parallel-size 2", "4"),
        ("-pp 4", "2"),
        ("--data-parallel-size=8", "1"),
        ("-pp 2 -dp 2", "2"),
        ("-dp 16 --data-parallel-size-local 1", "8"),
        ("-pp 16", "1"),
        ("-pp many", "8"),
    ],
)
def test_stages_and_copies_of_the_model_have_gpus_of_their_own(args: str, size: str) -> None:
    found = chosen("h100-x8", "llama-3.1-8b", VLLM_ARGS=args)
    assert (found.value, words(found)) == (size, f"--tensor-parallel-size {size}")


def test_what_the_operators_numbers_need_together_is_judged() -> None:
    reason = "8 GPUs visible, 4 for each of 2 stages and copies of the model in VLLM_ARGS"
    assert chosen("h100-x8", "llama-3.1-8b", VLLM_ARGS="-pp 2").reason == reason
    beyond = chosen("h100-x8", "llama-3.1-8b", VLLM_ARGS="-pp 2 -tp 8").warning
    assert beyond == "vLLM will refuse it: the engine sees 8 of the 16 GPUs."
    assert not chosen("h100-x8", "llama-3.1-8b", VLLM_ARGS="-pp 2 -tp 4").warning


def test_a_stage_holds_its_part_of_the_weights_and_of_the_kv_cache() -> None:
    """A model that two GPUs hold only as two stages: its heads cannot be divided."""
    odd = replace(model("llama-3.1-70b-fp8"), attention_heads=63, kv_heads=7)
    two = first(machine("h100-x8"), 2)
    small = replace(two, gpus=tuple(replace(gpu, memory_bytes=64 * GIB) for gpu in two.gpus))
    assert decision(planned(small, odd), "memory").value == "too large"
    staged = planned(small, odd, VLLM_ARGS="--pipeline-parallel-size 2")
    assert not staged.problems
    assert decision(staged, "memory").value == "fits"
    whole, half = planned(two, odd).budget, staged.budget
    assert whole.estimate is not None
    assert half.estimate is not None
    assert staged.estimate is not None
    assert half.estimate.weights_bytes == whole.estimate.weights_bytes // 2
    assert staged.estimate.with_margin_bytes <= 64 * GIB * half.utilization
    assert half.kv_bytes is not None
    needed = staged.max_concurrent * half.sequence_bytes(staged.given, staged.typical_tokens)
    assert staged.estimate.kv_cache_bytes == min(needed, half.kv_bytes) // 2


def test_experts_that_copies_share_out_are_vllms_to_judge() -> None:
    h200s = replace(machine("h200"), gpus=machine("h200").gpus * 8)
    spread = "--data-parallel-size 8 --enable-expert-parallel"
    assert not planned(h200s, "deepseek-v3", VLLM_ARGS=spread).problems
    assert planned(h200s, "deepseek-v3", VLLM_ARGS="--data-parallel-size 8").problems
    small = replace(machine("l40s"), gpus=machine("l40s").gpus * 8)
    sparse = planned(small, "qwen3-30b-a3b", VLLM_ARGS=spread, engine=EngineFacts())  # an eighth of its experts fits
    assert decision(sparse, "quantization").value == "none"
    dense = planned(h200s, replace(model("deepseek-v3"), moe=None), VLLM_ARGS=spread)
    assert dense.problems


def test_on_a_cpu_stages_have_one_memory() -> None:
    plain, staged = planned("two-core-24gb"), planned("two-core-24gb", VLLM_ARGS="-pp 2")
    assert plain.budget == staged.budget
