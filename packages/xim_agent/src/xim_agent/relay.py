"""One accepted request: from its body to the end of the engine's answer, driven by callbacks.

Nothing on this way waits as a rule: the request leaves for the engine in the turn of the loop that brought it, and the
answer's first bytes leave in the turn that brings them. A task runs for what has to be waited for and is rare: a long
body that is prepared in a thread, a connection that has to be made, a client that does not read.

Knows the link and the engine only by the Protocols below.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

from xim_agent.counting import Delivered, UsageCounter
from xim_agent.engine.body import THREAD_BYTES, BodyInvalid, PreparedBody, prepare_body
from xim_agent.engine.http import EngineBroken, EngineConnection, EngineError, EngineUnavailable, request_bytes
from xim_agent.engine.salt import tenant_salt
from xim_agent.engine.unreported import COUNTED_PATHS
from xim_agent.engine.usage import UsageReader, usage_reader
from xim_agent.link.writer import StreamGone
from xim_protocol.ids import StreamId
from xim_protocol.messages import Counted, FailCode, RefusalReason, Submit, Usage
from xim_protocol.routes import Route

log = logging.getLogger(__name__)

BUSY_STATUS = 503
"""The engine takes no more; another node may."""
INVALID_STATUS = 400
REFUSAL_BYTES = 64 * 1024
_OWN_HEADERS = frozenset({"host", "connection", "content-length", "transfer-encoding", "authorization", "x-request-id"})
"""Headers that the agent or its HTTP client sets; a client's own never reach the engine."""

T = TypeVar("T")


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


