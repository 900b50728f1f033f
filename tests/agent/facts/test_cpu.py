"""Processors, their limits and nodes, from files as kernels write them."""

from pathlib import Path

import pytest

from tests.agent.facts.trees import two_socket_host, write
from xim_agent.facts.cgroup import cpu_limit, memory_limit_bytes
from xim_agent.facts.cpu import read_cpu
from xim_agent.facts.hardware import CpuFacts, NumaNode

GIB = 1024**3


def test_a_host_is_read(tmp_path: Path) -> None:
    assert read_cpu(two_socket_host(tmp_path), "x86_64") == CpuFacts(
        model="AMD EPYC 9454 48-Core Processor",
        vendor="AuthenticAMD",
        architecture="x86_64",
        physical_cores=4,
        logical_cpus=8,
        flags=("avx2", "avx512_bf16", "avx512_vnni", "avx512f"),
        numa_nodes=(
            NumaNode(node=0, cpus=(0, 1, 4, 5), memory_bytes=49152000 * 1024),
            NumaNode(node=1, cpus=(2, 3, 6, 7), memory_bytes=49152000 * 1024),
        ),
    )


def test_cpus_outside_the_cpuset_are_not_counted(tmp_path: Path) -> None:
    cpu = read_cpu(two_socket_host(tmp_path, allowed="2,6"), "x86_64")
    assert (cpu.physical_cores, cpu.logical_cpus) == (1, 2)
    assert cpu.numa_nodes is not None
    assert [(node.node, node.cpus) for node in cpu.numa_nodes] == [(1, (2, 6))]


def test_nothing_to_read_is_nothing_known(tmp_path: Path) -> None:
    assert read_cpu(tmp_path, None) == CpuFacts()


def test_an_arm_processor_has_its_features_read(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "processor : 0\nFeatures : fp asimd sve bf16\n"})
    assert read_cpu(tmp_path, "aarch64").flags == ()


@pytest.mark.parametrize("broken", ["", "x", "0-", "a-b", "-1"])
def test_a_broken_list_of_cpus_falls_back_to_those_online(tmp_path: Path, broken: str) -> None:
    assert read_cpu(two_socket_host(tmp_path, allowed=broken), None).logical_cpus == 8


V2 = {
    "proc/self/cgroup": "0::/system.slice/agent.service\n",
    "sys/fs/cgroup/system.slice/agent.service/memory.max": "max\n",
    "sys/fs/cgroup/system.slice/agent.service/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/system.slice/memory.max": str(8 * GIB),
    "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
}


def test_a_limit_of_a_group_above_holds_too(tmp_path: Path) -> None:
    root = write(tmp_path, V2)
    assert (memory_limit_bytes(root), cpu_limit(root)) == (8 * GIB, 1.5)


def test_in_a_container_the_mounted_group_is_the_own_one(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../../kubepods/pod1\n",
        "sys/fs/cgroup/memory.max": str(4 * GIB),
        "sys/fs/cgroup/cpu.max": "50000 100000",
    }
    root = write(tmp_path, files)
    assert (memory_limit_bytes(root), cpu_limit(root)) == (4 * GIB, 0.5)


def test_version_1_is_read_by_controller(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "11:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    root = write(tmp_path, files)
    assert (memory_limit_bytes(root), cpu_limit(root)) == (2 * GIB, 2.5)


def test_no_limit_is_none(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "3:cpu:/\n4:memory:/\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    root = write(tmp_path, files)
    assert (memory_limit_bytes(root), cpu_limit(root)) == (None, None)


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert (memory_limit_bytes(tmp_path), cpu_limit(tmp_path)) == (None, None)
