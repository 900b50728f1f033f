"""Reading one model directory: config.json, the checkpoint's headers, and which files lie beside them."""

import os
from pathlib import Path
from typing import Any

from xim_agent.facts.config_file import FETCH_AGAIN, Config, read_config
from xim_agent.facts.layers import kinds, layer_facts, linear_facts, mla_facts
from xim_agent.facts.model import CountSource, ModelFacts, ModelUnreadable, MoeFacts, QuantizationFacts, RopeFacts
from xim_agent.facts.parameters import expert_count, head_dim, parameter_count, tied_embeddings
from xim_agent.facts.quantization import quantization_facts
from xim_agent.facts.safetensors import Checkpoint, read_checkpoint

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where families with several parts keep the text model's values (vLLM's `get_hf_text_config`)."""
_OTHER_SENSES = ("vision_config", "audio_config", "vision_encoder", "image_token_id", "image_token_index")
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tiktoken.model"),
)
_TOKENIZER_FORMS = ("*.tiktoken", "tokenizer.model.v*")
"""What the checkpoint's own code reads, as that of Qwen's first models, and what Mistral had before tekken.json."""
_POOLING_ENDINGS = (
    *("Model", "ForSequenceClassification", "ForTokenClassification", "ForRewardModel", "RewardModel"),
    *("EmbeddingModel", "ForMaskedLM", "ForTextEncoding"),
)
"""Architectures that vLLM serves with its pooling runner (`_SUFFIX_TO_DEFAULTS` in its model config)."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
"""What a nested text config leaves out where it equals the default in Transformers' Gemma3TextConfig, LlamaConfig
(LLaVA 1.5 names hardly anything else) and MistralConfig."""
_UNSCALED_ROPES = {"default", "mrope"}


def read_model(path: Path) -> ModelFacts:
    """The facts of the model in the directory `path`. Blocks; reads headers, no weights.

    A directory with only a config.json describes a model that is not at hand: parameters are then computed from the
    shapes, and what only the files can tell is `None`.

    Raises:
        ModelUnreadable: the directory or a file that is needed is missing or broken.
    """
    if not os.path.isdir(path):
        raise ModelUnreadable(path, "it is not a directory", "Name the directory that holds the model's config.json.")
    config = read_config(path / "config.json")
    text = _text_config(config)
    model_type = config.text("model_type") or "unknown"
    text_type = text.text("model_type") or model_type
    checkpoint = read_checkpoint(path)
    quantization = quantization_facts(config if config.has("quantization_config") else text, path)
    named = kinds(text, text_type)
    layers = layer_facts(named)
    heads = text.integer("num_attention_heads", "n_head", "num_heads") or 0
    parameters, source = _parameters(text, text_type, checkpoint, quantization)
    architectures = config.texts("architectures")
    return ModelFacts(
        path=path,
        architectures=architectures,
        model_type=model_type,
        text_model_type=text_type,
        hidden_size=text.required("hidden_size", "n_embd", "d_model"),
        layers=layers,
        attention_heads=heads,
        kv_heads=_kv_heads(text, text_type) or heads,
        head_dim=head_dim(text),
        vocab_size=text.required("vocab_size", "padded_vocab_size"),
        tied_embeddings=tied_embeddings(text, text_type),
        parameters=parameters,
        parameters_source=source,
        checkpoint_bytes=_checkpoint_bytes(path, checkpoint),
        dtype=_dtype(config, text),
        weights_dtype=None if checkpoint is None else checkpoint.main_dtype,
        max_position_embeddings=text.integer(
            "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"
        ),
        rope=_rope(text),
        sliding_window=text.integer("sliding_window", "attention_chunk_size") if layers.sliding else None,
        mla=mla_facts(text),
        linear=linear_facts(text) if layers.linear else None,
        moe=_moe(text),
        mtp_layers=_mtp_layers(text, checkpoint),
        quantization=quantization,
        has_tokenizer=_has_tokenizer(path),
        has_chat_template=_has_chat_template(path),
        pooling=os.path.exists(path / "modules.json") or any(name.endswith(_POOLING_ENDINGS) for name in architectures),
        multimodal=any(config.has(name) for name in _OTHER_SENSES),
    )


