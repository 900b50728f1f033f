"""What the agent's settings are made of: closed sets of words, parsers and ranges."""

from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode


class Group(StrEnum):
    """Parts of the reference page, in its order."""

    ENROLLMENT = "Enrollment"
    SERVING = "Serving"
    ENGINE = "Engine process"
    HARDWARE = "GPU and memory"
    MODELS = "Models"
    QUANTIZATION = "Quantization"
    SPECULATION = "Speculative decoding"
    MOE = "MoE kernel tuning"
    AUTO = "Automatic configuration"
    KV_CACHE = "KV cache"
    FLOW = "Flow control"
    LEASE = "Lease"
    HEALTH = "Health"
    TELEMETRY = "Logs and metrics"


class LogLevel(StrEnum):
    """Least severity that is logged."""

    TRACE = "trace"
    DEBUG = "debug"
    INFO = "info"
    NOTICE = "notice"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class KvCacheBackend(StrEnum):
    """Where KV blocks go that leave the accelerator."""

    NATIVE = "native"
    LMCACHE = "lmcache"
    NONE = "none"


class SpeculativeMethod(StrEnum):
    """vLLM's speculative methods that the agent knows."""

    DEEPSEEK_MTP = "deepseek_mtp"
    QWEN3_NEXT_MTP = "qwen3_next_mtp"
    MTP = "mtp"
    MIMO_MTP = "mimo_mtp"
    NGRAM = "ngram"
    SUFFIX = "suffix"
    EAGLE = "eagle"
    MEDUSA = "medusa"
    DRAFT_MODEL = "draft_model"
    MLP_SPECULATOR = "mlp_speculator"


class ModelSource(StrEnum):
    """Where models come from."""

    ROUTER = "router"
    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"
    LOCAL = "local"


def boolean(value: object) -> object:
    """1, 0, true or false in any case."""
    words = {"1": True, "true": True, "0": False, "false": False}
    if isinstance(value, str):
        if value.lower() not in words:
            raise ValueError("takes 1, 0, true or false")
        return words[value.lower()]
    return value


def words_of(value: object) -> object:
    """Words with spaces between them; no quoting, so that JSON keeps its quotes."""
    return tuple(value.split()) if isinstance(value, str) else value


def pairs_of(value: object) -> object:
    """KEY=VALUE words as a mapping; an empty value is skipped, so that `KEY=${UNSET}` is harmless."""
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return value
    pairs: dict[str, str] = {}
    for word in words:
        key, sign, text = str(word).partition("=")
        if not sign or not key:
            raise ValueError("takes KEY=VALUE words; one of them has no '='")
        if text:
            pairs[key] = text
    return pairs


def device_list(value: object) -> object:
    """Device numbers or ids with commas between them."""
    if isinstance(value, str) and not all(part.strip() for part in value.split(",")):
        raise ValueError("takes device numbers or ids with commas between them")
    return value


def text(value: str) -> str:
    """What can be told to a router: bytes that are no text stand for themselves in a variable, and nowhere else."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("takes text in UTF-8") from None
    return value


Text = Annotated[str, AfterValidator(text)]
Bool = Annotated[bool, BeforeValidator(boolean)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(words_of)]
Pairs = Annotated[dict[str, str], NoDecode, BeforeValidator(pairs_of)]
Devices = Annotated[str | None, BeforeValidator(device_list)]
Port = Annotated[int, Field(ge=1, le=65_535)]
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
