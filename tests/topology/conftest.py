"""One set of accounts for all topologies of the session, and the logs of the processes beside a failure."""

from pathlib import Path

import pytest

from tests.support.accounts import Accounts
from tests.support.topology import pytest_runtest_makereport

__all__ = ["accounts", "pytest_runtest_makereport"]


@pytest.fixture(scope="session")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Accounts:
    """Two projects, made by the CLI in a data directory that every topology copies."""
    return Accounts.prepare(Path(tmp_path_factory.mktemp("accounts")) / "router")
