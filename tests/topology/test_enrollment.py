"""Enrolling by the real commands: every way it fails has a code, a remedy, exit code 1, and shows no secret."""

import asyncio
import base64
import json
import re
import shutil
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.accounts import Accounts, Done, command
from tests.support.ports import HOST, free_ports
from tests.support.programs import clean_environment, eventually
from tests.support.tcp_proxy import TcpProxy
from tests.support.topology import MODEL, Node, Topology
from xim_protocol.enrollment import FAILURES, EnrollmentCode
from xim_protocol.join_key import JoinKey

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def topology(accounts: Accounts) -> AsyncIterator[Topology]:
    """A router alone."""
    async with Topology(accounts) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def good_key(topology: Topology) -> str:
    """A key that enrolls many agents."""
    return await topology.join_key("--max-uses", "100")


async def enroll(config: Path, key: str, *flags: str, insecure: bool = True) -> Done:
    """`xerotier-xim-agent enroll`, with the key in the environment."""
    environment = clean_environment(XEROTIER_AGENT_CONFIG_DIR=str(config), XEROTIER_AGENT_JOIN_KEY=key)
    words = ("enroll", *(["--insecure"] if insecure else []), *flags)
    return await asyncio.to_thread(command, "xerotier-xim-agent", *words, environment=environment)


RUN_STATUS = 3
"""Of a `run` that another start would only repeat; systemd leaves it alone."""


def assert_told(done: Done, code: EnrollmentCode, key: str, *, status: int = 1) -> None:
    """Exit status, cause, code and remedy of the common table, no traceback, nothing of the key's secret."""
    assert (done.status, code.value in done.text) == (status, True), done.text
    assert FAILURES[code].remedy in done.text
    assert "Traceback" not in done.text
    assert_no_secret(done.text, key)


def assert_no_secret(text: str, key: str) -> None:
    parts = key.split(".")
    for part in parts[1:2]:
        assert len(part) > 20, "the secret part of the key"
        assert part[:16] not in text
    assert key[:40] not in text


async def test_a_node_that_enrolls_says_so_and_keeps_its_credentials_to_itself(
    topology: Topology, good_key: str, tmp_path: Path
) -> None:
    done = await enroll(tmp_path / "config", good_key)
    assert done.status == 0, done.text
    stored = json.loads((tmp_path / "config" / "enrollment.json").read_text(encoding="utf-8"))
    agent_id = stored["enrollment"]["agent_id"]
    assert re.search(rf"enrollment successful\D.*{agent_id}", done.stdout)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "config").iterdir()}
    assert set(modes.values()) == {0o600}, modes
    assert_no_secret(done.text, good_key)
    assert stored["enrollment"]["refresh_token"] not in done.text
    listed = json.loads((await topology.cli("agent", "list", "--json")).stdout)
    assert [each["status"] for each in listed if each["id"] == agent_id] == ["pending"]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda key: "not a key", EnrollmentCode.JOIN_KEY_MALFORMED),
        (lambda key: key.replace(".", ".x", 1), EnrollmentCode.JOIN_KEY_MALFORMED),
        (lambda key: key[:-1], EnrollmentCode.JOIN_KEY_TRUNCATED),
        (lambda key: key[: len(key) // 2], EnrollmentCode.JOIN_KEY_TRUNCATED),
        (lambda key: key[:20], EnrollmentCode.JOIN_KEY_TRUNCATED),
    ],
    ids=["no-key", "damaged", "one-short", "half", "beginning"],
)
async def test_a_key_that_is_not_whole_is_told_without_asking_anyone(
    good_key: str, tmp_path: Path, damage: Callable[[str], str], code: EnrollmentCode
) -> None:
    damaged = damage(good_key)
    done = await enroll(tmp_path / "config", damaged)
    assert_told(done, code, good_key)
    ran = await run_once(tmp_path / "config", damaged)
    assert_told(ran, code, good_key, status=RUN_STATUS)


async def run_once(config: Path, key: str) -> Done:
    """`xerotier-xim-agent run` with this key, expected to end by itself."""
    (metrics_port,) = free_ports(1)
    environment = clean_environment(
        XEROTIER_AGENT_CONFIG_DIR=str(config),
        XEROTIER_AGENT_JOIN_KEY=key,
        XEROTIER_AGENT_ALLOW_INSECURE="1",
        XEROTIER_AGENT_INITIAL_MODEL_PATH=str(MODEL),
        XEROTIER_AGENT_MODEL_CACHE_PATH=str(config.parent / "cache" / "models"),
        XEROTIER_AGENT_VLLM_PATH=shutil.which("true") or "true",
        XEROTIER_AGENT_METRICS_PORT=str(metrics_port),
    )
    return await asyncio.to_thread(command, "xerotier-xim-agent", "run", environment=environment)


async def test_a_key_that_the_router_does_not_know(topology: Topology, good_key: str, tmp_path: Path) -> None:
    parsed = JoinKey.parse(good_key)
    secret = base64.urlsafe_b64encode(b"x" * 32).rstrip(b"=").decode()
    # Another secret under the key's own id, and the key's own secret under another id.
    for stranger in (replace(parsed, secret=secret), replace(parsed, key_id="0123456789ab")):
        done = await enroll(tmp_path / "config", stranger.encode())
        assert_told(done, EnrollmentCode.JOIN_KEY_UNKNOWN, stranger.encode())
    assert_no_secret(topology.router.written(), good_key)


