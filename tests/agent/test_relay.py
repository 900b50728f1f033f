"""One request beside an engine that answers what no engine of ours would, byte for byte."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.agent.serving_parts import Parts, chat, node
from tests.support.programs import eventually
from tests.support.router_stub import RouterStub
from xim_agent.engine.http import EnginePool
from xim_agent.relay import REFUSAL_BYTES, Outcome
from xim_agent.serving import ServingStatistics
from xim_protocol.messages import FailCode

WINDOW = 65_536
EVENT = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n'
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n%b"


@asynccontextmanager
async def answering(parts: Parts, tmp_path: Path, answer: bytes) -> AsyncIterator[None]:
    """From here on the engine of `parts` answers every request like this, and nothing else."""
    connections: set[asyncio.Task[None]] = set()

    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.create_task(answer_all(reader, writer)))

    server = await asyncio.start_unix_server(accept, str(tmp_path / "raw"))
    real, parts.client._pool = parts.client._pool, EnginePool(tmp_path / "raw")
    try:
        async with server:
            yield
    finally:
        parts.client._pool.close()
        parts.client._pool = real
        await asyncio.gather(*connections)


async def test_what_was_held_back_to_the_end_waits_for_credit_and_goes_before_the_end(tmp_path: Path) -> None:
    cut_off = b'data: {"choices":[],"usage":{"prompt_tokens":1'
    full = EVENT % (b"x" * (WINDOW - len(EVENT % b"")))
    assert len(full) == WINDOW
    async with RouterStub() as router, node(tmp_path, router) as parts:
        answer = EVENTS % (len(full + cut_off), full + cut_off)
        async with answering(parts, tmp_path, answer):
            router.consuming = False
            asked = await router.submit(chat())
            await router.until(lambda: len(asked.body) == WINDOW)
            assert not asked.over
            await router.consume(asked)
            await router.until(lambda: asked.over)
        assert (asked.ended, bytes(asked.body)) == (True, full + cut_off)
        assert parts.outcomes == [Outcome.ENDED]


@pytest.mark.parametrize("size", [10, REFUSAL_BYTES, 3 * REFUSAL_BYTES])
async def test_a_refusal_of_any_length_is_passed_on_whole(tmp_path: Path, size: int) -> None:
    error = b"'loc': 'body.x', 'msg': 'Field required', 'input': '<dict of 5 items>'" + b"e" * size
    head = b"HTTP/1.1 400 x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(error)
    async with RouterStub() as router, node(tmp_path, router) as parts:
        async with answering(parts, tmp_path, head + error):
            asked = await router.ask(json.dumps({"messages": []}).encode())
        assert (asked.status, asked.ended) == (400, True)
        # The client sent two fields less than the engine got.
        assert bytes(asked.body) == error.replace(b"<dict of 5", b"<dict of 3")


async def test_a_stream_that_the_session_gave_up_takes_nothing_and_holds_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = EVENT % b"x"
    async with RouterStub() as router, node(tmp_path, router) as parts:
        async with answering(parts, tmp_path, EVENTS % (len(event), event)):
            with monkeypatch.context() as patch:
                patch.setattr(parts.connections[0].session, "is_live", lambda number: False)
                asked = await router.submit(chat())
                await eventually(
                    lambda: parts.serving.statistics() == ServingStatistics(in_flight=0, accepted=1, outcomes={})
                )
        assert not asked.over


async def test_an_error_on_the_hot_path_fails_its_stream_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> bytes:
        raise ZeroDivisionError

    event = EVENT % b"x"
    async with RouterStub() as router, node(tmp_path, router) as parts:
        async with answering(parts, tmp_path, EVENTS % (len(event), event)):
            with monkeypatch.context() as patch:
                patch.setattr(parts.connections[0].writer, "offer", broken)
                failed = await router.ask(chat())
            whole = await router.ask(chat())
        assert failed.failed is not None
        assert failed.failed.code is FailCode.INTERNAL
        assert "ZeroDivisionError" in caplog.text
        assert (whole.ended, bytes(whole.body)) == (True, event)
        assert parts.outcomes == [Outcome.FAILED, Outcome.ENDED]
