"""What the engine computes on, with which numbers, and what is worked around."""

from dataclasses import replace

import pytest

from tests.agent.planning.givens import decision, given, machine, model, planned, vllm, words
from xim_agent.facts.hardware import CpuFacts, GpuFacts, HardwareFacts, Vendor
from xim_agent.planning.accelerator import GDN_GUARD
from xim_agent.planning.decision import Device, Source
from xim_agent.planning.engine_facts import EngineFacts
from xim_agent.planning.render import command_of

EAGER = "--enforce-eager"
NO_ALL_REDUCE = "--disable-custom-all-reduce"


def gpus(name: str, count: int) -> HardwareFacts:
    one = GpuFacts(name=name, vendor=Vendor.NVIDIA, memory_bytes=48 * 1024**3, compute_capability=(8, 6))
    return HardwareFacts(gpus=(one,) * count, ram_bytes=64 * 1024**3)


def mitigations(hardware: HardwareFacts, **values: object) -> list[str]:
    plan = planned(hardware, "llama-3.1-8b", **values)
    return [words(decision(plan, option)) for option in ("CUDA graphs", "custom all-reduce")]


@pytest.mark.parametrize("option", ["CUDA graphs", "custom all-reduce"])
def test_a_cpu_has_nothing_of_a_gpus(option: str) -> None:
    found = decision(planned("two-core-24gb", "llama-3.2-1b-instruct"), option)
    assert (found.value, found.source, words(found)) == ("none", Source.HARDWARE, "")
    assert found.reason == "the engine runs on the CPU"


@pytest.mark.parametrize(
    ("name", "count", "flags"),
    [
        ("NVIDIA A30", 2, [EAGER, NO_ALL_REDUCE]),
        ("NVIDIA A40", 4, [EAGER, NO_ALL_REDUCE]),
        ("NVIDIA A40-48Q", 2, [EAGER, NO_ALL_REDUCE]),
        ("NVIDIA L40", 2, [EAGER, ""]),
        ("NVIDIA L40S", 2, ["", ""]),
        ("NVIDIA A300", 2, ["", ""]),
        ("NVIDIA A40", 1, ["", ""]),
    ],
)
def test_the_named_gpus_are_worked_around_when_they_share_a_model(name: str, count: int, flags: list[str]) -> None:
    assert mitigations(gpus(name, count)) == flags


@pytest.mark.parametrize("switch", ["AUTO_CONFIG", "AUTO_CUDA_MITIGATION"])
def test_the_workaround_can_be_switched_off(switch: str) -> None:
    assert mitigations(gpus("NVIDIA A40", 2), TENSOR_PARALLEL_SIZE="2", **{switch: "0"}) == ["", ""]


def test_the_operator_can_ask_for_either_on_any_gpu() -> None:
    assert mitigations(gpus("NVIDIA H200", 1), VLLM_DISABLE_CUDA_GRAPHS="1") == [EAGER, ""]
    assert mitigations(gpus("NVIDIA H200", 1), VLLM_DISABLE_CUSTOM_ALL_REDUCE="true") == ["", NO_ALL_REDUCE]


def test_what_stands_in_vllm_args_is_not_passed_twice() -> None:
    assert mitigations(gpus("NVIDIA A40", 2), VLLM_ARGS=f"{EAGER} --no-disable-custom-all-reduce") == ["", ""]


def test_the_build_of_vllm_decides_on_the_device() -> None:
    both = replace(machine("h200"), gpus=machine("h200").gpus + machine("rx-7900-xtx").gpus)
    assert given(both).device is Device.CUDA
    assert given(both, engine=vllm("+rocm700")).device is Device.ROCM
    assert given(machine("rx-7900-xtx"), engine=vllm()).device is Device.ROCM
    on_cpu = decision(planned("h200", engine=vllm("+cpu")), "device")
    assert on_cpu.value == "cpu"
    assert "NVIDIA H200 will not be used" in on_cpu.warning


def test_a_gpu_build_that_sees_no_gpu_is_told_what_to_check() -> None:
    hardware = replace(machine("no-gpu"), problems=("the driver does not answer",))
    warning = decision(planned(hardware, engine=vllm()), "device").warning
    assert "(the driver does not answer)" in warning
    assert warning.index("nvidia-smi") < warning.index("container") < warning.index("mask")
    assert decision(planned(hardware, engine=EngineFacts()), "device").warning == "the driver does not answer"
    assert "()" not in decision(planned("no-gpu", engine=vllm()), "device").warning


