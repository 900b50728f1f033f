"""Speculative decoding: which method, how many tokens a step, and when none.

The families and the defaults are the published ones of the agent's settings. The Qwen3 family is left out of the
detection on purpose: its MTP layers came with endless repetition, so it takes the switch and the method together.
"""

import json
from dataclasses import dataclass

from xim_agent.facts.model import ModelFacts
from xim_agent.planning.decision import Decision, Device, Given, Source
from xim_agent.settings_types import SpeculativeMethod as Method

OPTION = "speculative decoding"
FLAG = "--speculative-config"

DEFAULT_TOKENS: dict[Method, int] = {
    Method.DEEPSEEK_MTP: 1,
    Method.QWEN3_NEXT_MTP: 2,
    Method.MTP: 1,
    Method.MIMO_MTP: 1,
    Method.NGRAM: 5,
    Method.SUFFIX: 16,
    Method.EAGLE: 3,
    Method.MEDUSA: 3,
    Method.DRAFT_MODEL: 5,
    Method.MLP_SPECULATOR: 3,
}
"""Tokens guessed per step where the operator names no number."""

NEEDS_DRAFT = frozenset({Method.EAGLE, Method.MEDUSA, Method.DRAFT_MODEL, Method.MLP_SPECULATOR})
MTP = frozenset({Method.DEEPSEEK_MTP, Method.QWEN3_NEXT_MTP, Method.MTP, Method.MIMO_MTP})
"""Methods that use layers of the model itself."""

FAMILIES: tuple[tuple[str, Method], ...] = (
    ("DeepseekV3", Method.DEEPSEEK_MTP),  # V3, R1 and V3.2, which all have this architecture or begin like it
    ("DeepseekV32", Method.DEEPSEEK_MTP),
    ("Glm4Moe", Method.MTP),
    ("MiMo", Method.MIMO_MTP),
)
"""Beginnings of `architectures` whose MTP layers are used without being named."""
QWEN3 = "qwen3"
"""Beginning of the model types that are carved out: qwen3, qwen3_moe, qwen3_next, qwen3_5, qwen3_5_moe."""
MTP_WITHOUT_COUNT = frozenset({"qwen3_next"})
"""Model types whose checkpoints have MTP layers that their config.json does not count."""
LOOKUP_TOKENS = 4
"""Length of the n-grams that are looked up in the prompt, as in vLLM's documentation of the method: the longest, and
with no other named the shortest as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """A method, or why there is none."""

    method: Method | None
    source: Source
    reason: str
    warning: str = ""


def choose_speculation(given: Given) -> Decision:
    """The method and its tokens per step; nothing is passed where it is off."""
    if given.words.has(FLAG) or given.words.has("--spec-method"):
        return Decision(option=OPTION, value="by VLLM_ARGS", source=Source.OPERATOR, reason="VLLM_ARGS name it")
    choice = _choice(given)
    settings = given.settings
    if choice.method is None:
        value, source = "off", choice.source
        return Decision(option=OPTION, value=value, source=source, reason=choice.reason, warning=choice.warning)
    tokens = settings.speculative_tokens or DEFAULT_TOKENS[choice.method]
    config: dict[str, object] = {"method": choice.method.value, "num_speculative_tokens": tokens}
    if choice.method is Method.NGRAM:
        config["prompt_lookup_max"] = LOOKUP_TOKENS
    if choice.method in NEEDS_DRAFT:
        config["model"] = str(settings.speculative_draft_model_path)
    return Decision(
        option=OPTION,
        value=f"{choice.method.value}, {tokens} token{'s' if tokens > 1 else ''}",
        source=choice.source,
        reason=choice.reason,
        arguments=((FLAG, json.dumps(config, separators=(",", ":"))),),
        warning=choice.warning,
    )


def tokens_of(decision: Decision) -> int:
    """Tokens that are guessed per step under a decision of `choose_speculation`; 0 where VLLM_ARGS say how many."""
    return sum(int(json.loads(config)["num_speculative_tokens"]) for _, config in decision.arguments)


def _choice(given: Given) -> _Choice:
    settings = given.settings
    if not settings.speculative_enabled:
        return _Choice(method=None, source=Source.DEFAULT, reason="XEROTIER_AGENT_SPECULATIVE_ENABLED is not set")
    if given.pooling:
        return _Choice(method=None, source=Source.MODEL, reason="nothing is generated")
    if settings.speculative_method is None:
        return _detected(given)
    missing = _unavailable(given, settings.speculative_method)
    if missing:
        method = settings.speculative_method.value
        return _fallback(given, Source.OPERATOR, f"{method} cannot be used: {missing}", warn=True)
    reason = "set by XEROTIER_AGENT_SPECULATIVE_METHOD"
    return _Choice(method=settings.speculative_method, source=Source.OPERATOR, reason=reason)


def _detected(given: Given) -> _Choice:
    """By architecture."""
    model = given.model
    if model.text_model_type.startswith(QWEN3) and _has_mtp(model):
        reason = "MTP of the Qwen3 family is used only when XEROTIER_AGENT_SPECULATIVE_METHOD names it"
        return _fallback(given, Source.MODEL, reason)
    for beginning, method in FAMILIES:
        if any(name.startswith(beginning) for name in model.architectures):
            if model.mtp_layers and given.device is not Device.CPU:
                reason = f"{model.architectures[0]} has {model.mtp_layers} MTP layer(s)"
                return _Choice(method=method, source=Source.MODEL, reason=reason)
            what = "the CPU is not meant for MTP" if model.mtp_layers else "the checkpoint has no MTP layers"
            return _fallback(given, Source.MODEL, what)
    return _fallback(given, Source.MODEL, f"no method of its own is known for {', '.join(model.architectures)}")


def _fallback(given: Given, source: Source, reason: str, *, warn: bool = False) -> _Choice:
    """N-grams where the operator wants them then, else nothing."""
    if given.settings.speculative_ngram_fallback:
        return _Choice(method=Method.NGRAM, source=source, reason=f"{reason}; n-grams are the fallback")
    reason = f"{reason}; XEROTIER_AGENT_SPECULATIVE_NGRAM_FALLBACK is not set"
    return _Choice(method=None, source=source, reason=reason, warning=f"No speculative decoding: {reason}." * warn)


def _unavailable(given: Given, method: Method) -> str:
    """Why `method` cannot be used; empty when it can."""
    if method in NEEDS_DRAFT and given.settings.speculative_draft_model_path is None:
        return "XEROTIER_AGENT_SPECULATIVE_DRAFT_MODEL_PATH is not set"
    if method is Method.SUFFIX and not given.engine.imports("arctic_inference"):
        return "vLLM's environment has no arctic-inference"
    if method in MTP and not _has_mtp(given.model):
        return "the model has no MTP layers"
    return ""


def _has_mtp(model: ModelFacts) -> bool:
    return model.mtp_layers > 0 or model.text_model_type in MTP_WITHOUT_COUNT
