"""Lets the link's sockets have the buffers they ask for: Linux caps them silently at net.core.{r,w}mem_max."""

import logging
from pathlib import Path

log = logging.getLogger(__name__)

WANTED_BYTES = 4 * 1024 * 1024
"""What the link asks for; Linux's default cap is 212,992."""
SYSCTLS = Path("/proc/sys/net/core")
NAMES = ("rmem_max", "wmem_max")


def raise_socket_buffers(sysctls: Path = SYSCTLS) -> None:
    """Raise what is too low; where that is not allowed, say once how it is done. Never lowers anything."""
    low = {name: size for name in NAMES if (size := _size(sysctls / name)) is not None and size < WANTED_BYTES}
    refused = [name for name in low if not _raised(sysctls / name)]
    if refused:
        words = " ".join(f"net.core.{name}={WANTED_BYTES}" for name in refused)
        log.warning(
            "socket buffers are capped by this system, which slows long links",
            extra={
                "now_bytes": {name: low[name] for name in refused},
                "remedy": f"sudo sysctl -w {words}",
                "for_good": "the same lines in /etc/sysctl.d/99-xerotier.conf",
            },
        )
    elif low:
        log.info("socket buffers raised", extra={"sysctls": sorted(low), "bytes": WANTED_BYTES})


def _size(path: Path) -> int | None:
    """The value now; None where the system has none, as in a network namespace of a container or on macOS."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _raised(path: Path) -> bool:
    """Whether it could be raised; a write that is taken and changes nothing counts as refused."""
    try:
        path.write_text(str(WANTED_BYTES))
    except OSError:
        return False
    size = _size(path)
    return size is not None and size >= WANTED_BYTES
