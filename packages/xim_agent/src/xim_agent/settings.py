"""Every setting of the agent, declared once: default, unit, range, flag and help.

The order of precedence is flag, environment variable, default. An empty variable counts as unset, because Compose
files pass empty strings. `--help`, the reference page and the Compose comments are made from this table; what the
operator did wrong is told by `settings_check`. The environment is read here and nowhere else.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import Field, SecretStr, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from xim_agent.settings_types import (
    Bool,
    Devices,
    Fraction,
    Group,
    KvCacheBackend,
    LogLevel,
    ModelSource,
    Pairs,
    Port,
    Positive,
    SpeculativeMethod,
    Text,
    Words,
)
from xim_protocol.codec import MAX_STREAMS

PREFIX = "XEROTIER_AGENT_"

MOST_CONCURRENT = MAX_STREAMS // 2
"""A Hello names every stream of the session: those in flight, and those that ended and the router did not close yet."""

NOT_YET_EFFECTIVE: dict[str, str] = {
    "model_cache_max_size_gb": "the agent does not receive models yet",
    "model_src": "the agent does not receive models yet; it serves INITIAL_MODEL_PATH",
    "model_pull_max_attempts": "the agent does not receive models yet",
    "model_pull_base_delay_ms": "the agent does not receive models yet",
    "model_pull_max_delay_ms": "the agent does not receive models yet",
}
"""Settings that are read and checked, but change nothing in this version, each with what holds until then."""


def _setting(
    default: Any,
    variable: str,
    group: Group,
    description: str,
    *,
    unit: str = "",
    flag: str = "",
    shown: str = "",
    strict: bool = False,
) -> Any:
    """One row of the table. `variable` is without prefix unless it belongs to another program; `flag` names the
    commands it is a flag of; `shown` is the default in words where the value says too little."""
    name = variable if variable == "HIP_VISIBLE_DEVICES" else PREFIX + variable
    extra = {"group": group, "unit": unit, "flag": flag, "shown": shown, "strict": strict}
    return Field(default, alias=name, description=description, json_schema_extra=extra)  # type: ignore[arg-type]


class AgentSettings(BaseSettings):
    """The settings in force, as the operator's units; properties ending in `_s` give seconds."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, case_sensitive=True, extra="ignore")

    # Enrollment
    join_key: SecretStr | None = _setting(
        None, "JOIN_KEY", Group.ENROLLMENT, "Enrolls this node; needed on the first start only.", flag="enroll run"
    )
    name: Text | None = _setting(
        None,
        "NAME",
        Group.ENROLLMENT,
        "What the agent is called in lists.",
        flag="enroll run",
        shown="the host name",
    )
    allow_insecure: Bool = _setting(
        False,
        "ALLOW_INSECURE",
        Group.ENROLLMENT,
        "Permit enrollment over plain http://, which shows the join key to the network. Development only.",
        flag="enroll run",
    )
    config_dir: Path | None = _setting(
        None,
        "CONFIG_DIR",
        Group.ENROLLMENT,
        "Keys and credentials of this agent; one directory per agent.",
        flag="enroll run",
        shown="xerotier in the user's config directory, or HOME/.config/xerotier",
    )
    home: Path | None = _setting(
        None, "HOME", Group.ENROLLMENT, "Directory that the config directory and the model cache are derived from."
    )

    # Serving
    max_concurrent: Annotated[int, Field(ge=1, le=MOST_CONCURRENT)] | None = _setting(
        None,
        "MAX_CONCURRENT",
        Group.SERVING,
        "Most requests at once; the router sends no more.",
        flag="enroll run",
        shown="automatic: 5 on a CPU, else what fits, at most MAX_NUM_SEQS and 64 for each GPU",
    )
    vllm_salt_secret: SecretStr | None = _setting(
        None,
        "VLLM_SALT_SECRET",
        Group.SERVING,
        "Secret of the per-tenant cache salts. Unset, a constant that everyone knows is used.",
        flag="run",
        shown="a built-in constant",
    )

    # Engine process
    vllm_path: str = _setting(
        "vllm", "VLLM_PATH", Group.ENGINE, "The vLLM program: a path, or a name on PATH.", flag="run"
    )
    vllm_args: Words = _setting(
        (),
        "VLLM_ARGS",
        Group.ENGINE,
        "Further arguments of `vllm serve`, with spaces between them; they come last and so win.",
        flag="run",
    )
    vllm_env: Pairs = _setting(
        {},
        "VLLM_ENV",
        Group.ENGINE,
        "Further variables of the engine as KEY=VALUE words; they win over all others.",
        flag="run",
    )
    vllm_socket_path: Path | None = _setting(
        None,
        "VLLM_SOCKET_PATH",
        Group.ENGINE,
        "Unix socket between agent and engine.",
        flag="run",
        shown="in the system's temporary directory",
    )
    vllm_startup_timeout_seconds: Positive = _setting(
        600,
        "VLLM_STARTUP_TIMEOUT_SECONDS",
        Group.ENGINE,
        "A start that takes longer has failed; handed on to vLLM as VLLM_ENGINE_READY_TIMEOUT_S.",
        unit="s",
    )
    vllm_startup_inactivity_grace_seconds: Positive = _setting(
        300,
        "VLLM_STARTUP_INACTIVITY_GRACE_SECONDS",
        Group.ENGINE,
        "A start without any output for this long is stuck.",
        unit="s",
    )
    max_num_seqs: Positive = _setting(
        64, "MAX_NUM_SEQS", Group.ENGINE, "Most sequences in one batch of the engine.", flag="run"
    )
    max_model_len: Positive | None = _setting(
        None,
        "MAX_MODEL_LEN",
        Group.ENGINE,
        "Longest context.",
        unit="tokens",
        flag="run",
        shown="the model's own where it fits, else what fits",
    )

    # GPU and memory
    tensor_parallel_size: Positive = _setting(
        1,
        "TENSOR_PARALLEL_SIZE",
        Group.HARDWARE,
        "GPUs that share one model; a value set here is never changed.",
        unit="GPUs",
        shown="derived from the visible GPUs, 1 where AUTO_CONFIGURE_GPU is off",
    )
    gpu_memory_utilization: Fraction = _setting(
        0.95, "GPU_MEMORY_UTILIZATION", Group.HARDWARE, "Part of each GPU's memory the engine takes.", flag="run"
    )
    cuda_visible_devices: Devices = _setting(
        None, "CUDA_VISIBLE_DEVICES", Group.HARDWARE, "CUDA devices the engine sees.", shown="all"
    )
    hip_visible_devices: Devices = _setting(
        None, "HIP_VISIBLE_DEVICES", Group.HARDWARE, "ROCm devices the engine sees.", shown="all"
    )
    vllm_disable_cuda_graphs: Bool = _setting(
        False, "VLLM_DISABLE_CUDA_GRAPHS", Group.HARDWARE, "Run without CUDA graphs.", strict=True
    )
    vllm_disable_custom_all_reduce: Bool = _setting(
        False,
        "VLLM_DISABLE_CUSTOM_ALL_REDUCE",
        Group.HARDWARE,
        "Run without vLLM's own all-reduce, for GPUs with peer-to-peer trouble.",
        strict=True,
    )

    # Models
    initial_model_path: Path | None = _setting(
        None, "INITIAL_MODEL_PATH", Group.MODELS, "Directory of the model that is served from the start."
    )
    model_src: ModelSource = _setting(ModelSource.ROUTER, "MODEL_SRC", Group.MODELS, "Where models come from.")
    model_cache_path: Path | None = _setting(
        None,
        "MODEL_CACHE_PATH",
        Group.MODELS,
        "Where received models will be kept; vLLM's cache, kernel configurations and facts lie beside it.",
        shown="xerotier/models in the user's cache directory, or HOME/.cache/xerotier/models",
    )
    model_cache_max_size_gb: Positive = _setting(
        100, "MODEL_CACHE_MAX_SIZE_GB", Group.MODELS, "Most the model cache may hold.", unit="GB", flag="run"
    )
    model_pull_max_attempts: Annotated[int, Field(ge=0, le=100)] = _setting(
        5, "MODEL_PULL_MAX_ATTEMPTS", Group.MODELS, "Retries of a failed model transfer after the first try."
    )
    model_pull_base_delay_ms: Positive = _setting(
        1000, "MODEL_PULL_BASE_DELAY_MS", Group.MODELS, "Delay before the first retry; doubles.", unit="ms"
    )
    model_pull_max_delay_ms: Positive = _setting(
        15_000, "MODEL_PULL_MAX_DELAY_MS", Group.MODELS, "Longest delay between retries.", unit="ms"
    )

    # Quantization
    vllm_quantization: str | None = _setting(
        None,
        "VLLM_QUANTIZATION",
        Group.QUANTIZATION,
        "Quantization method; wins over the endpoint's: bitsandbytes, fp8, awq, gptq or any other of vLLM's.",
        flag="run",
        shown="the model's own, else the endpoint's, else what fits",
    )

    # Speculative decoding
    speculative_enabled: Bool = _setting(False, "SPECULATIVE_ENABLED", Group.SPECULATION, "Switch it on.")
    speculative_method: SpeculativeMethod | None = _setting(
        None, "SPECULATIVE_METHOD", Group.SPECULATION, "Force a method.", shown="by the model's architecture"
    )
    speculative_tokens: Positive | None = _setting(
        None, "SPECULATIVE_TOKENS", Group.SPECULATION, "Tokens guessed per step.", unit="tokens", shown="by method"
    )
    speculative_ngram_fallback: Bool = _setting(
        False, "SPECULATIVE_NGRAM_FALLBACK", Group.SPECULATION, "Use n-grams where the method cannot be used."
    )
    speculative_draft_model_path: Path | None = _setting(
        None, "SPECULATIVE_DRAFT_MODEL_PATH", Group.SPECULATION, "Draft model of the methods that need one."
    )

    # MoE kernel tuning
    moe_config_enabled: Bool = _setting(
        True, "MOE_CONFIG_ENABLED", Group.MOE, "Make and use tuned kernel configurations for MoE models."
    )
    moe_config_path: Path | None = _setting(
        None, "MOE_CONFIG_PATH", Group.MOE, "Where they are kept.", shown="beside the model cache"
    )

    # Automatic configuration
    auto_config: Bool = _setting(
        True, "AUTO_CONFIG", Group.AUTO, "Master switch of all automatic choices.", strict=True
    )
    auto_configure_gpu: Bool = _setting(
        True, "AUTO_CONFIGURE_GPU", Group.AUTO, "Derive the tensor parallel size from the GPUs.", strict=True
    )
    auto_cuda_mitigation: Bool = _setting(
        True, "AUTO_CUDA_MITIGATION", Group.AUTO, "Work around CUDA graph trouble of A30, A40 and L40.", strict=True
    )

    # KV cache
    kv_offload_size_gb: Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)] | None = _setting(
        None,
        "KV_OFFLOAD_SIZE_GB",
        Group.KV_CACHE,
        "Host memory for KV blocks that leave the GPU, over all its ranks; 0 is off.",
        unit="GB",
        flag="run",
        shown="25% of the memory",
    )
    kv_cache_backend: KvCacheBackend = _setting(
        KvCacheBackend.NATIVE, "KV_CACHE_BACKEND", Group.KV_CACHE, "Who offloads KV blocks.", flag="run"
    )
    lmcache_enabled: Bool = _setting(
        False, "LMCACHE_ENABLED", Group.KV_CACHE, "Old switch for KV_CACHE_BACKEND=lmcache."
    )
    lmcache_redis_url: SecretStr | None = _setting(
        None, "LMCACHE_REDIS_URL", Group.KV_CACHE, "Remote tier of LMCache.", shown="none: memory and disk only"
    )
    lmcache_disk_size_gb: Annotated[int, Field(ge=0, le=1_000_000)] | None = _setting(
        None, "LMCACHE_DISK_SIZE_GB", Group.KV_CACHE, "Disk tier.", unit="GB", shown="10% of the partition"
    )

    # Flow control
    streaming_socket_enabled: Bool = _setting(
        True, "STREAMING_SOCKET_ENABLED", Group.FLOW, "Answers take a socket of their own."
    )
    flow_control_enabled: Bool = _setting(True, "FLOW_CONTROL_ENABLED", Group.FLOW, "Streams wait for credit.")
    flow_control_window_bytes: Annotated[int, Field(ge=1024, le=16 * 1024 * 1024)] = _setting(
        65_536, "FLOW_CONTROL_WINDOW_BYTES", Group.FLOW, "Unacknowledged bytes per stream.", unit="bytes"
    )
    flow_control_replenish_threshold: Fraction = _setting(
        0.5, "FLOW_CONTROL_REPLENISH_THRESHOLD", Group.FLOW, "Part of the window after which credit is given back."
    )
    flow_control_pause_threshold_bytes: Annotated[int, Field(ge=4096, le=1024 * 1024 * 1024)] = _setting(
        262_144, "FLOW_CONTROL_PAUSE_THRESHOLD_BYTES", Group.FLOW, "Unreceived bytes of all streams.", unit="bytes"
    )
    flow_control_timeout_seconds: Positive = _setting(
        30, "FLOW_CONTROL_TIMEOUT_SECONDS", Group.FLOW, "A stream without credit for this long has stalled.", unit="s"
    )
    stream_coalesce_ms: Annotated[int, Field(ge=0, le=1000)] = _setting(
        2, "STREAM_COALESCE_MS", Group.FLOW, "How long chunks wait for company; 0 is one turn of the loop.", unit="ms"
    )

    # Lease
    lease_renewal_interval_ms: Annotated[int, Field(ge=100, le=300_000)] = _setting(
        10_000,
        "LEASE_RENEWAL_INTERVAL_MS",
        Group.LEASE,
        "Time between two renewals; keep the lease at least twice as long.",
        unit="ms",
    )
    lease_duration_ms: Annotated[int, Field(ge=200, le=300_000)] = _setting(
        30_000, "LEASE_DURATION_MS", Group.LEASE, "Lease asked for; without a renewal in it requests stop.", unit="ms"
    )

    # Health
    degraded_to_failed_timeout_seconds: Positive = _setting(
        300,
        "DEGRADED_TO_FAILED_TIMEOUT_SECONDS",
        Group.HEALTH,
        "An engine degraded for longer has failed and is started again.",
        unit="s",
    )
    health_check_interval: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = _setting(
        5.0, "HEALTH_CHECK_INTERVAL", Group.HEALTH, "Time between two checks of the engine.", unit="s"
    )
    health_check_timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = _setting(
        10.0, "HEALTH_CHECK_TIMEOUT", Group.HEALTH, "Longest one check may take.", unit="s"
    )
    health_check_failure_threshold: Positive = _setting(
        5, "HEALTH_CHECK_FAILURE_THRESHOLD", Group.HEALTH, "Failed checks in a row that make the engine degraded."
    )
    disable_health_check: Bool = _setting(
        False, "DISABLE_HEALTH_CHECK", Group.HEALTH, "Do not check a running engine; leases stay."
    )

    # Logs and metrics
    log_level: LogLevel = _setting(
        LogLevel.INFO, "LOG_LEVEL", Group.TELEMETRY, "Least severity that is logged.", flag="enroll run"
    )
    metrics_host: str = _setting("127.0.0.1", "METRICS_HOST", Group.TELEMETRY, "Address of the metrics server.")
    metrics_port: Port = _setting(9094, "METRICS_PORT", Group.TELEMETRY, "Port of the metrics server.", flag="run")
    disable_metrics_server: Bool = _setting(
        False, "DISABLE_METRICS_SERVER", Group.TELEMETRY, "Serve no metrics.", flag="run"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unreadable_switches(cls, values: object) -> object:
        """The strict switches keep their default on any other word; `settings_check` warns of it."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if readable_switch(name, value)}

    @property
    def config_directory(self) -> Path:
        """Where keys and credentials are."""
        if self.config_dir is not None:
            return self.config_dir
        if self.home is not None:
            return self.home / ".config" / "xerotier"
        return platformdirs.user_config_path("xerotier")

    @property
    def cache_directory(self) -> Path:
        """Caches of this user: what may be deleted and is made again."""
        return platformdirs.user_cache_path() if self.home is None else self.home / ".cache"

    @property
    def model_cache_directory(self) -> Path:
        """Where received models are kept; what else outlives a start lies beside it."""
        return self.model_cache_path or self.cache_directory / "xerotier" / "models"

    @property
    def vllm_startup_timeout_s(self) -> float:
        """The ceiling of a start, in seconds."""
        return float(self.vllm_startup_timeout_seconds)

    def is_set(self, field: str) -> bool:
        """Whether the operator gave this setting a value, be it the default one."""
        return field in self.model_fields_set

    def non_defaults(self) -> dict[str, str]:
        """Every setting that is not at its default, by variable, for the log; secrets are masked."""
        changed: dict[str, str] = {}
        for field, info in type(self).model_fields.items():
            value = getattr(self, field)
            if value != info.default:
                changed[str(info.alias)] = shown_value(value)
        return changed


MASK = "**********"
SECRET_ARGUMENT = re.compile(r"--[\w.-]*(?:key|token|secret|password)[\w.-]*")
"""Arguments of vLLM whose value no log shows, such as --api-key."""
STRICT_WORDS = frozenset({"0", "1", "true", "false"})
STRICT_SWITCHES = frozenset(
    str(info.alias)
    for info in AgentSettings.model_fields.values()
    if isinstance(info.json_schema_extra, dict) and info.json_schema_extra["strict"]
)
"""Switches that take exactly four words and keep their default on any other."""


def readable_switch(variable: str, value: object) -> bool:
    """False for a strict switch with a word that it does not take."""
    return variable not in STRICT_SWITCHES or not isinstance(value, str) or value in STRICT_WORDS


def shown_value(value: object) -> str:
    """A setting's value as the operator writes it; secrets, and the values of the engine's variables, are masked."""
    match value:
        case None:
            return ""
        case SecretStr():
            return MASK
        case bool():
            return "1" if value else "0"
        case tuple():
            return " ".join(shown_words([str(word) for word in value]))
        case dict():
            return " ".join(f"{key}={MASK}" for key in value)
        case float():
            return f"{value:g}"
    return str(value)


def default_of(info: FieldInfo) -> str:
    """A setting's default as an operator reads it: the table's words, else its value; empty where there is none."""
    extra = info.json_schema_extra
    return (str(extra["shown"]) if isinstance(extra, dict) else "") or shown_value(info.default)


def shown_words(words: Sequence[str]) -> list[str]:
    """Arguments without the secrets among them: every value of a flag that speaks of one."""
    shown: list[str] = []
    hidden = False
    for word in words:
        name, sign, _ = word.partition("=")
        if name.startswith("--"):
            hidden = SECRET_ARGUMENT.fullmatch(name) is not None
            shown.append(f"{name}={MASK}" if hidden and sign else word)
        else:
            shown.append(MASK if hidden else word)
    return shown


def environment() -> Mapping[str, str]:
    """The process's variables, for the check of names and values."""
    return os.environ


def engine_environment() -> dict[str, str]:
    """What the engine inherits: everything but the agent's own variables, which hold secrets, a key that would lock
    the agent out of its engine, and empty variables: some of vLLM's crash it, and an empty mask hides every GPU where
    a Compose file only passed on what nobody had set."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("XEROTIER_")
        and name != "VLLM_API_KEY"
        and (value or not name.startswith(("VLLM_", "HIP_VISIBLE_DEVICES")))
    }
