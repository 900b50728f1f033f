"""The router's command line, on real databases: what it makes, lists, ends, and how it answers mistakes."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner, Result

from tests.router.control.plane_under_test import Clock, Node, PlaneUnderTest
from tests.support.ports import free_ports
from tests.support.programs import PATIENCE_S, Program, clean_environment, eventually
from xim_protocol.enrollment import JoinKey
from xim_protocol.ids import AgentId
from xim_router.cli import main
from xim_router.control.database_url import database_url
from xim_router.control.plane import ControlPlane
from xim_router.dispatch.reports import AgentSeen
from xim_router.settings import RouterSettings, declared

Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, database_url: str) -> Cli:
    """Runs one command on an empty database and expects its exit code."""
    clean: dict[str, str | None] = {setting.variable: None for setting in declared()}
    env = clean | {
        "XEROTIER_ROUTER_DATA_DIR": str(tmp_path / "state"),
        "XEROTIER_ROUTER_DATABASE_URL": database_url,
    }

    def run(*args: str, exit_code: int = 0, **more: str) -> Result:
        result = CliRunner(env=env | more).invoke(main, args)
        assert result.exit_code == exit_code, result.output
        return result

    return run


PORTS = (
    "XEROTIER_ROUTER_HTTP_PORT",
    "XEROTIER_ROUTER_CONTROL_PORT",
    "XEROTIER_ROUTER_STREAMING_PORT",
    "XEROTIER_ROUTER_METRICS_PORT",
)


@pytest.fixture
def settings_of(tmp_path: Path, database_url: str) -> Callable[[], RouterSettings]:
    """The settings that the commands of the test run with."""
    values = {"data_dir": tmp_path / "state", "database_url": database_url}
    return lambda: RouterSettings.model_validate(values)


async def enrolled_agent(settings: RouterSettings, seen_ago_s: float | None) -> str:
    """Enroll an agent in project `demo` and note when it was seen."""
    plane = ControlPlane(settings, lambda catalog: None)
    under_test = PlaneUnderTest(settings, Clock())
    under_test.plane = plane
    await plane.start()
    node = Node()
    key, _ = await plane.accounts.create_join_key("demo", enroll_url="https://router.example")
    enrolled = await under_test.enroll(node.request(key))
    if seen_ago_s is not None:
        plane.report_seen(AgentSeen(agent=enrolled.agent_id, seen_at=time.time() - seen_ago_s, state="ready"))
    await plane.close()
    return enrolled.agent_id


async def report(settings: RouterSettings, seen: AgentSeen) -> None:
    """Write one report of the data plane."""
    plane = ControlPlane(settings, lambda catalog: None)
    await plane.start()
    plane.report_seen(seen)
    await plane.close()


def made(result: Result) -> dict[str, str]:
    """The JSON that a `create` wrote."""
    return dict(json.loads(result.stdout))


def test_the_whole_way_from_nothing_to_a_join_key(cli: Cli) -> None:
    project = made(cli("project", "create", "--slug", "demo", "--name", "Demo", "--json"))
    endpoint = made(cli("endpoint", "create", "--project", "demo", "--slug", "tiny", "--model", "Tiny-1B", "--json"))
    key = made(cli("key", "create", "--project", "demo", "--name", "app", "--endpoint", "tiny", "--json"))
    join_key = made(cli("join-key", "create", "--project", "demo", "--endpoint", "tiny", "--region", "eu", "--json"))
    assert project["id"].startswith("proj_")
    assert endpoint["task_mode"] == "generate"
    assert key["key"].startswith("xero_demo_")
    parsed = JoinKey.parse(join_key["key"])
    assert (parsed.project_slug, parsed.enroll_url, parsed.region) == ("demo", "http://127.0.0.1:8080", "eu")
    (listed,) = json.loads(cli("endpoint", "list", "--project", "demo", "--json").stdout)
    assert (listed["slug"], listed["model"], listed["project_id"]) == ("tiny", "Tiny-1B", project["id"])
    listings = [cli(kind, "list", *form).stdout for kind in ("key", "join-key") for form in ((), ("--json",))]
    assert key["key"] not in "".join(listings)
    assert parsed.secret not in "".join(listings)
    assert listings[0].splitlines()[0].split()[:3] == ["ID", "NAME", "SCOPES"]


def test_readable_text_is_the_default_and_says_how_to_go_on(cli: Cli) -> None:
    assert "project create" in cli("project", "list").stdout
    cli("project", "create", "--slug", "demo")
    for kind, hint in (("endpoint", "endpoint create"), ("key", "key create"), ("join-key", "join-key create")):
        assert hint in cli(kind, "list").stdout
    assert "join-key create" in cli("agent", "list").stdout
    shown = cli("join-key", "create", "--project", "demo", "--enroll-url", "https://r.example").stdout
    assert "xerotier-xim-agent run" in shown
    assert "--insecure" not in shown
    assert "--insecure" in cli("join-key", "create", "--project", "demo").stdout
    assert "shown this once" in cli("key", "create", "--project", "demo", "--name", "n").stdout
    everywhere = cli("join-key", "create", "--project", "demo", "--json", XEROTIER_ROUTER_HTTP_HOST="0.0.0.0")
    assert "XEROTIER_ROUTER_ADVERTISE_HOST" in everywhere.stderr
    assert made(everywhere)["enroll_url"] == "http://127.0.0.1:8080"


def test_an_empty_quantization_is_none(cli: Cli) -> None:
    cli("project", "create", "--slug", "demo")
    endpoint = ("endpoint", "create", "--project", "demo", "--slug", "tiny", "--model", "M", "--json")
    assert made(cli(*endpoint, "--quantization", ""))["quantization"] is None


def test_revoked_keys_and_deleted_endpoints_are_listed_as_such(cli: Cli) -> None:
    cli("project", "create", "--slug", "demo")
    cli("endpoint", "create", "--project", "demo", "--slug", "tiny", "--model", "M")
    key = made(cli("key", "create", "--project", "demo", "--name", "n", "--expires-in", "30d", "--json"))
    join_key = made(cli("join-key", "create", "--project", "demo", "--json"))
    assert [row["status"] for row in json.loads(cli("key", "list", "--json").stdout)] == ["active"]
    for _ in range(2):
        cli("key", "revoke", key["id"])
        cli("join-key", "revoke", join_key["id"])
    for kind in ("key", "join-key"):
        assert [row["status"] for row in json.loads(cli(kind, "list", "--json").stdout)] == ["revoked"]
    cli("endpoint", "delete", "--project", "demo", "--slug", "tiny")
    assert json.loads(cli("endpoint", "list", "--json").stdout) == []


@pytest.mark.parametrize(
    ("args", "said", "exit_code"),
    [
        (("endpoint", "create", "--project", "no", "--slug", "s", "--model", "m"), "no project 'no'", 1),
        (("endpoint", "delete", "--project", "demo", "--slug", "no"), "no endpoint 'no'", 1),
        (("endpoint", "create", "--project", "demo", "--slug", "v1", "--model", "m"), "slug must be", 1),
        (("endpoint", "create", "--project", "demo", "--slug", "s", "--model", ""), "model's name must be", 1),
        (("project", "create", "--slug", "demo"), "a project 'demo' already", 1),
        (
            ("endpoint", "create", "--project", "demo", "--slug", "taken", "--model", "m"),
            "an endpoint 'taken' already",
            1,
        ),
        (("project", "create", "--slug", "De_mo"), "slug must be", 1),
        (("key", "create", "--project", "demo", "--name", "n", "--endpoint", "no"), "no endpoint 'no'", 1),
        (("key", "create", "--project", "demo", "--name", "n", "--expires-in", "soon"), "30m, 24h or 7d", 2),
        (("key", "create", "--project", "demo", "--name", "n", "--scope", "all"), "inference", 2),
        (("key", "revoke", "no"), "no API key 'no'", 1),
        (("join-key", "create", "--project", "demo", "--region", "a b"), "region", 1),
        (("join-key", "create", "--project", "demo", "--enroll-url", "ftp://x"), "enroll address", 1),
        (("join-key", "revoke", "no"), "no join key 'no'", 1),
        (("agent", "revoke", "no"), "no agent 'no'", 1),
        (("agent", "assign", "no", "--endpoint", "e"), "no agent 'no'", 1),
    ],
)
def test_a_mistake_is_answered_with_a_remedy_and_no_traceback(
    cli: Cli, args: tuple[str, ...], said: str, exit_code: int
) -> None:
    cli("project", "create", "--slug", "demo")
    cli("endpoint", "create", "--project", "demo", "--slug", "taken", "--model", "m")
    result = cli(*args, exit_code=exit_code)
    assert said in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    "args",
    [
        ("key", "revoke", "caf\udce9"),
        ("join-key", "create", "--project", "demo", "--name=caf\udce9"),
        ("agent", "assign", "caf\udce9", "--endpoint", "caf\udce9"),
        ("caf\udce9",),
    ],
)
def test_an_argument_that_is_not_utf_8_is_wrong_usage(cli: Cli, args: tuple[str, ...]) -> None:
    result = cli(*args, exit_code=2)
    assert isinstance(result.exception, SystemExit)
    assert "caf\\udce9' is not UTF-8" in result.output


def test_the_database_commands_tell_its_state(cli: Cli, database_url: str) -> None:
    before = cli("db", "check", exit_code=1)
    assert "db upgrade" in before.output
    assert "revision" in cli("db", "upgrade").stdout
    assert "belongs to the secret key" in cli("db", "check").stdout
    other_key = {"XEROTIER_ROUTER_SECRET_KEY": "ab" * 32}
    assert "does not belong to this database" in cli("db", "check", exit_code=1, **other_key).output


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+asyncpg://xim:hid@den:hush@db:5432/xim", "percent-encoded"),
        ("postgresql+asyncpg://xim:hush@[::1/xim", "percent-encoded"),
        ("postgresql+asyncpg://xim:hush@127.0.0.1:99999/xim", "from 1 to 65535"),
        ("postgresql+asyncpg://xim:hush@127.0.0.1/xim?sslmode=require", "ssl= instead of sslmode="),
        ("postgresql+asyncpg://xim:hush@127.0.0.1/xim?statement_cache_size=0", "statement_cache_size"),
        ("postgresql+asyncpg://xim:hush@127.0.0.1/xim?prepared_statement_cache_size=x", "a port is a number"),
        ("sqlite+aiosqlite:///", "names no file"),
        ("sqlite+aiosqlite:///:memory:", "names no file"),
    ],
)
@pytest.mark.parametrize("command", [("project", "list"), ("db", "check"), ("serve",)])
def test_a_database_url_that_no_driver_takes_is_told_without_its_password(
    cli: Cli, command: tuple[str, ...], url: str, said: str
) -> None:
    result = cli(*command, exit_code=1, XEROTIER_ROUTER_DATABASE_URL=url)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "XEROTIER_ROUTER_DATABASE_URL" in result.output
    assert said in result.output
    assert "hush" not in result.output


def test_the_options_of_a_database_url_that_the_driver_takes_are_passed_on() -> None:
    url = database_url("postgresql+asyncpg://xim@h/d?ssl=require&target_session_attrs=primary")
    assert dict(url.query) == {"ssl": "require", "target_session_attrs": "primary"}


def test_wrong_settings_stop_every_command_with_all_of_them(cli: Cli) -> None:
    wrong = {"XEROTIER_ROUTER_HTTP_PORT": "x", "XEROTIER_ROUTER_SSE_PING_S": "-1", "XEROTIER_ROUTER_SECRET_KEY": "hush"}
    result = cli("project", "list", exit_code=2, **wrong)
    for variable in wrong:
        assert variable in result.output
    assert "hush" not in result.output


@pytest.mark.parametrize(
    "command",
    [
        ("join-key", "create", "--project", "demo"),
        ("project", "list"),
        ("agent", "list"),
        ("settings",),
        ("db", "check"),
    ],
)
def test_a_misspelt_variable_is_warned_of_once(cli: Cli, command: tuple[str, ...]) -> None:
    cli("project", "create", "--slug", "demo")
    assert cli(*command, XEROTIER_ROUTER_HTP_PORT="1").stderr.count("XEROTIER_ROUTER_HTP_PORT is no variable") == 1


def test_serve_warns_of_a_misspelt_variable_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xim_router.cli._serve_requests", lambda _settings, _worker: None)
    monkeypatch.setattr("xim_router.cli.configure_logging", lambda *_words, **_more: None)
    told = cli("serve", XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT="1").stderr
    assert told.count("XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT is no variable") == 1


def test_settings_are_shown_with_their_origin_and_masked(cli: Cli) -> None:
    known = {"XEROTIER_ROUTER_SECRET_KEY": "cd" * 32, "XEROTIER_ROUTER_HTP_PORT": "1"}
    result = cli("settings", **known)
    assert "XEROTIER_ROUTER_SECRET_KEY=********  (environment)" in result.stdout
    assert "XEROTIER_ROUTER_HTTP_PORT=8080  (default)" in result.stdout
    assert "did you mean XEROTIER_ROUTER_HTTP_PORT?" in result.stderr
    assert "cdcd" not in result.output
    rows = json.loads(cli("settings", "--json").stdout)
    assert {row["variable"] for row in rows} == {setting.variable for setting in declared()}


def test_serve_help_lists_every_variable() -> None:
    shown = CliRunner().invoke(main, ["serve", "--help"]).stdout
    for setting in declared():
        assert setting.variable in shown


def test_agents_are_listed_with_their_standing_and_changed(cli: Cli, settings_of: Callable[[], RouterSettings]) -> None:
    cli("project", "create", "--slug", "demo")
    for slug in ("tiny", "other"):
        cli("endpoint", "create", "--project", "demo", "--slug", slug, "--model", "M")
    agent = asyncio.run(enrolled_agent(settings_of(), seen_ago_s=None))

    def standing() -> dict[str, str]:
        (row,) = json.loads(cli("agent", "list", "--project", "demo", "--json").stdout)
        assert row["state"] is None
        return {name: row[name] for name in ("id", "status", "endpoint")}

    assert standing() == {"id": agent, "status": "pending", "endpoint": None}
    cli("agent", "assign", agent, "--endpoint", "other")
    assert standing() == {"id": agent, "status": "pending", "endpoint": "other"}
    cli("agent", "suspend", agent)
    assert standing()["status"] == "suspended"
    cli("agent", "resume", agent)
    assert "no endpoint 'no'" in cli("agent", "assign", agent, "--endpoint", "no", exit_code=1).output
    cli("agent", "assign", agent)
    assert standing() == {"id": agent, "status": "pending", "endpoint": None}
    cli("agent", "revoke", agent)
    assert standing()["status"] == "revoked"


@pytest.mark.parametrize(
    ("seen_ago_s", "status", "state"),
    [(0.0, "active", "ready"), (3600.0, "disconnected", None), (90_000.0, "dead", None)],
)
def test_when_an_agent_was_seen_last_decides_its_status_and_whether_its_state_is_known(
    cli: Cli, settings_of: Callable[[], RouterSettings], seen_ago_s: float, status: str, state: str | None
) -> None:
    cli("project", "create", "--slug", "demo")
    asyncio.run(enrolled_agent(settings_of(), seen_ago_s=seen_ago_s))
    (row,) = json.loads(cli("agent", "list", "--json").stdout)
    assert (row["status"], row["state"]) == (status, state)


def test_an_agent_that_left_or_may_not_serve_has_no_state(cli: Cli, settings_of: Callable[[], RouterSettings]) -> None:
    cli("project", "create", "--slug", "demo")
    agent = asyncio.run(enrolled_agent(settings_of(), seen_ago_s=0.0))

    def shown() -> tuple[str, str | None]:
        (row,) = json.loads(cli("agent", "list", "--json").stdout)
        return row["status"], row["state"]

    cli("agent", "suspend", agent)
    assert shown() == ("suspended", None)
    cli("agent", "resume", agent)
    assert shown() == ("active", "ready")
    asyncio.run(report(settings_of(), AgentSeen(agent=AgentId(agent), seen_at=time.time(), departed=True)))
    assert shown() == ("disconnected", None)
    cli("agent", "revoke", agent)
    assert shown() == ("revoked", None)


def test_only_a_revoked_agent_is_deleted(cli: Cli, settings_of: Callable[[], RouterSettings]) -> None:
    cli("project", "create", "--slug", "demo")
    agent = asyncio.run(enrolled_agent(settings_of(), seen_ago_s=0.0))
    refused = cli("agent", "delete", agent, exit_code=1).output
    assert f"xerotier-router agent revoke {agent}" in refused
    assert len(json.loads(cli("agent", "list", "--json").stdout)) == 1
    cli("agent", "revoke", agent)
    assert "deleted" in cli("agent", "delete", agent).stdout
    assert json.loads(cli("agent", "list", "--json").stdout) == []
    assert f"no agent {agent!r}" in cli("agent", "delete", agent, exit_code=1).output


async def test_commands_take_effect_beside_a_running_router(cli: Cli, tmp_path: Path, database_url: str) -> None:
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    state = {"XEROTIER_ROUTER_DATA_DIR": str(tmp_path / "state"), "XEROTIER_ROUTER_DATABASE_URL": database_url}
    environment = clean_environment(**state, **{name: str(port) for name, port in ports.items()})
    # It logs to a file: nobody reads while it is asked again and again, and a pipe would be full at some time.
    router = Program("router", [sys.executable, "-m", "xim_router", "serve"], environment, tmp_path / "router.log")
    router.start()
    try:
        await eventually(lambda: router.lines("serving") or not router.running, what="it serves")
        assert "xerotier-router project create --slug demo" in router.written()
        await asyncio.to_thread(cli, "project", "create", "--slug", "demo")
        key = made(await asyncio.to_thread(cli, "key", "create", "--project", "demo", "--name", "n", "--json"))
        headers = {"authorization": f"Bearer {key['key']}"}
        url = f"http://127.0.0.1:{ports['XEROTIER_ROUTER_HTTP_PORT']}"
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE_S, trust_env=False) as client:

            async def answers(status: int) -> bool:
                return (await client.get("/v1/models")).status_code == status

            await eventually(lambda: answers(200), what="the key is good")
            await asyncio.to_thread(cli, "key", "revoke", key["id"])
            await eventually(lambda: answers(401), what="the key is good no more")
    finally:
        status = await router.terminate()
    assert status == 0, router.tail()
    assert key["key"] not in router.written()


def test_the_program_itself_runs_and_fails_without_a_traceback(tmp_path: Path) -> None:
    env = os.environ | {"XEROTIER_ROUTER_DATA_DIR": str(tmp_path / "file" / "state")}
    (tmp_path / "file").touch()
    ran = subprocess.run(
        [sys.executable, "-m", "xim_router", "project", "list"], env=env, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1
    assert "set XEROTIER_ROUTER_DATA_DIR" in ran.stderr
    assert "Traceback" not in ran.stderr
