"""One set of accounts for all topologies of the session, and the logs of the processes beside a failure."""

from tests.topology.conftest import accounts, pytest_runtest_makereport

__all__ = ["accounts", "pytest_runtest_makereport"]
