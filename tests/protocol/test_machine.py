"""Both sessions under every order of events that hypothesis can think of.

The machine plays the engine, the clients, the network and the clock. What an engine answers is a function of the
request and the offset, so a byte that is lost, doubled or of another stream is seen where it arrives.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.wire import Wire, content
from xim_protocol.agent_session import Link
from xim_protocol.events import (
    AgentEvent,
    BodyReceived,
    LinkFailed,
    RequestReceived,
    RequestRefused,
    ResponseEnded,
    ResponseFailed,
    ResponseStarted,
    RouterEvent,
    SessionExpired,
    StreamAborted,
    StreamCancelled,
    StreamFailed,
)
from xim_protocol.ids import StreamId
from xim_protocol.messages import CancelReason, Channel, FailCode, FlowControl, RefusalReason
from xim_protocol.router_session import Phase, RouterStream

WINDOWS = st.sampled_from([1_024, 1_500, 4_096])
PAUSES = st.sampled_from([1_024, 1_024, 3_000, 16_384])
THRESHOLDS = st.sampled_from([0.0, 0.3, 0.5, 1.0])
CHANNELS = st.sampled_from(list(Channel))


@dataclass
class Client:
    """A request as its client sees it."""

    stream: RouterStream[str]
    body: bytes
    started: bool = False
    received: int = 0
    consumed: int = 0
    cancelled: bool = False
    ends: list[object] = field(default_factory=list)


@dataclass
class Work:
    """A request as the agent's engine sees it."""

    context: str
    body: bytes | None
    asked: bool = False
    started: bool = False
    produced: int = 0


