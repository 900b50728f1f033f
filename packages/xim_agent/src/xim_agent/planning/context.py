"""How long sequences may be, how many run at once, and how much of the memory the engine takes."""

from xim_agent.planning.budget import TYPICAL_TOKENS, Budget, shortest_context
from xim_agent.planning.decision import Decision, Device, Given, Source, said
from xim_agent.planning.memory import GIB
from xim_agent.planning.operator_words import number_of
from xim_agent.planning.parallelism import shares_experts
from xim_agent.settings import MOST_CONCURRENT

GRAPHS = "vLLM's own"
"""The decision on CUDA graphs under which they are captured."""
CPU_CONCURRENCY = 5
"""Where a CPU starts; memory bandwidth, not vLLM, is its limit."""
MOST_PER_GPU = 64
"""Automatic concurrency stays within so many requests for each GPU that shares the model."""
CONTEXT_STEP = 1024
"""A context that is cut to fit is rounded down to this."""


def choose_utilization(given: Given) -> Decision:
    """The part of each GPU's memory that the engine takes. On a CPU only when the operator set it."""
    flag, name = "--gpu-memory-utilization", "GPU memory utilization"
    own = said(given, flag, "gpu_memory_utilization")
    if own is not None:
        return Decision(
            option=name, value=own.value, source=Source.OPERATOR, reason=own.reason, arguments=own.arguments
        )
    value = f"{given.settings.gpu_memory_utilization:g}"
    if given.device is Device.CPU:
        return Decision(option=name, value="not used", source=Source.DEFAULT, reason="the engine runs on the CPU")
    reason = "one model for each GPU, and little beside it"
    return Decision(option=name, value=value, source=Source.DEFAULT, reason=reason, arguments=((flag, value),))


def utilization_of(given: Given, decision: Decision) -> float:
    """The number that a decision of `choose_utilization` holds."""
    try:
        part = float(decision.value)
    except ValueError:
        return given.settings.gpu_memory_utilization
    # Also `nan`, which vLLM refuses, is no number to plan with.
    return part if 0.0 < part <= 1.0 else given.settings.gpu_memory_utilization


def judge_room(given: Given, budget: Budget) -> Decision:
    """Whether the model fits. Only weights that are too large by themselves stop a start: the rest of the estimate is
    a rule of thumb, and vLLM measures."""
    name = "memory"
    if budget.estimate is None or budget.device_bytes is None or budget.kv_bytes is None:
        unknown = "the model's size or the memory is not known"
        return Decision(option=name, value="not known", source=Source.AUTOMATIC, reason=unknown)
    on_cpu = given.device is Device.CPU
    usable = budget.device_bytes * (1.0 if on_cpu else budget.utilization)
    weights = budget.estimate.weights_bytes
    reason = f"{weights / GIB:.1f} GiB of weights in {usable / GIB:.1f} GiB"
    if budget.context_fits(given, shortest_context(given)):
        return Decision(option=name, value="fits", source=Source.AUTOMATIC, reason=reason)
    levers = "Use a smaller model, or one that is quantised"
    levers += ", or a machine with more memory." if on_cpu else ", more GPUs, or lower what else runs on them."
    # With weights in the host's memory, or experts shared out among copies of the model, the estimate does not hold.
    offloaded = given.words.has("--cpu-offload-gb") or given.words.has("--offload-backend")
    if weights > usable and not offloaded and not shares_experts(given):
        problem = f"The weights alone are larger than the memory: {reason}. {levers}"
        return Decision(option=name, value="too large", source=Source.AUTOMATIC, reason=reason, problem=problem)
    warning = f"By the estimate the model leaves no room for {shortest_context(given)} tokens: {reason}. {levers}"
    return Decision(option=name, value="tight", source=Source.AUTOMATIC, reason=reason, warning=warning)


def choose_sequences(given: Given, budget: Budget, graphs: Decision) -> Decision:
    """The most sequences in one batch: the operator's number, else the agent's as far as vLLM starts with it."""
    flag, name = "--max-num-seqs", "max num seqs"
    blocks = _blocks_for_graphs(given, budget, graphs)
    own = said(given, flag, "max_num_seqs")
    if own is not None:
        return Decision(
            option=name,
            value=own.value,
            source=Source.OPERATOR,
            reason=own.reason,
            arguments=own.arguments,
            warning=_too_many(number_of(own.value), blocks),
        )
    most = given.settings.max_num_seqs
    if blocks is not None and blocks < most and given.settings.auto_config:
        value = str(max(blocks, 1))
        reason = f"CUDA graphs are captured only where each has a block for its linear attention, and {blocks} fit"
        return Decision(option=name, value=value, source=Source.AUTOMATIC, reason=reason, arguments=((flag, value),))
    return Decision(
        option=name,
        value=str(most),
        source=Source.DEFAULT,
        reason="the agent's default",
        arguments=((flag, str(most)),),
        warning=_too_many(most, blocks),
    )


