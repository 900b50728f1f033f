"""The page that the tiny model knows, and the folder that vLLM loads."""

import json
from pathlib import Path

import pytest

from demo.demo import TINY, endpoint_slug
from demo.model.page import PAGE, read_page


def test_every_question_has_one_answer_in_sentences() -> None:
    entries = read_page()
    assert 25 <= len(entries) <= 40
    assert all(entry.answer.endswith((".", "!")) for entry in entries)


def test_an_answer_on_several_lines_is_one_paragraph(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n## Why?\nBecause\nit is so.\n")
    assert [(entry.question, entry.answer) for entry in read_page(page)] == [("Why?", "Because it is so.")]


@pytest.mark.parametrize(
    ("text", "message"),
    [("# T\n\n## Why?\n\n", "has no answer"), ("# T\n\n## Why?\nSo.\n\n## Why?\nElse.\n", "asked more than once: Why")],
)
def test_a_page_that_cannot_be_learned_is_refused(tmp_path: Path, text: str, message: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_page(page)


def test_the_model_is_small_and_decodes_greedily() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 5_000_000
    assert json.loads((TINY / "generation_config.json").read_text())["temperature"] == 0.0
    assert json.loads((TINY / "config.json").read_text())["max_position_embeddings"] >= 4096
    assert PAGE.is_file()


@pytest.mark.parametrize(
    ("folder", "slug"),
    [
        ("xim-tiny", "xim-tiny"),
        ("Llama-3.2-1B_Instruct", "llama-3-2-1b-instruct"),
        ("__", "model"),
        ("x" * 99, "x" * 48),
    ],
)
def test_an_endpoint_is_called_as_the_folder_of_its_model(folder: str, slug: str) -> None:
    assert endpoint_slug(folder) == slug
