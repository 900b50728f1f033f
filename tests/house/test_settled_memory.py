"""What a process has made before it serves is left out of its garbage collections."""

import gc
from collections.abc import Callable

import pytest

import xim_agent.app
import xim_router.app


@pytest.fixture(autouse=True)
def _thawed() -> None:
    """As in a process of its own: what tests/conftest.py froze is looked through again, until the test freezes it."""
    gc.unfreeze()


@pytest.mark.parametrize("settle_memory", [xim_router.app.settle_memory, xim_agent.app.settle_memory])
def test_a_full_collection_does_not_look_through_the_modules(settle_memory: Callable[[], None]) -> None:
    made_before = len(gc.get_objects())
    settle_memory()
    assert gc.get_freeze_count() >= made_before / 2
    assert len(gc.get_objects()) < made_before / 10
