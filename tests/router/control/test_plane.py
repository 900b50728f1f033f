"""The control plane as the composition root sees it: catalogs, keys, reports, and a database that goes away."""

import asyncio
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from tests.router.control.plane_under_test import START, Clock, Node, PlaneUnderTest
from tests.support.programs import PATIENCE_S, eventually
from xim_protocol.ids import AgentId, ProjectId
from xim_router.control.database import Database
from xim_router.control.errors import KeyFileUnusable, NotFound, SecretKeyMismatch
from xim_router.control.plane import ControlPlane
from xim_router.control.store import Store, Transaction
from xim_router.control.tokens import mint_xem_token, verify_xem_token
from xim_router.dispatch.catalog import Scope, TaskMode
from xim_router.dispatch.reports import AgentSeen
from xim_router.settings import RouterSettings

PROJECT = ProjectId("proj_1")


@pytest.fixture
async def another_process(settings: RouterSettings) -> AsyncIterator[ControlPlane]:
    """A second control plane on the same database."""
    other = PlaneUnderTest(settings, Clock())
    await other.plane.start()
    yield other.plane
    await other.plane.close()


async def test_an_api_key_is_found_in_the_catalog_by_its_hash(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    accounts = under_test.plane.accounts
    secret, _ = await accounts.create_api_key("demo", "app", endpoint_slug="tiny", expires_in_s=60.0)
    await under_test.plane.poll()
    principal = under_test.catalog.principals[under_test.plane.api_key_hash(secret)]
    assert secret.startswith("xero_demo_")
    assert principal.scopes == {Scope.INFERENCE}
    assert principal.expires_at == START + 60
    named = under_test.catalog.endpoint_named(principal.project, "tiny")
    assert named is not None
    assert principal.endpoint == named.endpoint
    assert under_test.catalog.endpoint_named(principal.project, "Tiny-1B") == named
    assert under_test.plane.api_key_hash("\udcff wrong") not in under_test.catalog.principals


async def test_a_change_of_another_process_is_published_by_the_next_poll(
    under_test: PlaneUnderTest, another_process: ControlPlane
) -> None:
    await another_process.accounts.create_project("demo")
    secret, key = await another_process.accounts.create_api_key("demo", "app")
    await under_test.plane.poll()
    assert under_test.plane.api_key_hash(secret) in under_test.catalog.principals
    await another_process.accounts.revoke_api_key(key.id)
    await under_test.plane.poll()
    assert under_test.catalog.principals == {}
    published = len(under_test.catalogs)
    await under_test.plane.poll()
    assert len(under_test.catalogs) == published


async def test_the_running_plane_polls_by_itself(under_test: PlaneUnderTest, another_process: ControlPlane) -> None:
    running = asyncio.create_task(under_test.plane.run())
    await another_process.accounts.create_project("demo")
    await another_process.accounts.create_endpoint("demo", "tiny", "Tiny-1B", task_mode=TaskMode.EMBED)
    async with asyncio.timeout(PATIENCE_S):
        while not under_test.catalog.endpoints:
            await asyncio.wait([running], timeout=0.05)
    running.cancel()
    await asyncio.wait([running])
    assert [each.task_mode for each in under_test.catalog.endpoints.values()] == [TaskMode.EMBED]


async def test_a_slug_wins_over_a_model_name_and_the_oldest_endpoint_over_later_ones(
    under_test: PlaneUnderTest,
) -> None:
    accounts = under_test.plane.accounts
    project = await accounts.create_project("demo")
    for slug, model in (("first", "shared"), ("second", "shared"), ("third", "first")):
        under_test.clock.now += 1
        await accounts.create_endpoint("demo", slug, model, task_mode=TaskMode.GENERATE)
    await under_test.plane.poll()
    named = {name: under_test.catalog.endpoint_named(project.id, name) for name in ("shared", "first", "third")}
    assert {name: found.slug for name, found in named.items() if found} == {
        "shared": "first",
        "first": "first",
        "third": "third",
    }


async def test_deleting_an_endpoint_revokes_the_keys_that_were_for_it_alone(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project(("tiny", "other"))
    accounts = under_test.plane.accounts
    bound, _ = await accounts.create_api_key("demo", "bound", endpoint_slug="tiny")
    free, _ = await accounts.create_api_key("demo", "free")
    join_key = await under_test.join_key(endpoint="tiny", max_uses=9)
    enrolled = await under_test.enroll(Node().request(join_key))
    await accounts.delete_endpoint("demo", "tiny")
    await under_test.plane.poll()
    assert set(under_test.catalog.principals) == {under_test.plane.api_key_hash(free)}
    assert under_test.plane.api_key_hash(bound) not in under_test.catalog.principals
    assert under_test.catalog.agents[enrolled.agent_id].endpoint is None
    assert await under_test.refusal(Node(curve=b"8" * 32).request(join_key)) == (401, "join_key_revoked")


async def test_an_agent_is_assigned_to_another_endpoint_and_to_none(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project(("tiny", "other"))
    enrolled = await under_test.enroll(Node().request(await under_test.join_key(endpoint="tiny")))
    accounts = under_test.plane.accounts
    for slug in ("other", None):
        await accounts.assign_agent(enrolled.agent_id, slug)
        await under_test.plane.poll()
        endpoint = under_test.catalog.agents[enrolled.agent_id].endpoint
        assert (None if endpoint is None else under_test.catalog.endpoints[endpoint].slug) == slug


async def test_agents_seen_are_written_with_their_latest_state(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    enrolled = await under_test.enroll(Node().request(await under_test.join_key()))
    published = len(under_test.catalogs)
    under_test.plane.report_seen(AgentSeen(agent=enrolled.agent_id, seen_at=START + 1, state="loading"))
    under_test.plane.report_seen(AgentSeen(agent=enrolled.agent_id, seen_at=START + 2, state="ready"))
    under_test.plane.report_seen(AgentSeen(agent=AgentId("gone"), seen_at=START, state="ready"))
    await under_test.plane.write_seen()
    (standing,) = await under_test.plane.accounts.agents("demo")
    assert (standing.agent.last_seen_at, standing.agent.state) == (START + 2, "ready")
    await under_test.plane.poll()
    assert len(under_test.catalogs) == published


async def test_an_agent_that_left_has_no_state_unless_another_router_saw_it_since(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    agent = (await under_test.enroll(Node().request(await under_test.join_key()))).agent_id

    async def written(*reports: AgentSeen) -> tuple[float | None, str | None]:
        for each in reports:
            under_test.plane.report_seen(each)
        await under_test.plane.write_seen()
        (standing,) = await under_test.plane.accounts.agents("demo")
        return standing.agent.last_seen_at, standing.agent.state

    ready = AgentSeen(agent=agent, seen_at=START + 10, state="ready")
    left = AgentSeen(agent=agent, seen_at=START + 10, departed=True)
    # In one write, the first of all, the later report counts.
    assert await written(ready, left) == (START + 10, None)
    assert await written(left, ready) == (START + 10, "ready")
    assert await written(left) == (START + 10, None)
    later = AgentSeen(agent=agent, seen_at=START + 12, state="draining")
    assert await written(later) == (START + 12, "draining")
    assert await written(left) == (START + 12, "draining")
    # Another router's, that was written late.
    assert await written(ready) == (START + 12, "draining")
    # A clock that was set back must not keep every report away.
    assert await written(replace(ready, seen_at=START - 60)) == (START - 60, "ready")


async def waits(database: Database) -> bool:
    """Whether a transaction of this PostgreSQL database waits for another's lock."""
    found = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with database.read() as connection:
        return bool((await connection.execute(text(found))).scalar_one())


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_an_endpoint_is_deleted_while_an_agent_enrolls_for_it(
    under_test: PlaneUnderTest, database_url: str
) -> None:
    await under_test.demo_project()
    await under_test.enroll(Node().request(await under_test.join_key()))
    (standing,) = await under_test.plane.accounts.agents("demo")
    newcomer = replace(standing.agent, id=AgentId("newcomer"), curve_public_key=b"\x02" * 32)
    assert newcomer.endpoint_id is not None
    database = await Database.open(database_url)
    async with Store(database).record() as enrolling:
        await enrolling.add(newcomer)
        deleting = asyncio.create_task(under_test.plane.accounts.delete_endpoint("demo", "tiny"))
        await eventually(lambda: waits(database), what="one waits for the other", beside=[deleting])
    await deleting
    assert [each.agent.endpoint_id for each in await under_test.plane.accounts.agents("demo")] == [None, None]
    await database.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_an_agent_that_enrolls_while_its_endpoint_is_deleted_is_free(
    under_test: PlaneUnderTest, database_url: str
) -> None:
    await under_test.demo_project()
    key = await under_test.join_key()
    database = await Database.open(database_url)
    async with Store(database).change() as deleting:
        (endpoint,) = await deleting.endpoints()
        await deleting.delete_endpoint(endpoint.id, START)
        enrolling = asyncio.create_task(under_test.enroll(Node().request(key)))
        await eventually(lambda: waits(database), what="one waits for the other", beside=[enrolling])
    assert (await enrolling).assignment is None
    (standing,) = await under_test.plane.accounts.agents("demo")
    assert standing.endpoint_slug is None
    await database.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("command", ["key", "join-key", "assign"])
async def test_a_command_that_meets_the_end_of_its_endpoint_says_that_there_is_none(
    under_test: PlaneUnderTest, database_url: str, command: str
) -> None:
    await under_test.demo_project()
    accounts = under_test.plane.accounts
    agent = (await under_test.enroll(Node().request(await under_test.join_key()))).agent_id
    await accounts.assign_agent(agent, None)
    commands: dict[str, Callable[[], Coroutine[object, object, object]]] = {
        "key": lambda: accounts.create_api_key("demo", "app", endpoint_slug="tiny"),
        "join-key": lambda: accounts.create_join_key("demo", enroll_url="http://router", endpoint_slug="tiny"),
        "assign": lambda: accounts.assign_agent(agent, "tiny"),
    }
    database = await Database.open(database_url)
    async with Store(database).change() as deleting:
        (endpoint,) = await deleting.endpoints()
        await deleting.delete_endpoint(endpoint.id, START)
        doing = asyncio.create_task(commands[command]())
        await eventually(lambda: waits(database))
    with pytest.raises(NotFound, match="no endpoint 'tiny'"):
        await doing
    await database.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("departed", [True, False])
async def test_two_routers_that_saw_the_same_agents_do_not_wait_for_each_other(
    under_test: PlaneUnderTest, database_url: str, departed: bool
) -> None:
    await under_test.demo_project()
    key = await under_test.join_key(max_uses=2)
    nodes = [Node(bytes([number]) * 32) for number in (1, 2)]
    first, second = sorted([(await under_test.enroll(node.request(key))).agent_id for node in nodes])
    reports = [AgentSeen(agent=second, seen_at=START), AgentSeen(agent=first, seen_at=START, departed=departed)]
    database = await Database.open(database_url)
    locking = text("SELECT id FROM agents WHERE id = :id FOR UPDATE NOWAIT")
    async with database.write() as another:
        # The other router has the first agent, and will take the second.
        await another.execute(locking, {"id": first})
        for each in reports:
            under_test.plane.report_seen(each)
        writing = asyncio.create_task(under_test.plane.write_seen())
        await eventually(lambda: waits(database), what="one waits for the other", beside=[writing])
        await another.execute(locking, {"id": second})
    await writing
    assert {each.agent.last_seen_at for each in await under_test.plane.accounts.agents("demo")} == {START}
    await database.close()


async def test_what_was_seen_is_written_within_a_second(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    agent = (await under_test.enroll(Node().request(await under_test.join_key()))).agent_id

    async def state() -> str | None:
        (standing,) = await under_test.plane.accounts.agents("demo")
        return standing.agent.state

    running = asyncio.create_task(under_test.plane.run())
    under_test.plane.report_seen(AgentSeen(agent=agent, seen_at=START, state="draining"))
    async with asyncio.timeout(PATIENCE_S):
        while await state() != "draining":
            await asyncio.wait([running], timeout=0.05)
    running.cancel()
    await asyncio.wait([running])


async def test_a_write_that_is_cut_off_loses_no_report(
    under_test: PlaneUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await under_test.demo_project()
    agent = (await under_test.enroll(Node().request(await under_test.join_key()))).agent_id
    under_test.plane.report_seen(AgentSeen(agent=agent, seen_at=START, state="ready"))
    entered = asyncio.Event()

    async def never(transaction: Transaction, reports: Iterable[AgentSeen]) -> None:
        entered.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "agents_seen", never)
        writing = asyncio.create_task(under_test.plane.write_seen())
        await entered.wait()
        writing.cancel()
        await asyncio.wait([writing])
    await under_test.plane.write_seen()
    (standing,) = await under_test.plane.accounts.agents("demo")
    assert standing.agent.state == "ready"


async def test_reports_are_bounded_and_what_has_no_room_is_counted(tmp_path: Path) -> None:
    dropped: list[None] = []
    settings = RouterSettings.model_validate({"data_dir": tmp_path})
    plane = ControlPlane(settings, print, report_dropped=lambda: dropped.append(None))
    for n in [*range(10_050), 0]:
        plane.report_seen(AgentSeen(agent=AgentId(str(n)), seen_at=START))
    assert (len(plane._seen), len(dropped)) == (10_000, 50)


@asynccontextmanager
async def database_away(settings: RouterSettings, request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """The database is there and answers nobody: on SQLite its file is in disorder, on PostgreSQL it lets none in."""
    url = make_url(settings.resolved_database_url)
    if url.get_backend_name() == "sqlite":
        database = Database(settings.resolved_database_url)
        async with database.write() as connection:
            for table in ("installation", "agents"):
                await connection.execute(text(f"ALTER TABLE {table} RENAME TO {table}_elsewhere"))
        yield
        async with database.write() as connection:
            for table in ("installation", "agents"):
                await connection.execute(text(f"ALTER TABLE {table}_elsewhere RENAME TO {table}"))
        await database.close()
        return
    server = request.getfixturevalue("postgres_server")
    server.psql(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS false;")
    server.psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.database}';")
    yield
    server.psql(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS true;")


async def test_without_its_database_the_last_catalog_stays_and_enrollment_answers_503(
    under_test: PlaneUnderTest,
    settings: RouterSettings,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await under_test.demo_project()
    key = await under_test.join_key()
    await under_test.plane.poll()
    before = under_test.catalog
    async with database_away(settings, request):
        under_test.clock.now += 42
        await under_test.plane.poll()
        await under_test.plane.poll()
        assert under_test.catalog is before
        assert under_test.plane.stale_s == 42
        assert [r.message for r in caplog.records].count("database away, serving the last catalog") == 1
        answer = await under_test.post("/v1/enroll", Node().request(key).to_json())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "control_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    await under_test.plane.poll()
    assert under_test.plane.stale_s == 0
    await under_test.enroll(Node().request(key))


async def test_reports_wait_for_a_database_that_is_away(
    under_test: PlaneUnderTest, settings: RouterSettings, request: pytest.FixtureRequest
) -> None:
    await under_test.demo_project()
    enrolled = await under_test.enroll(Node().request(await under_test.join_key()))
    under_test.plane.report_seen(AgentSeen(agent=enrolled.agent_id, seen_at=START + 1, state="ready"))
    async with database_away(settings, request):
        await under_test.plane.write_seen()
    await under_test.plane.write_seen()
    (standing,) = await under_test.plane.accounts.agents("demo")
    assert standing.agent.last_seen_at == START + 1


async def test_key_files_are_for_their_owner_alone(under_test: PlaneUnderTest, settings: RouterSettings) -> None:
    for name in ("secret.key", "curve.key"):
        mode = (settings.data_dir / name).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
    assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o700
    secret = under_test.plane.curve_keypair.secret_key
    assert repr(secret)[2:-1] not in repr(under_test.plane.curve_keypair)


async def test_another_secret_key_is_refused_at_start(plane: ControlPlane, settings: RouterSettings) -> None:
    other = settings.model_copy(update={"data_dir": settings.data_dir.parent / "other"})
    with pytest.raises(KeyFileUnusable, match=r"secret\.key"):
        await PlaneUnderTest(other, Clock()).plane.start()
    assert not (other.data_dir / "secret.key").exists()
    other.data_dir.mkdir(exist_ok=True)
    (other.data_dir / "secret.key").write_text("ab" * 32)
    with pytest.raises(SecretKeyMismatch) as caught:
        await PlaneUnderTest(other, Clock()).plane.start()
    assert "XEROTIER_ROUTER_SECRET_KEY" in caught.value.remedy
    (other.data_dir / "secret.key").write_text("no key")
    with pytest.raises(KeyFileUnusable, match="64 hexadecimal"):
        await PlaneUnderTest(other, Clock()).plane.start()


async def test_the_database_holds_no_secret(under_test: PlaneUnderTest, settings: RouterSettings) -> None:
    await under_test.demo_project()
    api_key, _ = await under_test.plane.accounts.create_api_key("demo", "app")
    key = await under_test.join_key()
    enrolled = await under_test.enroll(Node().request(key))
    database = Database(settings.resolved_database_url)
    async with database.read() as connection:
        rows = []
        for table in ("installation", "projects", "api_keys", "join_keys", "agents", "refresh_tokens"):
            rows += list(await connection.execute(text(f"SELECT * FROM {table}")))
    await database.close()
    stored = repr(rows)
    own_key = (settings.data_dir / "secret.key").read_text().strip()
    for secret in (api_key, key.secret, enrolled.refresh_token, enrolled.xem_token, own_key):
        assert secret not in stored
        assert repr(secret.encode())[2:-1] not in stored
    assert repr(bytes.fromhex(own_key)) not in stored


def test_an_xem_token_stands_for_its_agent_for_an_hour() -> None:
    key = b"k" * 32
    token = mint_xem_token(key, AgentId("a"), PROJECT, START)
    claims = verify_xem_token(key, token, START + 3599)
    assert claims is not None
    assert (claims.agent, claims.project) == ("a", PROJECT)
    assert verify_xem_token(key, token, START + 3600) is None
    assert verify_xem_token(b"x" * 32, token, START) is None
    assert verify_xem_token(key, f"{token}x", START) is None


async def test_a_plane_that_is_not_started_says_so(tmp_path: Path) -> None:
    plane = ControlPlane(RouterSettings.model_validate({"data_dir": tmp_path}), print)
    with pytest.raises(RuntimeError, match="not started"):
        plane.api()
    await plane.close()


async def test_the_secret_key_may_come_from_the_setting_or_a_file(tmp_path: Path, database_url: str) -> None:
    values = {"data_dir": tmp_path / "a", "database_url": database_url}
    first = PlaneUnderTest(RouterSettings.model_validate(values | {"secret_key": "ab" * 32}), Clock())
    await first.plane.start()
    assert not (tmp_path / "a" / "secret.key").exists()
    (tmp_path / "key").write_text("AB" * 32 + "\n")
    second = PlaneUnderTest(RouterSettings.model_validate(values | {"secret_key_file": tmp_path / "key"}), Clock())
    await second.plane.start()
    assert first.plane.api_key_hash("x") == second.plane.api_key_hash("x")
    await first.plane.close()
    await second.plane.close()
    missing = RouterSettings.model_validate(values | {"secret_key_file": tmp_path / "missing"})
    with pytest.raises(KeyFileUnusable, match="missing"):
        await PlaneUnderTest(missing, Clock()).plane.start()


async def test_routers_that_start_at_once_agree_on_the_key_that_one_of_them_made(settings: RouterSettings) -> None:
    planes = [PlaneUnderTest(settings, Clock()).plane for _ in range(5)]
    await asyncio.gather(*(plane.start() for plane in planes))
    assert len({plane.api_key_hash("x") for plane in planes}) == 1
    assert len({plane.curve_keypair.public_key for plane in planes}) == 1
    assert sorted(each.name for each in settings.data_dir.iterdir() if "key" in each.name) == [
        "curve.key",
        "secret.key",
    ]
    for plane in planes:
        await plane.close()


async def test_the_node_of_a_deleted_agent_is_unknown_and_may_enroll_anew(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    accounts, node = under_test.plane.accounts, Node()
    enrolled = await under_test.enroll(node.request(await under_test.join_key()))
    refreshed = await under_test.refresh(node.refresh(enrolled.agent_id, enrolled.refresh_token))
    await accounts.revoke_agent(enrolled.agent_id)
    await under_test.plane.poll()
    assert under_test.catalog.revoked_curve_keys == {node.curve}
    await accounts.delete_agent(enrolled.agent_id)
    await under_test.plane.poll()
    assert under_test.catalog.revoked_curve_keys == frozenset()
    assert under_test.catalog.agents == {}
    again = node.refresh(enrolled.agent_id, refreshed.refresh_token)
    assert await under_test.refusal(again) == (401, "refresh_token_unknown")
    # A sign of life that was under way is nobody's.
    under_test.plane.report_seen(AgentSeen(agent=enrolled.agent_id, seen_at=START, state="ready"))
    await under_test.plane.write_seen()
    assert await accounts.agents() == []
    await under_test.enroll(node.request(await under_test.join_key()))


async def test_an_agent_not_seen_for_a_day_is_dead_until_it_is_seen_again(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    agent = (await under_test.enroll(Node().request(await under_test.join_key()))).agent_id
    await under_test.plane.poll()
    assert not under_test.catalog.agents[agent].dead
    assert under_test.catalog.agents[agent].pending
    under_test.clock.now += 24 * 3600
    await under_test.plane.poll()
    assert under_test.catalog.agents[agent].dead
    under_test.plane.report_seen(AgentSeen(agent=agent, seen_at=under_test.clock.now))
    await under_test.plane.write_seen()
    under_test.clock.now += 300
    await under_test.plane.poll()
    assert not under_test.catalog.agents[agent].dead
    assert not under_test.catalog.agents[agent].pending
