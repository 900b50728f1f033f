"""Who may connect, what others see of it, and whose word a message is."""

import asyncio
import contextlib
import dataclasses
import functools
import os
from collections.abc import AsyncIterator

import pytest
import zmq

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import SSE, AgentStub, hold
from tests.support.stopwatch import Stopwatch
from tests.support.tcp_proxy import TcpProxy
from xim_protocol.agent_session import Link
from xim_protocol.codec import encode, encode_batch
from xim_protocol.errors import FaultReason
from xim_protocol.ids import AgentId
from xim_protocol.messages import Attach, Channel, EntryKind, GoodbyeCode
from xim_router.link import links
from xim_router.link.gatekeeper import Admission
from xim_router.link.transport import HandshakeFailure

SECRET = "the prompt that nobody else may read"


@contextlib.asynccontextmanager
async def recorded(rig: Rig) -> AsyncIterator[tuple[TcpProxy, TcpProxy]]:
    """Proxies before both ports."""
    control, streaming = (TcpProxy(f"tcp://127.0.0.1:{port}") for port in rig.ports)
    async with control, streaming:
        yield control, streaming


async def ask_through_proxies(*, secure: bool) -> list[bytes]:
    """Ask the secret and get it back; returns what passed, by socket and direction."""
    async with (
        Rig("a", secure=secure) as rig,
        recorded(rig) as (control, streaming),
        rig.agent("a", control=control, streaming=streaming),
    ):
        call = await rig.ask({"model": "chat", "prompt": SECRET})
        assert call.json()["prompt"] == SECRET
        passed = (control.to_target, control.from_target, streaming.to_target, streaming.from_target)
        return [bytes(recording) for recording in passed]


async def test_a_recording_holds_the_prompt_without_curve_and_does_not_with_it() -> None:
    plain = await ask_through_proxies(secure=False)
    # The question goes out on control, the answer comes on streaming.
    assert SECRET.encode() in plain[1]
    assert SECRET.encode() in plain[2]
    hidden = await ask_through_proxies(secure=True)
    assert min(map(len, hidden)) > 0
    assert len(hidden[1]) + len(hidden[2]) > 2 * len(SECRET)
    assert not any(SECRET.encode() in recording for recording in hidden)


async def test_an_unknown_key_is_asked_to_come_again_and_admitted_once_the_catalog_has_it() -> None:
    async with Rig("a") as rig, AgentStub(rig.dial("newcomer")) as agent:
        await until(lambda: rig.gatekeeper.refused[Admission.UNKNOWN] >= 2)
        assert agent.session.link is Link.HELLO_SENT
        assert not rig.links
        assert rig.gatekeeper.refused[Admission.REVOKED] == 0
        await agent.drop()
        rig.register("newcomer")
        agent.connect()
        await agent.opened()
        assert rig.serving("newcomer")


async def test_a_revoked_key_is_refused_for_good() -> None:
    async with Rig("a") as rig:
        rig.revoke("a")
        async with AgentStub(rig.dial("a")) as agent:
            await until(lambda: rig.gatekeeper.refused[Admission.REVOKED] == 2)
            # 400 is told, so the agent can tell it from a silence.
            await agent.until(lambda: agent.handshakes_failed > 0)
            assert rig.gatekeeper.refused[Admission.UNKNOWN] == 0
            assert not rig.links
        await until(lambda: rig.transport.handshake_failures[HandshakeFailure.AUTH] > 0)


async def test_a_peer_without_curve_or_with_a_wrong_server_key_gets_nowhere() -> None:
    async with Rig("a") as rig:
        dial = rig.dial("a")
        strangers = [
            AgentStub(dataclasses.replace(dial, secure=False)),
            AgentStub(dataclasses.replace(dial, server_key=zmq.curve_keypair()[0])),
        ]
        for stranger in strangers:
            async with stranger:
                await stranger.until(functools.partial(getattr, stranger, "lost"))
        assert not rig.links
        assert rig.broker.statistics().agents[AgentId("a")].state is None
        await until(lambda: sum(rig.transport.handshake_failures.values()) > 0)


