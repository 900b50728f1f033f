"""From a router's Submit to the engine and back, with a real engine process and real ZeroMQ."""

import asyncio
import json
import logging
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.agent.serving_parts import chat, node
from tests.support.fake_vllm_script import expected_text
from tests.support.programs import PATIENCE_S
from tests.support.router_stub import Answer as Asked
from tests.support.router_stub import RouterStub
from tests.support.tcp_proxy import TcpProxy
from xim_agent import places
from xim_agent.engine import http
from xim_agent.engine.client import EngineClient
from xim_agent.engine.process import EngineState
from xim_agent.relay import Outcome, Relay, ServedModel
from xim_agent.serving import Serving
from xim_protocol.events import SlotsFree
from xim_protocol.ids import ProjectId
from xim_protocol.messages import FailCode, RefusalReason

OTHER = ProjectId("proj_b")


def text_of(events: bytes) -> str:
    """The text of a chat stream."""
    pieces: list[str] = []
    for line in events.split(b"\n\n"):
        if line.startswith(b"data: {"):
            pieces += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]
    return "".join(pieces)


async def test_a_stream_arrives_whole_and_without_the_usage_nobody_asked_for(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router) as parts:
        answer = await router.ask(chat({"chunks": 40, "interval_ms": 1, "seed": 5}))
        assert (answer.status, answer.ended) == (200, True)
        assert answer.content_type.startswith("text/event-stream")
        text = text_of(bytes(answer.body))
        assert text == expected_text(5, len(text))
        assert len(text) > 40
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert b'"usage":{' not in answer.body
        assert answer.usage is not None
        assert answer.usage[1] > 0
        assert answer.usage[3] == "engine"
        assert parts.serving.statistics().in_flight == 0


async def test_the_usage_a_client_asked_for_stays_in_the_stream(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router):
        answer = await router.ask(chat({"chunks": 3}, stream_options={"include_usage": True}))
        assert b'"usage":{' in answer.body
        assert answer.usage is not None


async def test_the_engine_gets_salt_model_and_request_id(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router):
        answer = await router.ask(chat({"echo": True}, stream=False, cache_salt="mine"))
        body = bytes(answer.body)
        assert f"{answer.request}-1".encode() in body
        assert b"cache_salt" in body
        assert b'\\"mine\\"' not in body
        assert b"whatever" not in body


async def test_an_engines_own_error_passes_through(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router):
        answer = await router.ask(chat(temperature=-5))
        assert answer.status == 400
        assert "error" in json.loads(answer.body)
        answer = await router.ask(chat({"status": 500}))
        assert answer.status == 500
        assert answer.failed is None


@pytest.mark.parametrize(
    ("script", "code", "retryable"),
    [
        ({"status": 503}, FailCode.ENGINE_UNAVAILABLE, True),
        ({"reset_after": 0}, FailCode.ENGINE_UNAVAILABLE, True),
        ({"reset_after": 3, "interval_ms": 5}, FailCode.ENGINE_BROKEN, True),
    ],
)
async def test_an_engine_that_fails_is_told_from_one_that_answers(
    tmp_path: Path, script: dict[str, object], code: FailCode, retryable: bool
) -> None:
    async with RouterStub() as router, node(tmp_path, router) as parts:
        answer = await router.ask(chat(script))
        assert answer.failed is not None
        assert (answer.failed.code, answer.failed.retryable) == (code, retryable)
        assert parts.serving.statistics().in_flight == 0
        again = await router.ask(chat({"chunks": 2}))
        assert again.ended


async def test_a_body_that_is_no_json_never_reaches_the_engine(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router):
        answer = await router.ask(b"no json")
        assert answer.failed is not None
        assert answer.failed.code is FailCode.BODY_INVALID
        assert "JSON" in answer.failed.message


async def test_a_long_body_is_fetched_and_served(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router):
        answer = await router.ask(chat({"chunks": 2}, padding="x" * 2_000_000))
        assert answer.ended
        assert answer.status == 200


async def test_time_that_is_up_fails_the_stream_and_stops_the_engine(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router) as parts:
        answer = await router.submit(chat({"hang": True}), time_left_ms=200)
        await router.until(lambda: answer.over)
        assert answer.failed is not None
        assert answer.failed.code is FailCode.TIME_UP
        await parts.idle_engine(parts.stopwatch())


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancel_stops_the_engine_within_a_second(tmp_path: Path, stream: bool) -> None:
    async with RouterStub() as router, node(tmp_path, router, capacity=1) as parts:
        answer = await router.submit(chat({"chunks": 4_000}, stream=stream))
        if stream:
            await router.until(lambda: answer.chunks > 2)
        else:
            async with asyncio.timeout(PATIENCE_S):
                while not await parts.running():
                    pass
        asked = parts.stopwatch()
        await router.cancel(answer)
        await parts.idle_engine(asked)
        assert parts.serving.statistics().in_flight == 0
        await router.until(lambda: answer.over)
        assert answer.failed is not None
        assert answer.failed.code is FailCode.CANCELLED
        assert parts.outcomes == [Outcome.CANCELLED]
        assert (await router.ask(chat({"chunks": 2}))).ended


