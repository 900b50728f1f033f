"""The mesh on a real database: who joins, who stays, who drops out, and what agents are told of it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.router.control.plane_under_test import Clock, Node, PlaneUnderTest
from xim_protocol.messages import RouterMember
from xim_router.control.database import Database
from xim_router.control.membership import Membership, mesh_of
from xim_router.control.store import Store
from xim_router.settings import RouterSettings


def member(number: int, key: int | None = None) -> RouterMember:
    """A router; `key` where it is not its own."""
    return RouterMember(
        control_address=f"tcp://r{number}:5555",
        streaming_address=f"tcp://r{number}:5556",
        curve_public_key=bytes([number if key is None else key]) * 32,
    )


class Mesh:
    """Memberships on one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.store = Store(database)
        self._processes = 0

    def process(self, which: RouterMember) -> Membership:
        """A process that is this router."""
        self._processes += 1
        return Membership(self.store, which, member_id=f"process-{self._processes}", clock=Clock())

    async def addresses(self) -> list[str]:
        """Who is in the mesh."""
        async with self.store.read() as transaction:
            return sorted(each.control_address for each in (await transaction.snapshot()).members)

    async def version(self) -> int:
        async with self.store.read() as transaction:
            return await transaction.version()

    async def let_expire(self, which: RouterMember) -> None:
        """As if this router had not been heard of for longer than its lease."""
        async with self.database.write() as connection:
            statement = text("UPDATE members SET expires_at = expires_at - 60 WHERE control_address = :address")
            await connection.execute(statement, {"address": which.control_address})


@pytest.fixture
async def mesh(database_url: str) -> AsyncIterator[Mesh]:
    database = await Database.open(database_url)
    yield Mesh(database)
    await database.close()


async def test_members_join_and_leave_and_every_change_is_a_new_version(mesh: Mesh) -> None:
    first, second = mesh.process(member(1)), mesh.process(member(2))
    versions = [await mesh.version()]
    await first.join()
    versions.append(await mesh.version())
    await second.join()
    versions.append(await mesh.version())
    assert await mesh.addresses() == ["tcp://r1:5555", "tcp://r2:5555"]
    await first.renew()
    assert await mesh.version() == versions[-1], "a renewal changes nothing for anybody"
    await first.leave()
    versions.append(await mesh.version())
    assert await mesh.addresses() == ["tcp://r2:5555"]
    assert versions == sorted(set(versions))


async def test_a_member_that_is_not_heard_of_is_out_and_taken_out_by_the_others(mesh: Mesh) -> None:
    first, second = mesh.process(member(1)), mesh.process(member(2))
    await first.join()
    await second.join()
    await mesh.let_expire(member(1))
    assert await mesh.addresses() == ["tcp://r2:5555"]
    version = await mesh.version()
    await second.renew()
    assert await mesh.version() == version + 1, "routers learn of it"
    await second.renew()
    assert await mesh.version() == version + 1
    await first.renew()
    assert await mesh.addresses() == ["tcp://r1:5555", "tcp://r2:5555"], "it was only slow"


async def test_a_renewal_in_the_last_moment_keeps_the_place(mesh: Mesh) -> None:
    first = mesh.process(member(1))
    await first.join()
    await mesh.let_expire(member(1))
    await first.renew()
    assert await mesh.addresses() == ["tcp://r1:5555"]


async def test_a_restarted_router_takes_the_place_of_the_process_before_it(mesh: Mesh) -> None:
    await mesh.process(member(1)).join()
    await mesh.process(member(1)).join()
    assert await mesh.addresses() == ["tcp://r1:5555"]
    # With a new key too, where the data directory was lost.
    await mesh.process(member(1, key=9)).join()
    assert await mesh.addresses() == ["tcp://r1:5555"]


