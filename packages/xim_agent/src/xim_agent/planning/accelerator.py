"""What the engine computes on, with which numbers, and what has to be worked around there."""

import re
from pathlib import Path

from xim_agent.facts.hardware import GpuFacts
from xim_agent.facts.model import LinearKind
from xim_agent.planning.decision import Decision, Device, Given, Source, said

EAGER_ONLY = frozenset({"L40"})
EAGER_AND_NO_ALL_REDUCE = frozenset({"A30", "A40"})
"""GPUs that fail to capture CUDA graphs when they share a model; A30 and A40 have trouble with peer-to-peer copies as
well, which vLLM's own all-reduce needs. Exact names: an L40S is another GPU."""
CUDA_MASK, CUDA_ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
GDN_GUARD = "XEROTIER_GDN_ZERO_PAD"
"""Tells the plugin in vLLM's environment to pad short prompts."""
WRAPPER = "xerotier-vllm"
WITHOUT_WRAPPER = (
    "Prompts under 64 tokens may crash this engine: the guard against it comes with xerotier-vllm, so set "
    "XEROTIER_AGENT_VLLM_PATH to that."
)
GDN_SHORTEST_TOKENS = 64
"""Gated delta net kernels on ROCm crash for sequences that are shorter."""


def choose_device(given: Given) -> Decision:
    """CUDA, ROCm or CPU. Nothing is passed: vLLM's build has decided already."""
    problems = "; ".join(given.hardware.problems)
    if given.gpus:
        return Decision(
            option="device",
            value=f"{given.device}: {named(given.gpus)}",
            source=Source.HARDWARE,
            reason="the GPUs that the engine may see",
            warning=problems,
        )
    if given.hardware.gpus:
        return Decision(
            option="device",
            value="cpu",
            source=Source.HARDWARE,
            reason=f"vLLM {given.engine.version} is a build for the CPU",
            warning=f"{named(given.hardware.gpus)} will not be used: install a vLLM built for it.",
        )
    return Decision(
        option="device",
        value="cpu",
        source=Source.HARDWARE,
        reason="no GPU is seen",
        warning=problems if given.engine.on_cpu or given.engine.version is None else _no_gpu(given, problems),
    )


def choose_masks(given: Given) -> list[Decision | None]:
    """Which devices the engine sees, and by which numbers."""
    return [_devices(given), _device_order(given)]


def _devices(given: Given) -> Decision | None:
    """The mask of devices, when the operator set one."""
    masks = {
        CUDA_MASK: given.settings.cuda_visible_devices,
        "HIP_VISIBLE_DEVICES": given.settings.hip_visible_devices,
    }
    chosen = tuple((name, mask) for name, mask in masks.items() if mask is not None)
    if not chosen:
        return None
    return Decision(
        option="visible devices",
        value=" ".join(f"{name}={mask}" for name, mask in chosen),
        source=Source.OPERATOR,
        reason="handed to the engine",
        environment=chosen,
        forced=True,
    )


def _device_order(given: Given) -> Decision | None:
    """CUDA's numbers of the devices, where they matter, as nvidia-smi and this plan count them: along the PCI bus.
    CUDA itself puts the fastest first, so on a machine with several kinds a mask would name another one."""
    mask = given.settings.cuda_visible_devices or given.inherited.get(CUDA_MASK)
    if given.device is not Device.CUDA or (mask is None and len({gpu.name for gpu in given.gpus}) == 1):
        return None
    return Decision(
        option="device order",
        value="PCI bus",
        source=Source.HARDWARE,
        reason="GPUs are numbered as by nvidia-smi",
        environment=((CUDA_ORDER, "PCI_BUS_ID"),),
    )


def choose_dtype(given: Given) -> Decision:
    """bfloat16 on a CPU that computes in it, float32 on one that would only imitate it, else vLLM's own choice."""
    own = said(given, "--dtype", None)
    if own is not None:
        return Decision(option="dtype", value=own.value, source=own.source, reason=own.reason)
    auto = Decision(
        option="dtype",
        value="auto",
        source=Source.MODEL,
        reason=(
            "the checkpoint's is float32, which vLLM loads in 16 bits"
            if given.model.dtype == "float32"
            else f"the checkpoint's ({given.model.dtype or 'it names none'}), where the device has it"
        ),
    )
    if given.device is not Device.CPU or given.model.quantization is not None or not given.settings.auto_config:
        return auto
    cpu = given.hardware.cpu
    if cpu.has("avx512_bf16") or cpu.has("amx_bf16"):
        return _dtype("bfloat16", "the CPU computes in bfloat16, and half the bytes move")
    if cpu.has("avx512f") is False and _float32_fits(given):
        return _dtype("float32", "without AVX-512 a CPU only imitates bfloat16; the weights fit in float32")
    return auto


