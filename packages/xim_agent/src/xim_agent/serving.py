"""Joins requests of the routers to the engine: one task per accepted stream, bytes out as they come.

Knows the link and the engine only by the Protocols below. A place is taken when a request is accepted and given back
exactly once, before its end is told, so that the next request finds it free.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from xim_agent.counting import Delivered, UsageCounter
from xim_agent.engine.body import THREAD_BYTES, BodyInvalid, PreparedBody, prepare_body
from xim_agent.engine.client import EngineBroken, EngineUnavailable
from xim_agent.engine.salt import tenant_salt
from xim_agent.engine.unreported import COUNTED_PATHS
from xim_agent.engine.usage import TokenUsage, UsageReader, usage_reader
from xim_agent.link.writer import StreamGone
from xim_agent.places import Places
from xim_protocol.events import (
    AgentEvent,
    BodyReceived,
    RequestReceived,
    StreamAborted,
    StreamCancelled,
    StreamFailed,
)
from xim_protocol.ids import ProjectId, StreamId
from xim_protocol.messages import Counted, FailCode, RefusalReason, Submit, Usage
from xim_protocol.routes import ROUTES_BY_PATH, Route

log = logging.getLogger(__name__)

BUSY_STATUS = 503
"""The engine takes no more; another node may."""
INVALID_STATUS = 400
REFUSAL_BYTES = 64 * 1024
_OWN_HEADERS = frozenset({"host", "connection", "content-length", "transfer-encoding", "authorization", "x-request-id"})
"""Headers that the agent or its HTTP client sets; a client's own never reach the engine."""


class RouterLink(Protocol):
    """The writing side of one router's session; `link.writer.StreamWriter` is one."""

    def is_live(self, stream: StreamId) -> bool:
        """True while the stream may still produce."""
        ...

    def refuse(self, stream: StreamId, reason: RefusalReason, in_flight: int) -> None:
        """Do not take the request."""
        ...

    def continue_body(self, stream: StreamId) -> None:
        """Ask for a long request body."""
        ...

    def start_response(self, stream: StreamId, status: int, content_type: str) -> None:
        """The engine answered."""
        ...

    def offer(self, stream: StreamId, payload: bytes) -> bytes | None:
        """Hand over what there is credit for now; returns what is left over, if anything. Raises: StreamGone."""
        ...

    async def write(self, stream: StreamId, payload: bytes) -> None:
        """Hand over bytes; suspends while there is no credit. Raises: StreamGone."""
        ...

    def end(self, stream: StreamId, usage: Usage | None) -> None:
        """The response is whole."""
        ...

    def fail(self, stream: StreamId, code: FailCode, message: str, *, retryable: bool) -> None:
        """The stream ends without a whole response."""
        ...

    def announce_slots(self, free: int) -> bool:
        """Places are free again. False while no link can carry it."""
        ...

    def report_counted(self, counted: Counted) -> None:
        """What a stream cost that ended without the engine's report."""
        ...


class Answer(Protocol):
    """What the engine answers, once its status has come."""

    status: int
    content_type: str

    async def read_chunk(self) -> bytes:
        """The next bytes, b"" at the end. Raises: EngineBroken."""
        ...

    async def deliver(self, take: Callable[[bytes], bytes | None]) -> bytes | None:
        """Hand over the body as it comes; None at its end, or what `take` could not take. Raises: EngineBroken."""
        ...


