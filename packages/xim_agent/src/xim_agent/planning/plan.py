"""From settings, model and machine to how the engine is started, every decision with its reason."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from xim_agent.planning import accelerator, context, cpu, kv_cache, moe, parallelism, quantization, speculation
from xim_agent.planning.budget import TYPICAL_TOKENS, Budget, budget_of
from xim_agent.planning.decision import Decision, Device, Given, PlannedFile, Source
from xim_agent.planning.memory import Estimate
from xim_agent.planning.operator_words import number_of
from xim_agent.planning.reach import choose_reach

SOCKET_PATH_BYTES = 107
"""A Unix socket's path has room for so many bytes on Linux (104 - 1 on macOS are enough for the default)."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""The engine runs on local files and asks nobody."""
PRIVATE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""What runs on a node, and for whom, is nobody else's business."""
CACHE_ROOT = "VLLM_CACHE_ROOT"
TRUST = "--trust-remote-code"
TYPES_WITH_CODE = frozenset({"mimo"})
"""Model types of the families that a plan knows which transformers (5.19, with vLLM 0.32) does not."""
READY_TIMEOUT = "VLLM_ENGINE_READY_TIMEOUT_S"


class SocketPathTooLong(ValueError):
    """The engine's socket cannot have this path."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"The socket path {path} has {_size(path)} bytes; the system allows {SOCKET_PATH_BYTES}. "
            "Set XEROTIER_AGENT_VLLM_SOCKET_PATH to a shorter one."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlan:
    """How the engine is started, and why so."""

    given: Given = field(repr=False)
    decisions: tuple[Decision, ...]
    budget: Budget
    estimate: Estimate | None
    """With the KV cache of `max_concurrent` typical sequences; `None` where the model's size is not known."""
    max_concurrent: int
    typical_tokens: int
    """Of a sequence in `estimate`."""
    tensor_parallel_size: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """What will need the operator's attention, a sentence each."""
        return tuple(decision.warning for decision in self.decisions if decision.warning)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the engine cannot be started like this, each with its remedy."""
        return tuple(decision.problem for decision in self.decisions if decision.problem)

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """To be written before the engine starts."""
        return tuple(file for decision in self.decisions for file in decision.files)


def plan_engine(given: Given) -> EnginePlan:
    """Every decision, in the order in which they follow from each other.

    Raises:
        SocketPathTooLong: the socket's path does not fit into a socket address.
    """
    if _size(given.places.socket_path) > SOCKET_PATH_BYTES:
        raise SocketPathTooLong(given.places.socket_path)
    dtype = accelerator.choose_dtype(given)
    spread = parallelism.choose_tensor_parallel_size(given)
    size, stages = parallelism.size_of(spread), parallelism.stages_of(given)
    share = context.choose_utilization(given)
    speculative = speculation.choose_speculation(given)

    def budget_for(method: str | None) -> Budget:
        return budget_of(
            given,
            quantization=method,
            dtype=dtype.value,
            tensor_parallel_size=size,
            utilization=context.utilization_of(given, share),
            guessed_tokens=speculation.tokens_of(speculative),
            stages=stages,
        )

    quantized = quantization.choose_quantization(given, budget_for)
    budget = budget_for(quantized.value)
    length = context.choose_context(given, budget)
    graphs = accelerator.choose_graphs(given, size)
    sequences = context.choose_sequences(given, budget, graphs)
    concurrency = context.choose_concurrency(given, budget, sequences)
    decisions: list[Decision | None] = [
        accelerator.choose_device(given),
        *accelerator.choose_masks(given),
        _runner(given),
        *_checkpoint(given),
        dtype,
        quantized,
        spread,
        share,
        context.judge_room(given, budget),
        length,
        sequences,
        concurrency,
        graphs,
        accelerator.choose_all_reduce(given, size),
        speculative,
        moe.choose_moe_configs(given),
        kv_cache.choose_prefix_caching(given),
        kv_cache.choose_kv_offload(given, size * stages * parallelism.copies_of(given)),
        *cpu.choose_cpu_tuning(given, budget, length, concurrency),
        accelerator.choose_short_prompts(given),
        choose_reach(given),
        *_house(given),
    ]
    concurrent = int(concurrency.value)
    return EnginePlan(
        given=given,
        decisions=tuple(_settled(given, decision) for decision in decisions if decision is not None),
        budget=budget,
        estimate=_estimate(given, budget, length, concurrent),
        max_concurrent=concurrent,
        typical_tokens=_typical_tokens(length),
        tensor_parallel_size=size,
    )


def default_socket_path(temporary: Path, uid: int, config_dir: Path) -> Path:
    """Where the engine's socket is when the operator names no place.

    Short, and the same for every start with one config directory, so that a killed agent leaves one file and not one
    per start. Not in the config directory itself: a mounted volume may not take sockets.
    """
    digest = hashlib.sha256(_bytes(config_dir)).hexdigest()[:12]
    return temporary / f"xim-{uid}-{digest}" / "engine.sock"


def _size(path: Path) -> int:
    return len(_bytes(path))


def _bytes(path: Path) -> bytes:
    """As the system has it, whatever bytes it is of."""
    return str(path).encode("utf-8", "surrogateescape")


def _runner(given: Given) -> Decision | None:
    """A pooling runner where the endpoint embeds or scores; else vLLM sees by the model which one it needs."""
    if given.wanted.task_mode == "generate":
        return None
    reason = f"the endpoint's task mode is {given.wanted.task_mode}"
    if given.words.has("--runner"):
        return Decision(option="runner", value="by VLLM_ARGS", source=Source.OPERATOR, reason="--runner in VLLM_ARGS")
    return Decision(
        option="runner",
        value="pooling",
        source=Source.ENDPOINT,
        reason=reason,
        arguments=(("--runner", "pooling"),),
    )


def _checkpoint(given: Given) -> list[Decision | None]:
    """What lies beside the weights, or should."""
    return [_model_code(given), _tokenizer(given)]


def _model_code(given: Given) -> Decision | None:
    """Whether the checkpoint's own code may run, where vLLM cannot read the model without; to trust it is the
    operator's to say."""
    kind, option = given.model.text_model_type, "model code"
    if kind not in TYPES_WITH_CODE:
        return None
    reason = f"vLLM's transformers has no model type {kind}; the checkpoint brings code for it"
    if given.words.has(TRUST):
        return Decision(option=option, value="trusted", source=Source.OPERATOR, reason=f"{TRUST} in VLLM_ARGS")
    return Decision(
        option=option,
        value="not trusted",
        source=Source.DEFAULT,
        reason=reason,
        warning=f"vLLM will refuse the model: {reason}. XEROTIER_AGENT_VLLM_ARGS={TRUST} lets it run.",
    )


