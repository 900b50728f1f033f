"""The schema: made, migrated by several at once, undone, refused when it is newer."""

import asyncio
from pathlib import Path

import psutil
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from tests.support.blocks import blocks_kept
from xim_router.control.database import Database, newest_revision
from xim_router.control.errors import DatabaseUnavailable, KeyFileUnusable, SchemaNotCurrent
from xim_router.control.tables import metadata


def differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection), metadata))


async def test_the_migrations_make_exactly_the_declared_tables(database_url: str) -> None:
    database = await Database.open(database_url)
    async with database.read() as connection:
        assert await connection.run_sync(differences) == []
    assert await database.revision() == newest_revision()
    await database.close()


async def test_the_migrations_go_down_and_up_again(database_url: str) -> None:
    database = await Database.open(database_url)
    await database.migrate("base")
    assert await database.revision() is None
    async with database.read() as connection:
        assert len(await connection.run_sync(differences)) > 0
    await database.migrate("head")
    assert await database.revision() == newest_revision()
    await database.close()


async def test_several_routers_that_start_at_once_migrate_once(database_url: str) -> None:
    opened = await asyncio.gather(*(Database.open(database_url) for _ in range(4)))
    async with opened[0].read() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM installation"))).scalar_one() == 1
    for database in opened:
        await database.close()


async def test_a_newer_database_is_refused_with_what_to_do(database_url: str) -> None:
    database = await Database.open(database_url)
    async with database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await database.close()
    with pytest.raises(SchemaNotCurrent, match="9999") as caught:
        await Database.open(database_url)
    assert "newer" in caught.value.remedy


async def test_a_write_that_fails_leaves_nothing(database_url: str) -> None:
    database = await Database.open(database_url)

    async def failing_write() -> None:
        async with database.write() as connection:
            await connection.execute(text("UPDATE installation SET catalog_version = 77"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing_write()
    async with database.read() as connection:
        assert (await connection.execute(text("SELECT catalog_version FROM installation"))).scalar_one() == 1
    await database.close()


@pytest.mark.parametrize(
    "url",
    ["postgresql+asyncpg://u:hidden@127.0.0.1:1/db", "postgresql+asyncpg://nobody:hidden@/{name}?host={host}"],
)
async def test_a_database_that_does_not_take_us_is_unavailable_and_its_password_unsaid(
    url: str, tmp_path: Path
) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        await Database.open(url.format(name="x", host=tmp_path))
    assert "hidden" not in str(caught.value) + caught.value.remedy
    assert "xerotier-router db check" in caught.value.remedy


@pytest.mark.parametrize(
    "form", ["postgresql+asyncpg://nobody@/{0}?host={1}", "postgresql+asyncpg://postgres@/no?host={1}"]
)
async def test_an_unknown_role_or_database_of_a_running_server_is_unavailable(
    form: str, postgres_server: object
) -> None:
    with pytest.raises(DatabaseUnavailable):
        await Database.open(form.format("postgres", postgres_server.pgdata))  # type: ignore[attr-defined]


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KeyFileUnusable, match="file") as caught:
        await Database.open(f"sqlite+aiosqlite:///{tmp_path}/file/router.db")
    assert "XEROTIER_ROUTER_DATA_DIR" in caught.value.remedy


async def test_sqlite_is_opened_once_however_many_ask_at_once(tmp_path: Path) -> None:
    """A second connection would stay: a thread, two descriptors and 150 KB, at a moment of their own."""
    path = tmp_path / "router.db"
    database = await Database.open(f"sqlite+aiosqlite:///{path}")

    async def look() -> None:
        async with database.read() as connection:
            await connection.execute(text("SELECT 1"))

    async def change(number: int) -> None:
        async with database.write() as connection:
            await connection.execute(text("UPDATE installation SET catalog_version = :number"), {"number": number})

    await asyncio.gather(*(look() for _ in range(5)), *(change(number) for number in range(5)))
    assert [file.path for file in psutil.Process().open_files()].count(str(path)) == 1
    await database.close()


async def test_a_look_at_the_files_of_sqlite_leaves_nothing(tmp_path: Path) -> None:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'router.db'}")
    assert database.change_mark() is not None
    # A router looks four times a second.
    assert blocks_kept(database.change_mark, 1_000) < 0.5
    await database.close()
