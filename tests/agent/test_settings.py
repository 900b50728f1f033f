"""Settings: where a value comes from, and what an operator is told."""

import os
from pathlib import Path

import pytest

from xim_agent.settings import MOST_CONCURRENT, NOT_YET_EFFECTIVE, AgentSettings, engine_environment
from xim_agent.settings_check import SettingsInvalid, advice, load_settings, warnings
from xim_agent.settings_reference import help_text, rows
from xim_protocol.codec import MAX_STREAMS

A = "XEROTIER_AGENT_"
STRICT = (
    "AUTO_CONFIG",
    "AUTO_CONFIGURE_GPU",
    "AUTO_CUDA_MITIGATION",
    "VLLM_DISABLE_CUDA_GRAPHS",
    "VLLM_DISABLE_CUSTOM_ALL_REDUCE",
)
DEFAULTS = AgentSettings.model_fields


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("XEROTIER_", "HIP_")):
            monkeypatch.delenv(name)


def field_of(variable: str) -> str:
    return next(row.field for row in rows() if row.variable == A + variable)


def test_a_flag_wins_over_the_variable_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({}).metrics_port == 9094
    monkeypatch.setenv(A + "METRICS_PORT", "1000")
    assert load_settings({}).metrics_port == 1000
    assert load_settings({A + "METRICS_PORT": "2000"}).metrics_port == 2000


def test_empty_is_unset_for_every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in rows():
        monkeypatch.setenv(row.variable, "")
    settings = load_settings({})
    assert settings.non_defaults() == {}
    assert warnings() == []


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("word", ["True", "TRUE", "off", "yes", "2"])
def test_a_strict_switch_keeps_its_default_and_says_so(monkeypatch: pytest.MonkeyPatch, name: str, word: str) -> None:
    monkeypatch.setenv(A + name, word)
    field = field_of(name)
    assert getattr(load_settings({}), field) is DEFAULTS[field].default
    assert [w for w in warnings() if A + name in w and "exactly 0, 1, true or false" in w]


@pytest.mark.parametrize(("word", "value"), [("0", False), ("1", True), ("true", True), ("false", False)])
@pytest.mark.parametrize("name", STRICT)
def test_a_strict_switch_takes_its_four_words(
    monkeypatch: pytest.MonkeyPatch, name: str, word: str, value: bool
) -> None:
    monkeypatch.setenv(A + name, word)
    assert getattr(load_settings({}), field_of(name)) is value


def test_other_switches_take_their_words_in_any_case_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(A + "FLOW_CONTROL_ENABLED", "FALSE")
    assert not load_settings({}).flow_control_enabled
    monkeypatch.setenv(A + "FLOW_CONTROL_ENABLED", "off")
    with pytest.raises(SettingsInvalid, match="takes 1, 0, true or false"):
        load_settings({})


def test_all_problems_are_told_at_once_with_value_rule_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "METRICS_PORT": "0",
        "GPU_MEMORY_UTILIZATION": "90",
        "LOG_LEVEL": "loud",
        "MAX_NUM_SEQS": "x",
        "SPECULATIVE_METHOD": "magic",
        "HEALTH_CHECK_INTERVAL": "nan",
        "CUDA_VISIBLE_DEVICES": "0,,1",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(A + name, value)
    with pytest.raises(SettingsInvalid) as invalid:
        load_settings({})
    assert {(p.variable, p.value) for p in invalid.value.problems} == {(A + n, v) for n, v in wrong.items()}
    assert all(problem.rule and problem.remedy for problem in invalid.value.problems)
    assert f"{A}METRICS_PORT='0': must be at least 1. The default is 9094" in str(invalid.value)


def test_a_wrong_value_is_answered_with_the_default_as_the_table_words_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(A + "TENSOR_PARALLEL_SIZE", "0")
    with pytest.raises(SettingsInvalid, match="The default is derived from the visible GPUs"):
        load_settings({})


