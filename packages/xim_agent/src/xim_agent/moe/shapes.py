"""Which kernel configuration a mixture of experts needs, by the name that vLLM looks it up with. Pure.

vLLM's names (`get_config_file_name`): E is the number of experts on one GPU, N the width of one of them there, and the
device's name has underscores for spaces.
"""

from dataclasses import dataclass

from xim_agent.facts.hardware import HardwareFacts
from xim_agent.facts.model import ModelFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeShape:
    """What a kernel configuration is for."""

    experts: int
    width: int
    """Of one expert on one GPU."""
    hidden: int
    experts_per_token: int
    device: str
    """As the driver says it: `NVIDIA H100 80GB HBM3`."""
    dtype: str | None = None
    """vLLM's word for how weights are stored, such as `fp8_w8a8`; `None` for sixteen bits."""
    block: tuple[int, int] | None = None
    """Of weights that are scaled block by block."""

    @property
    def file_name(self) -> str:
        """The name of its file, in vLLM's folder and in ours."""
        device = self.device.replace(" ", "_").replace("/", "_")
        # vLLM has one set of configurations for the whole family.
        device = "NVIDIA_H200" if "H200" in device.split("_") else device
        dtype = f",dtype={self.dtype}" if self.dtype else ""
        block = f",block_shape=[{self.block[0]},{self.block[1]}]" if self.block else ""
        return f"E={self.experts},N={self.width},device_name={device}{dtype}{block}.json"


@dataclass(frozen=True, slots=True)
class NotTuned:
    """Nothing is to be tuned, and why."""

    reason: str


_TUNED: dict[str, str | None] = {"": None, "none": None, "fp8": "fp8_w8a8", "compressed-tensors": "fp8_w8a8"}
"""Quantization methods whose experts run in the kernels that are tuned, and vLLM's word for them. Integer weights
(AWQ, GPTQ) and mxfp4 run in kernels of their own."""


def shape_of(
    model: ModelFacts,
    hardware: HardwareFacts,
    *,
    quantization: str,
    tensor_parallel_size: int,
    block: tuple[int, int] | None = None,
) -> MoeShape | NotTuned:
    """The shape that a plan's engine looks up, or why there is none.

    `quantization` is the plan's method, empty or `none` for none; `block` is what the checkpoint says of its scales.
    """
    moe = model.moe
    if moe is None:
        return NotTuned("a dense model has no experts")
    if not hardware.gpus:
        return NotTuned("no GPU is seen; the kernels are a GPU's")
    stored = model.quantization
    if quantization not in _TUNED or (stored is not None and stored.weight_format == "int"):
        return NotTuned(f"experts stored as {quantization or 'integers'} run in kernels that take no configuration")
    if moe.intermediate_size is None or moe.experts_per_token is None:
        return NotTuned("config.json does not say how wide an expert is, or how many of them a token takes")
    if moe.intermediate_size % tensor_parallel_size:
        return NotTuned(f"experts of width {moe.intermediate_size} do not divide by {tensor_parallel_size} GPUs")
    dtype = _TUNED[quantization]
    return MoeShape(
        experts=moe.experts,
        width=moe.intermediate_size // tensor_parallel_size,
        hidden=model.hidden_size,
        experts_per_token=moe.experts_per_token,
        device=hardware.gpus[0].name,
        dtype=dtype,
        block=block if dtype == "fp8_w8a8" else None,
    )
