"""Prefix caching, KV offload to memory, and LMCache."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.agent.planning.givens import decision, machine, planned, vllm, words
from xim_agent.planning.decision import Decision, Source
from xim_agent.planning.engine_facts import EngineFacts
from xim_agent.planning.kv_cache import BACKEND_FLAG, SIZE_FLAG, TRANSFER_FLAG

GIB = 1024**3
WITH_LMCACHE = replace(vllm(), packages=frozenset({"lmcache"}))
LMCACHE: dict[str, Any] = {"KV_CACHE_BACKEND": "lmcache", "engine": WITH_LMCACHE}


def chosen(*names: str, **values: Any) -> Decision:
    return decision(planned(*names, **values), "KV offload")


@pytest.mark.parametrize("names", [("h200", "llama-3.1-8b"), ("two-core-24gb", "llama-3.2-1b-instruct")])
def test_prefix_caching_is_always_on(names: tuple[str, str]) -> None:
    found = decision(planned(*names, AUTO_CONFIG="0", KV_CACHE_BACKEND="none"), "prefix caching")
    assert words(found) == "--enable-prefix-caching"


def test_prefix_caching_is_not_asked_of_an_encoder_which_vllm_would_not_start() -> None:
    found = decision(planned("rtx-3090", "bge-base-en-v1.5"), "prefix caching")
    assert (found.value, found.source, words(found)) == ("none", Source.MODEL, "")
    embedding = decision(planned("l40s", "qwen3-embedding-0.6b"), "prefix caching")
    assert words(embedding) == "--enable-prefix-caching"


def test_a_quarter_of_the_memory_is_the_default() -> None:
    found = chosen("rtx-3090")
    assert (words(found), found.source) == (f"{BACKEND_FLAG} native {SIZE_FLAG} 16", Source.DEFAULT)
    kept = chosen("rtx-3090", AUTO_CONFIG="0")
    assert words(kept) == words(found)


def test_the_control_group_limits_the_memory_that_is_counted() -> None:
    limited = replace(machine("rtx-3090"), ram_limit_bytes=10 * GIB)
    assert words(decision(planned(limited), "KV offload")).endswith(f"{SIZE_FLAG} 2")
    tiny = replace(machine("rtx-3090"), ram_limit_bytes=3 * GIB)
    assert "less than 1 GiB" in decision(planned(tiny), "KV offload").reason
    unknown = replace(machine("rtx-3090"), ram_bytes=None)
    assert "not known" in decision(planned(unknown), "KV offload").reason


def test_zero_and_none_switch_it_off() -> None:
    for values in ({"KV_OFFLOAD_SIZE_GB": "0"}, {"KV_CACHE_BACKEND": "none"}):
        found = chosen("h200", **values)
        assert (found.value, found.source, words(found)) == ("off", Source.OPERATOR, "")


def test_a_size_of_the_operator_is_taken_and_too_much_is_warned_of() -> None:
    found = chosen("h200", KV_OFFLOAD_SIZE_GB="12.5")
    assert words(found) == f"{BACKEND_FLAG} native {SIZE_FLAG} 12.5"
    assert found.warning == ""
    assert "more than the memory of 64 GiB" in chosen("rtx-3090", KV_OFFLOAD_SIZE_GB="100").warning
    unknown = replace(machine("rtx-3090"), ram_bytes=None)
    assert decision(planned(unknown, KV_OFFLOAD_SIZE_GB="100"), "KV offload").warning == ""


def test_a_quarter_that_shared_memory_cannot_hold_is_cut() -> None:
    container = replace(machine("h200"), shm_free_bytes=90 * GIB)
    found = decision(planned(container), "KV offload")
    assert words(found) == f"{BACKEND_FLAG} native {SIZE_FLAG} 89"
    assert found.source is Source.HARDWARE
    assert "/dev/shm" in found.reason
    assert found.warning == ""
    roomy = replace(machine("h200"), shm_free_bytes=256 * GIB)
    assert words(decision(planned(roomy), "KV offload")) == f"{BACKEND_FLAG} native {SIZE_FLAG} 128"


def test_without_shared_memory_there_is_no_offload_and_the_operator_is_told() -> None:
    container = replace(machine("h200"), shm_free_bytes=64 * 1024**2)
    found = decision(planned(container), "KV offload")
    assert (found.value, words(found)) == ("off", "")
    assert "/dev/shm has 0.1 GiB free" in found.warning
    assert "SHM_SIZE" in found.warning
    chosen_off = decision(planned(container, KV_OFFLOAD_SIZE_GB="0"), "KV offload")
    assert chosen_off.warning == ""


def test_a_size_of_the_operator_beyond_shared_memory_is_warned_of_and_kept() -> None:
    container = replace(machine("h200"), shm_free_bytes=8 * GIB)
    found = decision(planned(container, KV_OFFLOAD_SIZE_GB="12.5"), "KV offload")
    assert words(found) == f"{BACKEND_FLAG} native {SIZE_FLAG} 12.5"
    assert "vLLM will refuse it" in found.warning
    assert decision(planned(container, KV_OFFLOAD_SIZE_GB="7"), "KV offload").warning == ""


def test_rocm_offloads_to_memory_of_its_own() -> None:
    container = replace(machine("mi300x-x8"), shm_free_bytes=0)
    assert words(decision(planned(container, engine=vllm("+rocm700")), "KV offload")).endswith(f"{SIZE_FLAG} 384")


def test_a_vllm_without_the_flags_gets_none() -> None:
    flags = vllm().flags
    assert flags is not None
    without = replace(vllm(), flags=flags - {SIZE_FLAG, BACKEND_FLAG})
    assert "has no --kv-offloading-size" in chosen("h200", engine=without).reason
    older = replace(vllm(), flags=flags - {BACKEND_FLAG})
    assert words(chosen("h200", engine=older)) == f"{SIZE_FLAG} 128"


def test_a_cpu_offloads_nothing() -> None:
    found = chosen("epyc-9454-96gb", "llama-3.2-1b-instruct")
    assert (words(found), found.warning) == ("", "")
    for values in ({"KV_OFFLOAD_SIZE_GB": "8"}, {"KV_CACHE_BACKEND": "lmcache"}):
        assert "no effect on a CPU" in chosen("epyc-9454-96gb", "llama-3.2-1b-instruct", **values).warning


@pytest.mark.parametrize("word", [f"{SIZE_FLAG} 4", TRANSFER_FLAG + " {}"])
def test_what_vllm_args_name_is_left_to_them(word: str) -> None:
    assert words(chosen("h200", VLLM_ARGS=word)) == ""


def test_a_model_that_embeds_keeps_nothing() -> None:
    assert words(chosen("h200", "bge-base-en-v1.5")) == ""


def test_lmcache_has_a_file_with_memory_and_disk() -> None:
    plan = planned("h200", **LMCACHE)
    found = decision(plan, "KV offload")
    assert words(found) == f'{TRANSFER_FLAG} {{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}}'
    (file,) = plan.files
    assert dict(found.environment) == {"LMCACHE_CONFIG_FILE": str(file.path), "PYTHONHASHSEED": "0"}
    assert "takes no notice of cache_salt" in found.warning
    assert str(file.path) == "/var/lib/inference/.config/xerotier/lmcache_config.yaml"
    assert file.content == (
        "chunk_size: 256\n"
        "local_cpu: true\n"
        "max_local_cpu_size: 51.2\n"
        'local_disk: "file:///var/lib/inference/.cache/lmcache/"\n'
        "max_local_disk_size: 400.0\n"
    )
    assert file.shown == file.content


def test_every_worker_gets_its_part_of_lmcaches_tiers() -> None:
    content = planned("h100-x8", "llama-3.1-70b", LMCACHE_DISK_SIZE_GB="400", **LMCACHE).files[0].content
    assert "max_local_cpu_size: 25.6\n" in content  # a tenth of 2 TiB, divided by 8
    assert "max_local_disk_size: 50.0\n" in content
    little = replace(machine("h100-x8"), ram_limit_bytes=GIB)
    assert "max_local_cpu_size: 0.1\n" in planned(little, "llama-3.1-70b", **LMCACHE).files[0].content


@pytest.mark.parametrize(
    ("url", "shown"),
    [("redis://[::1", "redis://**********"), ("cache:s3cret", "**********"), ("u:s3cret@h", "**********")],
)
def test_a_wrong_redis_url_is_lmcaches_to_refuse_and_still_shown_without_its_password(url: str, shown: str) -> None:
    (file,) = planned("h200", LMCACHE_REDIS_URL=url, **LMCACHE).files
    assert f"remote_url: {json.dumps(url)}" in file.content
    assert f"remote_url: {json.dumps(shown)}" in file.shown


def test_lmcache_takes_the_operators_tiers_and_hides_the_password() -> None:
    plan = planned("h200", LMCACHE_REDIS_URL="redis://:s3cret@cache:6379", LMCACHE_DISK_SIZE_GB="7", **LMCACHE)
    (file,) = plan.files
    assert 'remote_url: "redis://:s3cret@cache:6379"\nremote_serde: "naive"\n' in file.content
    assert "max_local_disk_size: 7.0" in file.content
    assert "s3cret" not in file.shown
    assert "s3cret" not in repr(plan)
    assert decision(plan, "KV offload").value == "LMCache: memory, disk, Redis"


def test_the_old_switch_means_lmcache_unless_the_new_setting_is_used() -> None:
    assert chosen("h200", LMCACHE_ENABLED="true", engine=WITH_LMCACHE).reason.endswith("LMCACHE_ENABLED")
    native = chosen("h200", LMCACHE_ENABLED="true", KV_CACHE_BACKEND="native", engine=WITH_LMCACHE)
    assert native.value.startswith("native")


def test_no_disk_tier_where_none_is_wanted_or_the_partition_is_not_known() -> None:
    assert "local_disk" not in planned("h200", LMCACHE_DISK_SIZE_GB="0", **LMCACHE).files[0].content
    unknown = replace(machine("h200"), disk_total_bytes=None)
    assert "local_disk" not in planned(unknown, **LMCACHE).files[0].content


def test_lmcache_that_cannot_be_had_is_told_and_the_engine_runs_without() -> None:
    flags = vllm().flags
    assert flags is not None
    no_ram = replace(machine("h200"), ram_bytes=None)
    cases = [
        (planned("h200", KV_CACHE_BACKEND="lmcache"), "vLLM's environment has no lmcache"),
        (
            planned("h200", KV_CACHE_BACKEND="lmcache", engine=EngineFacts(flags=flags - {TRANSFER_FLAG})),
            "this vLLM has no",
        ),
        (planned("h200", "qwen3.5-27b", **LMCACHE), "linear attention"),
        (planned(no_ram, **LMCACHE), "memory is not known"),
    ]
    for plan, reason in cases:
        found = decision(plan, "KV offload")
        assert reason in found.warning
        assert (words(found), plan.files) == ("", ())
    with_redis = planned(no_ram, LMCACHE_REDIS_URL="redis://cache", **LMCACHE)
    # LMCache copies through memory to the other tiers and fails where it may have none; its own default is 5 GiB.
    assert "local_cpu: false" in with_redis.files[0].content
    assert "max_local_cpu_size" not in with_redis.files[0].content
    assert json.loads(decision(with_redis, "KV offload").arguments[0][1])["kv_role"] == "kv_both"
