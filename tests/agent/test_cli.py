"""The command line as an operator meets it: a program of its own, its output and its exit status."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent.link.enrollments import refusal, router
from xim_agent.settings_reference import rows


async def agent(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the agent's command line in a clean environment."""
    environment = {"PATH": os.environ["PATH"], **variables}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "xim_agent", *arguments),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert b"Traceback" not in err
    return subprocess.CompletedProcess(arguments, process.returncode or 0, out.decode(), err.decode())


@pytest.mark.parametrize("command", [(), ("run",), ("enroll",)])
async def test_help_lists_every_variable_and_the_ceilings(command: tuple[str, ...]) -> None:
    done = await agent(*command, "--help", XEROTIER_AGENT_VLLM_STARTUP_TIMEOUT_SECONDS="777")
    assert done.returncode == 0
    assert "fails after 777 s" in done.stdout
    assert [row.variable for row in rows() if row.variable not in done.stdout] == []


async def test_run_has_the_flags_of_the_table() -> None:
    done = await agent("run", "--help")
    flags = (
        "--log-level --max-concurrent --vllm-path --vllm-salt-secret --vllm-socket-path --metrics-port "
        "--disable-metrics-server --vllm-arg --vllm-env --gpu-memory-utilization --max-num-seqs --max-model-len "
        "--quantization --kv-cache-backend --model-cache-max-size-gb --kv-offload-size-gb"
    )
    assert [flag for flag in flags.split() if flag not in done.stdout] == []


async def test_wrong_settings_are_all_told_and_end_with_2() -> None:
    done = await agent("run", "--metrics-port", "70000", XEROTIER_AGENT_MAX_NUM_SEQS="many")
    assert done.returncode == 2
    assert "METRICS_PORT='70000'" in done.stderr
    assert "MAX_NUM_SEQS='many'" in done.stderr


async def test_an_empty_flag_counts_as_unset() -> None:
    done = await agent("settings", "--max-concurrent", "", "--metrics-port", "", XEROTIER_AGENT_METRICS_PORT="9999")
    assert done.returncode == 0, done.stderr
    assert "XEROTIER_AGENT_MAX_CONCURRENT=automatic" in done.stdout
    assert "XEROTIER_AGENT_METRICS_PORT=9999  [environment]" in done.stdout


SIXTEEN = {
    "ALLOW_INSECURE": ("yes", "takes 1, 0, true or false"),
    "MAX_CONCURRENT": ("0", "must be at least 1"),
    "LOG_LEVEL": ("loud", "must be one of"),
    "MAX_MODEL_LEN": ("-1", "must be at least 1"),
    "TENSOR_PARALLEL_SIZE": ("two", "must be a whole number"),
    "GPU_MEMORY_UTILIZATION": ("90", "must be at most 1"),
    "CUDA_VISIBLE_DEVICES": ("0,,1", "commas between them"),
    "SPECULATIVE_METHOD": ("magic", "must be one of"),
    "SPECULATIVE_TOKENS": ("2.5", "must be a whole number"),
    "FLOW_CONTROL_WINDOW_BYTES": ("64k", "must be a whole number"),
    "FLOW_CONTROL_REPLENISH_THRESHOLD": ("0", "must be above 0"),
    "LEASE_DURATION_MS": ("1", "must be at least 200"),
    "METRICS_PORT": ("70000", "must be at most 65535"),
    "KV_OFFLOAD_SIZE_GB": ("-5", "must be at least 0"),
    "KV_CACHE_BACKEND": ("redis", "must be one of"),
    "HEALTH_CHECK_INTERVAL": ("nan", "must be"),
}


async def test_sixteen_wrong_settings_are_one_message_with_variable_value_rule_and_remedy() -> None:
    wrong = {f"XEROTIER_AGENT_{name}": value for name, (value, _) in SIXTEEN.items()}
    done = await agent("run", **wrong)
    assert done.returncode == 2
    assert done.stderr.count("settings cannot be used") == 1
    lines = [line for line in done.stderr.splitlines() if "XEROTIER_AGENT_" in line and "=" in line]
    assert len(lines) == len(SIXTEEN) == 16
    for name, (value, rule) in SIXTEEN.items():
        (line,) = (each for each in lines if f"XEROTIER_AGENT_{name}={value!r}: " in each)
        assert rule in line
        assert "eave it empty" in line


async def test_a_model_path_that_is_none_is_told(tmp_path: Path) -> None:
    no_model = {"XEROTIER_AGENT_INITIAL_MODEL_PATH": str(tmp_path / "m"), "XEROTIER_AGENT_VLLM_PATH": "/bin/true"}
    done = await agent("run", **no_model, HOME=str(tmp_path))
    assert done.returncode == 1
    assert "XEROTIER_AGENT_INITIAL_MODEL_PATH" in done.stderr


async def test_enrolling_stores_credentials_and_again_says_so(tmp_path: Path) -> None:
    async with router() as fake:
        key, home = fake.key().encode(), str(tmp_path)
        first = await agent("enroll", "--join-key", key, "--insecure", XEROTIER_AGENT_HOME=home)
        second = await agent("enroll", "--join-key", key, "--insecure", XEROTIER_AGENT_HOME=home)
        third = await agent("enroll", "--join-key", key, "--insecure", "--again", XEROTIER_AGENT_HOME=home)
    assert [done.returncode for done in (first, second, third)] == [0, 0, 0]
    assert "enrollment successful" in first.stdout
    assert "is enrolled as agent agent-1" in second.stdout
    assert "agent revoke" not in first.stdout + second.stdout
    assert "xerotier-router agent revoke agent-1" in third.stdout
    assert fake.paths() == ["/v1/enroll", "/v1/enroll"]
    assert fake.key().secret not in first.stdout + first.stderr


