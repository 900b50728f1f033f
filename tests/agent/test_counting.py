"""Streams without a report are counted afterwards: what is told, how many at once, and what is kept for it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.agent.serving_parts import Parts, chat, node
from tests.support.programs import PATIENCE_S
from tests.support.router_stub import RouterStub
from xim_agent import counting
from xim_agent.counting import Delivered, UsageCounter
from xim_agent.engine.client import EngineUnavailable
from xim_protocol.ids import ProjectId, RequestId, StreamId
from xim_protocol.messages import Counted, Submit

BODY = b'{"prompt": "hello"}'


def texts_of(events: bytes) -> str:
    said = [json.loads(line[6:]) for line in events.split(b"\n\n") if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for event in said for choice in event["choices"])


async def counted(router: RouterStub) -> Counted:
    await router.until(lambda: bool(router.of_type(Counted)))
    (found,) = router.of_type(Counted)
    assert isinstance(found, Counted)
    return found


# --- With a real engine process --------------------------------------------------------------------------------------


async def test_a_cancelled_stream_is_counted_over_its_prompt_and_what_its_client_read(tmp_path: Path) -> None:
    """A token of the fake engine is a byte."""
    async with RouterStub() as router, node(tmp_path, router) as parts:
        body = chat({"chunks": 40, "text_chars": 11, "hang_after": 7})
        answer = await router.submit(body)
        await router.until(lambda: len(texts_of(bytes(answer.body))) == 77)
        await router.cancel(answer)
        found = await counted(router)
        prompt = len(json.loads(body)["messages"][0]["content"].encode())
        assert found == Counted(request=RequestId(answer.request), attempt=1, usage=(prompt, 77, 0, "counted"))
        await all_dropped(router, parts)


async def test_a_stream_cancelled_before_its_first_byte_cost_its_prompt(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router) as parts:
        # Not in the prompt, which /tokenize gets too.
        answer = await router.submit(chat(user=json.dumps({"first_ms": 60_000})))
        await engine_works(parts)
        await router.cancel(answer)
        assert (await counted(router)).usage == (len("hi"), 0, 0, "counted")


async def test_a_stream_with_a_report_is_not_counted_again_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    async with RouterStub() as router, node(tmp_path, router) as parts:
        answer = await router.ask(chat({"chunks": 4}))
        assert answer.usage is not None
        refused = await router.ask(b'{"stream": true}')
        assert refused.status == 400
        await all_dropped(router, parts)
        assert router.of_type(Counted) == []


async def engine_works(parts: Parts) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await parts.running() != 1:
            pass


async def all_dropped(router: RouterStub, parts: Parts) -> None:
    """Return when nothing is kept any more; the engine's answers pass the time."""
    async with asyncio.timeout(PATIENCE_S):
        while parts.serving._usage.kept_bytes:
            await parts.running()


# --- With an engine that waits ---------------------------------------------------------------------------------------


class Reply:
    """One answer to /tokenize."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status, self._rest = status, [body, b""]

    async def read_chunk(self) -> bytes:
        return self._rest.pop(0)


class Engine:
    """Tokenizes when it may, and notes how many were asked for at once."""

    def __init__(self, status: int = 200, body: bytes = b'{"count": 3}') -> None:
        self.go_on = asyncio.Event()
        self.at_work = self.most = self.asked = 0
        self._reply = status, body

    @contextlib.asynccontextmanager
    async def open(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[Reply]:
        assert (method, path) == ("POST", "/tokenize")
        self.asked += 1
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            await self.go_on.wait()
            yield Reply(*self._reply)
        finally:
            self.at_work -= 1


def submitted(number: int, path: str = "/v1/completions") -> Submit:
    return Submit(
        stream=StreamId(number),
        request=RequestId(f"req_{number}"),
        attempt=1,
        project=ProjectId("p"),
        path=path,
        body=BODY,
        body_bytes=len(BODY),
    )


def told_of(counter: UsageCounter, told: list[Any], number: int, *pieces: bytes) -> Delivered:
    delivered = Delivered(counter)
    for piece in pieces:
        delivered.add(piece)
    counter.count(submitted(number), "served", BODY, delivered, told.append)
    return delivered


async def test_few_are_counted_at_once_and_all_in_their_turn() -> None:
    engine, told = Engine(), list[Counted]()
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        counter = UsageCounter(engine, tasks)
        for number in range(20):
            told_of(counter, told, number, b"data: x")
        while engine.at_work < counting.AT_ONCE:
            await asyncio.to_thread(lambda: None)
        assert counter.kept_bytes == 20 * len(b"data: x")
        engine.go_on.set()
    assert engine.most == counting.AT_ONCE
    assert [found.request for found in told] == [f"req_{number}" for number in range(20)]
    assert {found.usage for found in told} == {(3, 0, 0, "counted")}
    assert counter.kept_bytes == 0


async def test_what_comes_when_too_many_wait_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "WAITING", 3)
    engine, told = Engine(), list[Counted]()
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        counter = UsageCounter(engine, tasks)
        for number in range(5):
            told_of(counter, told, number, b"data: x")
        engine.go_on.set()
    assert [found.request for found in told] == ["req_0", "req_1", "req_2"]
    assert counter.kept_bytes == 0


@pytest.mark.parametrize(("status", "body"), [(500, b"{}"), (200, b"{}"), (200, b"no JSON"), (200, b'{"count": -1}')])
async def test_an_engine_that_names_no_count_leaves_it_unknown(status: int, body: bytes) -> None:
    engine, told = Engine(status, body), list[Counted]()
    engine.go_on.set()
    async with asyncio.TaskGroup() as tasks:
        told_of(UsageCounter(engine, tasks), told, 1)
    assert (engine.asked, told) == (1, [])


async def test_an_engine_that_is_gone_or_silent_leaves_it_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "TIMEOUT_S", 0.05)
    silent, told = Engine(), list[Counted]()

    class Gone(Engine):
        def open(self, *_: object) -> Any:
            raise EngineUnavailable("gone")

    async with asyncio.TaskGroup() as tasks:
        told_of(UsageCounter(silent, tasks), told, 1)
        told_of(UsageCounter(Gone(), tasks), told, 2)
    assert told == []


async def test_what_is_kept_is_bounded_for_each_stream_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "KEPT_BYTES", 10)
    monkeypatch.setattr(counting, "KEPT_TOTAL_BYTES", 25)
    engine, told = Engine(), list[Counted]()
    engine.go_on.set()
    async with asyncio.TaskGroup() as tasks:
        counter = UsageCounter(engine, tasks)
        long = Delivered(counter)
        for _ in range(3):
            long.add(b"12345")
        assert (long.lost, counter.kept_bytes) == (True, 0)
        others = [Delivered(counter) for _ in range(3)]
        for each in others:
            each.add(b"1234567890")
        assert [each.lost for each in others] == [False, False, True]
        assert counter.kept_bytes == 20
        for number, each in enumerate([long, *others]):
            counter.count(submitted(number), "served", BODY, each, told.append)
            each.add(b"late")
    assert [found.request for found in told] == ["req_1", "req_2"]
    assert counter.kept_bytes == 0
