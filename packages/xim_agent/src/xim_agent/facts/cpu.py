"""The processors: /proc/cpuinfo, the kernel's topology, NUMA nodes. What this process may not run on is not counted."""

from pathlib import Path

from xim_agent.facts.hardware import FLAGS_OF_INTEREST, CpuFacts, NumaNode
from xim_agent.facts.proc_files import number_of, numbers_in, pairs_of, text_of


def read_cpu(root: Path, architecture: str | None) -> CpuFacts:
    """The facts of the CPUs under `root`; `architecture` is the machine's own word for itself. Blocks."""
    first = pairs_of(root / "proc/cpuinfo")
    allowed = _allowed(root)
    flags = first.get("flags") or first.get("Features")
    return CpuFacts(
        model=first.get("model name") or None,
        vendor=first.get("vendor_id") or None,
        architecture=architecture,
        physical_cores=_cores(root, allowed),
        logical_cpus=len(allowed) or None,
        flags=None if flags is None else tuple(sorted(set(FLAGS_OF_INTEREST) & set(flags.split()))),
        numa_nodes=_nodes(root, allowed),
    )


def _allowed(root: Path) -> tuple[int, ...]:
    """CPUs this process may run on (which a cpuset narrows), else all that are online."""
    status = pairs_of(root / "proc/self/status")
    return numbers_in(status.get("Cpus_allowed_list")) or numbers_in(text_of(root / "sys/devices/system/cpu/online"))


def _cores(root: Path, allowed: tuple[int, ...]) -> int | None:
    """Cores behind the CPUs that are allowed: hardware threads of one core count once."""
    cores = set()
    for cpu in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        package, core = number_of(topology / "physical_package_id"), number_of(topology / "core_id")
        if core is None:
            return None
        cores.add((package, core))
    return len(cores) or None


def _nodes(root: Path, allowed: tuple[int, ...]) -> tuple[NumaNode, ...] | None:
    """The nodes with CPUs that are allowed; `None` where the kernel tells nothing of nodes."""
    there = [node for node in (root / "sys/devices/system/node").glob("node*") if node.name[4:].isdecimal()]
    nodes = []
    for node in sorted(there, key=lambda node: int(node.name[4:])):
        cpus = tuple(cpu for cpu in numbers_in(text_of(node / "cpulist")) if cpu in allowed)
        if cpus:
            nodes.append(NumaNode(node=int(node.name[4:]), cpus=cpus, memory_bytes=_memory(node)))
    return tuple(nodes) or None


def _memory(node: Path) -> int | None:
    """`Node 0 MemTotal:  24684084 kB`."""
    for line in (text_of(node / "meminfo") or "").splitlines():
        name, _, size = line.partition("MemTotal:")
        if size and name.startswith("Node"):
            return kilobytes(size)
    return None


def kilobytes(size: str | None) -> int | None:
    """Bytes of `24684084 kB`, the kernel's way of writing sizes; `None` for anything else."""
    digits = (size or "").split()
    return int(digits[0]) * 1024 if digits and digits[0].isdecimal() and digits[0] != "0" else None