async def test_without_an_answer_of_the_gatekeeper_nobody_is_admitted() -> None:
    """CURVE without a ZAP handler admits every key, if ZAP_ENFORCE_DOMAIN does not say otherwise."""
    async with Rig("a") as rig:
        rig.gatekeeper.close(asyncio.get_running_loop())
        async with AgentStub(rig.dial("a")) as agent:
            await until(lambda: sum(rig.transport.handshake_failures.values()) >= 2)
            assert agent.session.link is Link.HELLO_SENT
        assert not rig.links


# --- Revoked, suspended --------------------------------------------------------------------------------------------


async def test_a_revoked_agent_is_closed_within_a_second_and_its_requests_go_elsewhere() -> None:
    async with Rig("a", "b") as rig, rig.agent("a", serve=hold, capacity=2) as agent, await rig.call() as call:
        work = await agent.work()
        async with rig.agent("b"):
            revoked = Stopwatch()
            rig.revoke("a")
            assert rig.link("a") is None
            await call.rest()
            assert (call.status, call.json()["model"]) == (200, "chat")
            await agent.until(lambda: agent.goodbye is not None and agent.lost)
            assert agent.goodbye is not None
            assert agent.goodbye.code is GoodbyeCode.REVOKED
            revoked.check(1.0, "its link is closed")
            fenced = rig.metrics.hot.fenced_messages
            assert work.agent is agent
            # A new handshake is refused.
            await agent.drop()
            agent.connect()
            await until(lambda: rig.gatekeeper.refused[Admission.REVOKED] > 0)
            assert rig.link("a") is None
            assert rig.metrics.hot.fenced_messages == fenced


async def test_both_connections_of_a_revoked_agent_are_shut_even_if_it_holds_on_to_them() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        link = rig.link("a")
        assert link is not None
        sockets = {inode(descriptor) for descriptor in link.descriptors.values()}
        assert len(sockets) == 2
        agent.silent = True
        revoked = Stopwatch()
        rig.revoke("a")
        await until(lambda: not sockets & open_sockets())
        revoked.check(1.0, "both connections are shut")


