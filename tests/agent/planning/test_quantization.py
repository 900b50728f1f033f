"""Which quantization is chosen: the operator's, the checkpoint's, the endpoint's, else what fits."""

from dataclasses import replace
from typing import Any

import pytest

from tests.agent.planning.givens import decision, machine, model, planned, vllm, words
from xim_agent.facts.hardware import HardwareFacts
from xim_agent.planning.decision import Decision, Source, Wanted
from xim_agent.planning.engine_facts import BITSANDBYTES_PLUGIN, EngineFacts

OPTION = "quantization"


def chosen(*names: str, endpoint: str | None = None, engine: EngineFacts | None = None, **values: Any) -> Decision:
    wanted = Wanted(served_name="m", quantization=endpoint)
    return decision(planned(*names, wanted=wanted, engine=engine, **values), OPTION)


def test_the_operator_wins_over_the_checkpoint_and_the_endpoint() -> None:
    found = chosen("rtx-3090", "mammoth-7b-awq", endpoint="fp8", VLLM_QUANTIZATION="awq_marlin")
    assert (found.value, found.source, words(found)) == ("awq_marlin", Source.OPERATOR, "--quantization awq_marlin")
    assert found.warning == ""


def test_the_checkpoint_wins_over_the_endpoint_and_says_so() -> None:
    found = chosen("rtx-3090", "asclepius-13b-gptq", endpoint="fp8")
    assert (found.value, found.source, words(found)) == ("gptq", Source.MODEL, "--quantization gptq")
    assert "'fp8' is not used" in found.warning
    assert chosen("rtx-3090", "mammoth-7b-awq", endpoint="awq").warning == ""


def test_a_checkpoint_that_this_vllm_refuses_is_a_problem_and_no_start() -> None:
    refused = planned("rtx-3090", "asclepius-13b-gptq")
    (problem,) = refused.problems
    assert "grouped by activation (desc_act in config.json" in problem
    assert planned("rtx-3090", "asclepius-13b-gptq", VLLM_QUANTIZATION="gptq_marlin").problems == (problem,)
    gptq = model("asclepius-13b-gptq")
    assert gptq.quantization is not None
    in_order = replace(gptq, quantization=replace(gptq.quantization, grouped_by_activation=False))
    assert planned("rtx-3090", in_order).problems == ()
    for version in ("0.31.0", None):
        earlier = replace(vllm(), version=version)
        assert planned("rtx-3090", "asclepius-13b-gptq", engine=earlier).problems == ()


def test_a_checkpoint_in_another_format_gets_no_flag() -> None:
    found = chosen("h200", "qwen3-30b-a3b-fp8")
    assert (found.value, words(found)) == ("fp8", "")


def test_the_endpoint_wins_over_the_automatic_choice() -> None:
    found = chosen("rtx-3090", "llama-3.2-1b-instruct", endpoint="fp8")
    assert (found.value, found.source, words(found)) == ("fp8", Source.ENDPOINT, "--quantization fp8")


def test_none_from_the_operator_switches_the_automatic_choice_off() -> None:
    found = chosen("l40s", "gemma-3-27b-it", VLLM_QUANTIZATION="none")
    assert (found.value, found.source, words(found)) == ("none", Source.OPERATOR, "")


def test_a_method_in_vllm_args_counts_and_is_not_passed_twice() -> None:
    found = chosen("h200", "llama-3.1-8b", VLLM_ARGS="-q mxfp8")
    assert (found.value, found.source, words(found)) == ("mxfp8", Source.OPERATOR, "")


def test_a_method_that_is_not_the_checkpoints_is_warned_of() -> None:
    assert "refuses to load it as fp8" in chosen("rtx-3090", "mammoth-7b-awq", VLLM_QUANTIZATION="fp8").warning


def test_what_fits_stays_as_it_is() -> None:
    assert chosen("rtx-3090", "llama-3.1-8b").reason == "it fits as it is"