class SessionsMachine(RuleBasedStateMachine):
    """Rules are what can happen; invariants and `teardown` are what the protocol promises."""

    contexts = Bundle("contexts")

    @initialize(
        window=WINDOWS,
        pause=PAUSES,
        threshold=THRESHOLDS,
        streaming=st.booleans(),
        # Mostly on, as agents have it.
        enabled=st.sampled_from([True, True, True, False]),
    )
    def begin(self, window: int, pause: int, threshold: float, streaming: bool, enabled: bool) -> None:
        self.flow = FlowControl(
            enabled=enabled,
            window_bytes=window,
            pause_threshold_bytes=pause,
            replenish_threshold=threshold,
            stall_timeout_ms=9_000,
        )
        self.wire = Wire(flow=self.flow, streaming_socket=streaming, lease_s=20.0).connect()
        self.clients: dict[str, Client] = {}
        self.work: dict[StreamId, Work] = {}

    # --- Clients and the router -------------------------------------------------------------------------------------

    @precondition(lambda self: self.router_is_open)
    @rule(target=contexts, body_bytes=st.sampled_from([2, 2, 2, 65_536, 65_537, 1_700_000]))
    def submit(self, body_bytes: int) -> str:
        return self.ask(body_bytes)

    def ask(self, body_bytes: int) -> str:
        context = f"request-{len(self.clients)}"
        body = content(context, 0, body_bytes)
        self.clients[context] = Client(stream=self.wire.submit(context, body), body=body)
        return context

    @precondition(lambda self: self.router_is_open)
    @rule(target=contexts, size=st.integers(1, 6_000))
    def submit_and_answer(self, size: int) -> str:
        """A request that is on its way: most of what can go wrong does so from here on."""
        context = self.ask(2)
        self.wire.settle()
        self.hear()
        for stream, work in list(self.work.items()):
            if work.context == context:
                self.proceed(stream, size)
                self.proceed(stream, size)
        return context

    @property
    def router_is_open(self) -> bool:
        return self.wire.router is not None and self.wire.router.phase is Phase.OPEN

    @rule(context=contexts, size=st.integers(1, 5_000))
    def consume(self, context: str, size: int) -> None:
        client, router = self.clients[context], self.wire.router
        size = min(size, client.received - client.consumed)
        if size and router is not None:
            client.consumed += size
            router.consumed(client.stream, size)

    @rule(context=contexts)
    def cancel(self, context: str) -> None:
        client, router = self.clients[context], self.wire.router
        if router is not None:
            client.cancelled = True
            router.cancel(client.stream, CancelReason.CLIENT_LEFT)

    # --- The engine -------------------------------------------------------------------------------------------------

    def some_work(self, data: st.DataObject) -> StreamId:
        return data.draw(st.sampled_from(sorted(self.work)))

    @precondition(lambda self: self.work)
    @rule(data=st.data(), size=st.integers(1, 6_000))
    def work_on(self, data: st.DataObject, size: int) -> None:
        self.proceed(self.some_work(data), size)

    @precondition(lambda self: self.work)
    @rule(size=st.integers(1, 6_000), leaves=st.booleans())
    def work_on_all(self, size: int, leaves: bool) -> None:
        """Where what it brings `leaves` at once and is not heard of yet, the link pauses."""
        for stream in list(self.work):
            self.proceed(stream, size)
        if leaves:
            self.wire.collect_from_agent()

    @precondition(lambda self: self.work)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        stream = self.some_work(data)
        if self.work[stream].started:
            del self.work[stream]
            self.wire.agent.end(stream, (1, 2, 0, "engine"))

    @precondition(lambda self: self.work)
    @rule(data=st.data(), refuse=st.booleans())
    def give_up(self, data: st.DataObject, refuse: bool) -> None:
        stream = self.some_work(data)
        work = self.work.pop(stream)
        if refuse and not work.started:
            self.wire.agent.refuse(stream, RefusalReason.AT_CAPACITY, in_flight=1)
        else:
            self.wire.agent.fail(stream, FailCode.ENGINE_BROKEN, "broken", retryable=False)

    def proceed(self, stream: StreamId, size: int) -> None:
        """Take the next step of the engine's work on `stream`."""
        work, agent = self.work[stream], self.wire.agent
        if work.body is None:
            if not work.asked:
                work.asked = True
                agent.continue_body(stream)
        elif not work.started:
            work.started = True
            agent.start_response(stream, 200, "text/event-stream")
        else:
            work.produced += agent.produce(stream, content(work.context, work.produced, size), self.wire.now)

    # --- The network ------------------------------------------------------------------------------------------------

    @rule()
    def collect_from_agent(self) -> None:
        self.wire.collect_from_agent()

    @rule()
    def collect_from_router(self) -> None:
        self.wire.collect_from_router()

    @rule(channel=CHANNELS, most=st.integers(1, 4))
    def deliver_to_router(self, channel: Channel, most: int) -> None:
        while most and self.wire.deliver_to_router(channel):
            most -= 1
        self.hear()

    @rule(channel=CHANNELS, most=st.integers(1, 4))
    def deliver_to_agent(self, channel: Channel, most: int) -> None:
        while most and self.wire.deliver_to_agent(channel):
            most -= 1
        self.hear()

    @rule()
    def settle(self) -> None:
        self.wire.settle()
        self.hear()

    @precondition(lambda self: self.wire.agent.link is not Link.DOWN)
    @rule(router_notices=st.booleans())
    def drop(self, router_notices: bool) -> None:
        self.wire.drop(router_notices=router_notices)
        self.hear()

    @precondition(lambda self: self.wire.agent.link is Link.DOWN)
    @rule(whole=st.booleans())
    def come_back(self, whole: bool) -> None:
        """With a `whole` link, or with one that has its Welcome and no more."""
        if whole:
            self.wire.connect()
        else:
            self.wire.agent.connect(self.wire.now)
            self.wire.collect_from_agent()
            self.wire.deliver_to_router(Channel.CONTROL)
            self.wire.collect_from_router()
            self.wire.deliver_to_agent(Channel.CONTROL)
        self.hear()

    @precondition(lambda self: self.wire.agent.link is not Link.DOWN)
    @rule()
    def reconnect(self) -> None:
        self.wire.drop(router_notices=False)
        self.wire.agent.connect(self.wire.now)
        self.hear()

    # --- Processes and time -----------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 0.5, 3.0, 3.0, 8.0, 25.0]), router_looks=st.booleans())
    def time_passes(self, seconds: float, router_looks: bool) -> None:
        self.wire.advance(seconds)
        if router_looks:
            self.wire.expire_leases()
        self.hear()

    @precondition(lambda self: len(self.clients) >= 3)  # or little would ever be under way
    @rule(agent=st.booleans())
    def restart(self, agent: bool) -> None:
        if agent:
            self.wire.restart_agent()
            self.hear()
            self.work.clear()
        else:
            self.wire.restart_router()
            self.hear()

    # --- What is seen -----------------------------------------------------------------------------------------------

    def hear(self) -> None:
        """Look at every event once, as the two owners would."""
        wire = self.wire
        while wire.agent_events or wire.router_events or wire.cut:
            events, wire.agent_events = wire.agent_events, []
            for event in events:
                self.agent_says(event)
            said, wire.router_events = wire.router_events, []
            for heard in said:
                self.router_says(heard)
            cut, wire.cut = wire.cut, []
            for context in cut:
                self.ends(context, "cut")

    def agent_says(self, event: AgentEvent) -> None:
        match event:
            case RequestReceived(submit=submit):
                assert submit.stream not in self.work
                context = str(submit.request)
                assert submit.body is None or submit.body == self.clients[context].body
                self.work[submit.stream] = Work(context=context, body=submit.body)
            case BodyReceived(stream=stream, body=body):
                assert body == self.clients[self.work[stream].context].body
                self.work[stream].body = body
            case StreamCancelled(stream=stream) | StreamAborted(stream=stream) | StreamFailed(stream=stream):
                del self.work[stream]  # told once, and only of what the engine still works on
            case SessionExpired() | LinkFailed():
                self.wire.drop()

    def router_says(self, event: RouterEvent[str]) -> None:
        match event:
            case (context, payload):
                client = self.clients[context]
                assert client.started
                assert not client.ends
                assert payload == content(context, client.received, len(payload))
                client.received += len(payload)
                assert client.received - client.consumed <= self.flow.window_bytes or not self.flow.enabled
            case ResponseStarted(context=context):
                assert not self.clients[context].started
                self.clients[context].started = True
            case ResponseEnded(context=context, size=size):
                client = self.clients[context]
                assert client.cancelled or size == client.received
                self.ends(context, event)
            case ResponseFailed(context=context) | RequestRefused(context=context):
                self.ends(context, event)

    def ends(self, context: str, how: object) -> None:
        self.clients[context].ends.append(how)
        assert len(self.clients[context].ends) == 1

    @invariant()
    def agent_keeps_at_most_a_window_of_each_stream(self) -> None:
        held = self.wire.agent.statistics()
        assert held.kept_bytes <= held.streams * self.flow.window_bytes or not self.flow.enabled

    @invariant()
    def agent_never_runs_past_the_pause_threshold(self) -> None:
        held = self.wire.agent.statistics()
        assert held.unacknowledged_bytes <= self.flow.pause_threshold_bytes or not self.flow.enabled

    @invariant()
    def router_holds_exactly_the_streams_that_have_not_ended(self) -> None:
        held = 0 if self.wire.router is None else self.wire.router.statistics().streams
        waiting = [client for client in self.clients.values() if not client.ends]
        assert held == len(waiting)

    @invariant()
    def agent_works_on_live_streams_only(self) -> None:
        assert all(self.wire.agent.is_live(stream) for stream in self.work)

    def teardown(self) -> None:
        """The network is good again, the engine finishes, the clients read: everything ends and nothing is left."""
        if not hasattr(self, "wire"):
            return
        self.open_link()
        for _ in range(1_000):
            self.wire.settle()
            self.hear()
            if all(client.ends for client in self.clients.values()) and not self.work:
                break
            for stream in list(self.work):
                self.bring_to_an_end(stream)
            for context, client in self.clients.items():
                self.consume_all(context, client)
        self.wire.settle()
        self.hear()
        self.all_is_over()

    def open_link(self) -> None:
        """An agent whose lease had run out is told so on the first link, and says Hello on a second one."""
        self.wire.settle()
        self.hear()
        if self.wire.agent.link is not Link.OPEN or not self.wire.router_is_linked:
            self.wire.drop()
            self.wire.connect()
            self.hear()
        assert self.wire.agent.link is Link.OPEN

    def bring_to_an_end(self, stream: StreamId) -> None:
        work = self.work[stream]
        client = self.clients[work.context]
        if work.started and (work.produced >= 5_000 or client.cancelled):
            del self.work[stream]
            self.wire.agent.end(stream, None)
        else:
            self.proceed(stream, 2_000)

    def consume_all(self, context: str, client: Client) -> None:
        left, client.consumed = client.received - client.consumed, client.received
        if left and self.wire.router is not None:
            self.wire.router.consumed(client.stream, left)

    def all_is_over(self) -> None:
        assert all(len(client.ends) == 1 for client in self.clients.values())
        agent = self.wire.agent.statistics()
        assert (agent.streams, agent.kept_bytes, agent.unacknowledged_bytes) == (0, 0, 0)
        assert self.wire.router is not None
        router = self.wire.router.statistics()
        assert (router.streams, router.credit_owed_bytes, router.queued_messages) == (0, 0, 0)


TestSessions = SessionsMachine.TestCase
TestSessions.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