def _blocks_for_graphs(given: Given, budget: Budget, graphs: Decision) -> int | None:
    """Blocks of linear attention, of which vLLM wants one for each sequence before it captures graphs
    (`CompilationConfig.resolve_cudagraph_mode_and_sizes`); `None` where it has no such wish, or it is not known."""
    captured = given.device is not Device.CPU and graphs.value == GRAPHS
    return budget.state_blocks(given) if captured else None


def _too_many(sequences: int | None, blocks: int | None) -> str:
    if sequences is None or blocks is None or sequences <= blocks:
        return ""
    return (
        f"By the estimate vLLM refuses {sequences} sequences: about {blocks} blocks fit for linear attention, and CUDA "
        f"graphs need one for each. Lower XEROTIER_AGENT_MAX_NUM_SEQS to {max(blocks, 1)}."
    )


def choose_context(given: Given, budget: Budget) -> Decision:
    """The longest context: the operator's, the model's where it fits, else what fits."""
    flag, name = "--max-model-len", "context length"
    most = given.model.context_limit
    own = said(given, flag, "max_model_len")
    if own is not None:
        return Decision(
            option=name,
            value=own.value,
            source=Source.OPERATOR,
            reason=own.reason,
            arguments=own.arguments,
            warning=_too_long(given, budget, number_of(own.value)),
        )
    if most is None:
        return Decision(option=name, value="vLLM's own", source=Source.MODEL, reason="config.json names no longest")
    positions = "max_position_embeddings of config.json"
    if most != given.model.max_position_embeddings:
        positions += ", times the factor of its rope scaling, as vLLM reckons"
    model = Decision(option=name, value=str(most), source=Source.MODEL, reason=positions)
    if not given.settings.auto_config or budget.context_fits(given, most) is not False:
        return model
    fits = budget.longest(given, most)
    about = f"of the model's {most} tokens about {fits} fit beside the weights"
    if given.engine.fits_context:
        return Decision(
            option=name,
            value="auto",
            source=Source.AUTOMATIC,
            reason=f"{about}; vLLM measures and takes the longest that fits",
            arguments=((flag, "auto"),),
        )
    value = str(max(fits // CONTEXT_STEP * CONTEXT_STEP, CONTEXT_STEP))
    return Decision(option=name, value=value, source=Source.AUTOMATIC, reason=about, arguments=((flag, value),))


def choose_concurrency(given: Given, budget: Budget, sequences: Decision) -> Decision:
    """Most requests at once; the agent tells it to the router, vLLM is not told."""
    name = "max concurrent"
    if given.settings.max_concurrent is not None:
        reason = "set by XEROTIER_AGENT_MAX_CONCURRENT"
        return Decision(option=name, value=str(given.settings.max_concurrent), source=Source.OPERATOR, reason=reason)
    batch = number_of(sequences.value) or given.settings.max_num_seqs
    if given.device is Device.CPU:
        value = min(CPU_CONCURRENCY, batch)
        reason = "where a CPU starts: its memory bandwidth is the limit"
        return Decision(option=name, value=str(value), source=Source.HARDWARE, reason=reason)
    most = MOST_PER_GPU * budget.tensor_parallel_size
    if budget.kv_bytes is None:
        value, reason = _within_link(min(batch, most), "max num seqs; what fits is not known")
        return Decision(option=name, value=str(value), source=Source.DEFAULT, reason=reason)
    tokens = min(TYPICAL_TOKENS, given.model.max_position_embeddings or TYPICAL_TOKENS)
    if not given.model.layer_count:
        bounds = f"the model keeps no KV cache; no more than max num seqs, nor {MOST_PER_GPU} for each GPU"
        value, reason = _within_link(min(batch, most), bounds)
        return Decision(option=name, value=str(value), source=Source.AUTOMATIC, reason=reason)
    fitting = budget.sequences(given, tokens)
    bounds = f"{fitting} sequences of {tokens} tokens fit; no more than max num seqs, nor {MOST_PER_GPU} for each GPU"
    value, reason = _within_link(max(1, min(batch, fitting, most)), bounds)
    return Decision(option=name, value=str(value), source=Source.AUTOMATIC, reason=reason)


def _within_link(value: int, reason: str) -> tuple[int, str]:
    """`value` as far as a link carries it, and the reason with that said where it counts."""
    if value <= MOST_CONCURRENT:
        return value, reason
    return MOST_CONCURRENT, f"{reason}; a link carries no more than {MOST_CONCURRENT}"


def _too_long(given: Given, budget: Budget, tokens: int | None) -> str:
    """What speaks against the operator's context; empty for nothing."""
    if tokens is None:
        return ""
    most = given.model.context_limit
    if most is not None and tokens > most and given.model.rope is None:
        return f"vLLM refuses a context above the model's {most} tokens unless VLLM_ALLOW_LONG_MAX_MODEL_LEN=1."
    if budget.context_fits(given, tokens) is False:
        return f"By the estimate one sequence of {tokens} tokens does not fit: lower MAX_MODEL_LEN or use more GPUs."
    return ""
