"""Memory and cores of an engine on the CPU."""

from dataclasses import replace

import pytest

from tests.agent.planning.givens import decision, machine, model, planned
from xim_agent.facts.hardware import CpuFacts, HardwareFacts, NumaNode
from xim_agent.planning.cpu import as_ranges
from xim_agent.planning.plan import EnginePlan
from xim_agent.planning.render import planned_environment

GIB = 1024**3
MODEL = "llama-3.2-1b-instruct"


def tuned(hardware: HardwareFacts, model_name: str = MODEL, **values: object) -> dict[str, str]:
    environment = planned_environment(planned(hardware, model_name, **values))
    return {name: value for name, value in environment.items() if name.startswith(("VLLM_CPU_", "OMP_"))}


def test_every_variable_has_its_automatic_value() -> None:
    assert tuned(machine("two-core-24gb")) == {
        "VLLM_CPU_KVCACHE_SPACE": "15",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def test_the_reasons_say_whom_the_threads_and_the_reserved_cpu_concern() -> None:
    plan = planned("epyc-9454-96gb", MODEL)
    assert (
        decision(plan, "OpenMP threads").reason == "physical cores; vLLM gives a bound worker one for each of its CPUs"
    )
    assert decision(plan, "reserved CPUs").reason == "for the server, where VLLM_CPU_OMP_THREADS_BIND is set to auto"


def test_the_kv_cache_gets_what_the_model_and_the_system_leave() -> None:
    # 96 GiB - 15.3 GiB of weights in bfloat16 - 9.6 GiB for the system
    environment = tuned(machine("epyc-9454-96gb"), "qwen3-8b", MAX_CONCURRENT="64")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "71"


def test_the_kv_cache_is_no_larger_than_the_requests_can_use() -> None:
    environment = tuned(machine("epyc-9454-96gb"), MAX_MODEL_LEN="2048")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"  # 2 times 5 requests of 64 MiB


def test_a_control_group_limits_memory_and_cores() -> None:
    limited = replace(machine("epyc-9454-96gb"), ram_limit_bytes=16 * GIB, cpu_limit=3.5)
    environment = tuned(limited)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-2"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "9"  # 16 - 2.3 - 4
    starved = replace(limited, cpu_limit=0.5)
    assert tuned(starved)["VLLM_CPU_OMP_THREADS_BIND"] == "0"


def test_a_model_that_leaves_nothing_gets_the_least_and_a_warning() -> None:
    plan = planned("two-core-24gb", "llama-3.1-8b", VLLM_ARGS="--dtype float32 --offload-backend uva")
    assert planned_environment(plan)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert any("no memory for a KV cache" in sentence for sentence in plan.warnings)


def test_only_cpus_of_the_first_numa_node_are_bound() -> None:
    nodes = (NumaNode(node=0, cpus=(0, 1, 4, 5), memory_bytes=32 * GIB), NumaNode(node=1, cpus=(2, 3, 6, 7)))
    hardware = HardwareFacts(cpu=CpuFacts(physical_cores=4, logical_cpus=8, numa_nodes=nodes), ram_bytes=64 * GIB)
    environment = tuned(hardware)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1,4-5"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert planned(hardware, MODEL).budget.device_bytes == 32 * GIB
    silent = replace(hardware, cpu=replace(hardware.cpu, numa_nodes=(replace(nodes[0], memory_bytes=None), nodes[1])))
    assert planned(silent, MODEL).budget.device_bytes == 32 * GIB


def test_ranks_get_a_numa_node_each_and_their_part_of_the_memory() -> None:
    nodes = (NumaNode(node=0, cpus=(0, 1)), NumaNode(node=1, cpus=(2, 3)))
    hardware = HardwareFacts(cpu=CpuFacts(physical_cores=4, numa_nodes=nodes), ram_bytes=64 * GIB, cpu_limit=3.0)
    environment = tuned(hardware, TENSOR_PARALLEL_SIZE="2")
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0|2"
    assert planned(hardware, MODEL, TENSOR_PARALLEL_SIZE="2").budget.device_bytes == 32 * GIB
    assert decision(planned(hardware, MODEL, TENSOR_PARALLEL_SIZE="2"), "thread binding").reason.startswith(
        "2, one for"
    )
    one_node = replace(hardware, cpu=CpuFacts(logical_cpus=4))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in tuned(one_node, TENSOR_PARALLEL_SIZE="2")
    assert planned(one_node, MODEL, TENSOR_PARALLEL_SIZE="2").budget.device_bytes == 32 * GIB


def test_macos_binds_no_threads() -> None:
    environment = tuned(HardwareFacts(cpu=CpuFacts(logical_cpus=8), ram_bytes=16 * GIB, system="Darwin"))
    assert set(environment) == {"VLLM_CPU_KVCACHE_SPACE", "OMP_WAIT_POLICY"}


def test_what_is_not_known_is_left_to_vllm() -> None:
    assert tuned(HardwareFacts()) == {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    assert tuned(HardwareFacts(cpu=CpuFacts(logical_cpus=4)))["OMP_NUM_THREADS"] == "4"


def test_a_length_that_is_not_known_takes_all_that_is_left() -> None:
    unnamed = replace(model(MODEL), max_position_embeddings=None)
    environment = planned_environment(planned("two-core-24gb", unnamed))
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "15"


def test_a_size_in_vllm_args_is_not_overridden() -> None:
    assert "VLLM_CPU_KVCACHE_SPACE" not in tuned(machine("two-core-24gb"), VLLM_ARGS="--kv-cache-memory-bytes 128M")


def test_a_gpu_and_switched_off_choices_get_none() -> None:
    assert tuned(machine("h200")) == {}
    assert tuned(machine("two-core-24gb"), AUTO_CONFIG="0") == {}


def test_the_operators_variables_win() -> None:
    plan: EnginePlan = planned(
        "two-core-24gb",
        MODEL,
        VLLM_ENV="VLLM_CPU_KVCACHE_SPACE=4",
        inherited={"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"},
    )
    environment = planned_environment(plan)
    assert (environment["VLLM_CPU_KVCACHE_SPACE"], environment["OMP_NUM_THREADS"]) == ("4", "1")
    assert decision(plan, "KV cache space").reason == "VLLM_CPU_KVCACHE_SPACE in VLLM_ENV"
    assert decision(plan, "OpenMP threads").reason == "OMP_NUM_THREADS in the environment"


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0,2-3,7")])
def test_numbers_are_written_as_ranges(numbers: list[int], text: str) -> None:
    assert as_ranges(numbers) == text
