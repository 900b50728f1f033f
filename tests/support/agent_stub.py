"""The agent's side of a link for tests of the router: a real `AgentSession` over real DEALER sockets, with CURVE.

It serves nothing by itself: a test gives it a `serve` coroutine, which gets one `Work` per request, and may at any time
go silent, lose its link, say anything, or die.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from tests.support.programs import PATIENCE_S
from xim_protocol.agent_session import AgentConfig, AgentReport, AgentSession, Link
from xim_protocol.codec import Frames, decode
from xim_protocol.events import (
    AgentEvent,
    BodyReceived,
    CreditGranted,
    GoodbyeReceived,
    RequestReceived,
    SessionExpired,
    StreamAborted,
    StreamCancelled,
    StreamFailed,
    Welcomed,
)
from xim_protocol.ids import InstanceId, StreamId
from xim_protocol.lease import heartbeat_s
from xim_protocol.messages import (
    AgentState,
    CancelReason,
    Channel,
    FailCode,
    FlowControl,
    GoodbyeCode,
    Message,
    RefusalReason,
    Submit,
    Usage,
)

JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
LOST_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
REFUSED_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


@dataclass(frozen=True, kw_only=True, slots=True)
class Dial:
    """Where and as whom to connect; keys in Z85, as pyzmq takes them."""

    control: str
    streaming: str
    server_key: bytes
    keys: tuple[bytes, bytes]
    """Public and secret."""
    secure: bool = True


class StreamOver(Exception):
    """Nobody waits for the stream any more: cancelled, aborted or failed by the session."""


@dataclass(kw_only=True, eq=False)
class Work:
    """One request at the agent."""

    agent: "AgentStub"
    submit: Submit
    body: bytes = b""
    cancelled: CancelReason | None = None
    over: bool = False
    """Cancelled, aborted or failed: nobody waits for the rest."""
    task: "asyncio.Task[None] | None" = None
    produced: int = 0

    @property
    def stream(self) -> StreamId:
        return self.submit.stream

    def start(self, status: int = 200, content_type: str = JSON) -> None:
        self._check()
        self.agent.session.start_response(self.stream, status, content_type)

    async def write(self, payload: bytes) -> None:
        """Send `payload` as far as credit goes, then wait for more; at once on the wire, without coalescing."""
        while payload:
            self._check()
            taken = self.agent.session.produce(self.stream, payload, self.agent.now())
            payload = payload[taken:]
            self.produced += taken
            self.agent.flush()
            if payload:
                await self.agent.until(lambda: self.over or self.agent.session.room(self.stream) > 0)

    def end(self, usage: Usage | None = None) -> None:
        self._check()
        self.agent.session.end(self.stream, usage)
        self.agent.flush()

    def fail(self, code: FailCode, message: str = "", *, retryable: bool = False) -> None:
        self._check()
        self.agent.session.fail(self.stream, code, message, retryable=retryable)
        self.agent.flush()

    def refuse(self, reason: RefusalReason, in_flight: int = 1) -> None:
        self._check()
        self.agent.session.refuse(self.stream, reason, in_flight)
        self.agent.flush()

    async def answer(self, body: bytes = b"{}", status: int = 200, content_type: str = JSON) -> None:
        """A whole answer."""
        self.start(status, content_type)
        await self.write(body)
        self.end()

    def _check(self) -> None:
        if self.over:
            raise StreamOver


Serve = Callable[[Work], Awaitable[None]]


async def echo(work: Work) -> None:
    """Answers with the request's body."""
    await work.answer(work.body)


async def hold(work: Work) -> None:
    """Answers nothing; the test goes on with `work` itself."""


