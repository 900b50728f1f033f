"""Small /proc and /sys trees on disk, as kernels write them."""

from pathlib import Path


def write(root: Path, files: dict[str, str]) -> Path:
    """Every file of `files` under `root`, its directories made."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def two_socket_host(root: Path, allowed: str = "0-7") -> Path:
    """Two sockets of two cores with two threads each: CPU 0 and 4 share a core, and so on."""
    files = {
        "proc/cpuinfo": "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9454 48-Core Processor\n"
        "flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni sse2\n\nprocessor\t: 1\nmodel name\t: another\n",
        "proc/self/status": f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t{allowed}\n",
        "proc/meminfo": "MemTotal:       98304000 kB\nMemFree:        1 kB\n",
        "sys/devices/system/cpu/online": "0-7\n",
        "sys/devices/system/node/node0/cpulist": "0-1,4-5\n",
        "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       49152000 kB\n",
        "sys/devices/system/node/node1/cpulist": "2-3,6-7\n",
        "sys/devices/system/node/node1/meminfo": "Node 1 MemFree: 5 kB\nNode 1 MemTotal:       49152000 kB\n",
    }
    for cpu in range(8):
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files[f"{topology}/physical_package_id"] = f"{cpu % 4 // 2}\n"
        files[f"{topology}/core_id"] = f"{cpu % 2}\n"
    return write(root, files)


def amd_gpus(root: Path, targets: list[int], *, kfd: bool = True) -> Path:
    """One CPU node, then a GPU node of 16 GiB for each `gfx_target_version`; render devices count from 128."""
    nodes = "sys/class/kfd/kfd/topology/nodes"
    files = {f"{nodes}/0/properties": "cpu_cores_count 64\nsimd_count 0\ngfx_target_version 0\n"}
    if kfd:
        files["dev/kfd"] = ""
    for number, target in enumerate(targets):
        files[f"{nodes}/{number + 1}/properties"] = (
            f"cpu_cores_count 0\ngfx_target_version {target}\ndrm_render_minor {128 + number}\n"
        )
        device = f"sys/class/drm/renderD{128 + number}/device"
        files[f"{device}/mem_info_vram_total"] = f"{16 * 1024**3}\n"
        files[f"{device}/unique_id"] = f"{number:016x}\n"
    return write(root, files)