class EngineCalls(Protocol):
    """The engine over HTTP; `engine.client.EngineClient` is one."""

    def open(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> AbstractAsyncContextManager[Answer]:
        """One exchange. Leaving it early stops the engine's work. Raises on entering: EngineUnavailable."""
        ...


class ChunkCounters(Protocol):
    """Plain integers, counted per chunk."""

    chunks: int
    chunk_bytes: int


class Outcome(StrEnum):
    """How a request ended here; a label of metrics."""

    ENDED = "ended"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    ABORTED = "aborted"
    STALLED = "stalled"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingStatistics:
    """What was served so far."""

    in_flight: int
    accepted: int
    outcomes: Mapping[Outcome, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What a ready engine serves."""

    name: str
    """Its one served name."""
    fingerprint: str | None = None
    """Its `system_fingerprint`, None where it gives none."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Stream:
    """One accepted request."""

    link: RouterLink
    submit: Submit
    route: Route
    model: ServedModel
    body: "asyncio.Future[bytes]"
    task: "asyncio.Task[None] | None" = None
    placed: bool = True
    """It still holds its place."""
    asked: bytes | None = None
    """The body that the engine works on, while there is something to count."""
    delivered: Delivered


class Serving:
    """See the module's docstring. Everything happens in the loop of `tasks`."""

    def __init__(
        self,
        *,
        engine: EngineCalls,
        tasks: asyncio.TaskGroup,
        capacity: int,
        salt_secret: str,
        counters: ChunkCounters,
        on_in_flight: Callable[[int], None],
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        """`on_in_flight` is told every change of the number of places taken."""
        self._engine = engine
        self._tasks = tasks
        self._salt_secret = salt_secret
        self._counters = counters
        self._on_outcome = on_outcome
        self._loop = asyncio.get_running_loop()
        self._model: ServedModel | None = None
        self._streams: dict[tuple[RouterLink, StreamId], _Stream] = {}
        self._places = Places(capacity, on_in_flight)
        self._usage = UsageCounter(engine, tasks)
        self._draining = False
        self._unsalted_project: ProjectId | None = None
        self._accepted = 0
        self._outcomes: Counter[Outcome] = Counter()

    # --- For the owner ---------------------------------------------------------------------------------------------

    def engine_ready(self, model: ServedModel) -> None:
        """The engine answers: take requests."""
        self._model = model
        self._places.closed = self._draining
        self._places.offer()

    def engine_unready(self) -> None:
        """The engine does not answer: refuse what comes."""
        self._model = None
        self._places.closed = True

    def linked(self) -> None:
        """A link is open: a router that was refused hears of places that became free without one."""
        self._places.offer()

    def unlink(self, link: RouterLink) -> None:
        """The router left the mesh for good; its streams were aborted before."""
        self._places.forget(link)

    def engine_emptied(self) -> None:
        """A fresh engine process: its caches hold nothing of any project."""
        self._unsalted_project = None

    def receive(self, link: RouterLink, event: AgentEvent) -> None:
        """Take an event of `link`'s session; events that are no business of streams are ignored."""
        match event:
            case RequestReceived():
                self._requested(link, event.submit)
            case BodyReceived():
                stream = self._streams.get((link, event.stream))
                if stream is not None and not stream.body.done():
                    stream.body.set_result(event.body)
            case StreamCancelled():
                self._stop(link, event.stream, Outcome.CANCELLED)
            case StreamAborted():
                self._stop(link, event.stream, Outcome.ABORTED)
            case StreamFailed():
                self._stop(link, event.stream, Outcome.STALLED)

    def take_nothing_new(self) -> None:
        """Refuse everything from here on; what is in flight goes on."""
        self._draining = self._places.closed = True

    async def all_ended(self) -> None:
        """Return when nothing is in flight. The caller sets the deadline."""
        await self._places.all_free()

    def statistics(self) -> ServingStatistics:
        """A reading for metrics and tests."""
        return ServingStatistics(in_flight=self._places.taken, accepted=self._accepted, outcomes=dict(self._outcomes))

    # --- Taking and refusing ---------------------------------------------------------------------------------------

    def _requested(self, link: RouterLink, submit: Submit) -> None:
        route = ROUTES_BY_PATH.get(submit.path)
        reason = self._reason_against(submit, route)
        if reason is None and route is not None and self._model is not None:
            self._accept(link, submit, route, self._model)
            return
        refusal = reason or RefusalReason.ROUTE
        if refusal is RefusalReason.AT_CAPACITY:
            self._places.refused(link)
        link.refuse(submit.stream, refusal, self._places.taken)
        self._count(Outcome.REFUSED)

    def _reason_against(self, submit: Submit, route: Route | None) -> RefusalReason | None:
        """Why the request is not taken, or None."""
        if route is None or submit.method != "POST":
            return RefusalReason.ROUTE
        if self._draining:
            return RefusalReason.DRAINING
        if self._model is None:
            return RefusalReason.NOT_READY
        if self._places.full:
            return RefusalReason.AT_CAPACITY
        if not route.cache_salt:
            # Nothing keeps two projects apart in the prefix cache on such a route: the first one has the node.
            if self._unsalted_project not in (None, submit.project):
                return RefusalReason.ROUTE
            self._unsalted_project = submit.project
        return None

    def _accept(self, link: RouterLink, submit: Submit, route: Route, model: ServedModel) -> None:
        key = (link, submit.stream)
        body = self._loop.create_future()
        delivered = Delivered(self._usage)
        stream = _Stream(link=link, submit=submit, route=route, model=model, body=body, delivered=delivered)
        if submit.body is not None:
            body.set_result(submit.body)
        else:
            link.continue_body(submit.stream)
        self._streams[key] = stream
        self._accepted += 1
        self._places.take()
        name = f"{submit.request}-{submit.attempt}"
        stream.task = self._tasks.create_task(self._serve(stream), name=name)
        # Not in the task's own finally: a task that is cancelled before its first step never gets there.
        stream.task.add_done_callback(lambda _: self._forget(key, stream))

    def _stop(self, link: RouterLink, number: StreamId, outcome: Outcome) -> None:
        """Nobody waits for the stream; leaving the exchange closes the engine's connection."""
        stream = self._streams.pop((link, number), None)
        if stream is None:
            return
        if stream.placed:
            self._count(outcome)
        self._give_back(stream)
        if outcome is not Outcome.ABORTED:
            self._count_usage(stream)
        if stream.task is not None:
            stream.task.cancel()

    def _forget(self, key: tuple[RouterLink, StreamId], stream: _Stream) -> None:
        # A cancelled task keeps its traceback, and with it the stream: a circle that only a full collection would find.
        stream.task = None
        if self._streams.get(key) is stream:
            del self._streams[key]
        self._give_back(stream)
        if stream.asked is not None:
            stream.delivered.drop()  # nobody counts it

    def _count_usage(self, stream: _Stream) -> None:
        """The stream ended without a report after the engine began."""
        asked, stream.asked = stream.asked, None
        if asked is not None:
            link = stream.link
            self._usage.count(stream.submit, stream.model.name, asked, stream.delivered, link.report_counted)

    def _give_back(self, stream: _Stream) -> None:
        if stream.placed:
            stream.placed = False
            self._places.give_back()

    def _count(self, outcome: Outcome) -> None:
        self._outcomes[outcome] += 1
        self._on_outcome(outcome)

    # --- One stream ------------------------------------------------------------------------------------------------

    async def _serve(self, stream: _Stream) -> None:
        """The root of a stream's task: nothing that goes wrong in it harms another."""
        submit = stream.submit
        limit_s = None if submit.time_left_ms is None else submit.time_left_ms / 1000
        try:
            async with asyncio.timeout(limit_s) as limit:
                await self._exchange(stream)
        except BodyInvalid as error:
            self._fail(stream, FailCode.BODY_INVALID, error.detail, retryable=False)
        except EngineUnavailable as error:
            log.warning("engine unavailable", extra={"request": submit.request, "cause": str(error)})
            self._fail(stream, FailCode.ENGINE_UNAVAILABLE, "The engine gives no answer.", retryable=True)
        except EngineBroken as error:
            log.warning("engine broke off", extra={"request": submit.request, "cause": str(error)})
            self._fail(stream, FailCode.ENGINE_BROKEN, "The engine's answer broke off.", retryable=True)
        except StreamGone:
            # The session said so already, or will in a moment.
            log.debug("stream is gone", extra={"request": submit.request})
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                self._fail(stream, FailCode.TIME_UP, "The time for this request is over.", retryable=False)
            else:
                log.exception("stream failed", extra={"request": submit.request})
                self._fail(stream, FailCode.INTERNAL, "The agent failed.", retryable=False)

    async def _exchange(self, stream: _Stream) -> None:
        """Ask the engine and pass its answer on."""
        submit = stream.submit
        prepared = await self._prepared(stream)
        stream.asked = prepared.body if submit.path in COUNTED_PATHS else None
        async with self._engine.open(submit.method, submit.path, _headers(submit), prepared.body) as answer:
            if answer.status == BUSY_STATUS:
                raise EngineUnavailable("the engine answered 503")
            stream.link.start_response(submit.stream, answer.status, answer.content_type)
            reader = usage_reader(
                answer.content_type, take_out=prepared.take_usage_out, fingerprint=stream.model.fingerprint
            )
            if answer.status >= INVALID_STATUS:
                stream.asked = None
            if answer.status == INVALID_STATUS:
                await self._relay_refusal(stream, answer, prepared)
            else:
                await self._relay(stream, answer, reader)
        self._end(stream, reader.usage())

    async def _prepared(self, stream: _Stream) -> PreparedBody:
        body = await stream.body  # ended by the router's last piece, by a cancel, or by the request's time
        project = stream.submit.project

        def salt(sent: str | None) -> str:
            return tenant_salt(self._salt_secret, project, sent)

        if len(body) <= THREAD_BYTES:
            return prepare_body(body, route=stream.route, model=stream.model.name, salt=salt)
        return await asyncio.to_thread(prepare_body, body, route=stream.route, model=stream.model.name, salt=salt)

    async def _relay(self, stream: _Stream, answer: Answer, reader: UsageReader) -> None:
        """The hot path: no task switch per chunk while there is credit."""
        number, link, counters = stream.submit.stream, stream.link, self._counters
        deliver = stream.delivered.add if stream.asked is not None and _is_event_stream(answer) else None

        def take(chunk: bytes) -> bytes | None:
            counters.chunks += 1
            counters.chunk_bytes += len(chunk)
            payload = reader.feed(chunk)
            if deliver is not None:
                deliver(payload)
            return link.offer(number, payload) if payload else None

        while (rest := await answer.deliver(take)) is not None:
            await link.write(number, rest)
        if payload := reader.finish():
            await link.write(number, payload)

    async def _relay_refusal(self, stream: _Stream, answer: Answer, prepared: PreparedBody) -> None:
        """An error that may speak of the body's fields, in the client's terms; a long one is no such error."""
        error = b""
        while len(error) <= REFUSAL_BYTES and (chunk := await answer.read_chunk()):
            error += chunk
        await stream.link.write(stream.submit.stream, prepared.restore_error(error))
        while chunk := await answer.read_chunk():
            await stream.link.write(stream.submit.stream, chunk)

    def _end(self, stream: _Stream, usage: TokenUsage | None) -> None:
        if not stream.link.is_live(stream.submit.stream):
            return
        self._give_back(stream)
        self._count(Outcome.ENDED)
        stream.link.end(stream.submit.stream, None if usage is None else usage.for_wire())

    def _fail(self, stream: _Stream, code: FailCode, message: str, *, retryable: bool) -> None:
        if not stream.link.is_live(stream.submit.stream):
            return
        self._give_back(stream)
        self._count(Outcome.FAILED)
        stream.link.fail(stream.submit.stream, code, message, retryable=retryable)
        if code is not FailCode.ENGINE_UNAVAILABLE:
            self._count_usage(stream)


def _is_event_stream(answer: Answer) -> bool:
    return answer.content_type.startswith("text/event-stream")


def _headers(submit: Submit) -> dict[str, str]:
    """What the engine is sent: the client's few headers that the router let through, and the agent's own."""
    headers = {"content-type": "application/json"}
    headers.update((name, value) for name, value in submit.headers if name not in _OWN_HEADERS)
    # The engine makes it the response's id, so that a router's log and an engine's can be laid side by side.
    headers["x-request-id"] = f"{submit.request}-{submit.attempt}"
    if submit.traceparent is not None:
        headers["traceparent"] = submit.traceparent
    return headers
