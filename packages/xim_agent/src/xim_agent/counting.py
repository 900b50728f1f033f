"""Counts the tokens of streams that ended without the engine's report, afterwards and out of every request's way.

A few at a time, each in a bounded time; what comes when too many wait is not counted. Nothing of it is on the way of a
live request but that its chunks are kept, by reference and within bounds, until its end.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from xim_agent.engine.client import EngineError
from xim_agent.engine.unreported import Question, unknown_of
from xim_protocol.messages import Counted, Submit

log = logging.getLogger(__name__)

AT_ONCE = 2
"""Counts under way; the engine's API server tokenizes while it serves."""
WAITING = 256
TIMEOUT_S = 5.0
"""For one request, all its questions together."""
QUESTIONS = 16
"""A request with more prompts and choices than this is not counted."""
KEPT_BYTES = 1024 * 1024
"""Of one stream's answer: some 4,000 tokens, each in an event of its own."""
KEPT_TOTAL_BYTES = 64 * 1024 * 1024
_HEADERS = {"content-type": "application/json"}


class Reply(Protocol):
    """What the engine answers."""

    status: int

    async def read_chunk(self) -> bytes:
        """The next bytes, b"" at the end. Raises: EngineBroken."""
        ...


class Tokenizer(Protocol):
    """The engine over HTTP; `engine.client.EngineClient` is one."""

    def open(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> AbstractAsyncContextManager[Reply]:
        """One exchange. Raises on entering: EngineUnavailable."""
        ...


class Delivered:
    """What one client was given, as long as it may have to be counted."""

    __slots__ = ("_closed", "_counter", "_pieces", "_size", "lost")

    def __init__(self, counter: "UsageCounter") -> None:
        self._counter = counter
        self._pieces: list[bytes] = []
        self._size = 0
        self._closed = False
        self.lost = False
        """It was more than may be kept: the stream is not counted."""

    def add(self, payload: bytes) -> None:
        """The hot path: keep `payload`, if there is room."""
        if self._closed:
            return
        size = len(payload)
        counter = self._counter
        if self._size + size > KEPT_BYTES or counter.kept_bytes + size > KEPT_TOTAL_BYTES:
            self.drop()
            self.lost = True
            return
        self._size += size
        counter.kept_bytes += size
        self._pieces.append(payload)

    def close(self) -> list[bytes]:
        """Nothing more comes; what was given so far."""
        self._closed = True
        return self._pieces

    def drop(self) -> None:
        """Keep nothing, and nothing more."""
        self._closed = True
        self._counter.kept_bytes -= self._size
        self._size = 0
        self._pieces = []


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    submit: Submit
    model: str
    body: bytes
    delivered: Delivered
    tell: Callable[[Counted], None]


class UsageCounter:
    """See the module's docstring."""

    def __init__(self, engine: Tokenizer, tasks: asyncio.TaskGroup) -> None:
        self.kept_bytes = 0
        """Held by all `Delivered`."""
        self._engine = engine
        self._tasks = tasks
        self._waiting: deque[_Waiting] = deque()
        self._at_work = 0

    def count(
        self, submit: Submit, model: str, body: bytes, delivered: Delivered, tell: Callable[[Counted], None]
    ) -> None:
        """Count the stream of `submit` when its turn comes; `body` is the engine's. Takes `delivered` over."""
        if delivered.lost or len(self._waiting) >= WAITING:
            delivered.drop()
            return
        delivered.close()
        self._waiting.append(_Waiting(submit=submit, model=model, body=body, delivered=delivered, tell=tell))
        if self._at_work < AT_ONCE:
            self._at_work += 1
            self._tasks.create_task(self._work(), name="count")

    async def _work(self) -> None:
        """Count until nothing waits."""
        try:
            while self._waiting:
                waiting = self._waiting.popleft()
                try:
                    await self._count(waiting)
                except Exception:
                    log.exception("counting failed", extra={"request": waiting.submit.request})
                finally:
                    waiting.delivered.drop()
        finally:
            self._at_work -= 1

    async def _count(self, waiting: _Waiting) -> None:
        submit = waiting.submit
        pieces = waiting.delivered.close()
        unknown = await asyncio.to_thread(unknown_of, submit.path, waiting.body, pieces)
        if unknown is None or len(unknown.prompt) + len(unknown.answer) > QUESTIONS:
            return
        try:
            async with asyncio.timeout(TIMEOUT_S):
                prompt = [await self._ask(question, waiting.model) for question in unknown.prompt]
                answer = [await self._ask(question, waiting.model) for question in unknown.answer]
        except (EngineError, TimeoutError, ValueError) as error:
            log.info("not counted", extra={"request": submit.request, "cause": repr(error)})
            return
        usage = (unknown.known_prompt_tokens + sum(prompt), sum(answer), 0, "counted")
        waiting.tell(Counted(request=submit.request, attempt=submit.attempt, usage=usage))

    async def _ask(self, question: Question, model: str) -> int:
        """Tokens by the engine's own account. Raises: EngineError; ValueError for an answer that names none."""
        body = json.dumps({**question, "model": model}).encode()
        async with self._engine.open("POST", "/tokenize", _HEADERS, body) as reply:
            answer = bytearray()
            while chunk := await reply.read_chunk():
                answer += chunk
            if reply.status != 200:
                raise ValueError(f"/tokenize answered {reply.status}")
        fields = json.loads(answer)
        count = fields.get("count") if isinstance(fields, dict) else None
        if not isinstance(count, int) or count < 0:
            raise ValueError("/tokenize named no count")
        return count
