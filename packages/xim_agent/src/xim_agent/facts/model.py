"""What a model is, as far as starting an engine depends on it: types, and their form as JSON.

Counts come from the checkpoint's own headers where it is at hand, else from config.json by
`xim_agent.facts.parameters`. What neither says is `None`, never a guess.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from xim_agent.facts.hardware import described_errors

_STRICT = ConfigDict(extra="forbid")


class ModelUnreadable(ValueError):
    """A file of a model is missing or broken: which, what is wrong with it, and what to do."""

    def __init__(self, file: Path, what: str, remedy: str) -> None:
        super().__init__(f"{file}: {what}. {remedy}")
        self.file, self.what, self.remedy = file, what, remedy


class CountSource(StrEnum):
    """Where the number of parameters comes from."""

    SAFETENSORS = "safetensors"
    """Counted in the headers of the checkpoint's files."""
    CONFIG = "config"
    """Computed from the shapes in config.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaFacts:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): one compressed vector per token and layer."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    kv_lora_rank: int
    qk_rope_head_dim: int


class LinearKind(StrEnum):
    """A layer whose state does not grow with the context."""

    GDN = "gdn"
    """Gated delta net: Qwen3-Next, Qwen3.5."""
    MAMBA = "mamba"
    """Mamba and Mamba-2."""
    OTHER = "other"
    """Some other linear attention; its state's size is not known here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttention:
    """The shape of the layers with a state of fixed size, which every sequence has once."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    kind: LinearKind
    key_heads: int | None = None
    value_heads: int | None = None
    key_head_dim: int | None = None
    value_head_dim: int | None = None
    conv_kernel: int | None = None
    state_dtype: str | None = None
    """Of the state's values, where config.json names it: `float32`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFacts:
    """How many layers keep what between tokens. MTP layers are not counted, nor are layers that keep nothing."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    full: int
    """Attention over the whole context."""
    sliding: int = 0
    """Attention over the last `ModelFacts.sliding_window` tokens."""
    linear: int = 0
    """A state of fixed size (`ModelFacts.linear`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeFacts:
    """A mixture of experts."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    experts: int
    """Routed ones."""
    experts_per_token: int | None = None
    intermediate_size: int | None = None
    """Of one routed expert."""
    shared_experts: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationFacts:
    """How a checkpoint is quantised, from its `quantization_config`."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    method: str
    """As config.json spells it, in lower case: `awq`, `gptq`, `compressed-tensors`, `fp8`, `bitsandbytes`, `mxfp4`."""
    bits: int | None = None
    """Of one quantised weight."""
    group_size: int | None = None
    weight_format: str | None = None
    """`int`, `float` (fp8 and smaller), `nf4`, `fp4`; `None` where it does not say."""
    kv_cache_bits: int | None = None
    """Where the checkpoint brings scales for a quantised KV cache."""
    grouped_by_activation: bool = False
    """GPTQ's `desc_act` with groups: weights are grouped in the order of their activations, not in their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeFacts:
    """Scaling of the positions beyond what the model was trained for."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    kind: str
    """`llama3`, `yarn`, `linear`, `dynamic`, `longrope`, ...; never `default`."""
    factor: float | None = None
    original_max_position_embeddings: int | None = None


_INCLUDED_ROPES = {"llama3", "longrope", "su", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
"""Scalings after which `max_position_embeddings` is the scaled length already, to vLLM 0.32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """One model directory. Values of a model with a nested text config are the text model's."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    path: Path
    architectures: tuple[str, ...]
    model_type: str
    """The outermost: `qwen3_5`."""
    text_model_type: str
    """The text model's: `qwen3_5_text`; the same as `model_type` where nothing is nested."""
    hidden_size: int
    layers: LayerFacts
    attention_heads: int
    kv_heads: int
    """Attention heads where the config does not say, as in multi-head attention."""
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    """Whether the output head is the input embedding."""
    parameters: int | None = None
    """From files: every weight once, also of MTP layers and a vision tower. From the config: the text model alone."""
    parameters_source: CountSource | None = None
    checkpoint_bytes: int | None = None
    """Of all tensors in the files; `None` where no file is at hand."""
    dtype: str | None = None
    """The dtype that config.json names, without `torch.`: `bfloat16`, `float16`, `float32`."""
    weights_dtype: str | None = None
    """The dtype that most bytes of the checkpoint have, as safetensors spells it: `BF16`, `F8_E4M3`, `I32`."""
    max_position_embeddings: int | None = None
    rope: RopeFacts | None = None
    sliding_window: int | None = None
    mla: MlaFacts | None = None
    linear: LinearAttention | None = None
    moe: MoeFacts | None = None
    mtp_layers: int = 0
    quantization: QuantizationFacts | None = None
    has_tokenizer: bool = False
    has_chat_template: bool = False
    pooling: bool = False
    """Made for embeddings, scores or classes rather than for text, as far as its files show."""
    multimodal: bool = False
    """Takes images, video or sound as well."""

    @property
    def layer_count(self) -> int:
        """Layers of the text model that keep something between tokens; 0 where it reads a text at once (BERT)."""
        return self.layers.full + self.layers.sliding + self.layers.linear

    @property
    def context_limit(self) -> int | None:
        """The longest context that the positions allow, as vLLM derives it (`_get_and_verify_max_len`).

        `max_position_embeddings`, times the factor of a rope scaling that the value does not include yet.
        """
        positions = self.max_position_embeddings
        if positions is None or self.rope is None or self.rope.kind in _INCLUDED_ROPES or "gemma3" in self.model_type:
            return positions
        return int(positions * (self.rope.factor or 1.0))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        described: dict[str, Any] = _MODEL.dump_python(self, mode="json", exclude_defaults=True)
        return described

    @staticmethod
    def from_json(text: str | bytes) -> "ModelFacts":
        """The model that `text` describes.

        Raises:
            ValueError: it is not JSON, or a field is unknown or has a wrong value; every one is named.
        """
        try:
            return _MODEL.validate_json(text)
        except ValidationError as error:
            raise ValueError(f"This does not describe a model: {described_errors(error)}.") from None


_MODEL = TypeAdapter(ModelFacts)
