"""The page of questions and answers: read from `page.md`, standard library only.

The demo takes its question from here, the model is trained on it, and the tests compare answers with it.
"""

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("page.md")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One question and the answer that the model gives to it, word for word."""

    question: str
    answer: str


def read_page(path: Path = PAGE) -> tuple[Entry, ...]:
    """The entries of the page, in its order; lines of one answer are joined by a space.

    Raises: ValueError when a question has no answer or stands there twice.
    """
    _, *sections = path.read_text(encoding="utf-8").split("\n## ")
    entries = tuple(_entry(section) for section in sections)
    questions = [entry.question for entry in entries]
    twice = sorted({question for question in questions if questions.count(question) > 1})
    if twice:
        raise ValueError(f"{path.name}: asked more than once: {', '.join(twice)}")
    return entries


def _entry(section: str) -> Entry:
    question, _, rest = section.partition("\n")
    answer = " ".join(rest.split())
    if not answer:
        raise ValueError(f"the question {question!r} has no answer")
    return Entry(question=question.strip(), answer=answer)