async def test_a_client_that_does_not_read_stops_the_reading_from_the_engine(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router) as parts:
        router.consuming = False
        answer = await router.submit(chat({"chunks": 20_000, "interval_ms": 0, "seed": 3}))
        await router.until(lambda: len(answer.body) == 65_536)
        other = await router.submit(chat({"chunks": 5}))
        await router.until(lambda: other.over)
        assert len(answer.body) == 65_536
        assert parts.serving.statistics().in_flight == 1
        # What the engine wrote beyond lies in bounded buffers, not in the agent.
        assert parts.connections[0].statistics().kept_bytes <= 65_536 + len(other.body)
        await router.consume(answer)
        await router.until(lambda: answer.over)
        text = text_of(bytes(answer.body))
        assert text == expected_text(3, len(text))
        assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_a_cancel_of_a_stream_that_waits_for_its_client_leaves_nothing(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router, capacity=1) as parts:
        tasks = asyncio.all_tasks()
        router.consuming = False
        answer = await router.submit(chat({"chunks": 20_000, "interval_ms": 0}))
        await router.until(lambda: len(answer.body) == 65_536)
        asked = parts.stopwatch()
        await router.cancel(answer)
        await parts.idle_engine(asked)
        await router.until(lambda: answer.over)
        assert parts.outcomes == [Outcome.CANCELLED]
        assert parts.serving.statistics().in_flight == 0
        assert not {task for task in asyncio.all_tasks() - tasks if answer.request in task.get_name()}


async def test_a_stream_that_waits_for_its_client_does_not_outlive_the_connection(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router, capacity=1) as parts:
        tasks = asyncio.all_tasks()
        router.consuming = False
        answer = await router.submit(chat({"chunks": 20_000, "interval_ms": 0}))
        await router.until(lambda: len(answer.body) == 65_536)
        waiting = [task for task in asyncio.all_tasks() - tasks if answer.request in task.get_name()]
        assert waiting
        left = parts.stopwatch()
        parts.connections[0].close()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait(waiting)
        await parts.idle_engine(left)
        assert parts.outcomes == [Outcome.ABORTED]
        assert parts.serving.statistics().in_flight == 0


async def test_the_end_of_an_answer_waits_for_the_credit_of_its_last_bytes(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router, capacity=1) as parts:
        router.consuming = False
        answer = await router.submit(chat({"body_bytes": 100_000, "seed": 4}, stream=False))
        await router.until(lambda: len(answer.body) == 65_536)
        assert parts.serving.statistics().in_flight == 1
        assert not answer.over
        await router.consume(answer)
        await router.until(lambda: answer.over)
        assert (answer.ended, len(answer.body)) == (True, 100_000)
        assert answer.usage is not None
        text = json.loads(answer.body)["choices"][0]["message"]["content"]
        assert text == expected_text(4, len(text))


async def test_a_short_answer_needs_no_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "KEEP_ALIVE_S", PATIENCE_S)
    async with RouterStub() as router, node(tmp_path, router) as parts:
        assert (await router.ask(chat({"chunks": 2}))).ended  # leaves a connection behind
        made: list[str] = []
        relaying = parts.serving._relaying
        create = relaying.tasks.create_task

        def noted(coroutine: Coroutine[Any, Any, None], *, name: str) -> "asyncio.Task[None]":
            made.append(name)
            return create(coroutine, name=name)

        monkeypatch.setattr(relaying.tasks, "create_task", noted)
        answer = await router.submit(chat({"chunks": 20, "interval_ms": 1}), time_left_ms=60_000)
        await router.until(lambda: answer.over)
        assert answer.ended
        assert made == []


