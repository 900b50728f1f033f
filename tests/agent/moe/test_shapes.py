"""Which configuration a model looks up: by vLLM's own names."""

from dataclasses import replace
from pathlib import Path

import pytest

from xim_agent.facts.hardware import GpuFacts, HardwareFacts, Vendor
from xim_agent.facts.model import ModelFacts, QuantizationFacts
from xim_agent.facts.read_model import read_model
from xim_agent.moe.background import block_of
from xim_agent.moe.shapes import MoeShape, NotTuned, shape_of

MODELS = Path(__file__).parents[1] / "models"


def machine(name: str, vendor: Vendor = Vendor.NVIDIA, count: int = 1) -> HardwareFacts:
    return HardwareFacts(gpus=tuple(GpuFacts(name=name, vendor=vendor) for _ in range(count)))


def named(model: ModelFacts, device: str, *, quantization: str = "none", tp: int = 1) -> str:
    shape = shape_of(
        model,
        machine(device),
        quantization=quantization,
        tensor_parallel_size=tp,
        block=block_of(model.path),
    )
    assert isinstance(shape, MoeShape), shape
    return shape.file_name


@pytest.mark.parametrize(
    ("model", "device", "quantization", "tp", "file"),
    [
        ("mixtral-8x7b", "NVIDIA A100-SXM4-80GB", "none", 4, "E=8,N=3584,device_name=NVIDIA_A100-SXM4-80GB.json"),
        ("mixtral-8x7b", "AMD Instinct MI300X", "none", 1, "E=8,N=14336,device_name=AMD_Instinct_MI300X.json"),
        ("qwen3-30b-a3b", "NVIDIA H100 80GB HBM3", "", 1, "E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3.json"),
        # Every board of the family shares one set.
        ("qwen3-30b-a3b", "NVIDIA H200 NVL", "none", 2, "E=128,N=384,device_name=NVIDIA_H200.json"),
        (
            "qwen3-30b-a3b-fp8",
            "NVIDIA H20",
            "fp8",
            1,
            "E=128,N=768,device_name=NVIDIA_H20,dtype=fp8_w8a8,block_shape=[128,128].json",
        ),
        (
            "deepseek-v3",
            "NVIDIA H200",
            "fp8",
            8,
            "E=256,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
        ),
    ],
)
def test_the_name_is_the_one_vllm_looks_for(model: str, device: str, quantization: str, tp: int, file: str) -> None:
    assert named(read_model(MODELS / model), device, quantization=quantization, tp=tp) == file


def test_fp8_made_while_loading_has_no_blocks() -> None:
    name = named(read_model(MODELS / "mixtral-8x7b"), "NVIDIA L40S", quantization="fp8")
    assert name == "E=8,N=14336,device_name=NVIDIA_L40S,dtype=fp8_w8a8.json"


def reason(model: ModelFacts, hardware: HardwareFacts, *, quantization: str = "none", tp: int = 1) -> str:
    found = shape_of(model, hardware, quantization=quantization, tensor_parallel_size=tp)
    assert isinstance(found, NotTuned)
    return found.reason


def test_what_is_not_tuned_says_why() -> None:
    mixtral, gpu = read_model(MODELS / "mixtral-8x7b"), machine("NVIDIA L40S")
    assert "dense" in reason(read_model(MODELS / "llama-3.1-8b"), gpu)
    assert "no GPU" in reason(mixtral, HardwareFacts())
    assert "awq" in reason(mixtral, gpu, quantization="awq")
    integers = QuantizationFacts(method="compressed-tensors", bits=4, weight_format="int")
    assert "no configuration" in reason(replace(mixtral, quantization=integers), gpu, quantization="compressed-tensors")
    assert "do not divide by 3" in reason(mixtral, gpu, tp=3)
    assert mixtral.moe is not None
    assert "how wide" in reason(replace(mixtral, moe=replace(mixtral.moe, intermediate_size=None)), gpu)
