"""The plan as a whole: command, environment, what the operator says, what this vLLM lacks, how it is shown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.agent.planning.givens import PLACES, decision, given, machine, model, planned, settings, vllm, words
from xim_agent.facts.hardware import HardwareFacts
from xim_agent.planning.decision import Source, Wanted
from xim_agent.planning.moe import configs_folder
from xim_agent.planning.plan import SocketPathTooLong, default_socket_path, plan_engine
from xim_agent.planning.render import as_json, as_text, command_of
from xim_agent.settings import MASK, shown_words


def test_the_command_names_model_endpoint_and_socket_and_ends_with_the_operators_words() -> None:
    argv = command_of(planned("h200", VLLM_ARGS="--dtype float16 --seed 1")).argv
    assert argv[:7] == (
        *("/usr/local/bin/xerotier-vllm", "serve", "/models/llama-3.1-8b"),
        *("--served-model-name", "chat", "--uds", "/run/xim/engine.sock"),
    )
    assert argv[-4:] == ("--dtype", "float16", "--seed", "1")
    assert argv.count("--dtype") == 1


def test_the_engine_asks_nobody_and_knows_its_ceiling() -> None:
    command = command_of(planned("h200", VLLM_STARTUP_TIMEOUT_SECONDS="700", inherited={"PATH": "/bin"}))
    environment = command.environment
    assert environment["PATH"] == "/bin"
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "700"
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == environment["DO_NOT_TRACK"] == "1"
    assert environment["VLLM_CACHE_ROOT"] == "/var/lib/inference/.cache/xerotier/vllm"
    assert decision(planned("h200", VLLM_STARTUP_TIMEOUT_SECONDS="700"), "startup timeout").source is Source.OPERATOR


def test_a_long_ceiling_is_the_whole_number_that_vllm_reads() -> None:
    environment = command_of(planned("h200", VLLM_STARTUP_TIMEOUT_SECONDS="1234567")).environment
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "1234567"


def test_a_model_type_that_needs_the_checkpoints_own_code_is_told() -> None:
    (warning,) = planned("h200", "mimo-7b-base").warnings
    assert "--trust-remote-code" in warning
    trusted = planned("h200", "mimo-7b-base", VLLM_ARGS="--trust-remote-code")
    assert trusted.warnings == ()
    assert decision(trusted, "model code").source is Source.OPERATOR
    assert "model code" not in {each.option for each in planned("h200").decisions}


def test_weights_without_a_tokenizer_are_told() -> None:
    at_hand = replace(model("llama-3.1-8b"), checkpoint_bytes=16 * 10**9, has_tokenizer=False)
    (warning,) = planned("h200", at_hand).warnings
    assert "has no tokenizer. Copy its files there" in warning
    for args in ("--tokenizer /other", "--skip-tokenizer-init"):
        assert not planned("h200", at_hand, VLLM_ARGS=args).warnings
    assert not planned("h200", replace(at_hand, has_tokenizer=True)).warnings
    assert not planned("h200", replace(at_hand, checkpoint_bytes=None)).warnings  # a model that is not at hand


def test_the_agents_own_environment_wins_over_defaults_and_vllm_env_over_all() -> None:
    plan = planned(
        "h200",
        VLLM_ENV="VLLM_NO_USAGE_STATS=0 OTHER=x VLLM_ENGINE_READY_TIMEOUT_S=5",
        inherited={"HF_HUB_OFFLINE": "0", "DO_NOT_TRACK": "0", "VLLM_CACHE_ROOT": "/mine"},
    )
    environment = command_of(plan).environment
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert environment["DO_NOT_TRACK"] == "1"
    assert environment["VLLM_CACHE_ROOT"] == "/mine"
    assert (environment["VLLM_NO_USAGE_STATS"], environment["OTHER"]) == ("0", "x")
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "5"
    assert decision(plan, "vLLM's cache").source is Source.OPERATOR


def test_a_flag_that_this_vllm_lacks_is_not_passed_and_the_plan_says_so() -> None:
    flags = vllm().flags
    assert flags is not None
    old = replace(vllm(), version="0.1", flags=flags - {"--enable-prompt-tokens-details"})
    plan = planned("h200", engine=old)
    found = decision(plan, "answers")
    assert words(found) == "--disable-uvicorn-access-log"
    assert found.value.endswith("(not passed)")
    assert "this vLLM has no --enable-prompt-tokens-details" in found.reason
    assert plan.warnings == ("answers: this vLLM (0.1) has no --enable-prompt-tokens-details.",)


def test_an_endpoint_that_embeds_gets_the_pooling_runner() -> None:
    plan = planned("h200", "qwen3-embedding-0.6b", wanted=Wanted(served_name="e", task_mode="score"))
    assert words(decision(plan, "runner")) == "--runner pooling"
    own = planned("h200", wanted=Wanted(served_name="e", task_mode="embed"), VLLM_ARGS="--runner pooling")
    assert words(decision(own, "runner")) == ""


def test_tuned_kernels_are_looked_for_beside_the_model_cache_or_where_the_operator_says() -> None:
    option = "MoE kernel configurations"
    found = decision(planned("h200", "qwen3-30b-a3b"), option)
    assert dict(found.environment) == {"VLLM_TUNED_CONFIG_FOLDER": "/var/lib/inference/.cache/xerotier/moe-configs"}
    own = planned("h200", "qwen3-30b-a3b", MOE_CONFIG_PATH="/tuned", inherited={"VLLM_TUNED_CONFIG_FOLDER": "/else"})
    assert dict(decision(own, option).environment) == {"VLLM_TUNED_CONFIG_FOLDER": "/tuned"}
    for plan in (
        planned("h200", "qwen3-30b-a3b", MOE_CONFIG_ENABLED="0"),
        planned("epyc-9454-96gb", "qwen3-30b-a3b"),
        planned("h200", "llama-3.1-8b"),
    ):
        assert decision(plan, option).environment == ()
    assert configs_folder(given(MOE_CONFIG_PATH="/tuned")) == Path("/tuned")


def test_a_socket_path_that_does_not_fit_is_refused() -> None:
    places = replace(PLACES, socket_path=Path("/" + "x" * 107))
    with pytest.raises(SocketPathTooLong, match="VLLM_SOCKET_PATH"):
        plan_engine(replace(given(), places=places))


def test_the_default_socket_is_short_and_one_per_config_directory() -> None:
    first, second = (default_socket_path(Path("/tmp"), 0, Path(name)) for name in ("/a", "/b"))
    assert first != second
    assert first == default_socket_path(Path("/tmp"), 0, Path("/a"))
    assert len(str(first)) < 60


def test_no_secret_is_shown() -> None:
    plan = planned(
        "h200",
        VLLM_ARGS="--api-key s3cret1 s3cret2 --hf-token=s3cret3 --seed 1",
        VLLM_ENV="MY_PASSWORD=s3cret4 HF_HUB_OFFLINE=0",
        KV_CACHE_BACKEND="lmcache",
        LMCACHE_REDIS_URL="redis://user:s3cret5@cache",
        engine=replace(vllm(), packages=frozenset({"lmcache"})),
    )
    for shown in (as_text(plan), json.dumps(as_json(plan))):
        assert "s3cret" not in shown
        assert "--seed" in shown
    assert f"MY_PASSWORD={MASK}" in as_text(plan)
    assert "HF_HUB_OFFLINE=0" in as_text(plan)
    assert shown_words(["--port", "5"]) == ["--port", "5"]


def test_the_json_describes_the_machine_and_holds_the_estimate() -> None:
    plan = planned("rtx-3090")
    shown = as_json(plan)
    assert HardwareFacts.from_json(json.dumps(shown["hardware"])) == machine("rtx-3090")
    assert shown["estimate_bytes"]["weights"] == 2 * (model("llama-3.1-8b").parameters or 0)
    assert shown["engine_version"] == "0.32.0"
    assert {"option", "value", "source", "reason"} <= set(shown["decisions"][0])


def test_the_estimate_never_counts_more_kv_cache_than_there_is_room_for() -> None:
    plan = planned("rtx-3090", MAX_CONCURRENT="64")
    assert plan.estimate is not None
    assert plan.estimate.kv_cache_bytes == plan.budget.kv_bytes


def test_what_is_not_known_is_shown_as_such() -> None:
    bare = replace(model("llama-3.1-8b"), parameters=None, dtype=None, architectures=())
    plan = planned(HardwareFacts(), bare)
    text = as_text(plan)
    assert "size not known" in text
    assert "memory not known" in text
    assert "CPUs not known" in text
    assert "estimate" in text
    assert as_json(plan)["estimate_bytes"] is None


def test_warnings_and_problems_end_the_text() -> None:
    text = as_text(planned("h100-x8", "deepseek-v3", KV_OFFLOAD_SIZE_GB="99999"))
    assert text.index("Warnings") < text.index("The engine cannot be started like this")


def test_the_default_settings_are_no_decisions_of_the_operator() -> None:
    sources = {each.source for each in planned("h200").decisions}
    assert Source.OPERATOR not in sources
    assert settings().non_defaults() == {}
