"""The router's side of a link for tests of the agent: a real `RouterSession` over real ZeroMQ, with CURVE and ZAP.

It decides nothing: a test submits, consumes, cancels and says Goodbye, and waits for what came of it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio
from zmq.utils import z85

from tests.support.programs import PATIENCE_S
from xim_protocol.codec import Frames, decode, encode
from xim_protocol.enrollment import RouterAddress
from xim_protocol.events import (
    GoodbyeReceived,
    RequestRefused,
    ResponseEnded,
    ResponseFailed,
    ResponseStarted,
    RouterEvent,
    SlotsFree,
)
from xim_protocol.ids import AgentId, ProjectId, RequestId, SessionId
from xim_protocol.messages import (
    Assignment,
    Attach,
    CancelReason,
    Channel,
    Goodbye,
    GoodbyeCode,
    Hello,
    RouterMember,
    Usage,
)
from xim_protocol.router_session import Phase, RouterSession, RouterStream

PROJECT = ProjectId("proj_a")
AGENT = AgentId("agent-a")


@dataclass(kw_only=True, eq=False)
class Answer:
    """What came of one request."""

    request: str
    stream: RouterStream["Answer"] | None = None
    status: int | None = None
    content_type: str = ""
    body: bytearray = field(default_factory=bytearray)
    chunks: int = 0
    usage: Usage | None = None
    failed: ResponseFailed["Answer"] | None = None
    refused: RequestRefused["Answer"] | None = None
    ended: bool = False

    @property
    def over(self) -> bool:
        return self.ended or self.failed is not None or self.refused is not None


Session = RouterSession[Answer]


class RouterStub:
    """Two ROUTER sockets, a ZAP handler and at most one session; an async context manager."""

    def __init__(
        self,
        *,
        secure: bool = True,
        assignment: Assignment | None = None,
        routers: tuple[RouterMember, ...] = (),
        attach: bool = True,
    ) -> None:
        public, secret = zmq.curve_keypair()
        self._secure = secure
        self._keys = (public, secret)
        self._context = zmq.asyncio.Context()
        self._sockets: dict[Channel, zmq.asyncio.Socket] = {}
        self._ports: dict[Channel, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._routes: dict[Channel, bytes] = {}
        self._assignment = assignment
        self._routers = routers
        self._attach = attach
        self._numbers = 0
        self.admitted: dict[bytes, bytes] = {}
        """Raw public key to ZAP status; any other key is answered 300."""
        self.admit_all = False
        """True: any key is answered 200."""
        self.handshakes: list[bytes] = []
        """The statuses answered so far."""
        self.session: Session | None = None
        self.hellos: list[Hello] = []
        self.events: list[object] = []
        """Everything but chunks."""
        self.consuming = True
        """False: the client takes nothing, so no credit is given back."""

    @property
    def address(self) -> RouterAddress:
        """Where and by which key the stub is dialled."""
        return RouterAddress(
            control_addr=f"tcp://127.0.0.1:{self._ports[Channel.CONTROL]}",
            streaming_addr=f"tcp://127.0.0.1:{self._ports[Channel.STREAMING]}",
            server_curve_key=z85.decode(self._keys[0]),
        )

    @property
    def member(self) -> RouterMember:
        """The same, as routers tell it of each other."""
        address = self.address
        return RouterMember(
            control_address=address.control_addr,
            streaming_address=address.streaming_addr,
            curve_public_key=address.server_curve_key,
        )

    async def __aenter__(self) -> Self:
        zap = self._context.socket(zmq.REP)
        zap.linger = 0
        zap.bind("inproc://zeromq.zap.01")
        self._start(self._admit(zap))
        for channel in Channel:
            self._bind(channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def until(self, condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Return when `condition` holds; it is looked at after every message.

        Raises: what ended a task of the stub, which will hear of nothing more.
        """
        async with asyncio.timeout(patience_s):
            while not condition():
                for task in self._tasks:
                    if task.done():
                        task.result()
                self._changed.clear()
                await self._changed.wait()

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(lambda _: self._changed.set())

    async def opened(self) -> None:
        """Return when requests may be submitted."""
        await self.until(lambda: self.is_open)

    @property
    def is_open(self) -> bool:
        return self.session is not None and self.session.phase is Phase.OPEN

    def of_type(self, kind: type) -> list[object]:
        """The events of one type so far."""
        return [event for event in self.events if isinstance(event, kind)]

    # --- What a test does ------------------------------------------------------------------------------------------

    async def submit(
        self,
        body: bytes,
        *,
        path: str = "/v1/chat/completions",
        project: ProjectId = PROJECT,
        time_left_ms: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> Answer:
        """Submit one request on the open session."""
        assert self.session is not None
        self._numbers += 1
        answer = Answer(request=f"req_{self._numbers:024x}")
        answer.stream = self.session.submit(
            answer,
            request=RequestId(answer.request),
            attempt=1,
            project=project,
            path=path,
            body=body,
            headers=headers,
            time_left_ms=time_left_ms,
        )
        await self.flush()
        return answer

    async def ask(self, body: bytes, *, path: str = "/v1/chat/completions", project: ProjectId = PROJECT) -> Answer:
        """Submit one request and wait until it is over."""
        answer = await self.submit(body, path=path, project=project)
        await self.until(lambda: answer.over)
        return answer

    async def cancel(self, answer: Answer) -> None:
        assert self.session is not None
        assert answer.stream is not None
        self.session.cancel(answer.stream, CancelReason.CLIENT_LEFT)
        await self.flush()

    async def consume(self, answer: Answer) -> None:
        """The client reads again, and takes everything that lies there."""
        assert self.session is not None
        assert answer.stream is not None
        self.consuming = True
        self.session.consumed(answer.stream, answer.stream.credit.received - answer.stream.credit.consumed)
        await self.flush()

    async def assign(self, assignment: Assignment | None) -> None:
        self._assignment = assignment
        assert self.session is not None
        self.session.assign(assignment)
        await self.flush()

    def name_routers(self, *routers: RouterMember) -> None:
        """Whom the next Welcome of a new session names."""
        self._routers = routers

    async def tell_routers(self, *routers: RouterMember) -> None:
        """Tell the connected agent who is in the mesh now."""
        self.name_routers(*routers)
        assert self.session is not None
        self.session.tell_routers(routers)
        await self.flush()

    async def goodbye(self, code: GoodbyeCode) -> None:
        """End the session with `code`."""
        assert self.session is not None
        self.session.end(code)
        await self.flush()

    async def say(self, channel: Channel, frames: Frames) -> None:
        """Send anything, well-formed or not, to the agent."""
        await self._sockets[channel].send_multipart([self._routes[channel], *frames])

    async def flush(self) -> None:
        """Send what the session has to say."""
        if self.session is None:
            return
        self.session.flush_credit()
        for channel, frames in self.session.frames_to_send():
            await self.say(channel, frames)
        while (piece := self.session.next_body()) is not None:
            await self.say(*piece)

    # --- Sockets ---------------------------------------------------------------------------------------------------

    def _bind(self, channel: Channel) -> None:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        if self._secure:
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = self._keys
            socket.zap_domain = b"xim"
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._ports[channel] = socket.bind_to_random_port("tcp://127.0.0.1")
        self._sockets[channel] = socket
        self._start(self._receive(channel, socket))

    async def _admit(self, zap: zmq.asyncio.Socket) -> None:
        with contextlib.closing(zap):
            while True:
                version, request, *_, key = await zap.recv_multipart()
                status = self.admitted.get(key, b"200" if self.admit_all else b"300")
                self.handshakes.append(status)
                await zap.send_multipart([version, request, status, b"", AGENT.encode(), b""])
                self._changed.set()

    async def _receive(self, channel: Channel, socket: zmq.asyncio.Socket) -> None:
        with contextlib.closing(socket):
            while True:
                route, *frames = await socket.recv_multipart()
                await self._take(channel, route, frames)
                self._changed.set()

    async def _take(self, channel: Channel, route: bytes, frames: Frames) -> None:
        message = decode(frames)
        if isinstance(message, Hello):
            await self._hello(route, message)
        elif isinstance(message, Attach) and channel not in self._routes:
            # Not by anything else: what an earlier link sent last may come behind the Hello of the next.
            self._routes[channel] = route
        if isinstance(message, Hello) or self.session is None or self._routes.get(channel) != route:
            return
        if channel is Channel.STREAMING and not self._attach:
            return
        if self.session.phase in (Phase.WELCOMED, Phase.OPEN):
            for event in self.session.receive(channel, frames):
                self._note(event)
        await self.flush()

    async def _hello(self, route: bytes, hello: Hello) -> None:
        self.hellos.append(hello)
        session = self.session
        if session is not None and session.phase is not Phase.ENDED and session.instance == hello.instance:
            self._routes = {Channel.CONTROL: route}
            for event in session.resume(hello):
                self._note(event)
        else:
            if session is not None and session.phase is not Phase.ENDED:
                goodbye = encode(Goodbye(code=GoodbyeCode.SUPERSEDED))
                await self.say(Channel.CONTROL, goodbye)
            self._routes = {Channel.CONTROL: route}
            self.session = RouterSession(
                agent=AGENT,
                session=SessionId(f"session-{len(self.hellos)}"),
                hello=hello,
                assignment=self._assignment,
                routers=self._routers,
            )
        await self.flush()

    def _note(self, event: RouterEvent[Answer]) -> None:
        if isinstance(event, tuple):
            answer, payload = event
            answer.body += payload
            answer.chunks += 1
            if self.consuming and self.session is not None and answer.stream is not None:
                self.session.consumed(answer.stream, len(payload))
            return
        self.events.append(event)
        match event:
            case ResponseStarted():
                event.context.status, event.context.content_type = event.status, event.content_type
            case ResponseEnded():
                event.context.ended, event.context.usage = True, event.usage
            case ResponseFailed():
                event.context.failed = event
            case RequestRefused():
                event.context.refused = event
            case SlotsFree() | GoodbyeReceived():
                pass
