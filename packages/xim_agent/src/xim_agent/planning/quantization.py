"""How the weights are quantised: the operator, the checkpoint, the endpoint, else what fits, in this order."""

from collections.abc import Callable

from xim_agent.planning.budget import Budget, shortest_context
from xim_agent.planning.decision import Decision, Device, Given, Source, said
from xim_agent.planning.parallelism import shares_experts

OPTION = "quantization"
FLAG = "--quantization"
NATIVE_FP8 = (8, 9)
"""The first compute capability with fp8 arithmetic (Ada, Hopper)."""
WEIGHT_ONLY_FP8 = (7, 5)
"""The first on which vLLM runs fp8 weights in 16-bit arithmetic (`Fp8Config.get_min_capability`, Marlin)."""
FP8_ARCHITECTURES = ("gfx94", "gfx95", "gfx1200", "gfx1201")
"""AMD targets with fp8 arithmetic: MI300, MI350 and RDNA 4 (`RocmPlatform.supports_fp8`)."""
FP8_RENAMED = (0, 32)
"""Since then `fp8` is for checkpoints, and on others a deprecated name of `fp8_per_tensor` (`get_quant_config`)."""
ACTIVATION_ORDER_LEFT = (0, 32)
"""This version refuses GPTQ checkpoints that are grouped by activation (`normalize_and_validate_gptq_desc_act`; vLLM's
pull request 54809). What an earlier one says is not known here."""
PREQUANTIZED = {"awq": "awq", "gptq": "gptq"}
"""Checkpoints whose flag is passed. vLLM finds its fastest kernels for both by itself (AutoAWQ, AutoGPTQ); all other
formats are read from config.json or hf_quant_config.json, and a flag that names another one would stop it."""

BudgetFor = Callable[[str | None], Budget]
"""The budget under a quantization."""


def choose_quantization(given: Given, budget_for: BudgetFor) -> Decision:
    """The quantization. `arguments` are empty where vLLM reads it from the checkpoint."""
    own = said(given, FLAG, "vllm_quantization")
    if own is not None:
        return _chosen(given, own.value, Source.OPERATOR, own.reason, passed=bool(own.arguments))
    checkpoint = given.model.quantization
    endpoint = given.wanted.quantization
    if checkpoint is not None:
        flag = PREQUANTIZED.get(checkpoint.method)
        ignored = f"The endpoint's {endpoint!r} is not used: the checkpoint is quantised already."
        return Decision(
            option=OPTION,
            value=checkpoint.method,
            source=Source.MODEL,
            reason="config.json says so" if flag else "vLLM reads it from the checkpoint",
            arguments=((FLAG, flag),) if flag else (),
            warning=ignored if endpoint not in (None, checkpoint.method) else "",
            problem=_missing(given, checkpoint.method) or _refused(given),
        )
    if endpoint is not None:
        return _chosen(given, endpoint, Source.ENDPOINT, "set for the endpoint", passed=True)
    if not given.settings.auto_config:
        return _none(Source.DEFAULT, "XEROTIER_AGENT_AUTO_CONFIG is off, and none is set")
    return _by_fit(given, budget_for)


def _chosen(given: Given, value: str, source: Source, reason: str, *, passed: bool) -> Decision:
    """A method by name; a name that is not vLLM's own is translated."""
    if value.lower() == "none":
        return _none(source, reason)
    method = "bitsandbytes" if value == "bitsandbytes-fp4" else value
    if method != value:
        reason += "; vLLM quantises to nf4 while loading and has no fp4 there"
    return Decision(
        option=OPTION,
        value=method,
        source=source,
        reason=reason,
        arguments=((FLAG, method),) if passed else (),
        problem=_missing(given, method) or _refused(given),
        warning=_mismatch(given, method),
    )


def _by_fit(given: Given, budget_for: BudgetFor) -> Decision:
    """Nothing where the weights fit as they are; else the method that loses least among those that run here."""
    if shares_experts(given):
        return _none(Source.AUTOMATIC, "whether it fits cannot be told: copies of the model share its experts out")
    plain = budget_for(None)
    context = shortest_context(given)
    fits = plain.context_fits(given, context)
    if fits is None:
        return _none(Source.AUTOMATIC, "whether it fits cannot be told: the model's size or the memory is not known")
    if fits:
        return _none(Source.AUTOMATIC, "it fits as it is")
    tried: list[str] = []
    for method, reason in _candidates(given):
        if budget_for(method).context_fits(given, context):
            return Decision(
                option=OPTION,
                value=method,
                source=Source.AUTOMATIC,
                reason=f"in 16 bits it does not fit; {reason}",
                arguments=((FLAG, method),),
            )
        tried.append(method)
    tries = f" ({', '.join(tried)} would not fit either)" if tried else ""
    return _none(Source.AUTOMATIC, f"it does not fit, and no method that runs here makes it fit{tries}")


def _candidates(given: Given) -> list[tuple[str, str]]:
    """Methods that quantise while loading and run on this device, the one that loses least first."""
    if given.device is Device.CPU:
        return []
    release = given.engine.release
    name = "fp8_per_tensor" if release is None or release >= FP8_RENAMED else "fp8"
    fp8 = (name, "the GPU computes in fp8")
    if given.device is Device.ROCM:
        architectures = [gpu.architecture or "" for gpu in given.gpus]
        return [fp8] if all(name.startswith(FP8_ARCHITECTURES) for name in architectures) else []
    capabilities = [gpu.compute_capability or (0, 0) for gpu in given.gpus]
    found: list[tuple[str, str]] = []
    if min(capabilities) >= NATIVE_FP8:
        found.append(fp8)
    elif min(capabilities) >= WEIGHT_ONLY_FP8:
        found.append((name, "the GPU keeps weights in fp8 and computes in 16 bits"))
    if given.engine.has_bitsandbytes:
        found.append(("bitsandbytes", "4 bits (nf4) are the smallest that vLLM makes while loading"))
    return found


def _none(source: Source, reason: str) -> Decision:
    return Decision(option=OPTION, value="none", source=source, reason=reason)


def _missing(given: Given, method: str) -> str:
    """Why `method` cannot run with this vLLM."""
    if method != "bitsandbytes" or given.engine.has_bitsandbytes:
        return ""
    if given.engine.release is not None and given.engine.release >= (0, 28):
        return (
            f"vLLM {given.engine.version} has bitsandbytes in a plugin only. Install vllm-bnb-plugin and bitsandbytes "
            "into vLLM's environment, or use another quantization."
        )
    return "vLLM's environment has no bitsandbytes. Install it there, or use another quantization."


def _refused(given: Given) -> str:
    """Why vLLM cannot load the checkpoint, whatever its method is called."""
    checkpoint, release = given.model.quantization, given.engine.release
    if checkpoint is None or not checkpoint.grouped_by_activation or (release or (0, 0)) < ACTIVATION_ORDER_LEFT:
        return ""
    return (
        f"vLLM {given.engine.version} loads no GPTQ checkpoint that is grouped by activation (desc_act in config.json, "
        "with a group size). Use one made without desc_act, or one in AWQ."
    )


def _mismatch(given: Given, method: str) -> str:
    """What vLLM will say to a method that is not the checkpoint's."""
    checkpoint = given.model.quantization
    if checkpoint is None or checkpoint.method.split("_")[0] == method.split("_")[0]:
        return ""
    return f"The checkpoint is quantised as {checkpoint.method}; vLLM refuses to load it as {method}."
