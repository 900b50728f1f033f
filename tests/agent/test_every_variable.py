"""Every variable of the specification works: its default, its parsing, its effect. None is left out."""

import os

import pytest

from tests.agent.planning.givens import given, planned
from tests.agent.variables import CPU, VARIABLES, Variable, env, plain
from xim_agent.planning.plan import plan_engine
from xim_agent.settings import PREFIX, STRICT_SWITCHES, AgentSettings, engine_environment
from xim_agent.settings_check import SettingsInvalid, load_settings, warnings

NAMED = frozenset(
    [
        "ALLOW_INSECURE",
        "AUTO_CONFIG",
        "AUTO_CONFIGURE_GPU",
        "AUTO_CUDA_MITIGATION",
        "CUDA_VISIBLE_DEVICES",
        "DEGRADED_TO_FAILED_TIMEOUT_SECONDS",
        "FLOW_CONTROL_ENABLED",
        "FLOW_CONTROL_PAUSE_THRESHOLD_BYTES",
        "FLOW_CONTROL_REPLENISH_THRESHOLD",
        "FLOW_CONTROL_TIMEOUT_SECONDS",
        "FLOW_CONTROL_WINDOW_BYTES",
        "GPU_MEMORY_UTILIZATION",
        "HIP_VISIBLE_DEVICES",
        "INITIAL_MODEL_PATH",
        "JOIN_KEY",
        "KV_OFFLOAD_SIZE_GB",
        "LEASE_DURATION_MS",
        "LEASE_RENEWAL_INTERVAL_MS",
        "LMCACHE_DISK_SIZE_GB",
        "LMCACHE_ENABLED",
        "LMCACHE_REDIS_URL",
        "LOG_LEVEL",
        "MAX_CONCURRENT",
        "MAX_MODEL_LEN",
        "MODEL_CACHE_MAX_SIZE_GB",
        "MODEL_CACHE_PATH",
        "MODEL_PULL_BASE_DELAY_MS",
        "MODEL_PULL_MAX_ATTEMPTS",
        "MODEL_PULL_MAX_DELAY_MS",
        "MOE_CONFIG_ENABLED",
        "MOE_CONFIG_PATH",
        "SPECULATIVE_DRAFT_MODEL_PATH",
        "SPECULATIVE_ENABLED",
        "SPECULATIVE_METHOD",
        "SPECULATIVE_NGRAM_FALLBACK",
        "SPECULATIVE_TOKENS",
        "STREAMING_SOCKET_ENABLED",
        "TENSOR_PARALLEL_SIZE",
        "VLLM_DISABLE_CUDA_GRAPHS",
        "VLLM_DISABLE_CUSTOM_ALL_REDUCE",
        "VLLM_ENV",
        "VLLM_PATH",
        "VLLM_QUANTIZATION",
        "VLLM_SALT_SECRET",
        "VLLM_STARTUP_INACTIVITY_GRACE_SECONDS",
        "VLLM_STARTUP_TIMEOUT_SECONDS",
    ]
)
"""What the specification calls XEROTIER_AGENT_..., and HIP_VISIBLE_DEVICES."""

SHOWN_WITH_MODEL_PULL = {
    "MODEL_CACHE_MAX_SIZE_GB": ("model_cache_max_size_gb", 100, "250", 250, "0"),
    "MODEL_PULL_MAX_ATTEMPTS": ("model_pull_max_attempts", 5, "0", 0, "-1"),
    "MODEL_PULL_BASE_DELAY_MS": ("model_pull_base_delay_ms", 1_000, "250", 250, "1s"),
    "MODEL_PULL_MAX_DELAY_MS": ("model_pull_max_delay_ms", 15_000, "30000", 30_000, "0"),
}
"""Default and parsing are shown here; their effect is on the pulling and keeping of models, and is shown with those
(tests/agent/models): field, default, a good word, its value, a wrong word."""

OF_COMPOSE_FILES = frozenset(
    {"SHM_SIZE", "DOCKER_REGISTRY", "VERSION", "DOCKER_GPU_COUNT", "XEROTIER_CPU_IMAGE", "XEROTIER_AGENT_BIN"}
)
"""Read by Compose or by start scripts; that the files have them is shown by the checks of deploy/compose."""

OF_THE_ROUTER = frozenset({"XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S"})

OF_VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "3",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "ACTIVE",
}
"""Chosen by the plan on a CPU; an operator's own value wins, from VLLM_ENV or from the agent's environment."""