async def test_of_two_routers_with_one_key_the_newer_stays_and_the_older_says_so_once(
    mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = mesh.process(member(1)), mesh.process(member(2, key=1))
    await older.join()
    await newer.join()
    for _ in range(3):
        await older.renew()
    assert await mesh.addresses() == ["tcp://r2:5555"]
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "same CURVE key" in told.getMessage()
    assert "XEROTIER_ROUTER_DATA_DIR" in vars(told)["remedy"]
    await older.leave()
    assert await mesh.addresses() == ["tcp://r2:5555"]


async def test_of_two_routers_at_one_address_the_newer_stays_and_the_older_says_so_once(
    mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = mesh.process(member(1)), mesh.process(member(1, key=9))
    await older.join()
    await newer.join()
    version = await mesh.version()
    for _ in range(3):
        await older.renew()
        await newer.renew()
    assert await mesh.version() == version, "agents are not driven to and fro"
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "same address" in told.getMessage()
    assert "XEROTIER_ROUTER_ADVERTISE_HOST" in vars(told)["remedy"]
    await newer.leave()
    await older.renew()
    assert await mesh.addresses() == ["tcp://r1:5555"], "the place is free"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_routers_whose_leases_ended_together_renew_them_together(mesh: Mesh) -> None:
    for number in (1, 2):
        await mesh.process(member(number)).join()
    for number in (1, 2):
        await mesh.let_expire(member(number))
    # As `Membership.renew`, step by step.
    async with mesh.store.record() as first, mesh.store.record() as second:
        assert await first.extend_member("process-1", 15.0)
        assert await second.extend_member("process-2", 15.0)
        assert not any(await asyncio.gather(first.drop_expired_members(), second.drop_expired_members()))
    assert await mesh.addresses() == ["tcp://r1:5555", "tcp://r2:5555"]


async def test_routers_that_join_at_once_are_all_there(mesh: Mesh) -> None:
    await asyncio.gather(*(mesh.process(member(number)).join() for number in range(1, 6)))
    assert len(await mesh.addresses()) == 5


def test_every_member_names_the_same_mesh_and_itself_in_it() -> None:
    one, two, three = member(1), member(2), member(3)
    assert mesh_of(two, [one, two, three]) == (one, two, three)
    assert mesh_of(three, [two, one]) == (one, two, three), "it left the database already, or never got in"
    moved = RouterMember(
        control_address="tcp://new:1", streaming_address="tcp://new:2", curve_public_key=bytes([1]) * 32
    )
    assert mesh_of(moved, [one, two]) == (moved, two), "what it says of itself is newer"


async def test_planes_of_one_postgresql_are_one_mesh_and_one_of_sqlite_is_alone(
    database_url: str, tmp_path: Path
) -> None:
    values = {"database_url": database_url, "secret_key": "ab" * 32}
    planes = []
    for number in range(2):
        own = {
            "data_dir": tmp_path / str(number),
            "control_port": 7000 + 2 * number,
            "streaming_port": 7001 + 2 * number,
        }
        made = PlaneUnderTest(RouterSettings.model_validate(values | own), Clock())
        await made.plane.start()
        await made.plane.join()
        planes.append(made)
    shared = database_url.startswith("postgresql")
    await planes[0].plane.poll()
    expected = [7000, 7002] if shared else [7000]
    assert ports(planes[0]) == expected
    await planes[0].demo_project()
    enrolled = await planes[0].enroll(Node().request(await planes[0].join_key()))
    assert [int(each.control_addr.rpartition(":")[2]) for each in enrolled.mesh] == expected
    assert {each.server_curve_key for each in enrolled.mesh} >= {planes[0].plane.curve_keypair.public_key}
    await planes[1].plane.close()
    await planes[0].plane.poll()
    assert ports(planes[0]) == [7000]
    await planes[0].plane.close()


def ports(plane: PlaneUnderTest) -> list[int]:
    return [int(each.control_address.rpartition(":")[2]) for each in plane.catalog.routers]


async def test_each_worker_of_a_data_directory_has_a_key_of_its_own(settings: RouterSettings) -> None:
    keys = set()
    for number in (0, 1, 1):
        made = PlaneUnderTest(settings, Clock(), member=number)
        await made.plane.start()
        keys.add(made.plane.curve_keypair.public_key)
        await made.plane.close()
    assert len(keys) == 2
    assert {path.name for path in settings.data_dir.glob("curve*")} == {"curve.key", "curve-1.key"}