def choose_graphs(given: Given, tensor_parallel_size: int) -> Decision:
    """Whether CUDA graphs are captured."""
    eager: tuple[tuple[str, ...], ...] = (("--enforce-eager",),)
    if given.words.has("--enforce-eager"):
        return Decision(
            option="CUDA graphs", value="by VLLM_ARGS", source=Source.OPERATOR, reason="--enforce-eager in VLLM_ARGS"
        )
    if given.settings.vllm_disable_cuda_graphs:
        reason = "set by XEROTIER_AGENT_VLLM_DISABLE_CUDA_GRAPHS"
        return Decision(option="CUDA graphs", value="off", source=Source.OPERATOR, reason=reason, arguments=eager)
    if given.device is Device.CPU:
        return _none_on_cpu("CUDA graphs")
    unsafe = _mitigated(given, tensor_parallel_size, EAGER_ONLY | EAGER_AND_NO_ALL_REDUCE)
    if unsafe:
        reason = f"graph capture fails on {unsafe} when {tensor_parallel_size} of them share a model"
        return Decision(option="CUDA graphs", value="off", source=Source.HARDWARE, reason=reason, arguments=eager)
    return Decision(option="CUDA graphs", value="vLLM's own", source=Source.DEFAULT, reason="no trouble is known here")


def choose_all_reduce(given: Given, tensor_parallel_size: int) -> Decision:
    """Whether vLLM's own all-reduce is used between GPUs."""
    off: tuple[tuple[str, ...], ...] = (("--disable-custom-all-reduce",),)
    name = "custom all-reduce"
    if given.words.has("--disable-custom-all-reduce"):
        reason = "--disable-custom-all-reduce in VLLM_ARGS"
        return Decision(option=name, value="by VLLM_ARGS", source=Source.OPERATOR, reason=reason)
    if given.settings.vllm_disable_custom_all_reduce:
        reason = "set by XEROTIER_AGENT_VLLM_DISABLE_CUSTOM_ALL_REDUCE"
        return Decision(option=name, value="off", source=Source.OPERATOR, reason=reason, arguments=off)
    if given.device is Device.CPU:
        return _none_on_cpu(name)
    unsafe = _mitigated(given, tensor_parallel_size, EAGER_AND_NO_ALL_REDUCE)
    if unsafe:
        reason = f"{unsafe} has trouble with copies between GPUs, which it needs"
        return Decision(option=name, value="off", source=Source.HARDWARE, reason=reason, arguments=off)
    return Decision(option=name, value="vLLM's own", source=Source.DEFAULT, reason="no trouble is known here")


def choose_short_prompts(given: Given) -> Decision | None:
    """The guard for short prompts, on ROCm with gated delta nets only."""
    linear = given.model.linear
    if given.device is not Device.ROCM or linear is None or linear.kind is not LinearKind.GDN:
        return None
    return Decision(
        option="short prompts",
        value=f"padded to {GDN_SHORTEST_TOKENS} tokens",
        source=Source.HARDWARE,
        reason="gated delta net kernels crash on ROCm for shorter sequences",
        environment=((GDN_GUARD, "1"),),
        warning="" if Path(given.places.executable).name == WRAPPER else WITHOUT_WRAPPER,
    )


def named(gpus: tuple[GpuFacts, ...]) -> str:
    """`NVIDIA A40 × 4`, each kind once."""
    names = dict.fromkeys(gpu.name for gpu in gpus)
    counted = ((name, sum(gpu.name == name for gpu in gpus)) for name in names)
    return ", ".join(f"{name} × {count}" if count > 1 else name for name, count in counted)


def _none_on_cpu(option: str) -> Decision:
    return Decision(option=option, value="none", source=Source.HARDWARE, reason="the engine runs on the CPU")


def _mitigated(given: Given, tensor_parallel_size: int, names: frozenset[str]) -> str:
    """The first of `names` among the GPUs that share the model, where the mitigation is on; else nothing."""
    settings = given.settings
    if not (settings.auto_config and settings.auto_cuda_mitigation) or tensor_parallel_size == 1:
        return ""
    words = (word for gpu in given.gpus for word in re.split(r"[\s-]+", gpu.name) if word in names)
    return next(words, "")


def _dtype(value: str, reason: str) -> Decision:
    return Decision(option="dtype", value=value, source=Source.HARDWARE, reason=reason, arguments=(("--dtype", value),))


def _float32_fits(given: Given) -> bool:
    """Whether half of the memory holds the weights in float32; the other half is for the cache and the system."""
    ram, parameters = given.hardware.usable_ram_bytes, given.model.parameters
    return ram is not None and parameters is not None and parameters * 4 <= ram / 2


def _no_gpu(given: Given, problems: str) -> str:
    return (
        f"vLLM {given.engine.version} is no build for the CPU, and no GPU is seen, so it will find no device"
        f"{f' ({problems})' if problems else ''}. In this order: does nvidia-smi or rocm-smi list it on the host; is "
        "it passed into the container (--gpus all, or /dev/kfd and /dev/dri); does a mask such as CUDA_VISIBLE_DEVICES "
        "hide it?"
    )
