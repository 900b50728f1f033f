"""What the agent's work leaves in memory: nothing that adds up."""

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.blocks import blocks_kept
from xim_agent.engine.figures import NAMES, figures_in
from xim_agent.engine.http import EngineConnection
from xim_agent.engine.unreported import COUNTED_PATHS, unknown_of
from xim_agent.link.connection import Connection
from xim_agent.mesh import Mesh
from xim_agent.relay import RouterLink, ServedModel
from xim_agent.serving import Serving
from xim_agent.telemetry.metrics import StreamCounters
from xim_protocol.enrollment import RouterAddress
from xim_protocol.events import AgentEvent, RequestReceived, StreamCancelled
from xim_protocol.ids import ProjectId, RequestId, StreamId
from xim_protocol.messages import CancelReason, RouterMember, Submit

TIMES = 1_000
ONE_IN_TWO = 0.5
"""Far above what free lists take once, and below one block for each call."""
SAID = b'data: {"choices":[{"index":0,"delta":{"content":"ab"}}]}\n\n' * 3
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("path", sorted(COUNTED_PATHS))
def test_what_is_to_be_counted_leaves_nothing(path: str) -> None:
    body = json.dumps({"prompt": ["a", "b"], "input": "a", "messages": MESSAGES}).encode()
    assert unknown_of(path, body, [SAID]) is not None
    assert blocks_kept(lambda: unknown_of(path, body, [SAID]), TIMES) < ONE_IN_TWO


def test_the_engines_figures_leave_nothing() -> None:
    text = b"".join(b'%b{model="m"} 1.0\n' % name for name in NAMES)
    assert figures_in(text)
    assert blocks_kept(lambda: figures_in(text), TIMES) < ONE_IN_TWO


def test_a_list_of_the_routers_leaves_nothing() -> None:
    """Every link that opens brings one."""
    router = RouterMember(control_address="tcp://a:1", streaming_address="tcp://a:2", curve_public_key=bytes(32))
    connections: list[Connection] = []

    def dial(address: RouterAddress) -> Connection:
        connections.append(cast(Connection, SimpleNamespace(router=address, is_open=True)))
        return connections[-1]

    mesh = Mesh(dial=dial, given_up=connections.remove, remember=lambda routers: None)
    mesh.start([RouterAddress(control_addr="tcp://a:1", streaming_addr="tcp://a:2", server_curve_key=bytes(32))])
    assert blocks_kept(lambda: mesh.told(connections[0], (router,)), TIMES) < ONE_IN_TWO


STREAM = StreamId(1)
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"ab"}}]}\n\n'
REPORT = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
EVENTS = [b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"] + [
    b"%x\r\n%b\r\n" % (len(event), event) for event in [EVENT, EVENT, REPORT, b"data: [DONE]\n\n"]
]
WHOLE_EVENTS = [*EVENTS, b"0\r\n\r\n"]
OBJECT = b'{"object":"list","usage":{"prompt_tokens":1}}'
WHOLE_OBJECT = [
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(OBJECT),
    OBJECT,
]


class EngineInMemory:
    """Connections over no socket; one that is whole is used again, as by the pool."""

    def __init__(self) -> None:
        self.last: EngineConnection | None = None
        self._kept: EngineConnection | None = None

    def idle(self) -> EngineConnection:
        found, self._kept = self._kept, None
        if found is None:
            found = EngineConnection()
            found.connection_made(cast(asyncio.Transport, NoTransport()))
        self.last = found
        return found

    def give_back(self, connection: EngineConnection) -> None:
        if connection.release():
            self._kept = connection


class NoTransport:
    """Takes everything."""

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        pass


class LinkInMemory:
    """A session that takes everything; how many streams ended whole."""

    def __init__(self) -> None:
        self.ended = 0

    def is_live(self, stream: StreamId) -> bool:
        return True

    def start_response(self, stream: StreamId, status: int, content_type: str) -> None:
        pass

    def offer(self, stream: StreamId, payload: bytes) -> None:
        pass

    def end(self, stream: StreamId, usage: object) -> None:
        self.ended += 1


async def asked(
    tell: Callable[[Callable[[AgentEvent], None], EngineInMemory], None], times: int
) -> tuple[float, LinkInMemory, Serving]:
    """What a request leaves; `tell` is given where events go, and does with the engine's connection what it wants."""
    engine, link = EngineInMemory(), LinkInMemory()
    async with asyncio.TaskGroup() as tasks:
        serving = Serving(
            engine=cast(Any, engine),
            tasks=tasks,
            capacity=4,
            salt_secret="a secret",
            counters=StreamCounters(),
            on_in_flight=lambda number: None,
            on_outcome=lambda outcome: None,
        )
        serving.engine_ready(ServedModel(name="served"))

        def receive(event: AgentEvent) -> None:
            serving.receive(cast(RouterLink, link), event)

        kept = blocks_kept(lambda: tell(receive, engine), times)
    return kept, link, serving


def submitted(path: str, *, stream: bool) -> RequestReceived:
    body = json.dumps({"model": "m", "stream": stream, "input": "a", "messages": MESSAGES}).encode()
    return RequestReceived(
        submit=Submit(
            stream=STREAM,
            request=RequestId("request"),
            attempt=1,
            project=ProjectId("project"),
            path=path,
            body=body,
            body_bytes=len(body),
            headers=(("accept", "*/*"),),
        )
    )


@pytest.mark.parametrize(
    ("path", "pieces"),
    [("/v1/chat/completions", WHOLE_EVENTS), ("/v1/embeddings", WHOLE_OBJECT)],
    ids=["events", "object"],
)
async def test_a_request_that_was_answered_leaves_nothing(path: str, pieces: list[bytes]) -> None:
    request = submitted(path, stream=pieces is WHOLE_EVENTS)

    def answered(receive: Callable[[AgentEvent], None], engine: EngineInMemory) -> None:
        receive(request)
        assert engine.last is not None
        for piece in pieces:
            engine.last.data_received(piece)

    kept, link, serving = await asked(answered, TIMES)
    assert link.ended == TIMES + TIMES // 10
    assert serving.statistics().in_flight == 0
    assert kept < ONE_IN_TWO


async def test_a_request_whose_client_left_leaves_nothing() -> None:
    request = submitted("/v1/embeddings", stream=False)

    def left(receive: Callable[[AgentEvent], None], engine: EngineInMemory) -> None:
        receive(request)
        connection = engine.last
        assert connection is not None
        connection.data_received(WHOLE_OBJECT[0])
        receive(StreamCancelled(stream=STREAM, reason=CancelReason.CLIENT_LEFT))
        assert connection.closed
        connection.connection_lost(None)

    kept, _, serving = await asked(left, TIMES)
    assert serving.statistics().in_flight == 0
    assert kept < ONE_IN_TWO
