"""What each layer of a model keeps between tokens, from its text config. Pure.

Families say it in different words: a list of layer types, an interval, a pattern in letters, or a window for all.
"""

from collections.abc import Callable

from xim_agent.facts.config_file import Config
from xim_agent.facts.model import LayerFacts, LinearAttention, LinearKind, MlaFacts

FULL, SLIDING, LINEAR, NOTHING = "full", "sliding", "linear", "nothing"

MOST_LAYERS = 100_000
"""A list of them is made; no model has a hundredth."""

_WORDS = {
    "full_attention": FULL,
    "attention": FULL,
    "global": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": SLIDING,
    "local": SLIDING,
    "linear_attention": LINEAR,
    "mamba": LINEAR,
    "mamba2": LINEAR,
    "recurrent": LINEAR,
    "conv": LINEAR,
}
"""The words of `layer_types` and its older names. A word that is not here counts as full attention, which keeps most:
a new family must not be refused, and must not be underestimated."""
_LETTERS = {"*": FULL, "M": LINEAR, "-": NOTHING, "E": NOTHING}
"""The letters of Nemotron-H's `hybrid_override_pattern`: attention, Mamba-2, dense and expert feed-forward."""
_ALWAYS_SLIDING = {"mistral", "mixtral", "phi3", "starcoder2"}
"""Families where a window, if one is set, holds for every layer."""
_ENCODERS = {"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "gte", "new"}
"""Families that read a text at once and keep nothing of it (`EncoderOnlyAttention` in vLLM's models of them)."""
_PURE_SSM = {"mamba", "mamba2", "falcon_mamba"}


def kinds(config: Config, model_type: str) -> list[str]:
    """What every layer of the text model keeps, in order."""
    count = config.required("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    if count > MOST_LAYERS:
        raise config.fault(f"it has {count} layers, more than any model")
    if model_type in _ENCODERS or not config.flag("is_causal", default=True):
        return [NOTHING] * count
    pattern = config.text("hybrid_override_pattern")
    if pattern is not None:
        return [_LETTERS.get(letter, FULL) for letter in pattern if letter != "|"]
    words = config.texts("layer_types") or config.texts("layers_block_type")
    if words:
        if len(words) < count:
            raise config.fault(f"it names {len(words)} layer types for {count} layers")
        named = [_WORDS.get(word, FULL) for word in words[:count]]
        return named if config.has("sliding_window") else [FULL if kind == SLIDING else kind for kind in named]
    keeps = _rule(config, model_type)
    return [keeps(layer) for layer in range(count)]


def _rule(config: Config, model_type: str) -> Callable[[int], str]:
    """What the layer of a number keeps, for a family that lists no layer types."""
    if model_type in _PURE_SSM:
        return lambda layer: LINEAR
    interval = config.integer("full_attention_interval")
    if interval:
        return lambda layer: FULL if (layer + 1) % interval == 0 else LINEAR
    period = config.integer("attn_layer_period")
    if period:
        offset = config.integer("attn_layer_offset") or 0
        return lambda layer: FULL if layer % period == offset else LINEAR
    attention = config.integers("attn_layer_indices")
    if attention:
        return lambda layer: FULL if layer in attention else LINEAR
    return _windows(config, model_type)


def _windows(config: Config, model_type: str) -> Callable[[int], str]:
    """As `_rule`, where all layers are attention and some may have a window."""
    if not config.has("sliding_window") or not config.flag("use_sliding_window", default=True):
        return lambda layer: FULL
    pattern = config.integer("sliding_window_pattern", "_sliding_window_pattern")
    if pattern:
        return lambda layer: FULL if (layer + 1) % pattern == 0 else SLIDING
    if model_type == "gemma2":
        return lambda layer: FULL if layer % 2 else SLIDING
    first = config.integer("max_window_layers")
    if first is not None:
        return lambda layer: SLIDING if layer >= first else FULL
    return lambda layer: SLIDING if model_type in _ALWAYS_SLIDING else FULL


def layer_facts(named: list[str]) -> LayerFacts:
    """The layers by what they keep."""
    return LayerFacts(full=named.count(FULL), sliding=named.count(SLIDING), linear=named.count(LINEAR))


def mla_facts(config: Config) -> MlaFacts | None:
    """The latent attention's shape, where the model has it."""
    rank, rope = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    return MlaFacts(kv_lora_rank=rank, qk_rope_head_dim=rope) if rank and rope else None


def linear_facts(config: Config) -> LinearAttention:
    """The state's shape of the layers that keep one of fixed size.

    A Mamba-2 layer has the same two parts as a gated delta net: groups are its key heads, the state its key size.
    """
    if config.has("linear_num_value_heads"):
        return LinearAttention(
            kind=LinearKind.GDN,
            key_heads=config.integer("linear_num_key_heads"),
            value_heads=config.integer("linear_num_value_heads"),
            key_head_dim=config.integer("linear_key_head_dim"),
            value_head_dim=config.integer("linear_value_head_dim"),
            conv_kernel=config.integer("linear_conv_kernel_dim"),
            state_dtype=config.text("mamba_ssm_dtype"),
        )
    heads = config.integer("mamba_num_heads", "mamba_n_heads", "n_mamba_heads")
    if heads is None:
        return LinearAttention(kind=LinearKind.OTHER)
    return LinearAttention(
        kind=LinearKind.MAMBA,
        key_heads=config.integer("n_groups", "mamba_n_groups", "mamba_ngroups"),
        value_heads=heads,
        key_head_dim=config.integer("ssm_state_size", "mamba_d_state"),
        value_head_dim=config.integer("mamba_head_dim", "mamba_d_head", "mamba_headdim"),
        conv_kernel=config.integer("conv_kernel", "mamba_d_conv"),
        state_dtype=config.text("mamba_ssm_cache_dtype"),
    )
