"""Two sessions joined without a socket: messages lie in two queues per direction until the test moves them.

The two sockets of a link keep order each and none between them, so a test may deliver either first; it may also drop
the link, which loses whatever lies in the queues. Time passes only in `advance`.
"""

from collections import deque
from collections.abc import Sequence
from functools import cache
from random import Random

from xim_protocol.agent_session import AgentConfig, AgentReport, AgentSession
from xim_protocol.codec import Frames, decode
from xim_protocol.events import AgentEvent, RouterEvent
from xim_protocol.ids import AgentId, InstanceId, ProjectId, RequestId, SessionId
from xim_protocol.lease import LeaseTable
from xim_protocol.messages import AgentState, Assignment, Channel, FlowControl, GoodbyeCode, Hello, Renew
from xim_protocol.router_session import Phase, RouterSession, RouterStream

AGENT = AgentId("agent-a")
PROJECT = ProjectId("proj_a")
PATTERN_BYTES = 8_191
"""A prime, so that no window, piece or frame size hides a shift."""


def content(context: str, offset: int, size: int) -> bytes:
    """The bytes that the engine answers for `context` from `offset` on."""
    pattern = _pattern(context)
    begin = offset % PATTERN_BYTES
    return (pattern * (2 + size // PATTERN_BYTES))[begin : begin + size]


@cache
def _pattern(context: str) -> bytes:
    return Random(context).randbytes(PATTERN_BYTES)


class Wire:
    """An agent's and a router's session and the four queues between them."""

    def __init__(
        self,
        *,
        flow: FlowControl | None = None,
        streaming_socket: bool = True,
        assignment: Assignment | None = None,
        lease_s: float = 30.0,
    ) -> None:
        self.now = 0.0
        self.flow = flow or FlowControl()
        self.streaming_socket = streaming_socket
        self.lease_s = lease_s
        self.assignment = assignment
        self.instances = 0
        self.sessions = 0
        self.agent = self._new_agent()
        self.router: RouterSession[str] | None = None
        self.leases = LeaseTable()
        self.router_is_linked = False
        """False while what the router sends goes nowhere, whether it knows or not."""
        self.cut: list[str] = []
        """Contexts of the streams that the router cut off with a session."""
        self.to_router: dict[Channel, deque[Frames]] = {channel: deque() for channel in Channel}
        self.to_agent: dict[Channel, deque[Frames]] = {channel: deque() for channel in Channel}
        self.agent_events: list[AgentEvent] = []
        self.router_events: list[RouterEvent[str]] = []

    def _new_agent(self) -> AgentSession:
        self.instances += 1
        config = AgentConfig(
            instance=InstanceId(f"instance-{self.instances}"),
            agent_version="test",
            lease_s=self.lease_s,
            renewal_interval_s=self.lease_s / 3,
            flow=self.flow,
            streaming_socket=self.streaming_socket,
        )
        return AgentSession(config, AgentReport(capacity=1024, state=AgentState.READY))

    # --- Moving messages -------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Put what both sessions want to send into the queues."""
        self.collect_from_agent()
        self.collect_from_router()

    def collect_from_agent(self) -> None:
        """Put what the agent wants to send into its queues."""
        while self.agent.gather():
            pass
        for channel, frames in self.agent.frames_to_send():
            self.to_router[channel].append(frames)

    def collect_from_router(self) -> None:
        """Put what the router wants to send into its queues; without a link it is lost."""
        router = self.router
        if router is None:
            return
        router.flush_credit()
        outgoing = router.frames_to_send()
        while (piece := router.next_body()) is not None:
            outgoing.append(piece)
        if self.router_is_linked:
            for channel, frames in outgoing:
                self.to_agent[channel].append(frames)

    def deliver_to_router(self, channel: Channel) -> bool:
        """Deliver the next message of `channel` to the router; false when there is none."""
        if not self.to_router[channel]:
            return False
        self._router_takes(channel, self.to_router[channel].popleft())
        return True

    def deliver_to_agent(self, channel: Channel) -> bool:
        """Deliver the next message of `channel` to the agent; false when there is none."""
        if not self.to_agent[channel]:
            return False
        self.agent_events.extend(self.agent.receive(channel, self.to_agent[channel].popleft(), self.now))
        return True

    def settle(self) -> None:
        """Deliver everything until nothing moves."""
        moved = True
        while moved:
            self.collect()
            moved = False
            for channel in Channel:
                while self.deliver_to_router(channel):
                    moved = True
                while self.deliver_to_agent(channel):
                    moved = True

    def _router_takes(self, channel: Channel, frames: Sequence[bytes]) -> None:
        message = decode(frames)
        if isinstance(message, Hello):
            self._hello(message)
        elif self.router is not None:
            self.router_events.extend(self.router.receive(channel, frames))
            if isinstance(message, Renew) and self.router.phase is not Phase.ENDED:
                self.leases.grant(AGENT, self.router.lease_s, self.now)

    def _hello(self, hello: Hello) -> None:
        router = self.router
        self.router_is_linked = True
        if router is not None and router.phase is not Phase.ENDED and router.instance == hello.instance:
            self.router_events.extend(router.resume(hello))
        else:
            if router is not None:
                self.cut.extend(router.end(GoodbyeCode.SUPERSEDED))
            self.sessions += 1
            self.router = RouterSession(
                agent=AGENT,
                session=SessionId(f"session-{self.sessions}"),
                hello=hello,
                assignment=self.assignment,
                routers=(),
            )
        assert self.router is not None
        self.leases.grant(AGENT, self.router.lease_s, self.now)

    # --- Links -----------------------------------------------------------------------------------------------------

    def connect(self) -> "Wire":
        """Open a link and deliver everything."""
        self.agent.connect(self.now)
        self.settle()
        return self

    def drop(self, *, router_notices: bool = True) -> None:
        """Lose the link and what lies in its queues. A router that does not notice goes on as before."""
        for queues in (self.to_router, self.to_agent):
            for queue in queues.values():
                queue.clear()
        self.router_is_linked = False
        self.agent_events.extend(self.agent.link_lost(self.now))
        if self.router is not None and router_notices:
            self.router.link_lost()

    def reconnect(self) -> "Wire":
        """Lose the link, open another and deliver everything."""
        self.drop()
        return self.connect()

    def restart_router(self) -> None:
        """The router's process is another: it knows no session."""
        self.drop()
        if self.router is not None:
            self.cut.extend(self.router.end(None))
        self.router = None
        self.leases = LeaseTable()

    def restart_agent(self) -> None:
        """The agent's process is another: it knows no stream."""
        self.drop(router_notices=False)
        self.agent = self._new_agent()

    # --- Time ------------------------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> list[AgentEvent]:
        """Let time pass at once, as for a process that slept; returns what became due at the agent."""
        self.now += seconds
        events: list[AgentEvent] = []
        deadline = self.agent.next_deadline()
        if deadline is not None and self.now >= deadline:
            events = self.agent.handle_timeout(self.now)
            self.agent_events.extend(events)
        return events

    def expire_leases(self) -> None:
        """Let the router take back the lease when it ran out."""
        if self.leases.expire(self.now) and self.router is not None:
            self.cut.extend(self.router.expire())

    # --- Requests --------------------------------------------------------------------------------------------------

    def submit(self, context: str, body: bytes = b"{}") -> RouterStream[str]:
        """Submit one request; its context is also its request id."""
        assert self.router is not None
        return self.router.submit(
            context,
            request=RequestId(context),
            attempt=1,
            project=PROJECT,
            path="/v1/chat/completions",
            body=body,
        )