def _tokenizer(given: Given) -> Decision | None:
    """A word where the weights are at hand and nothing that vLLM would read a tokenizer from."""
    model = given.model
    elsewhere = given.words.has("--tokenizer") or given.words.has("--skip-tokenizer-init")
    if model.has_tokenizer or model.checkpoint_bytes is None or elsewhere:
        return None
    return Decision(
        option="tokenizer",
        value="none",
        source=Source.MODEL,
        reason="no file of one lies beside the weights",
        warning=f"vLLM will refuse the model: {model.path} has no tokenizer. Copy its files there (tokenizer.json, "
        "tokenizer_config.json), or name another one: --tokenizer in XEROTIER_AGENT_VLLM_ARGS.",
    )


def _house(given: Given) -> list[Decision]:
    """What every engine gets, whatever the model."""
    timeout = str(given.settings.vllm_startup_timeout_seconds)
    timed = given.settings.is_set("vllm_startup_timeout_seconds")
    caches = str(given.places.caches / "vllm")
    return [
        Decision(
            option="startup timeout",
            value=f"{timeout} s",
            source=Source.OPERATOR if timed else Source.DEFAULT,
            reason="the agent's own ceiling of a start",
            environment=((READY_TIMEOUT, timeout),),
            forced=True,
        ),
        Decision(
            option="vLLM's cache",
            value=caches,
            source=Source.DEFAULT,
            reason="compiled graphs outlive a start, beside the model cache",
            environment=((CACHE_ROOT, caches),),
        ),
        Decision(
            option="hub access",
            value="offline",
            source=Source.DEFAULT,
            reason="the model is on local files",
            environment=tuple(OFFLINE.items()),
        ),
        Decision(
            option="usage reports",
            value="off",
            source=Source.DEFAULT,
            reason="what runs here is nobody else's business",
            environment=tuple(PRIVATE.items()),
            forced=True,
        ),
        Decision(
            option="answers",
            value="with cached tokens, without access log",
            source=Source.DEFAULT,
            reason="usage shows what the prefix cache saved; the router logs every request",
            arguments=(("--enable-prompt-tokens-details",), ("--disable-uvicorn-access-log",)),
        ),
    ]


def _settled(given: Given, decision: Decision) -> Decision:
    """`decision` under the operator's variables and under the flags that this vLLM has."""
    return _without_missing_flags(given, _under_variables(given, decision))


def _under_variables(given: Given, decision: Decision) -> Decision:
    """VLLM_ENV wins over everything, the agent's own environment over what is not forced."""
    found: Mapping[str, str] = given.settings.vllm_env
    if not decision.forced:
        found = {**given.inherited, **found}
    own = {name: found[name] for name, value in decision.environment if name in found and found[name] != value}
    if not own:
        return decision
    names = ", ".join(own)
    return replace(
        decision,
        value=" ".join(f"{name}={value}" for name, value in own.items()),
        source=Source.OPERATOR,
        reason=f"{names} in {'VLLM_ENV' if set(own) <= set(given.settings.vllm_env) else 'the environment'}",
        environment=tuple((name, own.get(name, value)) for name, value in decision.environment),
    )


def _without_missing_flags(given: Given, decision: Decision) -> Decision:
    missing = [words[0] for words in decision.arguments if not given.engine.has(words[0])]
    if not missing:
        return decision
    return replace(
        decision,
        value=f"{decision.value} (not passed)",
        reason=f"{decision.reason}; this vLLM has no {', '.join(missing)}",
        arguments=tuple(words for words in decision.arguments if words[0] not in missing),
        warning=decision.warning or f"{decision.option}: this vLLM ({given.engine.version}) has no {missing[0]}.",
    )


def _typical_tokens(length: Decision) -> int:
    """What a sequence is counted with: no more than the context holds."""
    return min(TYPICAL_TOKENS, number_of(length.value) or TYPICAL_TOKENS)


def _estimate(given: Given, budget: Budget, length: Decision, concurrent: int) -> Estimate | None:
    """With the KV cache that the engine will have room for and that `concurrent` typical sequences use."""
    needed = concurrent * budget.sequence_bytes(given, _typical_tokens(length))
    if given.device is Device.CPU:
        return budget.with_kv(needed)
    return budget.with_kv(needed if budget.kv_bytes is None else min(needed, budget.kv_bytes))
