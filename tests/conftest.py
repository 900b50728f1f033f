"""What holds for every test: fixtures that several folders share, and a machine that may be slow and crowded."""

import gc
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


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave the thousands of tests that were collected, and all modules, out of every garbage collection.

    Looking through them stops this process for a third of a second, now and then for a whole one: routers and agents
    that run in it stand still, and so does the client that a test has for those that do not.
    """
    gc.collect()
    gc.freeze()
    # The next full collection waits for a quarter of what the last one left: let that be nothing.
    gc.collect()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Note how the run ended: `.ci/run` runs again what failed in one that came to its end, and in no other."""
    cache = getattr(session.config, "cache", None)  # which `-p no:cacheprovider` takes away
    if cache is not None:
        cache.set("run/exitstatus", int(exitstatus))
