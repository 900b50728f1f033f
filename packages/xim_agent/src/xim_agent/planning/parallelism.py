"""On how many GPUs one model is spread."""

from xim_agent.planning.decision import Decision, Device, Given, Source, said
from xim_agent.planning.operator_words import number_of

OPTION = "tensor parallel size"
FLAG = "--tensor-parallel-size"


def choose_tensor_parallel_size(given: Given) -> Decision:
    """The operator's number, never ignored; else the most GPUs that can share the model; else 1.

    `value` is a whole number, but for one in VLLM_ARGS that vLLM will refuse.
    """
    own = said(given, FLAG, "tensor_parallel_size")
    groups = stages_of(given) * copies_of(given)
    visible = len(given.gpus) // groups
    if own is not None:
        size = number_of(own.value) or 1
        return Decision(
            option=OPTION,
            value=own.value,
            source=Source.OPERATOR,
            reason=own.reason,
            arguments=own.arguments,
            warning=_beyond(size * groups, len(given.gpus)) or _undivided(given, size),
        )
    settings = given.settings
    if given.device is Device.CPU:
        return Decision(option=OPTION, value="1", source=Source.DEFAULT, reason="one process computes on the CPU")
    if not settings.auto_config or not settings.auto_configure_gpu:
        switch = "AUTO_CONFIG" if not settings.auto_config else "AUTO_CONFIGURE_GPU"
        return _passed(1, Source.DEFAULT, f"XEROTIER_AGENT_{switch} is off, and no number is set")
    if any(gpu.mig for gpu in given.gpus):
        return _passed(1, Source.HARDWARE, "a MIG slice shares no model: CUDA shows a process one slice")
    sizes = [2**power for power in range(max(visible, 1).bit_length())]
    size = max(size for size in sizes if not _undivided(given, size))
    reason = f"{len(given.gpus)} GPU{'s' if len(given.gpus) > 1 else ''} visible"
    if groups > 1:
        reason += f", {visible} for each of {groups} stages and copies of the model in VLLM_ARGS"
    if size < visible:
        reason += f"; the largest power of two that divides {_heads(given)}" if visible > 1 else ""
    return _passed(size, Source.AUTOMATIC, reason)


def stages_of(given: Given) -> int:
    """Stages that the model's layers are divided into, each on GPUs of its own: VLLM_ARGS alone say so."""
    return _counted(given, "--pipeline-parallel-size")


def copies_of(given: Given) -> int:
    """Copies of the model on this machine, each on GPUs of its own: VLLM_ARGS alone say so."""
    local = "--data-parallel-size-local"
    return _counted(given, local if given.words.has(local) else "--data-parallel-size")


def shares_experts(given: Given) -> bool:
    """Whether the copies of a mixture of experts share its experts out among them, which no estimate here counts."""
    copied = _counted(given, "--data-parallel-size") > 1
    return copied and given.model.moe is not None and given.words.has("--enable-expert-parallel")


def _counted(given: Given, flag: str) -> int:
    """The operator's number; on a CPU all ranks have one memory, and are counted as one."""
    return 1 if given.device is Device.CPU else number_of(given.words.value(flag) or "") or 1


def size_of(decision: Decision) -> int:
    """The number that a decision of `choose_tensor_parallel_size` holds; 1 where vLLM will refuse it."""
    return number_of(decision.value) or 1


def _passed(size: int, source: Source, reason: str) -> Decision:
    return Decision(option=OPTION, value=str(size), source=source, reason=reason, arguments=((FLAG, str(size)),))


def _heads(given: Given) -> str:
    model = given.model
    heads = f"{model.attention_heads} attention heads"
    return heads if model.mla is not None else f"{heads} and suits {model.kv_heads} KV heads"


def _undivided(given: Given, size: int) -> str:
    """Why `size` GPUs cannot share the model; empty when they can.

    vLLM divides attention heads and gives every GPU a whole number of KV heads, or copies of one
    (`ModelConfig.verify_with_parallel_config`, `get_num_kv_heads`); MLA keeps one latent vector on all of them.
    """
    model = given.model
    if model.attention_heads % size:
        return f"vLLM will refuse it: {model.attention_heads} attention heads cannot be divided by {size}."
    if model.mla is None and model.kv_heads % size and size % model.kv_heads:
        return f"vLLM will refuse it: {model.kv_heads} KV heads cannot be spread over {size} GPUs."
    linear = model.linear
    for heads in () if linear is None else (linear.key_heads, linear.value_heads):
        if heads is not None and heads % size:
            return f"vLLM will refuse it: {heads} heads of linear attention cannot be divided by {size}."
    return ""


def _beyond(size: int, visible: int) -> str:
    if visible and size > visible:
        return f"vLLM will refuse it: the engine sees {visible} of the {size} GPUs."
    return ""
