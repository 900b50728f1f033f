"""Programs that are killed or asked to stop, in every phase: each client gets one clear end, and none is forgotten."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Any

import pytest

from tests.faults.parts import engine_runs, load_on, metric_is, nothing_left
from tests.support.accounts import Accounts
from tests.support.load import COMPLETIONS, GENERATING, MESSAGES, Client, Ending, Reading, Route, assert_whole, readings
from tests.support.programs import PATIENCE_S, eventually
from tests.support.topology import Node, Topology

CHARS = 200
LASTING: dict[str, Any] = {"chunks": 100, "text_chars": CHARS, "interval_ms": 50}
"""Five seconds: no test needs as long for what it does while these are under way."""
PATIENT = {"XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S": "60"}
RIGHT = {Ending.WHOLE, Ending.HTTP_ERROR, Ending.ERROR_EVENT}
"""What a client may see while its router lives; a body that is no stream and over the buffer may be `CUT` too."""


class Killed(StrEnum):
    """Which program."""

    AGENT = "agent"
    ENGINE = "engine"
    ROUTER = "router"


@pytest.fixture
async def topology(accounts: Accounts) -> AsyncIterator[Topology]:
    """A router in whose queue a request may wait for its agent's next start."""
    async with Topology(accounts, router=PATIENT) as made:
        yield made


async def every_phase(topology: Topology) -> dict[str, Client]:
    """One client in each phase that a request of a full node can be in."""
    load = load_on(topology)
    clients = {
        "mid-stream": await load.open(**LASTING, seed=1),
        "near the end": await load.open(chunks=20, text_chars=CHARS, interval_ms=20, hang_after=19, seed=2),
        "before the first byte": await load.open(chunks=4, text_chars=CHARS, first_ms=4000, interval_ms=10, seed=3),
        "whole, before its end": await load.open(stream=False, chunks=20, text_chars=CHARS, interval_ms=200, seed=4),
        "over the buffer": await load.open(COMPLETIONS, stream=False, chunks=2000, text_chars=CHARS, interval_ms=2),
    }
    await asyncio.gather(clients["mid-stream"].begun, clients["near the end"].begun)
    await metric_is(topology, "xim_router_in_flight", len(clients))
    clients["parked"] = await load.open(chunks=2, text_chars=CHARS, interval_ms=10, seed=5)
    await metric_is(topology, "xim_router_queue_depth", 1)
    return clients


async def kill(topology: Topology, node: Node, killed: Killed) -> None:
    if killed is Killed.ENGINE:
        engines = topology.engine_processes(node)
        next(each for each in engines if "guard.py" not in " ".join(each.cmdline())).send_signal(signal.SIGKILL)
    else:
        await (node.program if killed is Killed.AGENT else topology.router).kill()


async def seen_by(clients: dict[str, Client]) -> dict[str, Reading]:
    """What each saw, by its phase."""
    async with asyncio.timeout(PATIENCE_S):
        return dict(zip(clients, await readings(clients.values()), strict=True))


@pytest.mark.parametrize("killed", [Killed.AGENT, Killed.ENGINE], ids=str)
async def test_after_a_kill_each_client_has_one_clear_end(topology: Topology, killed: Killed) -> None:
    node = await topology.start_node(MAX_CONCURRENT="5")
    clients = await every_phase(topology)
    await kill(topology, node, killed)
    if killed is Killed.AGENT:
        await topology.restart_node(node)
    seen = await seen_by(clients)
    endings = {phase: reading.ending for phase, reading in seen.items()}
    # What was given to a client cannot be taken back; what was not is done again.
    assert endings["mid-stream"] is Ending.ERROR_EVENT, seen["mid-stream"]
    assert endings["near the end"] is Ending.ERROR_EVENT, seen["near the end"]
    wanted = "agent_lost" if killed is Killed.AGENT else "engine_error"
    assert {seen["mid-stream"].code, seen["near the end"].code} == {wanted}
    for phase in ("before the first byte", "whole, before its end", "parked"):
        assert endings[phase] is Ending.WHOLE, seen[phase]
    assert endings["over the buffer"] in RIGHT | {Ending.CUT}
    await nothing_left(topology)


async def test_after_a_kill_of_the_router_no_client_takes_a_part_for_the_whole(topology: Topology) -> None:
    node = await topology.start_node(MAX_CONCURRENT="5")
    clients = await every_phase(topology)
    await kill(topology, node, Killed.ROUTER)
    seen = await seen_by(clients)
    assert Counter(reading.ending for reading in seen.values()) == {Ending.CUT: len(clients)}
    assert not any(reading.wrong for reading in seen.values())
    # What it had asked for is not worked on for nobody, once it is back.
    topology.router.start()
    await topology.ready(program=node.program)
    await engine_runs(topology, node, 0)
    assert_whole(await readings([await load_on(topology).open(chunks=2, text_chars=CHARS)]))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_an_answer_over_the_buffer_that_breaks_is_closed_before_its_end(topology: Topology, stream: bool) -> None:
    node = await topology.start_node()
    # One piece of 300 KiB and then nothing, or the same as a stream: the router has begun to send.
    script: dict[str, Any] = {"hang_after": 300} if stream else {}
    client = await load_on(topology).open(
        COMPLETIONS, stream=stream, chunks=400, text_chars=1000, interval_ms=1, **script
    )
    await eventually(lambda: client.reading.status or client.done.done(), what="the answer has begun")
    await kill(topology, node, Killed.AGENT)
    await topology.restart_node(node)
    (seen,) = await readings([client])
    assert seen.ending in ({Ending.ERROR_EVENT} if stream else {Ending.CUT, Ending.WHOLE, Ending.HTTP_ERROR}), seen


