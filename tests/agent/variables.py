"""Every variable that the agent's specification names, each with default, a good word, a wrong one, and its effect.

`effect` asserts what the variable changes: in the plan, on vLLM's command line, in its environment, or in what the
agent does.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.agent.planning.givens import PLACES, machine, model, planned, settings, vllm
from xim_agent.assigned_engine import policy_of
from xim_agent.cli import join_key_of
from xim_agent.engine.salt import BUILT_IN_SECRET, tenant_salt
from xim_agent.moe.background import shape_for
from xim_agent.moe.shapes import MoeShape
from xim_agent.node import session_config
from xim_agent.planning.plan import EnginePlan
from xim_agent.planning.render import command_of
from xim_agent.settings import AgentSettings
from xim_agent.surroundings import Surroundings, find_engine, model_at, places_of
from xim_agent.telemetry import logs
from xim_protocol.agent_session import AgentConfig
from xim_protocol.ids import ProjectId
from xim_protocol.join_key import JoinKey

KEY = JoinKey.from_entropy(bytes(40), project_slug="p", enroll_url="https://router.example").encode()
QWEN3_NEXT = ("h100-x8", "qwen3-next-80b-a3b")
MIXTRAL = ("a40-x4", "mixtral-8x7b")
CPU = ("two-core-24gb", "llama-3.2-1b-instruct")
DEEPSEEK = ("h100-x8", "deepseek-v3")


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One row."""

    name: str
    """Without prefix, where it has the agent's."""
    default: object
    """As the agent holds it: None for automatic, or for nothing."""
    word: str
    value: object
    """`word` as the agent reads it; secrets in plain text."""
    wrong: str | None = None
    """A word that breaks the rule; None where any word will do."""
    strict: bool = False
    """A wrong word keeps the default, with a warning, and stops nothing."""
    effect: Callable[[], None]

    @property
    def field(self) -> str:
        """Of the settings."""
        return self.name.lower()


def argv(plan: EnginePlan) -> str:
    """The command line."""
    return " ".join(command_of(plan).argv)


def env(plan: EnginePlan) -> dict[str, str]:
    """The engine's environment."""
    return dict(command_of(plan).environment)


def config(**values: Any) -> AgentConfig:
    """What the agent asks a router for, under these settings."""
    given = settings(**values)
    parts = Surroundings(
        settings=given, places=PLACES, engine=vllm(), model=model("llama-3.1-8b"), hardware=machine("h200")
    )
    return session_config(given, parts)


def flag(name: str, words: str, pair: tuple[str, str] = ("h200", "llama-3.1-8b"), **values: Any) -> None:
    """`words` are on the command line with these settings, and not without."""
    assert words in f"{argv(planned(*pair, **values))} ", name
    assert words not in f"{argv(planned(*pair))} ", name


def devices(name: str, machine_name: str, word: str) -> None:
    """The engine gets the mask, and none where none is set."""
    assert env(planned(machine_name, "llama-3.1-8b", **{name: word}))[name] == word
    assert name not in env(planned(machine_name, "llama-3.1-8b"))


def _max_concurrent() -> None:
    assert planned(MAX_CONCURRENT="7").max_concurrent == 7
    assert planned(*CPU).max_concurrent == 5


def _utilization() -> None:
    assert "--gpu-memory-utilization 0.95" in argv(planned())
    assert "--gpu-memory-utilization 0.8 " in argv(planned(GPU_MEMORY_UTILIZATION="0.8"))


def _tensor_parallel() -> None:
    assert "--tensor-parallel-size 4" in argv(planned("a40-x4", "llama-3.1-70b"))
    assert "--tensor-parallel-size 2" in argv(planned("a40-x4", "llama-3.1-70b", TENSOR_PARALLEL_SIZE="2"))


def _cache_path() -> None:
    places = places_of(settings(MODEL_CACHE_PATH="/data/xerotier/models"), "vllm")
    assert places.caches == Path("/data/xerotier")  # what outlives a start lies beside the models


