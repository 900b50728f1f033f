"""Speculative decoding: methods, defaults, families, carve-outs and fallbacks."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.agent.planning.givens import decision, model, planned, vllm, words
from xim_agent.planning.decision import Decision, Source, Wanted
from xim_agent.planning.speculation import DEFAULT_TOKENS, FLAG, NEEDS_DRAFT
from xim_agent.settings_types import SpeculativeMethod as Method

ON = {"SPECULATIVE_ENABLED": "1"}
FALLBACK = {**ON, "SPECULATIVE_NGRAM_FALLBACK": "1"}
ALL = replace(vllm(), packages=None)


def chosen(model_name: str, machine: str = "h200", **values: Any) -> Decision:
    return decision(planned(machine, model_name, **values), "speculative decoding")


def config_of(found: Decision) -> dict[str, Any]:
    ((flag, text),) = found.arguments
    assert flag == FLAG
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def test_it_is_off_unless_it_is_switched_on() -> None:
    found = chosen("deepseek-v3", SPECULATIVE_METHOD="ngram")
    assert (found.value, found.source, words(found)) == ("off", Source.DEFAULT, "")


@pytest.mark.parametrize(
    ("method", "tokens"),
    [
        ("deepseek_mtp", 1),
        ("mtp", 1),
        ("mimo_mtp", 1),
        ("qwen3_next_mtp", 2),
        ("eagle", 3),
        ("medusa", 3),
        ("mlp_speculator", 3),
        ("ngram", 5),
        ("draft_model", 5),
        ("suffix", 16),
    ],
)
def test_every_method_has_its_own_default_of_tokens(method: str, tokens: int) -> None:
    found = chosen("deepseek-v3", engine=ALL, SPECULATIVE_METHOD=method, SPECULATIVE_DRAFT_MODEL_PATH="/drafts/d", **ON)
    config = config_of(found)
    assert (config["method"], config["num_speculative_tokens"]) == (method, tokens)
    assert ("model" in config) == (Method(method) in NEEDS_DRAFT)
    assert config.get("prompt_lookup_max") == (4 if method == "ngram" else None)
    assert found.source is Source.OPERATOR


def test_there_are_ten_methods_with_defaults() -> None:
    assert set(DEFAULT_TOKENS) == set(Method)
    assert len(Method) == 10


def test_the_operators_number_of_tokens_wins() -> None:
    assert config_of(chosen("deepseek-v3", SPECULATIVE_TOKENS="3", **ON))["num_speculative_tokens"] == 3


@pytest.mark.parametrize(
    ("model_name", "method"),
    [("deepseek-v3", "deepseek_mtp"), ("glm-4.5-air", "mtp"), ("glm-4.7", "mtp"), ("mimo-7b-base", "mimo_mtp")],
)
def test_families_with_mtp_layers_are_detected(model_name: str, method: str) -> None:
    found = chosen(model_name, **ON)
    assert config_of(found)["method"] == method
    assert found.source is Source.MODEL


@pytest.mark.parametrize("model_name", ["qwen3-8b", "qwen3-30b-a3b", "qwen3-next-80b-a3b", "qwen3.5-35b-a3b"])
def test_the_qwen3_family_gets_no_mtp_by_itself(model_name: str) -> None:
    assert chosen(model_name, **ON).value == "off"
    assert config_of(chosen(model_name, **FALLBACK))["method"] == "ngram"


def test_a_qwen3_without_mtp_layers_is_not_told_to_name_the_method() -> None:
    assert "SPECULATIVE_METHOD names it" in chosen("qwen3.5-35b-a3b", **ON).reason
    assert "no method of its own is known for Qwen3ForCausalLM" in chosen("qwen3-8b", **ON).reason


def test_qwen3_next_gets_mtp_when_switch_and_method_are_set() -> None:
    found = chosen("qwen3-next-80b-a3b", SPECULATIVE_METHOD="qwen3_next_mtp", **ON)
    assert config_of(found) == {"method": "qwen3_next_mtp", "num_speculative_tokens": 2}


def test_guessed_tokens_are_reckoned_with_where_they_cost_states() -> None:
    plain = planned("h200", "qwen3.5-27b")
    guessing = planned("h200", "qwen3.5-27b", SPECULATIVE_METHOD="ngram", SPECULATIVE_TOKENS="4", **ON)
    assert (plain.budget.guessed_tokens, guessing.budget.guessed_tokens) == (0, 4)
    assert "sequences of 2048" in decision(guessing, "max concurrent").reason
    assert guessing.budget.sequences(guessing.given, 2048) < plain.budget.sequences(plain.given, 2048)
    by_words = planned("h200", "qwen3.5-27b", VLLM_ARGS="--spec-method ngram", **ON)
    assert by_words.budget.guessed_tokens == 0


def test_a_family_without_its_mtp_layers_and_a_cpu_fall_back() -> None:
    bare = replace(model("deepseek-v3"), mtp_layers=0)
    assert "no MTP layers" in decision(planned("h200", bare, **ON), "speculative decoding").reason
    assert "CPU is not meant" in chosen("mimo-7b-base", machine="epyc-9454-96gb", **ON).reason


def test_other_models_get_ngrams_where_the_operator_wants_them() -> None:
    assert chosen("llama-3.1-8b", **ON).value == "off"
    assert chosen("llama-3.1-8b", **FALLBACK).value == "ngram, 5 tokens"


@pytest.mark.parametrize("method", sorted(NEEDS_DRAFT))
def test_a_method_without_its_draft_model_falls_back_or_is_told(method: Method) -> None:
    found = chosen("llama-3.1-8b", SPECULATIVE_METHOD=method.value, **ON)
    assert found.value == "off"
    assert "SPECULATIVE_DRAFT_MODEL_PATH is not set" in found.warning
    fallen = chosen("llama-3.1-8b", SPECULATIVE_METHOD=method.value, **FALLBACK)
    assert config_of(fallen)["method"] == "ngram"
    assert fallen.warning == ""


def test_mtp_for_a_model_without_it_and_suffix_without_its_package_cannot_be_used() -> None:
    assert "no MTP layers" in chosen("llama-3.1-8b", SPECULATIVE_METHOD="mtp", **ON).warning
    assert "no arctic-inference" in chosen("llama-3.1-8b", SPECULATIVE_METHOD="suffix", **ON).warning


def test_a_model_that_embeds_speculates_nothing() -> None:
    wanted = Wanted(served_name="e", task_mode="embed")
    assert chosen("qwen3-8b", wanted=wanted, **FALLBACK).reason == "nothing is generated"


@pytest.mark.parametrize("word", ['--speculative-config {"method":"ngram"}', "--spec-method ngram", "-sc.method=ngram"])
def test_what_vllm_args_name_is_left_to_them(word: str) -> None:
    found = chosen("deepseek-v3", VLLM_ARGS=word, **ON)
    assert (found.value, words(found)) == ("by VLLM_ARGS", "")