class EngineCalls(Protocol):
    """The engine over HTTP; `engine.client.EngineClient` is one."""

    def idle(self) -> EngineConnection | None:
        """A connection that served before, None where none is left."""
        ...

    async def connect(self) -> EngineConnection:
        """A new connection. Raises: EngineUnavailable."""
        ...

    def give_back(self, connection: EngineConnection) -> None:
        """The exchange is over; one that is not whole is broken off, which stops the engine's work."""
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
class ServedModel:
    """What a ready engine serves."""

    name: str
    """Its one served name."""
    fingerprint: str | None = None
    """Its `system_fingerprint`, None where it gives none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relaying:
    """What all relays of an agent share."""

    loop: asyncio.AbstractEventLoop
    """Held, because asking for the running one is a system call (CPython 3.11)."""
    engine: EngineCalls
    tasks: asyncio.TaskGroup
    counters: ChunkCounters
    usage: UsageCounter
    salt_secret: str
    on_outcome: "Callable[[Relay, Outcome], None]"
    """How a stream ends, told before its end is: from here on its place is free."""
    on_closed: "Callable[[Relay], None]"
    """Nothing of the relay is left."""


class Relay:
    """See the module's docstring. A `Receiver` of the engine's answer; what goes wrong in one harms no other."""

    __slots__ = (
        *("_asked", "_connection", "_delivered", "_keep", "_number", "_prepared", "_reader", "_refusal", "_route"),
        *("_shared", "_task", "_timer", "link", "model", "placed", "submit"),
    )

    def __init__(self, shared: Relaying, link: RouterLink, submit: Submit, route: Route, model: ServedModel) -> None:
        self.link = link
        self.submit = submit
        self.model = model
        self.placed = True
        """It still holds its place."""
        self._shared = shared
        self._route = route
        self._number = submit.stream
        self._delivered = Delivered(shared.usage)
        self._prepared: PreparedBody | None = None
        self._asked: bytes | None = None
        """The body that the engine works on, while there is something to count."""
        self._connection: EngineConnection | None = None
        self._reader: UsageReader | None = None
        self._keep: Callable[[bytes], None] | None = None
        """Takes what the client is given, where it may have to be counted."""
        self._refusal: bytearray | None = None
        """An error that may speak of the body's fields, as far as it has come."""
        self._task: asyncio.Task[None] | None = None
        """Waits for what the stream cannot go on without."""
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Ask the engine, or the router for the body, which `bring` takes."""
        submit = self.submit
        if submit.time_left_ms is not None:
            self._timer = self._shared.loop.call_later(submit.time_left_ms / 1000, self._time_up)
        if submit.body is None:
            self.link.continue_body(self._number)
        else:
            self.bring(submit.body)

    def bring(self, body: bytes) -> None:
        """The client's body is whole."""
        if len(body) > THREAD_BYTES:
            self._wait_for(lambda: asyncio.to_thread(self._prepare, body), self._ask)
            return
        try:
            self._ask(self._prepare(body))
        except Exception as error:
            self._failed(error)

    def count_usage(self) -> None:
        """The stream ended without a report after the engine began."""
        asked, self._asked = self._asked, None
        if asked is not None:
            self._shared.usage.count(self.submit, self.model.name, asked, self._delivered, self.link.report_counted)

    def close(self) -> None:
        """Leave nothing behind; closing the engine's connection stops its work."""
        self._release()
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        if self._asked is not None:
            self._asked = None
            self._delivered.drop()  # nobody counts it
        self._shared.on_closed(self)

    # --- To the engine ---------------------------------------------------------------------------------------------

    def _prepare(self, body: bytes) -> PreparedBody:
        secret, project = self._shared.salt_secret, self.submit.project
        return prepare_body(
            body,
            route=self._route,
            model=self.model.name,
            salt=lambda sent: tenant_salt(secret, project, sent),
        )

    def _ask(self, prepared: PreparedBody) -> None:
        self._prepared = prepared
        connection = self._shared.engine.idle()
        if connection is None:
            self._wait_for(self._shared.engine.connect, self._ask_over)
        else:
            self._ask_over(connection)

    def _ask_over(self, connection: EngineConnection) -> None:
        submit, prepared = self.submit, self._prepared
        assert prepared is not None
        self._connection = connection
        if submit.path in COUNTED_PATHS:
            self._asked = prepared.body
        connection.begin(request_bytes(submit.method, submit.path, _headers(submit), prepared.body), self)

    # --- The engine's answer ---------------------------------------------------------------------------------------

    def headed(self, status: int, content_type: str) -> None:
        """The status has come."""
        try:
            if status == BUSY_STATUS:
                raise EngineUnavailable("the engine answered 503")
            self.link.start_response(self._number, status, content_type)
            prepared = self._prepared
            assert prepared is not None
            self._reader = usage_reader(
                content_type, take_out=prepared.take_usage_out, fingerprint=self.model.fingerprint
            )
            if status >= INVALID_STATUS:
                self._asked = None
            elif self._asked is not None and content_type.startswith("text/event-stream"):
                self._keep = self._delivered.add
            if status == INVALID_STATUS:
                self._refusal = bytearray()
        except Exception as error:
            self._failed(error)

    def take(self, piece: bytes) -> bool:
        """The hot path: pass on a piece; False while the client's credit is used up."""
        counters = self._shared.counters
        counters.chunks += 1
        counters.chunk_bytes += len(piece)
        try:
            assert self._reader is not None
            payload = self._reader.feed(piece) if self._refusal is None else self._gather(piece)
            if self._keep is not None:
                self._keep(payload)
            rest = self.link.offer(self._number, payload) if payload else None
        except Exception as error:
            self._failed(error)
            return False
        if rest is None:
            return True
        self._wait_for(lambda: self.link.write(self._number, rest), lambda _: self._go_on())
        return False

    def ended(self) -> None:
        """The answer is whole."""
        try:
            self._release()
            payload = self._last()
            rest = self.link.offer(self._number, payload) if payload else None
            if rest is None:
                self._end()
            else:
                self._wait_for(lambda: self.link.write(self._number, rest), lambda _: self._end())
        except Exception as error:
            self._failed(error)

    def broke(self, error: EngineError) -> None:
        """The engine says nothing more."""
        self._failed(error)

    def _go_on(self) -> None:
        if self._connection is not None:
            self._connection.go_on()

    def _gather(self, piece: bytes) -> bytes:
        """An engine's 400 is passed on whole, in the client's terms; a long one is no such error."""
        assert self._refusal is not None
        self._refusal += piece
        return self._restored() if len(self._refusal) > REFUSAL_BYTES else b""

    def _restored(self) -> bytes:
        assert self._refusal is not None
        assert self._prepared is not None
        refusal, self._refusal = bytes(self._refusal), None
        return self._prepared.restore_error(refusal)

    def _last(self) -> bytes:
        """What was held back until the end."""
        assert self._reader is not None
        return self._reader.finish() if self._refusal is None else self._restored()

    # --- Waiting ---------------------------------------------------------------------------------------------------

    def _wait_for(self, step: Callable[[], Awaitable[T]], then: Callable[[T], None]) -> None:
        """Go on with `then` once `step` has its result; a stream waits for one thing at a time."""
        name = f"{self.submit.request}-{self.submit.attempt}"
        self._task = self._shared.tasks.create_task(self._waited(step, then), name=name)

    async def _waited(self, step: Callable[[], Awaitable[T]], then: Callable[[T], None]) -> None:
        try:
            try:
                result = await step()
            finally:
                self._task = None
            then(result)
        except Exception as error:
            self._failed(error)

    # --- Ends ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        if self.link.is_live(self._number):
            assert self._reader is not None
            usage = self._reader.usage()
            self._shared.on_outcome(self, Outcome.ENDED)
            self.link.end(self._number, None if usage is None else usage.for_wire())
        self.close()

    def _failed(self, error: Exception) -> None:
        """Whatever goes wrong in a stream comes here."""
        about: dict[str, object] = {"request": self.submit.request}
        match error:
            case BodyInvalid():
                self._fail(FailCode.BODY_INVALID, error.detail)
            case EngineUnavailable():
                log.warning("engine unavailable", extra={**about, "cause": str(error)})
                self._fail(FailCode.ENGINE_UNAVAILABLE, "The engine gives no answer.", retryable=True)
            case EngineBroken():
                log.warning("engine broke off", extra={**about, "cause": str(error)})
                self._fail(FailCode.ENGINE_BROKEN, "The engine's answer broke off.", retryable=True)
            case StreamGone():
                # The session said so already, or will in a moment.
                log.debug("stream is gone", extra=about)
                self.close()
            case _:
                log.error("stream failed", exc_info=error, extra=about)
                self._fail(FailCode.INTERNAL, "The agent failed.")

    def _time_up(self) -> None:
        self._timer = None
        self._fail(FailCode.TIME_UP, "The time for this request is over.")

    def _fail(self, code: FailCode, message: str, *, retryable: bool = False) -> None:
        self._release()
        if self.link.is_live(self._number):
            self._shared.on_outcome(self, Outcome.FAILED)
            self.link.fail(self._number, code, message, retryable=retryable)
            if code is not FailCode.ENGINE_UNAVAILABLE:
                self.count_usage()
        self.close()

    def _release(self) -> None:
        """Give the connection back; closed in the middle of an answer, it stops the engine's work."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._shared.engine.give_back(connection)


def _headers(submit: Submit) -> dict[str, str]:
    """What the engine is sent: the client's few headers that the router let through, and the agent's own."""
    headers = {"content-type": "application/json"}
    headers.update((name, value) for name, value in submit.headers if name not in _OWN_HEADERS)
    # The engine makes it the response's id, so that a router's log and an engine's can be laid side by side.
    headers["x-request-id"] = f"{submit.request}-{submit.attempt}"
    if submit.traceparent is not None:
        headers["traceparent"] = submit.traceparent
    return headers