async def test_a_key_that_has_expired(topology: Topology, tmp_path: Path) -> None:
    key = await topology.join_key("--expires-in", "1s", "--max-uses", "50")

    async def refused() -> Done | None:
        done = await enroll(tmp_path / "config", key, "--again")
        # The first try may still be in time; it would use the key up, hence a key for several.
        return done if done.status else None

    assert_told(await eventually(refused), EnrollmentCode.JOIN_KEY_EXPIRED, key)


async def test_a_key_that_is_used_up(topology: Topology, tmp_path: Path) -> None:
    key = await topology.join_key()
    assert (await enroll(tmp_path / "first", key)).status == 0
    assert_told(await enroll(tmp_path / "second", key), EnrollmentCode.JOIN_KEY_USED_UP, key)
    # The node that has it stays enrolled, and a second command changes nothing.
    again = await enroll(tmp_path / "first", key)
    assert again.status == 0
    assert "--again" in again.stdout


async def test_a_key_that_was_revoked(topology: Topology, tmp_path: Path) -> None:
    done = await topology.cli("join-key", "create", "--project", "alpha", "--json")
    key, key_id = str(done.made["key"]), str(done.made["id"])
    assert (await topology.cli("join-key", "revoke", key_id)).status == 0
    assert_told(await enroll(tmp_path / "config", key), EnrollmentCode.JOIN_KEY_REVOKED, key)
    assert_told(await run_once(tmp_path / "config", key), EnrollmentCode.JOIN_KEY_REVOKED, key, status=RUN_STATUS)


async def test_plain_http_needs_to_be_permitted(topology: Topology, good_key: str, tmp_path: Path) -> None:
    done = await enroll(tmp_path / "config", good_key, insecure=False)
    assert_told(done, EnrollmentCode.INSECURE_TRANSPORT, good_key)
    assert not (tmp_path / "config" / "enrollment.json").exists()


async def test_an_enrollment_address_that_does_not_answer(good_key: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    key = replace(JoinKey.parse(good_key), enroll_url=f"http://{HOST}:{port}").encode()
    assert_told(await enroll(tmp_path / "config", key), EnrollmentCode.ENROLL_UNREACHABLE, key)


async def test_an_enrollment_address_that_is_somebody_elses(topology: Topology, good_key: str, tmp_path: Path) -> None:
    key = replace(JoinKey.parse(good_key), enroll_url=f"http://{HOST}:{topology.metrics_port}").encode()
    done = await enroll(tmp_path / "config", key)
    assert done.status == 1
    assert "http_404" in done.text
    assert "Traceback" not in done.text
    assert_no_secret(done.text, key)


@pytest.mark.parametrize("blocked", ["control", "streaming"])
async def test_a_blocked_port_is_told_by_name_and_requests_wait_until_it_opens(
    accounts: Accounts, blocked: str
) -> None:
    apart = {"XEROTIER_ROUTER_LINK_HOST": "127.0.0.2", "XEROTIER_ROUTER_ADVERTISE_HOST": HOST}
    async with AsyncExitStack() as stack:
        topology = await stack.enter_async_context(Topology(accounts, router=apart))
        ports = {"control": topology.control_port, "streaming": topology.streaming_port}
        proxies = {name: TcpProxy(f"tcp://127.0.0.2:{port}", port) for name, port in ports.items()}
        for name, proxy in proxies.items():
            if name != blocked:
                await stack.enter_async_context(proxy)
        node = topology.node(join_key=await topology.join_key())
        node.program.start()
        code = EnrollmentCode(f"{blocked}_port_unreachable")
        (line, *_) = await eventually(lambda: told_about(node, code), what=f"{code} is told")
        assert line["remedy"] == FAILURES[code].remedy
        assert await topology.agents_ready() == 0
        await stack.enter_async_context(proxies[blocked])
        await topology.ready(program=node.program)


def told_about(node: Node, code: EnrollmentCode) -> list[dict[str, object]]:
    return node.program.lines("no link to the router", problem=code.value)


async def test_a_node_whose_refresh_answer_was_lost_comes_back(accounts: Accounts) -> None:
    """The router has rotated the credentials, the agent never heard of it: its old ones must still be good."""
    async with Topology(accounts) as topology:
        node = await topology.start_node()
        await killed(topology, node)
        before = json.loads((node.config_dir / "enrollment.json").read_text(encoding="utf-8"))
        for _ in range(2):
            await topology.restart_node(node)
            await topology.ready(program=node.program)
            await killed(topology, node)
            # As if the answer had never arrived: what stands on the disk is what stood there before it.
            (node.config_dir / "enrollment.json").write_text(json.dumps(before), encoding="utf-8")
        await topology.restart_node(node)
        await topology.ready(program=node.program)
        assert len(node.program.lines("credentials refreshed")) == 3
        assert topology.router.lines("agent enrolled")[1:] == []


async def killed(topology: Topology, node: Node) -> None:
    """Kill the agent; return when the router knows, so that the next that is ready is the next one."""
    await node.program.kill()
    await topology.ready(0)