def test_a_mask_names_the_gpus_that_nvidia_smi_numbers_so() -> None:
    """CUDA's own order is by speed: on a machine with two kinds, its 0 may be nvidia-smi's 1."""
    order = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    for plan in (
        planned("h100-x8", CUDA_VISIBLE_DEVICES="1"),
        planned("h100-x8", inherited={"CUDA_VISIBLE_DEVICES": "1"}),
        planned(replace(machine("rtx-3090"), gpus=machine("rtx-3090").gpus + machine("l40s").gpus)),
    ):
        assert decision(plan, "device order").environment == (order,)
    own = planned("h100-x8", CUDA_VISIBLE_DEVICES="1", inherited={"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    assert command_of(own).environment["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    for plan in (planned("h100-x8"), planned("mi300x-x8", HIP_VISIBLE_DEVICES="1"), planned("no-gpu")):
        assert "CUDA_DEVICE_ORDER" not in command_of(plan).environment


def test_masks_are_handed_on() -> None:
    plan = planned("h200", CUDA_VISIBLE_DEVICES="0,1", HIP_VISIBLE_DEVICES="2", inherited={"CUDA_VISIBLE_DEVICES": "7"})
    found = decision(plan, "visible devices")
    assert dict(found.environment) == {"CUDA_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "2"}
    assert found.source is Source.OPERATOR


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (("avx512_bf16", "avx512f"), "bfloat16"),
        (("amx_bf16", "avx512f"), "bfloat16"),
        (("avx2", "avx512f"), "auto"),
        (("avx2",), "float32"),
        (None, "auto"),
    ],
)
def test_a_cpu_gets_the_dtype_that_it_computes_in(flags: tuple[str, ...] | None, dtype: str) -> None:
    hardware = HardwareFacts(cpu=CpuFacts(flags=flags), ram_bytes=24 * 1024**3)
    found = decision(planned(hardware, "llama-3.2-1b-instruct"), "dtype")
    assert found.value == dtype
    assert words(found) == ("" if dtype == "auto" else f"--dtype {dtype}")


def test_float32_is_not_chosen_where_it_would_fill_the_memory() -> None:
    hardware = HardwareFacts(cpu=CpuFacts(flags=("avx2",)), ram_bytes=24 * 1024**3)
    assert decision(planned(hardware, "llama-3.1-8b"), "dtype").value == "auto"
    assert decision(planned(replace(hardware, ram_bytes=None), "llama-3.2-1b-instruct"), "dtype").value == "auto"


def test_a_quantised_checkpoint_and_a_gpu_keep_their_dtype() -> None:
    assert decision(planned("epyc-9454-96gb", "mammoth-7b-awq"), "dtype").value == "auto"
    assert decision(planned("h200"), "dtype").value == "auto"
    assert decision(planned("epyc-9454-96gb", AUTO_CONFIG="0"), "dtype").value == "auto"


def test_a_dtype_in_vllm_args_wins_and_counts_in_the_estimate() -> None:
    plan = planned("epyc-9454-96gb", "llama-3.2-1b-instruct", VLLM_ARGS="--dtype float32")
    found = decision(plan, "dtype")
    assert (found.value, found.source, words(found)) == ("float32", Source.OPERATOR, "")
    assert plan.budget.kv_dtype_bytes == 4


def test_short_prompts_are_padded_on_rocm_with_gated_delta_nets_only() -> None:
    found = decision(planned("rx-7900-xtx", "qwen3.5-9b"), "short prompts")
    assert dict(found.environment) == {GDN_GUARD: "1"}
    for machine_name, model_name in (
        ("h200", "qwen3.5-9b"),
        ("rx-7900-xtx", "qwen3-8b"),
        ("mi300x-x8", "nemotron-h-56b"),
    ):
        options = [each.option for each in planned(machine_name, model_name).decisions]
        assert "short prompts" not in options


def test_the_model_names_no_dtype() -> None:
    unnamed = replace(model("llama-3.1-8b"), dtype=None)
    assert "it names none" in decision(planned("h200", unnamed), "dtype").reason


def test_float32_in_a_checkpoint_is_loaded_in_16_bits_and_said_so() -> None:
    found = decision(planned("rtx-3090", "mammoth-7b-awq"), "dtype")
    assert (found.value, words(found)) == ("auto", "")
    assert found.reason == "the checkpoint's is float32, which vLLM loads in 16 bits"
