"""How many parameters a model has, computed from the shapes in its text config. Pure.

For a model whose weights are not at hand. Counts the text model as it is served: embeddings, layers, experts and the
output head; neither layers for multi-token prediction nor a vision tower. Shapes are those of the families' modules
in Transformers; the counts are compared with published ones in the tests. Families that are not listed here have no
count rather than a guessed one.
"""

from xim_agent.facts.config_file import Config
from xim_agent.facts.layers import FULL, LINEAR, NOTHING, kinds
from xim_agent.facts.model import ModelUnreadable

_QKV_BIAS = {"qwen2", "qwen2_moe", "mimo"}
"""Biases on query, key and value, and none on the output, whatever `attention_bias` says."""
_QK_NORM = {"qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma3_text"}
_GATED_ATTENTION = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
"""The query projection is twice as wide: its second half gates the output."""
_TIED_BY_DEFAULT = {"gemma", "gemma2", "gemma3_text"}
_DECODERS = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text"),
    *(
        "qwen3_5_moe_text",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "mimo",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
    ),
}


def parameter_count(config: Config, model_type: str) -> int | None:
    """Parameters of the text model that `config` describes; `None` for a family or a shape that is not known here."""
    try:
        return _counted(config, model_type)
    except ModelUnreadable:
        # Published files leave out what equals a default in Transformers: that ends the count, not the reading.
        return None


def _counted(config: Config, model_type: str) -> int | None:
    if model_type in {"bert", "roberta", "xlm-roberta"}:
        return _encoder(config)
    if model_type == "nemotron_h":
        return _embeddings(config, model_type) + sum(
            _nemotron_layer(config, kind) for kind in kinds(config, model_type)
        )
    if model_type not in _DECODERS:
        return None
    named = kinds(config, model_type)
    layers = sum(
        (_linear(config) if kind == LINEAR else _attention(config, model_type))
        + _feed_forward(config, model_type, number)
        + _norms(config, model_type, kind)
        for number, kind in enumerate(named)
    )
    return _embeddings(config, model_type) + layers


def head_dim(config: Config) -> int:
    """Size of one attention head: what the config says, else the hidden size shared out among the heads."""
    said = config.integer("head_dim", "attention_head_dim")
    if said:
        return said
    heads = config.integer("num_attention_heads", "n_head", "num_heads") or 0
    return config.required("hidden_size", "n_embd", "d_model") // heads if heads else 0


def expert_count(config: Config) -> int:
    """Routed experts of a layer; 0 for a dense model."""
    return config.integer("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts") or 0


def _embeddings(config: Config, model_type: str) -> int:
    hidden, vocabulary = config.required("hidden_size"), config.required("vocab_size")
    return vocabulary * hidden * (1 if tied_embeddings(config, model_type) else 2) + hidden


def tied_embeddings(config: Config, model_type: str) -> bool:
    """Whether the output head is the input embedding."""
    return config.flag("tie_word_embeddings", default=model_type in _TIED_BY_DEFAULT)


def _norms(config: Config, model_type: str, kind: str) -> int:
    each = 4 if model_type in {"gemma2", "gemma3_text"} else 2
    normed = model_type in _QK_NORM or config.flag("use_qk_norm")
    heads = 2 * head_dim(config) if normed and kind != LINEAR else 0
    return each * config.required("hidden_size") + heads


def _attention(config: Config, model_type: str) -> int:
    if config.integer("kv_lora_rank"):
        return _latent_attention(config)
    hidden, heads = config.required("hidden_size"), config.required("num_attention_heads")
    size = head_dim(config)
    key_value = (config.integer("num_key_value_heads") or heads) * size
    query = heads * size * (2 if model_type in _GATED_ATTENTION else 1)
    weights = hidden * (query + 2 * key_value) + heads * size * hidden
    if model_type in _QKV_BIAS:
        return weights + query + 2 * key_value
    bias = config.flag("attention_bias")
    output_bias = hidden if model_type in {"gpt_oss", "llama"} else 0
    sinks = heads if model_type == "gpt_oss" else 0
    return weights + (query + 2 * key_value + output_bias if bias else 0) + sinks


