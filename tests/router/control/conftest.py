"""A control plane on a real database, with a clock that stands still until a test moves it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.router.control.plane_under_test import Clock, PlaneUnderTest
from xim_router.control.plane import ControlPlane
from xim_router.settings import RouterSettings


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> RouterSettings:
    return RouterSettings.model_validate({"data_dir": tmp_path / "state", "database_url": database_url})


@pytest.fixture
async def under_test(settings: RouterSettings) -> AsyncIterator[PlaneUnderTest]:
    """A started control plane."""
    made = PlaneUnderTest(settings, Clock())
    await made.plane.start()
    yield made
    await made.plane.close()


@pytest.fixture
def plane(under_test: PlaneUnderTest) -> ControlPlane:
    return under_test.plane