async def test_an_engine_stream_that_is_cut_short_is_an_error_and_never_a_clean_end(topology: Topology) -> None:
    await topology.start_node()
    for fault in ({"truncate": True}, {"reset_after": 5}):
        for route in GENERATING:
            client = await load_on(topology).open(route, chunks=10, text_chars=CHARS, interval_ms=20, **fault)
            (seen,) = await readings([client])
            # Of `truncate` all text came, of the other what was written before the fault.
            assert_broken_off(route, seen, characters=CHARS * (10 if "truncate" in fault else 5))


async def test_streams_of_an_engine_that_dies_are_errors_and_never_clean_ends(topology: Topology) -> None:
    await topology.start_node()
    load = load_on(topology)
    clients = [await load.open(route, chunks=400, text_chars=CHARS, interval_ms=20) for route in GENERATING]
    await asyncio.gather(*(client.begun for client in clients))
    clients.append(await load.open(chunks=10, text_chars=CHARS, interval_ms=20, die_after=5))
    *seen, last = await readings(clients)
    for route, each in zip(GENERATING, seen, strict=True):
        assert_broken_off(route, each, characters=each.received)
    assert_broken_off(GENERATING[0], last, characters=CHARS * 5)


def assert_broken_off(route: Route, seen: Reading, *, characters: int) -> None:
    """An error event in the route's own form behind so much right text, and nothing else."""
    code = "api_error" if route is MESSAGES else "engine_error"
    assert (seen.ending, seen.code, seen.wrong, seen.received) == (Ending.ERROR_EVENT, code, "", characters), seen


async def test_an_agent_that_drains_finishes_what_it_has_and_its_waiting_requests_move(topology: Topology) -> None:
    leaving = await topology.start_node(MAX_CONCURRENT="4")
    load = load_on(topology)
    clients = await load.open_many(4, **LASTING)
    await asyncio.gather(*(client.begun for client in clients))
    parked = await load.open_many(3, chunks=4, text_chars=CHARS, interval_ms=10)
    await metric_is(topology, "xim_router_queue_depth", 3)
    leaving.program.send(signal.SIGTERM)
    await eventually(lambda: leaving.program.lines("draining"), what="the agent drains")
    # Nobody else is there: they stay. Then somebody is, and answers before the first one has ended.
    assert not any(client.done.done() for client in parked)
    other = topology.node(join_key=await topology.join_key(), MAX_CONCURRENT="4")
    other.program.start()
    assert_whole(await readings(parked))
    assert_whole(await readings(clients))
    assert await leaving.program.ended() == 0
    served = Counter(line["agent"] for line in await topology.request_lines(7, outcome="200"))
    assert served == {leaving.agent_id: 4, other.agent_id: 3}


async def test_requests_at_a_sole_draining_node_wait_for_its_next_start(topology: Topology) -> None:
    node = await topology.start_node(MAX_CONCURRENT="2")
    load = load_on(topology)
    clients = await load.open_many(2, chunks=60, text_chars=CHARS, interval_ms=50)
    await asyncio.gather(*(client.begun for client in clients))
    parked = await load.open_many(3, chunks=4, text_chars=CHARS, interval_ms=10)
    await metric_is(topology, "xim_router_queue_depth", 3)
    assert await node.program.terminate() == 0
    assert_whole(await readings(clients))
    await metric_is(topology, "xim_router_queue_depth", 3)
    await topology.restart_node(node)
    assert_whole(await readings(parked))


async def test_a_router_that_stops_finishes_what_runs_and_tells_those_who_wait(topology: Topology) -> None:
    node = await topology.start_node(MAX_CONCURRENT="4")
    load = load_on(topology)
    clients = await load.open_many(3, **LASTING)
    whole = await load.open(stream=False, chunks=20, text_chars=CHARS, interval_ms=200, seed=70)
    await asyncio.gather(*(client.begun for client in clients))
    await metric_is(topology, "xim_router_in_flight", 4)
    parked = await load.open_many(2, chunks=4, text_chars=CHARS)
    await metric_is(topology, "xim_router_queue_depth", 2)
    topology.router.send(signal.SIGTERM)
    told = await readings(parked)
    assert [(reading.ending, reading.status, reading.code) for reading in told] == [
        (Ending.HTTP_ERROR, 503, "shutting_down")
    ] * 2
    assert_whole(await readings([*clients, whole]))
    assert await topology.router.ended() == 0
    assert node.program.running


async def test_a_router_whose_grace_is_over_tells_the_rest(accounts: Accounts) -> None:
    async with Topology(accounts, router={"XEROTIER_ROUTER_SHUTDOWN_GRACE_S": "0"}) as topology:
        node = await topology.start_node()
        load = load_on(topology)
        clients = [await load.open(route, chunks=400, text_chars=CHARS, interval_ms=50) for route in GENERATING]
        await asyncio.gather(*(client.begun for client in clients))
        unbegun = await load.open(chunks=4, text_chars=CHARS, first_ms=60_000)
        await engine_runs(topology, node, 5)
        topology.router.send(signal.SIGTERM)
        seen = await readings(clients)
        assert {reading.ending for reading in seen} == {Ending.ERROR_EVENT}
        (last,) = await readings([unbegun])
        assert (last.ending, last.code) == (Ending.HTTP_ERROR, "agent_lost")
        assert await topology.router.ended() == 0
        await engine_runs(topology, node, 0)