async def test_a_link_cut_and_restored_leaves_the_stream_exact(tmp_path: Path) -> None:
    async with RouterStub() as router:
        address = router.address
        async with TcpProxy(address.control_addr) as control, TcpProxy(address.streaming_addr) as streaming:
            router.admit_all = True
            through = replace(address, control_addr=control.address, streaming_addr=streaming.address)
            async with node(tmp_path, through):
                await router.opened()
                answer = await router.submit(chat({"chunks": 300, "interval_ms": 5, "seed": 9}))
                await router.until(lambda: answer.chunks > 20)
                for _ in range(2):
                    router.hellos.clear()
                    await asyncio.gather(control.cut(), streaming.cut())
                    await asyncio.gather(control.restore(), streaming.restore())
                    await router.until(lambda: bool(router.hellos) and router.is_open)
                await router.until(lambda: answer.over)
                text = text_of(bytes(answer.body))
                assert text == expected_text(9, len(text))
                assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_streams_of_one_step_share_messages(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router, capacity=32, coalesce_s=0.05) as parts:
        answers = [await router.submit(chat({"chunks": 30, "interval_ms": 10})) for _ in range(16)]
        await router.until(lambda: all(answer.over for answer in answers))
        written = parts.connections[0].writer.statistics()
        assert sum(written.buckets) == written.messages
        assert any(written.buckets[4:])  # messages with more than eight entries
        assert written.messages < 16 * 30 / 4


async def test_refusals_say_why(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router, ready=False) as parts:
        await _refused(router, RefusalReason.NOT_READY)
        await parts.states.reach(EngineState.READY)
        parts.serving.engine_ready(ServedModel(name="served"))
        assert (await router.ask(chat({"chunks": 1}))).ended
        await _refused(router, RefusalReason.ROUTE, path="/v1/load_lora_adapter")
        parts.serving.take_nothing_new()
        await _refused(router, RefusalReason.DRAINING)


async def _refused(router: RouterStub, reason: RefusalReason, path: str = "/v1/chat/completions") -> None:
    answer = await router.ask(chat({"chunks": 1}), path=path)
    assert answer.refused is not None
    assert answer.refused.reason is reason


async def test_a_route_without_a_salt_serves_one_project(tmp_path: Path) -> None:
    body = json.dumps({"model": "m", "input": "text"}).encode()
    async with RouterStub() as router, node(tmp_path, router) as parts:
        assert (await router.ask(body, path="/v1/embeddings")).ended
        other = await router.ask(body, path="/v1/embeddings", project=OTHER)
        assert other.refused is not None
        assert other.refused.reason is RefusalReason.ROUTE
        assert (await router.ask(chat({"chunks": 1}), project=OTHER)).ended
        parts.serving.engine_emptied()
        assert (await router.ask(body, path="/v1/embeddings", project=OTHER)).ended


async def test_beyond_capacity_the_router_refused_first_hears_first_of_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two sockets keep no order between them; so much later than the first, the second has not been overtaken.
    monkeypatch.setattr(places, "NEXT_ROUTER_S", 1.0)
    async with RouterStub() as first, RouterStub() as second, node(tmp_path, first, second, capacity=1) as parts:
        await first.opened()
        await second.opened()
        running = await first.submit(chat({"hang": True}))
        async with asyncio.timeout(PATIENCE_S):
            while parts.serving.statistics().in_flight == 0:
                await parts.running()
        for router in (second, first):
            answer = await router.ask(chat({"chunks": 1}))
            assert answer.refused is not None
            assert (answer.refused.reason, answer.refused.in_flight) == (RefusalReason.AT_CAPACITY, 1)
        heard: list[RouterStub] = []
        await first.cancel(running)

        async def hear(router: RouterStub) -> None:
            await router.until(lambda: SlotsFree(free=1) in router.events)
            heard.append(router)

        await asyncio.gather(hear(first), hear(second))
        assert heard == [second, first]


def _broken(_self: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("owner", "method"), [(EngineClient, "idle"), (Relay, "start")], ids=["in a stream", "before it has begun"]
)
async def test_a_bug_in_one_stream_harms_no_other(
    owner: type, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RouterStub() as router, node(tmp_path, router) as parts:
        lasting: Asked = await router.submit(chat({"chunks": 100, "interval_ms": 5}))
        await router.until(lambda: lasting.chunks > 2)
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, _broken)
            answer = await router.ask(chat())
        assert answer.failed is not None
        assert answer.failed.code is FailCode.INTERNAL
        assert "ZeroDivisionError" in caplog.text
        assert [record.levelno for record in caplog.records if record.message == "stream failed"] == [logging.ERROR]
        await router.until(lambda: lasting.over)
        assert lasting.ended
        serving: Serving = parts.serving
        assert serving.statistics().in_flight == 0
        assert len(router.hellos) == 1
        assert parts.outcomes == [Outcome.FAILED, Outcome.ENDED]
        assert parts.serving.statistics().in_flight == 0