def _kv_heads(text: Config, text_type: str) -> int | None:
    """As vLLM's `get_total_num_kv_heads` finds them; Falcon has a switch for one that all heads share."""
    if text_type == "falcon" and text.flag("multi_query") and not text.flag("new_decoder_architecture"):
        return 1
    return text.integer(
        *("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups")
    )


def _text_config(config: Config) -> Config:
    """The text model's values, with the outer ones where it has none."""
    inner = config.inner(*_TEXT_CONFIGS)
    if inner is None:
        return config
    text = _text_config(inner)
    return config.beneath(text.with_defaults(_DEFAULTS.get(text.text("model_type") or "", {})))


def _parameters(
    text: Config, text_type: str, checkpoint: Checkpoint | None, quantization: QuantizationFacts | None
) -> tuple[int | None, CountSource | None]:
    if checkpoint is not None:
        return checkpoint.parameters(None if quantization is None else quantization.bits), CountSource.SAFETENSORS
    count = parameter_count(text, text_type)
    return count, None if count is None else CountSource.CONFIG


def _checkpoint_bytes(path: Path, checkpoint: Checkpoint | None) -> int | None:
    """Of the tensors; of PyTorch's own files, which have no header to read, as large as they are."""
    if checkpoint is not None:
        return checkpoint.size_bytes
    try:
        return sum(file.stat().st_size for file in path.glob("pytorch_model*.bin")) or None
    except OSError as error:  # a link into a cache whose file is gone, or another user's
        raise ModelUnreadable(
            Path(error.filename),
            f"it cannot be read: {error.strerror}",
            f"{FETCH_AGAIN}, and let the agent's user read it.",
        ) from None


def _dtype(config: Config, text: Config) -> str | None:
    said = text.text("dtype", "torch_dtype") or config.text("dtype", "torch_dtype")
    return None if said is None or said == "auto" else said.removeprefix("torch.")


def _rope(text: Config) -> RopeFacts | None:
    """The scaling; that of full attention where each kind of layer has its own."""
    scaling = text.inner("rope_scaling", "rope_parameters")
    if scaling is None:
        return None
    scaling = scaling.inner("full_attention") or scaling
    kind = scaling.text("rope_type", "type")
    if kind is None or kind in _UNSCALED_ROPES:
        return None
    return RopeFacts(
        kind=kind,
        factor=scaling.number("factor"),
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings")
        or text.integer("original_max_position_embeddings"),
    )


def _moe(text: Config) -> MoeFacts | None:
    experts = expert_count(text)
    if not experts:
        return None
    shared = text.integer("n_shared_experts", "num_shared_experts")
    if shared is None:
        shared = 1 if text.integer("shared_expert_intermediate_size") else 0
    return MoeFacts(
        experts=experts,
        experts_per_token=text.integer("num_experts_per_tok", "experts_per_token", "moe_topk"),
        intermediate_size=text.integer("moe_intermediate_size", "expert_intermediate_size", "intermediate_size"),
        shared_experts=shared,
    )


def _mtp_layers(text: Config, checkpoint: Checkpoint | None) -> int:
    """Layers for multi-token prediction: what the config says, or one where only the checkpoint shows them."""
    said = text.integer("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
    if said is not None:
        return said
    return 1 if checkpoint is not None and checkpoint.has_mtp else 0


def _has_tokenizer(path: Path) -> bool:
    if any(os.path.exists(path / name) for name in _TOKENIZERS):
        return True
    return any(os.path.exists(file) for form in _TOKENIZER_FORMS for file in path.glob(form))


def _has_chat_template(path: Path) -> bool:
    if any(os.path.exists(path / name) for name in ("chat_template.jinja", "chat_template.json")):
        return True
    tokenizer = path / "tokenizer_config.json"
    return os.path.exists(tokenizer) and read_config(tokenizer).has("chat_template")