class AgentStub:
    """One agent process and its links; an async context manager that connects."""

    def __init__(
        self,
        dial: Dial,
        *,
        serve: Serve = echo,
        capacity: int = 1,
        state: AgentState = AgentState.READY,
        served_model: str | None = None,
        lease_s: float = 30.0,
        flow: FlowControl | None = None,
        streaming_socket: bool = True,
        routing_id: bytes | None = None,
    ) -> None:
        self.dial = dial
        self.serve = serve
        self.report = AgentReport(capacity=capacity, state=state, served_model=served_model)
        config = AgentConfig(
            instance=InstanceId(secrets.token_hex(8)),
            agent_version="stub",
            lease_s=lease_s,
            renewal_interval_s=lease_s / 3,
            flow=flow or FlowControl(),
            streaming_socket=streaming_socket,
        )
        self.session = AgentSession(config, self.report)
        self.works: list[Work] = []
        """Every request so far, in order."""
        self.messages: list[Message] = []
        """What the router said on the links so far."""
        self.goodbye: GoodbyeReceived | None = None
        self.expirations = 0
        self.welcomes: list[Welcomed] = []
        self.lost = False
        """The current link's sockets were shut by the other end."""
        self.handshakes_failed = 0
        self.silent = False
        """Takes nothing in and says nothing by itself, not even a renewal."""
        self._routing_id = routing_id
        self._context = zmq.asyncio.Context()
        self._sockets: dict[Channel, zmq.asyncio.Socket] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._failures: list[Exception] = []
        """What ended tasks of links that are dropped."""
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        works = [work.task for work in self.works if work.task is not None]
        for task in works:
            task.cancel()
        results = await asyncio.gather(*works, return_exceptions=True)
        await self.drop()
        self._context.destroy(linger=0)
        self._failures += [result for result in results if isinstance(result, Exception)]
        if self._failures and error is None:
            raise self._failures[0]

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def until(self, condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Return when `condition` holds; it is looked at after everything that happens at this agent.

        Raises: what ended a task of the stub or of one of its requests.
        """
        async with asyncio.timeout(patience_s):
            while not condition():
                for task in (*self._tasks, *(work.task for work in self.works if work.task is not None)):
                    if task.done() and not task.cancelled():
                        task.result()
                self._changed.clear()
                await self._changed.wait()

    def _start(self, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._changed.set())
        return task

    async def opened(self) -> None:
        """Return when requests may come."""
        await self.until(lambda: self.session.link is Link.OPEN)

    async def work(self, number: int = 0) -> Work:
        """The request `number` as it comes."""
        await self.until(lambda: len(self.works) > number)
        return self.works[number]

    # --- Links -----------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Open a fresh pair of sockets and say Hello."""
        self.lost = False
        channels = Channel if self.session.config.streaming_socket else (Channel.CONTROL,)
        addresses = {Channel.CONTROL: self.dial.control, Channel.STREAMING: self.dial.streaming}
        for channel in channels:
            socket = self._make_socket()
            monitor = socket.get_monitor_socket(LOST_EVENTS | REFUSED_EVENTS)
            socket.connect(addresses[channel])
            self._sockets[channel] = socket
            self._tasks.append(self._start(self._receive(channel, socket)))
            self._tasks.append(self._start(self._watch(monitor)))
        self.session.connect(self.now())
        self.flush()

    def _make_socket(self) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.HEARTBEAT_IVL, round(heartbeat_s(self.session.config.lease_s) * 1000))
        if self._routing_id is not None:
            socket.routing_id = self._routing_id
        if self.dial.secure:
            socket.curve_publickey, socket.curve_secretkey = self.dial.keys
            socket.curve_serverkey = self.dial.server_key
        else:
            socket.setsockopt(zmq.ZAP_DOMAIN, b"xim")
        return socket

    async def drop(self) -> None:
        """Close the sockets without a word; the process and its streams live on until `connect`."""
        # While the monitors are open: libzmq waits for ever to tell a closed one that it stops.
        for socket in self._sockets.values():
            socket.disable_monitor()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        self._failures += [result for result in results if isinstance(result, Exception)]
        for socket in self._sockets.values():
            socket.close(linger=0)
        self._sockets.clear()
        self._rearm(None)
        if self.session.link is not Link.DOWN:
            self._take(self.session.link_lost(self.now()))

    async def leave(self, code: GoodbyeCode = GoodbyeCode.LEAVING) -> None:
        """Say Goodbye and wait until the router shut the link."""
        self.session.leave(code)
        self.flush()
        await self.until(lambda: self.lost)

    # --- Saying ----------------------------------------------------------------------------------------------------

    def say(self, channel: Channel, frames: Frames) -> None:
        """Send anything, well-formed or not."""
        # Leaves at once; what the peer does not take waits in pyzmq and goes with the socket.
        self._sockets[channel].send_multipart(frames)

    def set_state(self, state: AgentState, *, served_model: str | None = None) -> None:
        """Report a change at once."""
        self.report.state = state
        self.report.served_model = served_model or self.report.served_model
        self.session.renew(self.now())
        self.flush()

    def wake(self) -> None:
        """Be silent no more, and do first what the clock asks for."""
        self.silent = False
        self._on_timer()

    def flush(self) -> None:
        """Send what the session has to say."""
        while self.session.gather():
            pass
        for channel, frames in self.session.frames_to_send():
            self.say(channel, frames)
        if not self.silent:
            self._rearm(self.session.next_deadline())

    def _rearm(self, deadline: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = None if deadline is None else loop.call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        if self.silent:
            return
        self._take(self.session.handle_timeout(self.now()))
        self.flush()

    # --- Hearing ---------------------------------------------------------------------------------------------------

    async def _receive(self, channel: Channel, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            if self.silent:
                continue
            message = decode(frames)
            assert message is not None
            self.messages.append(message)
            self._take(self.session.receive(channel, frames, self.now()))
            self.flush()

    async def _watch(self, monitor: "zmq.asyncio.Socket") -> None:
        with contextlib.closing(monitor):
            while True:
                event = parse_monitor_message(await monitor.recv_multipart())
                if event["event"] & REFUSED_EVENTS:
                    self.handshakes_failed += 1
                self.lost = True
                self._changed.set()

    def _take(self, events: list[AgentEvent]) -> None:
        for event in events:
            self._handle(event)
        self._changed.set()

    def _handle(self, event: AgentEvent) -> None:
        match event:
            case RequestReceived():
                work = Work(agent=self, submit=event.submit)
                self.works.append(work)
                if event.submit.body is None:
                    self.session.continue_body(event.submit.stream)
                else:
                    self._begin(work, event.submit.body)
            case BodyReceived():
                self._begin(self._work_of(event.stream), event.body)
            case StreamCancelled():
                work = self._work_of(event.stream)
                work.cancelled, work.over = event.reason, True
            case StreamAborted() | StreamFailed():
                self._work_of(event.stream).over = True
            case Welcomed():
                self.welcomes.append(event)
            case GoodbyeReceived():
                self.goodbye = event
            case SessionExpired():
                self.expirations += 1
            case CreditGranted():
                pass  # `until` wakes whoever waits for room

    def _begin(self, work: Work, body: bytes) -> None:
        work.body = body
        work.task = self._start(self._serve(work))

    async def _serve(self, work: Work) -> None:
        with contextlib.suppress(StreamOver):
            await self.serve(work)

    def _work_of(self, stream: StreamId) -> Work:
        # Ids begin anew with each session: the latest is meant.
        return next(work for work in reversed(self.works) if work.stream == stream)
