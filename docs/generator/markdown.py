"""The little Markdown that the generated pages need. Pure."""

from collections.abc import Iterable, Sequence

NOTICE = "<!-- Written by `make docs` from the code; change it there. -->"


def page(title: str, *parts: str) -> str:
    """A page: heading, notice, parts with an empty line between them, one newline at the end."""
    return "\n\n".join([f"# {title}", NOTICE, *(part.strip("\n") for part in parts)]) + "\n"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a `|` or a line break in a cell does not end it."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def code(text: str) -> str:
    """Inline code, or nothing for nothing."""
    return f"`{text}`" if text else ""


def sentence(text: str) -> str:
    """A docstring's text on one line."""
    return " ".join(text.split())


def _cell(text: str) -> str:
    return sentence(text).replace("|", "\\|")
