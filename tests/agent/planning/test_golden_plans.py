"""Whole plans, diffed as text; `python -m tests.agent.planning.golden_plans --write` writes them anew."""

import pytest

from tests.agent.planning.golden_plans import FOLDER, PAIRS, Pair


@pytest.mark.parametrize("pair", PAIRS, ids=[pair.name for pair in PAIRS])
def test_the_plan_is_the_one_that_was_reviewed(pair: Pair) -> None:
    assert pair.text == pair.file.read_text(encoding="utf-8")


def test_every_text_belongs_to_a_pair() -> None:
    assert {file.name for file in FOLDER.glob("*.txt")} == {pair.file.name for pair in PAIRS}


def test_there_are_as_many_different_machines_and_models_as_are_worth_it() -> None:
    assert len({(pair.machine, pair.model) for pair in PAIRS}) >= 24
    assert len({pair.machine for pair in PAIRS}) >= 14
    assert len({pair.model for pair in PAIRS}) >= 16
