"""Small files that the kernel writes: one line, a number, or a list of CPUs. Missing and unreadable is `None`."""

from pathlib import Path

LIMIT_CHARACTERS = 4_000_000
"""More than /proc/cpuinfo has on a thousand CPUs, so that no file in its place can fill the memory."""


def text_of(file: Path) -> str | None:
    """What `file` holds, without white space around it. Blocks."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(LIMIT_CHARACTERS).strip()
    except OSError:
        return None


def number_of(file: Path) -> int | None:
    """The whole number that `file` holds. Blocks."""
    text = text_of(file)
    return int(text) if text is not None and text.removeprefix("-").isdecimal() else None


def pairs_of(file: Path) -> dict[str, str]:
    """Lines of `name value` or `name: value`; the first of a name wins. Blocks."""
    pairs: dict[str, str] = {}
    for line in (text_of(file) or "").splitlines():
        name, _, value = line.partition(":") if ":" in line else line.partition(" ")
        pairs.setdefault(name.strip(), value.strip())
    return pairs


def numbers_in(listed: str | None) -> tuple[int, ...]:
    """The numbers of a list such as `0-3,8`, as the kernel writes CPU lists; empty for anything else."""
    numbers: list[int] = []
    for part in (listed or "").split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            return ()
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)
