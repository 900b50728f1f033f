"""The operator's arguments, vLLM's help, and its version."""

import pytest

from xim_agent.planning.engine_facts import EngineFacts, fits_context, flags_in
from xim_agent.planning.operator_words import OperatorWords, number_of

HELP = """usage: vllm serve [model_tag] [options]

options:
  --max-model-len MAX_MODEL_LEN
                        Model context length. -1 or 'auto' takes what fits, see --block-size
                        and so on.
  --tensor-parallel-size TENSOR_PARALLEL_SIZE, -tp TENSOR_PARALLEL_SIZE
                        Number of tensor parallel groups. (default: 1)
  --enforce-eager, --no-enforce-eager
  --dtype {auto,bfloat16,--not-a-flag}
  --port PORT           Port number, as --uds is not given.
"""


def test_the_flags_of_a_help_text_are_found_and_those_in_descriptions_are_not() -> None:
    assert flags_in(HELP) == {
        *("--max-model-len", "--tensor-parallel-size", "-tp", "--enforce-eager", "--no-enforce-eager", "--dtype"),
        "--port",
    }


def test_whether_vllm_measures_the_context_stands_in_its_help() -> None:
    assert fits_context(HELP)
    assert not fits_context(HELP.replace("'auto'", "0"))
    assert not fits_context("  --max-len\n 'auto'")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("--max-model-len 8192", "8192"),
        ("--max_model_len=8k --x 1", "8k"),
        ("--max-model-len 1 --max-model-len 2", "2"),
        ("--other 5", None),
        ("word --max-model-len", ""),
        ("--max-model-len -1", "-1"),
    ],
)
def test_the_last_value_of_a_flag_counts_in_any_spelling(text: str, value: str | None) -> None:
    assert OperatorWords(tuple(text.split())).value("--max-model-len") == value


def test_short_names_denials_and_keys_of_json_are_their_flags() -> None:
    found = OperatorWords(("-tp", "2", "--no-enforce-eager", "--speculative-config.method", "ngram", "stray"))
    assert found.value("--tensor-parallel-size") == "2"
    assert found.has("--enforce-eager")
    assert found.value("--speculative-config") == "ngram stray"
    assert not found.has("--dtype")


@pytest.mark.parametrize(
    ("text", "number"),
    [("8192", 8192), ("8k", 8000), ("8K", 8192), ("25.6k", 25600), ("2M", 2**21), ("auto", None), ("9" * 400, None)],
)
def test_numbers_are_read_as_vllm_reads_them(text: str, number: int | None) -> None:
    assert number_of(text) == number


def test_a_vllm_that_was_not_asked_has_everything() -> None:
    unknown = EngineFacts()
    assert unknown.has("--anything")
    assert unknown.imports("lmcache")
    assert unknown.has_bitsandbytes
    assert not unknown.on_cpu
    assert EngineFacts(version="nightly").release is None
    assert not EngineFacts(version="0.28.0").has_bitsandbytes
    assert EngineFacts(version="0.27.1").has_bitsandbytes