def _latent_attention(config: Config) -> int:
    """MLA as in DeepSeek-V2, section 2.1: queries and keys with values each go through a compressed vector."""
    hidden, heads = config.required("hidden_size"), config.required("num_attention_heads")
    rank, rope = config.required("kv_lora_rank"), config.required("qk_rope_head_dim")
    nope, value = config.required("qk_nope_head_dim"), config.required("v_head_dim")
    query_rank = config.integer("q_lora_rank")
    wide = heads * (nope + rope)
    query = hidden * query_rank + query_rank + query_rank * wide if query_rank else hidden * wide
    return query + hidden * (rank + rope) + rank + rank * heads * (nope + value) + heads * value * hidden


def _linear(config: Config) -> int:
    """A gated delta net: projections for queries, keys, values and the gate, two per head, a convolution, a norm."""
    hidden = config.required("hidden_size")
    key = config.required("linear_num_key_heads") * config.required("linear_key_head_dim")
    heads, size = config.required("linear_num_value_heads"), config.required("linear_value_head_dim")
    value = heads * size
    projections = hidden * (2 * key + 2 * value + 2 * heads) + value * hidden
    return projections + (2 * key + value) * config.required("linear_conv_kernel_dim") + 2 * heads + size


def _feed_forward(config: Config, model_type: str, layer: int) -> int:
    hidden = config.required("hidden_size")
    experts = expert_count(config)
    if not experts or _is_dense(config, layer):
        return 3 * hidden * config.required("intermediate_size")
    width = config.integer("moe_intermediate_size") or config.required("intermediate_size")
    shared = (config.integer("n_shared_experts") or 0) * width
    shared_width = config.integer("shared_expert_intermediate_size") or 0
    routed = experts * 3 * hidden * width
    gate = hidden * experts + (hidden if shared_width else 0)
    if model_type == "gpt_oss":
        gate += experts + experts * (2 * width + hidden)
    elif model_type in {"deepseek_v3", "glm4_moe"}:
        gate += experts
    return routed + gate + 3 * hidden * (shared + shared_width)


def _is_dense(config: Config, layer: int) -> bool:
    """Whether a layer of a mixture of experts has an ordinary feed-forward instead."""
    step = config.integer("decoder_sparse_step", "moe_layer_freq") or 1
    return (
        layer < (config.integer("first_k_dense_replace") or 0)
        or layer in config.integers("mlp_only_layers")
        or (config.has("decoder_sparse_step") and (layer + 1) % step != 0)
    )


def _encoder(config: Config) -> int:
    """BERT: three embeddings with a norm, layers with biases, and the pooler."""
    hidden, wide = config.required("hidden_size"), config.required("intermediate_size")
    rows = sum(config.required(name) for name in ("vocab_size", "max_position_embeddings", "type_vocab_size"))
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * wide + wide + hidden + 4 * hidden
    return rows * hidden + 2 * hidden + config.required("num_hidden_layers") * layer + hidden * hidden + hidden


def _nemotron_layer(config: Config, kind: str) -> int:
    """Nemotron-H: every layer is one of attention, Mamba-2 and feed-forward, behind one norm."""
    hidden = config.required("hidden_size")
    if kind == FULL:
        return _attention(config, "nemotron_h") + hidden
    if kind == NOTHING:
        return 2 * hidden * config.required("intermediate_size") + hidden
    heads = config.required("mamba_num_heads")
    inner = heads * config.required("mamba_head_dim")
    channels = inner + 2 * config.required("n_groups") * config.required("ssm_state_size")
    convolution = channels * (config.required("conv_kernel") + 1)
    return hidden * (inner + channels + heads) + convolution + 3 * heads + inner + inner * hidden + hidden