def inode(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def open_sockets() -> set[str]:
    """What this process has open."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


async def test_what_a_revoked_agent_still_says_is_dropped_and_it_is_sent_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Time enough for what it says to arrive before its connections are shut.
    monkeypatch.setattr(links, "SHUT_DELAY_S", 1.0)
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await rig.call() as call:
        work = await agent.work()
        rig.revoke("a")
        heard = len(agent.messages)
        # Said in the same moment, on connections that are not shut yet.
        await work.answer(b"too late")
        await call.rest()
        assert (call.status, call.code) == (503, "no_agent_available")
        await until(lambda: rig.count("xim_router_fenced_messages_total") > 0)
        await agent.until(lambda: agent.goodbye is not None and agent.lost)
        assert [type(message).__name__ for message in agent.messages[heard:]] == ["Goodbye"]


async def test_a_suspended_agent_is_turned_away_until_it_is_allowed_again() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await rig.call() as call:
        await agent.work()
        rig.register("a", suspended=True)
        assert rig.link("a") is None
        await call.rest()
        assert (call.status, call.code) == (503, "no_agent_available")
        for _ in range(2):
            await agent.until(lambda: agent.goodbye is not None and agent.lost)
            assert agent.goodbye is not None
            assert agent.goodbye.code is GoodbyeCode.SUSPENDED
            agent.goodbye = None
            await agent.drop()
            agent.connect()
        await agent.until(lambda: agent.lost)
        await agent.drop()
        rig.register("a")
        agent.connect()
        await agent.opened()
        assert rig.serving("a")


# --- Identity ------------------------------------------------------------------------------------------------------


async def test_an_agent_cannot_attach_to_anothers_session() -> None:
    async with Rig("a", "b") as rig, AgentStub(rig.dial("a"), serve=hold) as a, rig.agent("b") as b:
        await a.opened()
        assert a.session.session is not None
        stranger = b._make_socket()
        stranger.connect(b.dial.streaming)
        try:
            stranger.send_multipart(encode(Attach(session=a.session.session)))
            await until(lambda: rig.metrics.hot.fenced_messages == 1)
        finally:
            stranger.close(linger=0)
        assert rig.serving("a")
        assert rig.serving("b")


@pytest.mark.parametrize("kind", ["chunk", "end", "fail"])
async def test_an_agent_that_names_anothers_stream_harms_only_itself(kind: str) -> None:
    async with Rig("a", "b") as rig, rig.agent("a", serve=hold) as a, await rig.call() as call:
        work = await a.work()
        work.start(200, SSE)
        await work.write(b'data: {"from": "a"}\n\n')
        await call.head()
        await call.until(b'"a"}\n\n')
        async with rig.agent("b") as b:
            entry = {
                "chunk": (EntryKind.CHUNK, work.stream, work.produced, b"data: forged\n\n"),
                "end": (EntryKind.END, work.stream, work.produced, None),
                "fail": (EntryKind.FAIL, work.stream, "internal", "forged", False, None),
            }[kind]
            b.say(Channel.STREAMING, encode_batch([entry]))
            await b.until(lambda: b.goodbye is not None and b.lost)
            assert b.goodbye is not None
            assert b.goodbye.code is GoodbyeCode.PROTOCOL_ERROR
            assert rig.faults(FaultReason.UNEXPECTED) == 1
            assert rig.link("b") is None
        await work.write(b"data: [DONE]\n\n")
        work.end()
        await call.rest()
        assert bytes(call.body) == b'data: {"from": "a"}\n\ndata: [DONE]\n\n'


async def test_a_peer_that_claims_anothers_routing_id_receives_nothing_of_it() -> None:
    async with Rig("a", "b") as rig, rig.agent("a") as a:
        link = rig.link("a")
        assert link is not None
        claimed = link.routing_ids[Channel.CONTROL]
        async with AgentStub(rig.dial("b"), routing_id=claimed) as b:
            # Let in by its key, but its Hello is nobody's: the id is taken.
            await asked_and_answered(rig, a, times=5)
            assert b.messages == []
            assert b.session.link is not Link.OPEN
            assert link.routing_ids[Channel.CONTROL] == claimed
        await asked_and_answered(rig, a, times=1)


async def test_of_two_peers_with_one_routing_id_the_first_keeps_its_requests() -> None:
    async with Rig("a", "b") as rig, rig.agent("a", routing_id=b"chosen") as a:
        async with AgentStub(rig.dial("b"), routing_id=b"chosen") as b:
            await asked_and_answered(rig, a, times=5)
            assert b.messages == []
        await asked_and_answered(rig, a, times=1)
        # The id is free for b's next link once a's is gone, and brings it nothing of a's session.
        await a.leave()
        async with AgentStub(rig.dial("b"), routing_id=b"chosen") as b:
            await b.opened()
            assert b.session.session != a.session.session


async def asked_and_answered(rig: Rig, agent: AgentStub, *, times: int) -> None:
    before = len(agent.works)
    for number in range(times):
        call = await rig.ask({"model": "chat", "n": number})
        assert call.json()["n"] == number
    assert len(agent.works) == before + times


async def test_messages_of_a_link_that_was_replaced_are_dropped_and_counted() -> None:
    async with Rig("a") as rig, rig.agent("a") as old, AgentStub(rig.dial("a")) as agent:
        await agent.opened()
        await old.until(lambda: old.goodbye is not None)
        assert old.goodbye is not None
        assert old.goodbye.code is GoodbyeCode.SUPERSEDED
        await old.until(lambda: old.lost)
        assert rig.serving("a")
        await asked_and_answered(rig, agent, times=1)
        assert old.works == []