def _engine_variables() -> None:
    plan = planned(*CPU, VLLM_ENV="VLLM_CPU_KVCACHE_SPACE=3 OMP_NUM_THREADS=1")
    assert env(plan)["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert env(plan)["OMP_NUM_THREADS"] == "1"


def _program() -> None:
    assert find_engine(settings(VLLM_PATH="/bin/sh")) == "/bin/sh"
    assert find_engine(settings(VLLM_PATH="/nowhere/vllm")) is None


def _salt() -> None:
    project = ProjectId("proj_a")
    secret = settings(VLLM_SALT_SECRET="own").vllm_salt_secret
    assert secret is not None
    assert tenant_salt(secret.get_secret_value(), project) != tenant_salt(BUILT_IN_SECRET, project)


def _initial_model() -> None:
    path = Path(__file__).parent / "models" / "llama-3.1-8b"
    assert model_at(settings(INITIAL_MODEL_PATH=str(path)).initial_model_path).hidden_size == 4096


def _insecure() -> None:
    """Over http an enrollment is refused without it: tests/agent/link/test_enrollment.py asks a real server."""
    assert settings(ALLOW_INSECURE="true").allow_insecure
    assert not settings().allow_insecure


def _log_level() -> None:
    root = logging.getLogger()
    before, handlers = root.level, list(root.handlers)
    try:
        logs.configure(settings(LOG_LEVEL="debug").log_level)
        assert root.level == logging.DEBUG
        logs.configure(settings().log_level)
        assert root.level == logging.INFO
    finally:
        root.setLevel(before)
        root.handlers[:] = handlers


def _join_key() -> None:
    key = join_key_of(settings(JOIN_KEY=KEY))
    assert key is not None
    assert key.project_slug == "p"


def _speculation_on() -> None:
    flag("SPECULATIVE_ENABLED", '--speculative-config {"method":"deepseek_mtp"', DEEPSEEK, SPECULATIVE_ENABLED="1")


def _speculation_method() -> None:
    on: dict[str, Any] = {"SPECULATIVE_ENABLED": "1"}
    assert "--speculative-config" not in argv(planned(*QWEN3_NEXT, **on))  # the family is carved out
    named = argv(planned(*QWEN3_NEXT, SPECULATIVE_METHOD="qwen3_next_mtp", **on))
    assert '{"method":"qwen3_next_mtp","num_speculative_tokens":2}' in named


def _speculation_tokens() -> None:
    plan = planned(*DEEPSEEK, SPECULATIVE_ENABLED="1", SPECULATIVE_TOKENS="3")
    assert '"num_speculative_tokens":3' in argv(plan)


def _speculation_fallback() -> None:
    plan = planned(SPECULATIVE_ENABLED="1", SPECULATIVE_NGRAM_FALLBACK="1")
    assert '{"method":"ngram","num_speculative_tokens":5' in argv(plan)


def _speculation_draft() -> None:
    eagle: dict[str, Any] = {"SPECULATIVE_ENABLED": "1", "SPECULATIVE_METHOD": "eagle"}
    assert '"model":"/draft"' in argv(planned(SPECULATIVE_DRAFT_MODEL_PATH="/draft", **eagle))
    assert any("DRAFT_MODEL_PATH is not set" in sentence for sentence in planned(**eagle).warnings)


def _moe_enabled() -> None:
    assert "VLLM_TUNED_CONFIG_FOLDER" in env(planned(*MIXTRAL))
    assert isinstance(shape_for(planned(*MIXTRAL)), MoeShape)
    off = planned(*MIXTRAL, MOE_CONFIG_ENABLED="0")
    assert "VLLM_TUNED_CONFIG_FOLDER" not in env(off)
    assert not isinstance(shape_for(off), MoeShape)


def _moe_path() -> None:
    assert env(planned(*MIXTRAL, MOE_CONFIG_PATH="/tuned"))["VLLM_TUNED_CONFIG_FOLDER"] == "/tuned"
    beside = env(planned(*MIXTRAL))["VLLM_TUNED_CONFIG_FOLDER"]
    assert Path(beside).parent == PLACES.caches


def _auto_config() -> None:
    off = planned("a40-x4", "llama-3.1-70b", AUTO_CONFIG="0")
    assert off.tensor_parallel_size == 1
    assert "--enforce-eager" not in argv(off)
    assert "--enable-prefix-caching" in argv(off)


def _auto_gpu() -> None:
    assert planned("a40-x4", "llama-3.1-70b").tensor_parallel_size == 4
    assert planned("a40-x4", "llama-3.1-70b", AUTO_CONFIGURE_GPU="0").tensor_parallel_size == 1


def _auto_mitigation() -> None:
    mitigated, off = planned(*MIXTRAL), planned(*MIXTRAL, AUTO_CUDA_MITIGATION="false")
    assert {"--enforce-eager", "--disable-custom-all-reduce"} <= set(argv(mitigated).split())
    assert not {"--enforce-eager", "--disable-custom-all-reduce"} & set(argv(off).split())


def _offload() -> None:
    assert "--kv-offloading-size 10" in argv(planned(KV_OFFLOAD_SIZE_GB="10"))
    assert "--kv-offloading-size" not in argv(planned(KV_OFFLOAD_SIZE_GB="0"))
    assert "--kv-offloading-backend native" in argv(planned())


def _lmcache(**values: Any) -> EnginePlan:
    engine = replace(vllm(), packages=frozenset({"lmcache"}))
    return planned(engine=engine, LMCACHE_ENABLED="1", **values)


def _lmcache_enabled() -> None:
    assert '"kv_connector":"LMCacheConnectorV1"' in argv(_lmcache())
    assert env(_lmcache())["LMCACHE_CONFIG_FILE"].endswith("lmcache_config.yaml")
    assert "LMCache" not in argv(planned())


def _lmcache_redis() -> None:
    (file,) = _lmcache(LMCACHE_REDIS_URL="redis://:hidden@host:6379").files
    assert "redis://:hidden@host:6379" in file.content
    assert "hidden" not in file.shown
    assert "remote_url" not in _lmcache().files[0].content


def _lmcache_disk() -> None:
    assert "max_local_disk_size: 42.0" in _lmcache(LMCACHE_DISK_SIZE_GB="42").files[0].content


def _startup() -> None:
    assert policy_of(settings(VLLM_STARTUP_TIMEOUT_SECONDS="77")).startup_timeout_s == 77.0
    assert env(planned(VLLM_STARTUP_TIMEOUT_SECONDS="77"))["VLLM_ENGINE_READY_TIMEOUT_S"] == "77"


def _inactivity() -> None:
    assert policy_of(settings(VLLM_STARTUP_INACTIVITY_GRACE_SECONDS="7")).inactivity_grace_s == 7.0


def _degraded() -> None:
    assert policy_of(settings(DEGRADED_TO_FAILED_TIMEOUT_SECONDS="9")).degraded_to_failed_s == 9.0


def _flow(variable: str, word: str, value: object, field: str) -> Callable[[], None]:
    """A field of the flow control that the agent says in its hello."""

    def check() -> None:
        assert getattr(config(**{variable: word}).flow, field) == value
        assert getattr(config().flow, field) != value

    return check


def _lease() -> None:
    assert config(LEASE_DURATION_MS="60000").lease_s == 60.0


def _renewal() -> None:
    assert config(LEASE_RENEWAL_INTERVAL_MS="5000").renewal_interval_s == 5.0


def _streaming() -> None:
    assert config().streaming_socket
    assert not config(STREAMING_SOCKET_ENABLED="0").streaming_socket


def _row(
    name: str,
    default: object,
    word: str,
    value: object,
    effect: Callable[[], None],
    *,
    wrong: str | None = None,
    strict: bool = False,
) -> Variable:
    return Variable(name=name, default=default, word=word, value=value, wrong=wrong, strict=strict, effect=effect)


VARIABLES: tuple[Variable, ...] = (
    _row("JOIN_KEY", None, KEY, KEY, _join_key),
    _row("ALLOW_INSECURE", False, "1", True, _insecure, wrong="yes"),
    _row("MAX_CONCURRENT", None, "7", 7, _max_concurrent, wrong="0"),
    _row("LOG_LEVEL", "info", "trace", "trace", _log_level, wrong="loud"),
    _row(
        "MAX_MODEL_LEN",
        None,
        "4096",
        4096,
        lambda: flag("MAX_MODEL_LEN", "--max-model-len 4096 ", MAX_MODEL_LEN="4096"),
        wrong="0",
    ),
    _row("TENSOR_PARALLEL_SIZE", 1, "2", 2, _tensor_parallel, wrong="0"),
    _row("GPU_MEMORY_UTILIZATION", 0.95, "0.8", 0.8, _utilization, wrong="90"),
    _row(
        "CUDA_VISIBLE_DEVICES",
        None,
        "0,2",
        "0,2",
        lambda: devices("CUDA_VISIBLE_DEVICES", "a40-x4", "0,2"),
        wrong="0,,2",
    ),
    _row("HIP_VISIBLE_DEVICES", None, "0", "0", lambda: devices("HIP_VISIBLE_DEVICES", "mi300x-x8", "0"), wrong=",0"),
    _row(
        "VLLM_QUANTIZATION",
        None,
        "fp8",
        "fp8",
        lambda: flag("VLLM_QUANTIZATION", "--quantization fp8 ", VLLM_QUANTIZATION="fp8"),
    ),
    _row("VLLM_PATH", "vllm", "/bin/sh", "/bin/sh", _program),
    _row("VLLM_ENV", {}, "A=1 B= C=x=y", {"A": "1", "C": "x=y"}, _engine_variables, wrong="novalue"),
    _row("VLLM_SALT_SECRET", None, "own", "own", _salt),
    _row("INITIAL_MODEL_PATH", None, "/models/m", Path("/models/m"), _initial_model),
    _row("SPECULATIVE_ENABLED", False, "true", True, _speculation_on, wrong="on"),
    _row("SPECULATIVE_METHOD", None, "ngram", "ngram", _speculation_method, wrong="magic"),
    _row("SPECULATIVE_TOKENS", None, "3", 3, _speculation_tokens, wrong="0"),
    _row("SPECULATIVE_NGRAM_FALLBACK", False, "1", True, _speculation_fallback, wrong="maybe"),
    _row("SPECULATIVE_DRAFT_MODEL_PATH", None, "/draft", Path("/draft"), _speculation_draft),
    _row("MOE_CONFIG_ENABLED", True, "0", False, _moe_enabled, wrong="off"),
    _row("MOE_CONFIG_PATH", None, "/tuned", Path("/tuned"), _moe_path),
    _row("AUTO_CONFIG", True, "0", False, _auto_config, wrong="False", strict=True),
    _row("AUTO_CONFIGURE_GPU", True, "false", False, _auto_gpu, wrong="off", strict=True),
    _row("AUTO_CUDA_MITIGATION", True, "0", False, _auto_mitigation, wrong="no", strict=True),
    _row(
        "VLLM_DISABLE_CUDA_GRAPHS",
        False,
        "1",
        True,
        lambda: flag("VLLM_DISABLE_CUDA_GRAPHS", "--enforce-eager ", VLLM_DISABLE_CUDA_GRAPHS="1"),
        wrong="True",
        strict=True,
    ),
    _row(
        "VLLM_DISABLE_CUSTOM_ALL_REDUCE",
        False,
        "true",
        True,
        lambda: flag(
            "VLLM_DISABLE_CUSTOM_ALL_REDUCE", "--disable-custom-all-reduce ", VLLM_DISABLE_CUSTOM_ALL_REDUCE="1"
        ),
        wrong="yes",
        strict=True,
    ),
    _row("STREAMING_SOCKET_ENABLED", True, "FALSE", False, _streaming, wrong="off"),
    _row("FLOW_CONTROL_ENABLED", True, "0", False, _flow("FLOW_CONTROL_ENABLED", "0", False, "enabled"), wrong="no"),
    _row(
        "FLOW_CONTROL_WINDOW_BYTES",
        65_536,
        "131072",
        131_072,
        _flow("FLOW_CONTROL_WINDOW_BYTES", "131072", 131_072, "window_bytes"),
        wrong="12",
    ),
    _row(
        "FLOW_CONTROL_REPLENISH_THRESHOLD",
        0.5,
        "0.25",
        0.25,
        _flow("FLOW_CONTROL_REPLENISH_THRESHOLD", "0.25", 0.25, "replenish_threshold"),
        wrong="1.5",
    ),
    _row(
        "FLOW_CONTROL_PAUSE_THRESHOLD_BYTES",
        262_144,
        "524288",
        524_288,
        _flow("FLOW_CONTROL_PAUSE_THRESHOLD_BYTES", "524288", 524_288, "pause_threshold_bytes"),
        wrong="64 KiB",
    ),
    _row(
        "FLOW_CONTROL_TIMEOUT_SECONDS",
        30,
        "60",
        60,
        _flow("FLOW_CONTROL_TIMEOUT_SECONDS", "60", 60_000, "stall_timeout_ms"),
        wrong="0",
    ),
    _row("LEASE_RENEWAL_INTERVAL_MS", 10_000, "5000", 5_000, _renewal, wrong="10s"),
    _row("LEASE_DURATION_MS", 30_000, "60000", 60_000, _lease, wrong="1"),
    _row("VLLM_STARTUP_TIMEOUT_SECONDS", 600, "77", 77, _startup, wrong="-1"),
    _row("VLLM_STARTUP_INACTIVITY_GRACE_SECONDS", 300, "7", 7, _inactivity, wrong="soon"),
    _row("DEGRADED_TO_FAILED_TIMEOUT_SECONDS", 300, "9", 9, _degraded, wrong="0"),
    _row("KV_OFFLOAD_SIZE_GB", None, "0", 0.0, _offload, wrong="-1"),
    _row("LMCACHE_ENABLED", False, "TRUE", True, _lmcache_enabled, wrong="y"),
    _row("LMCACHE_REDIS_URL", None, "redis://host", "redis://host", _lmcache_redis),
    _row("LMCACHE_DISK_SIZE_GB", None, "42", 42, _lmcache_disk, wrong="-5"),
    _row("MODEL_CACHE_PATH", None, "/data/xerotier/models", Path("/data/xerotier/models"), _cache_path),
)


def plain(settings_now: AgentSettings, field: str) -> object:
    """A field's value; a secret's in plain text."""
    value = getattr(settings_now, field)
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value
