"""The database: one engine, read and write transactions, and a schema that is brought up to date at start.

SQLite (WAL) by default, PostgreSQL by URL; the same migrations run on both. Whatever a driver raises because the
database is away becomes `DatabaseUnavailable` here.
"""

import asyncio
import fcntl
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Select, event, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from xim_router.control import migrations
from xim_router.control.database_url import database_url
from xim_router.control.errors import DatabaseUnavailable, DatabaseUnreadable, SchemaNotCurrent, unusable
from xim_router.control.notifications import Notifications

# Another process holds SQLite's one write lock for milliseconds; ten seconds of it mean that something is wrong.
_SQLITE_BUSY_TIMEOUT_S = 10
_POSTGRES_TIMEOUT_S = 5
# Any fixed number of our own will do; every router of the same database takes the same.
_MIGRATION_LOCK = 0x58494D01
_WRITES = "xim_writes"


class Database:
    """One database, its schema current.

    Made by `Database.open`; `close` gives its connections back.
    """

    def __init__(self, url: str) -> None:
        """Nothing is opened yet.

        Raises:
            DatabaseUrlInvalid: `url` names no server and no file.
        """
        parsed = database_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self._path = Path(parsed.database or "") if self.is_sqlite else None
        self._engine = _sqlite_engine(parsed) if self.is_sqlite else _postgres_engine(parsed)
        self.notifications = None if self.is_sqlite else Notifications(self._engine)
        """Of changes; SQLite has none."""

    @classmethod
    async def open(cls, url: str) -> Self:
        """The database at `url`, made where it is missing and migrated where it is older.

        Raises:
            DatabaseUrlInvalid: `url` names no server and no file.
            DatabaseUnavailable: it cannot be reached.
            SchemaNotCurrent: it is newer than this program.
        """
        database = cls(url)
        try:
            await database.migrate("head")
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        """Give every connection back."""
        if self.notifications is not None:
            await self.notifications.close()
        await self._engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that sees one state of the database from its first query to its last."""
        level = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        async with _translated(self._path), self._engine.connect() as connection:
            await connection.execution_options(**level)
            async with connection.begin():
                yield connection

    async def value(self, query: Select[Any]) -> Any:
        """The one value of a query that is asked often; one caller at a time.

        On PostgreSQL it goes over the connection that listens.
        """
        if self.notifications is None:
            async with self.read() as connection:
                return (await connection.execute(query)).scalar_one()
        async with _translated(self._path):
            return await self.notifications.value(query)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes; on SQLite it is the only one that does, from its beginning.

        SQLite refuses to turn a read into a write once another process wrote, without waiting; so it says so first.
        """
        async with _translated(self._path), self._engine.connect() as connection:
            await connection.execution_options(**{_WRITES: True})
            async with connection.begin():
                yield connection

    async def migrate(self, revision: str) -> None:
        """Bring the schema to `revision`, once, however many processes try at the same moment.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
            SchemaNotCurrent: it is newer than this program.
        """
        release = await asyncio.to_thread(_lock_file, self._path) if self._path is not None else None
        try:
            if self.is_sqlite:
                async with _translated(self._path), self._engine.connect() as connection:
                    driver = await connection.get_raw_connection()
                    assert driver.driver_connection is not None
                    await driver.driver_connection.execute("PRAGMA journal_mode=WAL")
            async with self.write() as connection:
                if not self.is_sqlite:
                    await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
                await connection.run_sync(_migrate, revision)
        finally:
            if release is not None:
                release()

    def change_mark(self) -> object | None:
        """Something that differs after every commit of any process, or None where only a query can tell.

        Asking a file for its times costs microseconds, a query through the driver's thread a millisecond. SQLite in WAL
        mode writes each commit to the `-wal` file, or to the database itself at a checkpoint.
        """
        if self._path is None:
            return None
        return _times(self._path), _times(self._path.with_name(self._path.name + "-wal"))

    async def revision(self) -> str | None:
        """The schema's revision, or None when the database is empty or not there."""
        if self._path is not None and not self._path.exists():
            return None
        async with self.read() as connection:
            return await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())


def _times(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def newest_revision() -> str:
    """The revision this program needs."""
    revision = ScriptDirectory.from_config(_alembic()).get_current_head()
    assert revision is not None
    return revision


def _alembic(connection: Connection | None = None) -> Config:
    config = Config()
    # Alembic reads % as interpolation.
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _migrate(connection: Connection, revision: str) -> None:
    config = _alembic(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise SchemaNotCurrent(
            f"The database is at revision {current}, which this version of xerotier-router does not know.",
            "Run the version that wrote it, or a newer one, or restore a backup from before that upgrade.",
        )
    if revision == "base":
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)


def _sqlite_engine(url: URL) -> AsyncEngine:
    # isolation_level None: sqlite3 begins no transaction of its own, the listener below does.
    driver = {"isolation_level": None, "timeout": _SQLITE_BUSY_TIMEOUT_S}
    # One connection: reads and writes that meet take turns of a millisecond, where a second one would stay for good. A
    # write that waits for another process keeps no news from a read: nobody else can commit any meanwhile.
    engine = create_async_engine(url, connect_args=driver, pool_size=1, max_overflow=0)

    @event.listens_for(engine.sync_engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        # With WAL, NORMAL loses no committed transaction when the process dies, only when the machine does.
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres_engine(url: URL) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_pre_ping=True,
        pool_timeout=_POSTGRES_TIMEOUT_S,
        connect_args={"timeout": _POSTGRES_TIMEOUT_S, "command_timeout": 2 * _POSTGRES_TIMEOUT_S},
    )


@asynccontextmanager
async def _translated(path: Path | None) -> AsyncIterator[None]:
    """`path` is the file of an SQLite database."""
    try:
        yield
    except (IntegrityError, DataError):
        raise
    except DBAPIError as error:
        # Our statements are fixed, so whatever a driver says to one is about the database: away, starting, full,
        # closed to us, its tables not as we left them. A router must outlive all of it.
        cause = None if error.orig is None else error.orig.__cause__
        raise _unreadable(path, error.orig) or DatabaseUnavailable(cause or error) from error
    except sqlite3.DatabaseError as error:
        raise _unreadable(path, error) or DatabaseUnavailable(error) from error
    except (PoolTimeout, OSError, TimeoutError) as error:
        raise DatabaseUnavailable(error) from error


def _unreadable(path: Path | None, error: BaseException | None) -> DatabaseUnreadable | None:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits tell kinds of one error apart
    if path is None or code not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return None
    return DatabaseUnreadable(path, damaged=code == sqlite3.SQLITE_CORRUPT)


def _lock_file(path: Path) -> Callable[[], None]:
    """Make the database's directory and take the lock beside it; blocks, and returns what releases the lock."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = path.with_name(f"{path.name}.lock").open("w")
    except OSError as error:
        named = "XEROTIER_ROUTER_DATA_DIR, or XEROTIER_ROUTER_DATABASE_URL where that names the file,"
        raise unusable(path.parent, error, named) from error
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle.close