HANDED_ON = {
    "VLLM_PLUGINS": "zentorch",
    "OMP_PROC_BIND": "TRUE",
    "VLLM_CPU_DISABLE_AVX512": "1",
    "VLLM_CPU_AVX512BF16": "1",
    "VLLM_CPU_AVX512VNNI": "1",
}
"""vLLM's own, the last three read when it is built; the agent neither sets nor changes them."""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("XEROTIER_", "HIP_", "VLLM_", "OMP_")):
            monkeypatch.delenv(name)


def whole_name(name: str) -> str:
    return name if name.startswith("HIP_") else PREFIX + name


def ids(variable: Variable) -> str:
    return variable.name


def test_none_is_missing() -> None:
    shown = {variable.name for variable in VARIABLES} | set(SHOWN_WITH_MODEL_PULL)
    assert sorted(NAMED - shown) == []
    assert sorted(shown - NAMED) == []
    settings = {str(info.alias) for info in AgentSettings.model_fields.values()}
    assert sorted({whole_name(name) for name in NAMED} - settings) == []


@pytest.mark.parametrize("variable", VARIABLES, ids=ids)
def test_its_default_holds_unset_and_empty(monkeypatch: pytest.MonkeyPatch, variable: Variable) -> None:
    assert plain(load_settings({}), variable.field) == variable.default
    monkeypatch.setenv(whole_name(variable.name), "")
    assert plain(load_settings({}), variable.field) == variable.default
    assert warnings() == []


@pytest.mark.parametrize("variable", VARIABLES, ids=ids)
def test_its_words_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, variable: Variable) -> None:
    monkeypatch.setenv(whole_name(variable.name), variable.word)
    assert plain(load_settings({}), variable.field) == variable.value
    assert warnings() == []


@pytest.mark.parametrize("variable", [each for each in VARIABLES if each.wrong is not None], ids=ids)
def test_a_wrong_word_is_told(monkeypatch: pytest.MonkeyPatch, variable: Variable) -> None:
    assert variable.wrong is not None
    name = whole_name(variable.name)
    monkeypatch.setenv(name, variable.wrong)
    assert (name in STRICT_SWITCHES) is variable.strict
    if variable.strict:
        assert plain(load_settings({}), variable.field) == variable.default
        assert [sentence for sentence in warnings() if name in sentence and "exactly 0, 1, true or false" in sentence]
        return
    with pytest.raises(SettingsInvalid) as invalid:
        load_settings({})
    assert [problem.variable for problem in invalid.value.problems] == [name]


@pytest.mark.parametrize("variable", VARIABLES, ids=ids)
def test_it_has_its_effect(variable: Variable) -> None:
    variable.effect()


@pytest.mark.parametrize("name", SHOWN_WITH_MODEL_PULL)
def test_what_is_of_the_model_pull_has_its_default_and_its_rule(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    field, default, word, value, wrong = SHOWN_WITH_MODEL_PULL[name]
    assert getattr(load_settings({}), field) == default
    monkeypatch.setenv(PREFIX + name, word)
    assert getattr(load_settings({}), field) == value
    monkeypatch.setenv(PREFIX + name, wrong)
    with pytest.raises(SettingsInvalid, match=name):
        load_settings({})


@pytest.mark.parametrize("name", OF_VLLM)
def test_what_the_plan_chooses_for_a_cpu_yields_to_the_operator(name: str) -> None:
    word = OF_VLLM[name]
    chosen = env(planned(*CPU))[name]
    assert chosen
    assert chosen != word
    assert env(planned(*CPU, VLLM_ENV=f"{name}={word}"))[name] == word
    assert env(plan_engine(given(*CPU, inherited={name: word})))[name] == word


@pytest.mark.parametrize("name", HANDED_ON)
def test_what_is_vllms_own_reaches_it_unchanged(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, HANDED_ON[name])
    assert engine_environment()[name] == HANDED_ON[name]
    assert env(plan_engine(given(*CPU, inherited=engine_environment())))[name] == HANDED_ON[name]
    assert warnings() == []


def test_what_is_gone_is_told() -> None:
    (told,) = warnings({"VLLM_MODEL": "meta-llama/Llama-3.2-1B-Instruct"})
    assert "VLLM_MODEL is gone" in told
    assert "XEROTIER_AGENT_INITIAL_MODEL_PATH" in told


@pytest.mark.parametrize("name", sorted(OF_COMPOSE_FILES | OF_THE_ROUTER))
def test_what_others_read_is_no_setting_of_the_agent_and_no_mistake(name: str) -> None:
    assert name not in {str(info.alias) for info in AgentSettings.model_fields.values()}
    assert warnings({name: "x"}) == []
