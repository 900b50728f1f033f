"""What holds for every test: fixtures that several folders share, and a machine that may be slow and crowded."""

import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings

from tests.support.postgres import database_url, postgres_server

__all__ = ["database_url", "postgres_server"]

# How long one example takes says something of the machine, and nothing of what the property states.
settings.register_profile("xim", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("xim")


def pytest_configure(config: pytest.Config) -> None:
    """Let the programs under test keep their compiled modules for each other, where the environment says to keep none.

    A router that compiles all it imports takes three times as long to start, and there are hundreds of starts.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        folder = tempfile.TemporaryDirectory(prefix="xim-pyc-")
        config.add_cleanup(folder.cleanup)
        os.environ["PYTHONPYCACHEPREFIX"] = folder.name
