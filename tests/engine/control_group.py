"""A control group of the test's own, where the kernel lets one be made: limits for a process and all it starts."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 100_000


@contextlib.contextmanager
def control_group(*, memory_bytes: int, cpus: float) -> Iterator[list[str]]:
    """Limits for what is started by the words yielded, which go before a command. Skips the test where it cannot be.

    Whoever started something in it ends it before the group goes.
    """
    name = f"xim-{uuid.uuid4().hex[:8]}"
    quota = str(int(cpus * PERIOD_US))
    groups: dict[Path, dict[str, str]] = {
        ROOT / name: {"memory.max": str(memory_bytes), "cpu.max": f"{quota} {PERIOD_US}"}
    }
    if not (ROOT / "cgroup.controllers").exists():
        groups = {
            ROOT / "memory" / name: {"memory.limit_in_bytes": str(memory_bytes)},
            ROOT / "cpu" / name: {"cpu.cfs_quota_us": quota},
        }
    made: list[Path] = []
    try:
        for group, limits in groups.items():
            try:
                group.mkdir()
                made.append(group)
                for file, limit in limits.items():
                    (group / file).write_text(limit, encoding="ascii")
            except OSError as error:
                pytest.skip(f"no control group can be made here: {error}")
        join = "".join(f"echo $$ > {group}/cgroup.procs && " for group in made)
        yield ["/bin/sh", "-c", f'{join}exec "$@"', "sh"]
    finally:
        for group in made:
            group.rmdir()