@pytest.mark.parametrize(
    ("name", "model_name", "version", "method", "reason"),
    [
        ("l40s", "gemma-3-27b-it", "0.32.0", "fp8_per_tensor", "computes in fp8"),
        ("l40s", "gemma-3-27b-it", "0.27.1", "fp8", "computes in fp8"),
        ("a100-mig-3g.40gb", "gemma-3-27b-it", "0.32.0", "fp8_per_tensor", "keeps weights in fp8"),
    ],
)
def test_what_does_not_fit_is_quantised_as_little_as_possible(
    name: str, model_name: str, version: str, method: str, reason: str
) -> None:
    found = chosen(name, model_name, engine=replace(vllm(), version=version))
    assert (found.value, found.source) == (method, Source.AUTOMATIC)
    assert reason in found.reason
    assert words(found) == f"--quantization {method}"


def test_amd_gets_fp8_where_it_computes_in_it() -> None:
    small = machine("mi300x-x8")
    one = replace(small, gpus=tuple(replace(gpu, memory_bytes=48 * 1024**3) for gpu in small.gpus[:1]))
    assert chosen_on(one, "gemma-3-27b-it").value == "fp8_per_tensor"
    for target, method in (("gfx90a", "none"), ("gfx1100", "none"), ("gfx1201", "fp8_per_tensor")):
        other = replace(one, gpus=tuple(replace(gpu, architecture=target) for gpu in one.gpus))
        assert chosen_on(other, "gemma-3-27b-it").value == method


def chosen_on(hardware: HardwareFacts, model_name: str) -> Decision:
    return decision(planned(hardware, model_name), OPTION)


def test_bitsandbytes_is_the_last_resort_where_vllm_has_it() -> None:
    big = machine("rtx-3090")
    small = replace(big, gpus=tuple(replace(gpu, memory_bytes=12 * 1024**3) for gpu in big.gpus))
    with_plugin = replace(vllm(), packages=frozenset({BITSANDBYTES_PLUGIN}))
    older = replace(vllm(), version="0.27.1", packages=frozenset({"bitsandbytes"}))
    for engine, method in ((with_plugin, "bitsandbytes"), (older, "bitsandbytes"), (vllm(), "none")):
        assert decision(planned(small, "llama-3.1-8b", engine=engine), OPTION).value == method


def test_a_gpu_from_before_fp8_kernels_has_nothing_but_bitsandbytes() -> None:
    old = machine("rtx-3090")
    volta = replace(old, gpus=tuple(replace(gpu, compute_capability=(7, 0)) for gpu in old.gpus))
    assert "makes it fit" in chosen_on(volta, "gemma-3-27b-it").reason
    unknown = replace(old, gpus=tuple(replace(gpu, compute_capability=None) for gpu in old.gpus))
    assert chosen_on(unknown, "gemma-3-27b-it").value == "none"


def test_bitsandbytes_that_vllm_lacks_is_a_problem_with_its_remedy() -> None:
    assert "vllm-bnb-plugin" in chosen("h200", "llama-3.1-8b", VLLM_QUANTIZATION="bitsandbytes").problem
    older = replace(vllm(), version="0.27.1")
    problem = chosen("h200", "llama-3.1-8b", VLLM_QUANTIZATION="bitsandbytes", engine=older).problem
    assert problem == "vLLM's environment has no bitsandbytes. Install it there, or use another quantization."


def test_fp4_of_bitsandbytes_is_its_nf4_and_says_so() -> None:
    engine = EngineFacts()
    found = chosen("h200", "llama-3.1-8b", VLLM_QUANTIZATION="bitsandbytes-fp4", engine=engine)
    assert words(found) == "--quantization bitsandbytes"
    assert "nf4" in found.reason
    assert found.problem == ""


def test_a_cpu_quantises_nothing_by_itself() -> None:
    assert chosen("two-core-24gb", "gemma-3-27b-it").value == "none"


def test_without_automatic_choices_nothing_is_chosen() -> None:
    found = chosen("l40s", "gemma-3-27b-it", AUTO_CONFIG="0")
    assert (found.value, found.source) == ("none", Source.DEFAULT)


def test_an_unknown_size_is_no_reason_to_quantise() -> None:
    unknown = replace(model("llama-3.1-8b"), parameters=None)
    assert "cannot be told" in decision(planned("rtx-3090", unknown), OPTION).reason
