"""On how many GPUs a model is spread."""

from dataclasses import replace
from typing import Any

import pytest

from tests.agent.planning.givens import decision, given, machine, model, planned, words
from xim_agent.facts.hardware import HardwareFacts
from xim_agent.planning.decision import Decision, Device, Source
from xim_agent.planning.parallelism import size_of

OPTION = "tensor parallel size"


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