async def test_a_refused_key_ends_with_1_its_code_and_its_remedy(tmp_path: Path) -> None:
    async with router() as fake:
        fake.answers = [refusal(401, "join_key_expired")]
        done = await agent(
            "enroll", "--insecure", XEROTIER_AGENT_JOIN_KEY=fake.key().encode(), XEROTIER_AGENT_HOME=str(tmp_path)
        )
    assert done.returncode == 1
    assert "[join_key_expired]" in done.stderr
    assert "join-key create" in done.stderr


@pytest.mark.parametrize(("key", "code"), [("xjk_p_abc", "join_key_truncated"), ("nonsense", "join_key_malformed")])
async def test_a_damaged_key_is_told_before_anything_is_sent(tmp_path: Path, key: str, code: str) -> None:
    done = await agent("enroll", "--join-key", key, XEROTIER_AGENT_HOME=str(tmp_path))
    assert done.returncode == 1
    assert code in done.stderr


async def test_without_a_key_the_remedy_is_one(tmp_path: Path) -> None:
    done = await agent("enroll", XEROTIER_AGENT_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "XEROTIER_AGENT_JOIN_KEY" in done.stderr


async def test_an_unusable_config_directory_is_told_with_its_remedy(tmp_path: Path) -> None:
    file = tmp_path / "file"
    await asyncio.to_thread(file.write_text, "")
    done = await agent("enroll", XEROTIER_AGENT_CONFIG_DIR=str(file / "config"))
    assert done.returncode == 1
    assert "Set XEROTIER_AGENT_CONFIG_DIR to a directory" in done.stderr
    assert "chown" not in done.stderr


async def test_settings_shows_every_value_with_its_origin_and_no_secret() -> None:
    given = {
        "XEROTIER_AGENT_JOIN_KEY": "xjk_hidden",
        "XEROTIER_AGENT_MAX_CONCURRENT": "3",
        "XEROTIER_AGENT_METRICS_PORT": "1000",
        "XEROTIER_AGENT_VLLM_ENV": "HF_TOKEN=hidden",
        "XEROTIER_AGENT_AUTO_CONFIG": "off",
    }
    done = await agent("settings", "--metrics-port", "2000", **given)
    assert done.returncode == 0
    assert [row.variable for row in rows() if f"  {row.variable}=" not in done.stdout] == []
    assert "XEROTIER_AGENT_MAX_CONCURRENT=3  [environment]" in done.stdout
    assert "XEROTIER_AGENT_METRICS_PORT=2000  [flag]" in done.stdout
    assert "XEROTIER_AGENT_MAX_NUM_SEQS=64  [default]" in done.stdout
    assert "XEROTIER_AGENT_AUTO_CONFIG=1  [default]" in done.stdout  # a strict switch took no notice of the word
    assert "XEROTIER_AGENT_VLLM_ENV=HF_TOKEN=**********  [environment]" in done.stdout
    assert "hidden" not in done.stdout + done.stderr


async def test_settings_shows_what_a_default_in_words_is_here(tmp_path: Path) -> None:
    done = await agent("settings", XEROTIER_AGENT_HOME=str(tmp_path))
    for expected in (
        f"XEROTIER_AGENT_NAME={socket.gethostname()}  [default]",
        f"XEROTIER_AGENT_CONFIG_DIR={tmp_path}/.config/xerotier  [default]",
        f"XEROTIER_AGENT_MODEL_CACHE_PATH={tmp_path}/.cache/xerotier/models  [default]",
    ):
        assert expected in done.stdout


@pytest.mark.parametrize("option", ["--model", "--initial-model-path"])
async def test_an_option_that_is_only_a_variable_is_answered_with_it(option: str) -> None:
    done = await agent("run", option, "/models/x")
    assert done.returncode == 2
    assert f"No such option: {option}" in done.stderr
    assert "XEROTIER_AGENT_INITIAL_MODEL_PATH" in done.stderr


async def test_another_unknown_option_is_answered_with_the_nearest() -> None:
    done = await agent("run", "--max-model-lenn", "5")
    assert done.returncode == 2
    assert "--max-model-len" in done.stderr


@pytest.mark.parametrize("words", [(), ("run",)])
async def test_h_is_help(words: tuple[str, ...]) -> None:
    done = await agent(*words, "-h")
    assert (done.returncode, done.stdout.startswith("Usage:")) == (0, True)


async def test_warnings_come_with_the_errors_and_not_after_them() -> None:
    wrong = {"METRICS_PORT": "0", "METRICS_PORTT": "1", "AUTO_CONFIG": "off"}
    done = await agent("run", VLLM_MODEL="x", **{f"XEROTIER_AGENT_{name}": value for name, value in wrong.items()})
    assert done.returncode == 2
    for expected in ("METRICS_PORT='0'", "METRICS_PORTT is not a setting", "AUTO_CONFIG='off'", "VLLM_MODEL is gone"):
        assert done.stderr.count(expected) == 1