@pytest.mark.parametrize(
    "name", ["VLLM_STARTUP_TIMEOUT_SECONDS", "FLOW_CONTROL_TIMEOUT_SECONDS", "MAX_NUM_SEQS", "LMCACHE_DISK_SIZE_GB"]
)
def test_a_number_beyond_all_reckoning_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a count of seconds or bytes it would be too large for a float, or for the wire."""
    monkeypatch.setenv(A + name, "9" * 400)
    with pytest.raises(SettingsInvalid, match="must be at most 1000000"):
        load_settings({})


@pytest.mark.parametrize("name", ["HEALTH_CHECK_INTERVAL", "GPU_MEMORY_UTILIZATION", "KV_OFFLOAD_SIZE_GB"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_no_finite_number_is_called_that(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(A + name, value)
    with pytest.raises(SettingsInvalid, match="must be a finite number"):
        load_settings({})


def test_a_name_that_is_no_text_is_refused_before_a_router_hears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(A + "NAME", os.fsdecode(b"caf\xe9"))
    with pytest.raises(SettingsInvalid, match="takes text in UTF-8"):
        load_settings({})
    monkeypatch.setenv(A + "NAME", "café")
    assert load_settings({}).name == "café"


def test_the_nearest_setting_is_one_that_ends_the_same_way() -> None:
    assert warnings({A + "MODEL_PATH": "/m"}) == [
        f"{A}MODEL_PATH is not a setting; the nearest one is {A}INITIAL_MODEL_PATH."
    ]


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(A + "JOIN_KEY", "xjk_hidden")
    monkeypatch.setenv(A + "VLLM_SALT_SECRET", "hidden")
    monkeypatch.setenv(A + "VLLM_ENV", "HF_TOKEN=hidden")
    monkeypatch.setenv(A + "VLLM_ARGS", "--api-key hidden --hf-token=hidden --port 5")
    settings = load_settings({})
    shown = str(settings.non_defaults())
    assert "hidden" not in shown
    assert "--port 5" in shown
    assert A + "JOIN_KEY" in shown
    monkeypatch.setenv(A + "VLLM_ENV", "hidden")
    with pytest.raises(SettingsInvalid) as invalid:
        load_settings({})
    assert "hidden" not in str(invalid.value)


def test_words_and_pairs_are_split_at_spaces_and_json_keeps_its_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(A + "VLLM_ARGS", '--a {"b":"c"}  -d')
    monkeypatch.setenv(A + "VLLM_ENV", "K=V=W EMPTY= L=1")
    settings = load_settings({})
    assert settings.vllm_args == ("--a", '{"b":"c"}', "-d")
    assert settings.vllm_env == {"K": "V=W", "L": "1"}


def test_unknown_variables_are_named_with_the_nearest_known_one() -> None:
    assert warnings({A + "MAX_CONCURENT": "5"}) == [
        f"{A}MAX_CONCURENT is not a setting; the nearest one is {A}MAX_CONCURRENT."
    ]


def test_what_is_gone_and_what_is_not_yet_is_told() -> None:
    told = "\n".join(warnings({"VLLM_MODEL": "m", A + "MODEL_PULL_MAX_ATTEMPTS": "1", A + "BIN": "/x"}))
    assert "VLLM_MODEL is gone" in told
    assert f"{A}MODEL_PULL_MAX_ATTEMPTS has no effect in this version" in told
    assert "BIN" not in told


def test_what_is_not_yet_effective_is_a_setting() -> None:
    assert set(NOT_YET_EFFECTIVE) <= set(DEFAULTS)


def test_an_unset_salt_and_a_tight_lease_are_advised_against() -> None:
    told = "\n".join(advice(load_settings({A + "LEASE_DURATION_MS": "15000"})))
    assert "VLLM_SALT_SECRET is not set" in told
    assert "15000 ms" in told
    assert advice(load_settings({A + "VLLM_SALT_SECRET": "s"})) == []


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31)  # a user without an entry, as in a container
    for given in ({}, {A + "CONFIG_DIR": "/c", A + "MODEL_CACHE_PATH": "/m"}):  # LMCache's folder is in the home too
        with pytest.raises(SettingsInvalid, match="XEROTIER_AGENT_HOME='': this user has no home directory"):
            load_settings(given)
    load_settings({A + "HOME": "/srv/x"})


def test_the_config_directory_follows_the_home() -> None:
    assert load_settings({A + "HOME": "/srv/x"}).config_directory == Path("/srv/x/.config/xerotier")
    assert load_settings({A + "CONFIG_DIR": "/c", A + "HOME": "/srv/x"}).config_directory == Path("/c")


def test_the_engine_inherits_no_secret_of_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(A + "JOIN_KEY", "x")
    monkeypatch.setenv("VLLM_API_KEY", "x")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")
    monkeypatch.setenv("VLLM_PLUGINS", "zentorch")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    inherited = engine_environment()
    assert "HIP_VISIBLE_DEVICES" not in inherited  # empty it would hide every GPU
    assert inherited["VLLM_PLUGINS"] == "zentorch"
    assert not {A + "JOIN_KEY", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE"} & set(inherited)


def test_every_setting_has_a_description_and_its_own_variable() -> None:
    table = list(rows())
    assert len({row.variable for row in table}) == len(table)
    assert all(row.description.endswith(".") for row in table)
    assert all(row.variable in help_text() for row in table)


@pytest.mark.parametrize(
    ("field", "takes"),
    [
        ("metrics_port", "at least 1 and at most 65535"),
        ("gpu_memory_utilization", "above 0 and at most 1"),
        ("max_concurrent", "at least 1 and at most 4096"),
        ("kv_cache_backend", "native, lmcache, none"),
        ("auto_config", "exactly 0, 1, true or false"),
        ("vllm_path", ""),
    ],
)
def test_the_reference_says_what_a_setting_takes(field: str, takes: str) -> None:
    assert next(row.takes for row in rows() if row.field == field) == takes


def test_a_hello_names_the_streams_of_a_full_node_and_as_many_that_ended() -> None:
    assert 2 * MOST_CONCURRENT <= MAX_STREAMS
    with pytest.raises(SettingsInvalid, match="MAX_CONCURRENT='4097': must be at most 4096"):
        load_settings({"XEROTIER_AGENT_MAX_CONCURRENT": "4097"})
