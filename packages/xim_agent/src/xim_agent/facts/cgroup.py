"""Limits of the control group this process is in: memory and CPU quota, of version 1 and version 2.

A limit of any group above holds too, so the whole way up is read. Inside a container the path may name groups that
only the host sees; what is mounted there is the container's own group, and that is on the way.
"""

from collections.abc import Iterator
from pathlib import Path

from xim_agent.facts.proc_files import number_of, text_of

_UNLIMITED = 1 << 60
"""Version 1 says "no limit" with a number near 2**63, rounded to pages."""


def memory_limit_bytes(root: Path) -> int | None:
    """The smallest memory limit above this process; `None` where there is none. Blocks."""
    limits = [number_of(group / "memory.max") for group in _groups(root, "")]
    limits += [number_of(group / "memory.limit_in_bytes") for group in _groups(root, "memory")]
    return min((limit for limit in limits if limit is not None and 0 < limit < _UNLIMITED), default=None)


def cpu_limit(root: Path) -> float | None:
    """The smallest CPU quota above this process, in CPUs; `None` where there is none. Blocks."""
    said = [text_of(group / "cpu.max") for group in _groups(root, "")]
    said += [
        f"{number_of(group / 'cpu.cfs_quota_us')} {number_of(group / 'cpu.cfs_period_us')}"
        for group in _groups(root, "cpu")
    ]
    limits = [_quota(one) for one in said]
    return min((limit for limit in limits if limit is not None), default=None)


def _quota(said: str | None) -> float | None:
    """CPUs of `150000 100000` (quota and period in microseconds); `max` and -1 are none."""
    parts = (said or "").split()
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        return None
    return int(parts[0]) / int(parts[1])


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """This process's group of a version 1 controller (of version 2 where it is empty), and all above it."""
    for line in (text_of(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (controller in names.split(",")) if controller else not names:
            for mount in _mounts(root, names, controller):
                group = mount / path.lstrip("/")
                yield from (one for one in (group, *group.parents) if one.is_relative_to(mount))
            return


def _mounts(root: Path, names: str, controller: str) -> Iterator[Path]:
    """Where the hierarchy is mounted; hosts name a shared one after all its controllers."""
    top = root / "sys/fs/cgroup"
    candidates = (top / names, top / controller) if controller else (top, top / "unified")
    yield from dict.fromkeys(mount for mount in candidates if mount.is_dir())
