"""How many processes the kernel has killed for lack of memory; compared before and after a life of the engine."""

from pathlib import Path

VMSTAT = Path("/proc/vmstat")
"""Counts control groups' kills as well as the whole machine's (Linux 4.13 and later)."""


def oom_kills(vmstat: Path = VMSTAT) -> int | None:
    """The kernel's count since it started; `None` where it keeps none."""
    try:
        words = vmstat.read_text().split()
    except OSError:
        return None
    try:
        return int(words[words.index("oom_kill") + 1])
    except (ValueError, IndexError):
        return None
