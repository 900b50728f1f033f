"""Reading this machine: accelerators, processors, memory and the cache's disk, each from the source that knows it."""

import os
import platform
from pathlib import Path

import psutil

from xim_agent.facts.amd import AmdSmi, load_amdsmi, read_amd
from xim_agent.facts.cgroup import cpu_limit, memory_limit_bytes
from xim_agent.facts.cpu import kilobytes, read_cpu
from xim_agent.facts.hardware import HardwareFacts
from xim_agent.facts.nvidia import Nvml, load_nvml, read_nvidia
from xim_agent.facts.proc_files import pairs_of
from xim_agent.facts.visible import visible

THIS_MACHINE = Path("/")


def read_this_machine(*, cache: Path, cuda_mask: str | None = None, hip_mask: str | None = None) -> HardwareFacts:
    """The facts of this machine, with the vendors' libraries where they are installed. Blocks; see `read_hardware`."""
    return read_hardware(
        root=THIS_MACHINE,
        cache=cache,
        cuda_mask=cuda_mask,
        hip_mask=hip_mask,
        nvml=load_nvml(),
        amdsmi=load_amdsmi(),
        system=platform.system() or None,
        architecture=platform.machine() or None,
    )


def read_hardware(
    *,
    root: Path,
    cache: Path,
    cuda_mask: str | None,
    hip_mask: str | None,
    nvml: Nvml | None,
    amdsmi: AmdSmi | None,
    system: str | None,
    architecture: str | None,
) -> HardwareFacts:
    """The facts of the machine whose /proc, /sys and /dev lie under `root`. Blocks, up to seconds while a driver wakes.

    `cuda_mask` and `hip_mask` are the values of the visibility masks that the engine will start with, `None` where it
    starts without; `cache` is the model cache, whose file system is measured even before the directory exists.
    """
    nvidia, amd = read_nvidia(nvml, root), read_amd(amdsmi, root)
    cuda, cuda_problem = visible(nvidia.gpus, cuda_mask, "CUDA_VISIBLE_DEVICES")
    hip, hip_problem = visible(amd.gpus, hip_mask, "HIP_VISIBLE_DEVICES")
    total, free = _disk(cache)
    shm = root / "dev/shm"
    problems = (nvidia.problem, amd.problem, cuda_problem if nvidia.gpus else None, hip_problem if amd.gpus else None)
    return HardwareFacts(
        gpus=(*cuda, *hip),
        cpu=read_cpu(root, architecture),
        ram_bytes=_ram(root),
        ram_limit_bytes=memory_limit_bytes(root),
        cpu_limit=cpu_limit(root),
        disk_total_bytes=total,
        disk_free_bytes=free,
        shm_free_bytes=_disk(shm)[1] if shm.is_dir() else None,
        nvidia_driver=nvidia.driver,
        cuda_version=nvidia.cuda_version,
        amd_driver=amd.driver,
        rocm_version=amd.rocm_version,
        system=system,
        problems=tuple(problem for problem in problems if problem is not None),
    )


def _ram(root: Path) -> int | None:
    """Memory of the machine; where there is no /proc, as on macOS, what psutil is told."""
    meminfo = pairs_of(root / "proc/meminfo")
    if not meminfo and root == THIS_MACHINE:
        return int(psutil.virtual_memory().total)
    return kilobytes(meminfo.get("MemTotal"))


def _disk(cache: Path) -> tuple[int | None, int | None]:
    """Size of the file system that holds `cache`, and what an ordinary user may still write there."""
    for place in (cache, *cache.parents):
        try:
            measured = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None, None
        return measured.f_blocks * measured.f_frsize or None, measured.f_bavail * measured.f_frsize
    return None, None
