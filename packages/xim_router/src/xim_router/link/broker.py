"""The broker: owns the dispatcher, the agents' sessions and the one timer, and carries out what they decide.

Everything here runs on one event loop and nothing waits: a state change never contains an `await`. What sockets,
clients and the clock bring comes in by the `on_...` and public methods; what is decided leaves by `Transport.send`
and the responses' sinks. Sends are gathered and leave once per loop tick.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterable

from xim_protocol.codec import MAX_FRAMES, Frames
from xim_protocol.errors import MessageTooLarge, RemoteProtocolError
from xim_protocol.events import (
    AgentReported,
    GoodbyeReceived,
    LinkReady,
    RequestRefused,
    ResponseEnded,
    ResponseFailed,
    ResponseStarted,
    RouterEvent,
    SlotsFree,
)
from xim_protocol.ids import AgentId, RequestId
from xim_protocol.lease import LeaseTable
from xim_protocol.messages import (
    AgentState,
    CancelReason,
    Channel,
    Counted,
    Expired,
    FailCode,
    GoodbyeCode,
    RefusalReason,
    RouterMember,
)
from xim_protocol.router_session import Phase
from xim_router.dispatch.catalog import Catalog
from xim_router.dispatch.dispatcher import Dispatcher
from xim_router.dispatch.effects import Assign, Effect, Rejection
from xim_router.dispatch.reports import AgentSeen
from xim_router.dispatch.roster import AgentView
from xim_router.dispatch.statistics import DispatcherStatistics
from xim_router.link.agent_link import AgentLink
from xim_router.link.exchange import Exchange
from xim_router.link.gatekeeper import Admission
from xim_router.link.journal import Journal
from xim_router.link.links import Links
from xim_router.link.reception import SHUTTING_DOWN, Reception
from xim_router.link.sightings import Sightings
from xim_router.link.transport import RoutingId, Transport
from xim_router.telemetry.metrics import LinkReading

log = logging.getLogger(__name__)

LATE_S = 1.0
"""A timer that fires later than this says that the router itself stood still: nobody is expired for that."""


class Broker:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        journal: Journal,
        routers: tuple[RouterMember, ...] = (),
        report_seen: Callable[[AgentSeen], None] = lambda seen: None,
    ) -> None:
        self.catalog = Catalog()
        self.dispatcher = dispatcher
        self.routers = routers
        self._journal = journal
        self._sightings = Sightings(report_seen)
        self._loop = asyncio.get_running_loop()
        self._leases = LeaseTable()
        self._links = Links(self._loop, self.lose_link)
        self.on_accepted = self._links.accepted
        self._reception = Reception(self, self._links, journal)
        self._exchanges: dict[RequestId, Exchange] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_deadline: float | None = None

    def attach(self, transport: Transport) -> None:
        """Send through `transport` from here on."""
        self._links.attach(transport)

    # --- Catalog ---------------------------------------------------------------------------------------------------

    def publish(self, catalog: Catalog) -> None:
        """Take over a new snapshot: revoked and suspended agents end at once, assignments and routers are told."""
        if catalog.revoked_curve_keys - self.catalog.revoked_curve_keys:
            self._links.shut_unattached()
        self.catalog = catalog
        self.routers = catalog.routers or self.routers
        self._perform(self.dispatcher.set_registered(catalog.agents, self._loop.time()))
        for link in self._links:
            registered = catalog.agents.get(link.agent)
            if registered is None:
                self.end_session(link, GoodbyeCode.REVOKED, "The credentials of this agent were revoked.")
            elif registered.suspended:
                self.end_session(link, GoodbyeCode.SUSPENDED, "This agent is suspended.")
            else:
                link.session.assign(catalog.assignment_of(registered))
                link.session.tell_routers(self.routers)
                self._announce(link)
                self._links.touch(link)

    def admit(self, curve_public_key: bytes) -> AgentId | Admission:
        """Whose key this is: the gatekeeper's question."""
        agent = self.catalog.agents_by_curve_key.get(curve_public_key)
        if agent is not None:
            return agent
        revoked = curve_public_key in self.catalog.revoked_curve_keys
        return Admission.REVOKED if revoked else Admission.UNKNOWN

    # --- Requests --------------------------------------------------------------------------------------------------

    def open(self, exchange: Exchange) -> None:
        """Dispatch, park or turn away a new request; its sink is driven from here on."""
        self._exchanges[exchange.request] = exchange
        self._perform(self.dispatcher.submit(exchange.request, exchange.endpoint.endpoint, self._loop.time()))

    def close(self, exchange: Exchange, reason: CancelReason = CancelReason.CLIENT_LEFT) -> None:
        """Nobody waits for the answer any more; harmless when it is complete. Place and slot are given back."""
        if exchange.concluded:
            return
        self._journal.left(exchange)
        self._conclude(exchange, "client_closed_request" if reason is CancelReason.CLIENT_LEFT else reason.value)
        self._give_up(exchange, reason)

    def time_up(self, exchange: Exchange) -> None:
        """The request took longer than it may."""
        if not exchange.concluded:
            self._conclude(exchange, exchange.sink.fail(FailCode.TIME_UP, ""))
            self._give_up(exchange, CancelReason.TIME_UP)

    def client_stalled(self, exchange: Exchange) -> None:
        """The client took no byte for too long: cut it off, stop the engine. Its answer may be complete here."""
        self._journal.client_stalled(exchange)
        if not exchange.concluded:
            self._conclude(exchange, "client_stalled")
            self._give_up(exchange, CancelReason.CLIENT_STALLED)
        exchange.sink.abort()

    def consumed(self, exchange: Exchange, size: int) -> None:
        """`size` held bytes of the response left for the client."""
        stream, link = exchange.stream, self._link_of(exchange)
        if stream is not None and link is not None:
            link.session.consumed(stream, size)
            self._links.touch(link)

    def ping(self) -> None:
        """Give every response the chance to keep a silent client connection alive."""
        for exchange in list(self._exchanges.values()):
            if not exchange.concluded:
                exchange.sink.ping()

    def _give_up(self, exchange: Exchange, reason: CancelReason) -> None:
        link = self._link_of(exchange)
        if exchange.stream is not None and link is not None:
            # The slot is free when the agent says so, which it does at once.
            link.session.cancel(exchange.stream, reason)
            self._links.touch(link)
            return
        self._exchanges.pop(exchange.request, None)
        self._perform(self.dispatcher.withdraw(exchange.request, self._loop.time()))

    def _link_of(self, exchange: Exchange) -> AgentLink | None:
        return self._links.get(exchange.agent)

    def is_linked(self, exchange: Exchange) -> bool:
        """Whether the agent that works on the request can be heard now."""
        link = self._link_of(exchange)
        return link is not None and link.session.phase is Phase.OPEN

    # --- What the dispatcher decided -------------------------------------------------------------------------------

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            exchange = self._exchanges[effect.request]
            exchange.queue_wait_s = effect.waited_s
            if isinstance(effect, Assign):
                self._assign(exchange, effect)
            else:
                self._reject(exchange, effect.reason)
        self._rearm()

    def _assign(self, exchange: Exchange, effect: Assign) -> None:
        link = self._links.get(effect.agent)
        assert link is not None, "the dispatcher assigns to connected agents only"
        exchange.agent = effect.agent
        exchange.attempts = effect.attempt
        self._journal.assigned(exchange)
        exchange.stream = link.session.submit(
            exchange,
            request=exchange.request,
            attempt=effect.attempt,
            project=exchange.project,
            path=exchange.route.path,
            body=exchange.body,
            headers=exchange.headers,
            time_left_ms=max(0, round((exchange.deadline - self._loop.time()) * 1000)),
        )
        self._links.touch(link)

    def _reject(self, exchange: Exchange, reason: Rejection) -> None:
        del self._exchanges[exchange.request]
        if exchange.concluded:
            return
        if reason is Rejection.AGENT_LOST and exchange.failure is not None:
            # The last attempt's own failure says more than that attempts are used up.
            code = exchange.sink.fail(*exchange.failure)
        else:
            code = exchange.sink.reject(reason)
        self._journal.rejected(exchange, reason)
        self._conclude(exchange, code)

    def _conclude(self, exchange: Exchange, code: str | None) -> None:
        """The client has its answer, or left: one log line, one count. `code` is None for a whole answer."""
        exchange.concluded = True
        exchange.body = b""
        self._journal.concluded(exchange, code, self._loop.time())

    # --- Receiving -------------------------------------------------------------------------------------------------

    def on_message(
        self, channel: Channel, routing_id: RoutingId, agent: AgentId, descriptor: Callable[[], int], frames: Frames
    ) -> None:
        """One message; the hot path for every chunk of every answer."""
        link = self._links.bound(channel, routing_id)
        if link is None or link.agent != agent:
            self._reception.receive(channel, routing_id, agent, descriptor, frames)
            return
        session = link.session
        entries = session.entries
        try:
            events = session.receive(channel, frames)
        except RemoteProtocolError as error:
            self._fault(link, error)
            return
        chunks = received_bytes = 0
        for event in events:
            try:
                if type(event) is tuple:
                    exchange, payload = event
                    chunks += 1
                    received_bytes += len(payload)
                    exchange.chunks += 1
                    exchange.received_bytes += len(payload)
                    if not exchange.concluded:
                        size = exchange.sink.put(payload)
                        if size and exchange.stream is not None:
                            session.consumed(exchange.stream, size)
                        if exchange.first_byte_at is None and exchange.sink.committed:
                            exchange.first_byte_at = self._loop.time()
                            exchange.body = b""  # from here on it is dispatched to nobody else
                else:
                    self.handle(link, event)
            except Exception:
                # The message has other clients' bytes too, which come only once.
                self._spoiled(event)
        self._journal.message(session.entries - entries, chunks, received_bytes)
        if session.wants_to_send:
            self._links.touch(link)
        if session.closes_streams:
            self._links.touch_later(link)

    def _spoiled(self, event: RouterEvent[Exchange]) -> None:
        """A fault of ours, while `event` was seen to: it ends the one answer that it belongs to."""
        exchange: Exchange | None = event[0] if isinstance(event, tuple) else getattr(event, "context", None)
        log.exception("answer failed", extra={"request": None if exchange is None else exchange.request})
        if exchange is None:
            return
        exchange.sink.abort()
        if not exchange.concluded:
            self._conclude(exchange, "internal_error")
        over = not isinstance(event, (tuple, ResponseStarted))
        self._release(exchange) if over else self._give_up(exchange, CancelReason.CLIENT_LEFT)

    def on_oversized(
        self, channel: Channel, routing_id: RoutingId, agent: AgentId, descriptor: Callable[[], int], frames: int
    ) -> None:
        """A message of too many frames, whoever sent it."""
        error = MessageTooLarge("frames", frames, MAX_FRAMES)
        link = self._links.bound(channel, routing_id)
        if link is not None:
            self._fault(link, error)
        else:
            self._reception.fault(channel, descriptor, error)

    def on_disconnected(self, channel: Channel, descriptor: int) -> None:
        """A TCP connection is gone; so is the link it belonged to."""
        link = self._links.disconnected(channel, descriptor)
        if link is not None:
            self.lose_link(link)

    def handle(self, link: AgentLink, event: RouterEvent[Exchange]) -> None:
        now = self._loop.time()
        match event:
            case ResponseStarted(context=exchange):
                exchange.status = event.status
                if not exchange.concluded:
                    exchange.sink.start(event.status, event.content_type)
            case ResponseEnded(context=exchange):
                self._finished(exchange, event)
            case ResponseFailed(context=exchange):
                self._failed(exchange, event.code, event.message, retryable=event.retryable)
            case RequestRefused(context=exchange):
                self._refused(exchange, event)
            case AgentReported():
                self._leases.grant(link.agent, link.session.lease_s, now)
                self._sightings.seen(link, event.state)
                self._announce(link)
            case LinkReady():
                self._announce(link)
            case SlotsFree():
                self._perform(self.dispatcher.slots_free(link.agent, event.free, now))
            case Counted():
                self._journal.counted(link.agent, event)
            case GoodbyeReceived():
                self._sightings.said_goodbye(link, event.code)
                self.end_session(link, None, "")

    def _finished(self, exchange: Exchange, event: ResponseEnded[Exchange]) -> None:
        exchange.usage = event.usage
        if not exchange.concluded:
            code = exchange.sink.end()
            if exchange.first_byte_at is None:
                exchange.first_byte_at = self._loop.time()
            self._conclude(exchange, code)
        self._release(exchange)

    def _failed(self, exchange: Exchange, code: FailCode, message: str, *, retryable: bool) -> None:
        if code is FailCode.ENGINE_UNAVAILABLE:
            self._degrade(exchange)
        if not exchange.concluded and retryable and not exchange.sink.committed:
            exchange.failure = (code, message)
            exchange.sink.reset()
            exchange.stream = None
            self._journal.retried(code)
            self._perform(self.dispatcher.lost(exchange.request, self._loop.time()))
            return
        if not exchange.concluded:
            self._journal.failed(code)
            self._conclude(exchange, exchange.sink.fail(code, message))
        self._release(exchange)

    def _degrade(self, exchange: Exchange) -> None:
        """The engine of an agent that calls itself ready did not answer: believe that until it reports again.

        Otherwise a sole agent would be given the request again at once, and both attempts be gone within milliseconds.
        """
        link = self._link_of(exchange)
        if link is not None and link.session.report.state is AgentState.READY:
            link.session.report = dataclasses.replace(link.session.report, state=AgentState.DEGRADED)
            self._announce(link)

    def _refused(self, exchange: Exchange, event: RequestRefused[Exchange]) -> None:
        exchange.stream = None
        if exchange.concluded:
            self._release(exchange)
        elif event.reason is RefusalReason.ROUTE:
            # Every agent of the endpoint would say the same; a retry would go round for ever.
            self._conclude(exchange, exchange.sink.fail(FailCode.BODY_INVALID, "The agent does not serve this route."))
            self._release(exchange)
        else:
            self._journal.refused()
            full = event.in_flight if event.reason is RefusalReason.AT_CAPACITY else None
            self._perform(self.dispatcher.refused(exchange.request, full, self._loop.time()))

    def _release(self, exchange: Exchange) -> None:
        """The slot is free; the longest parked request leaves in the same tick."""
        exchange.stream = None
        self._exchanges.pop(exchange.request, None)
        self._perform(self.dispatcher.finished(exchange.request, self._loop.time()))

    # --- Links and sessions ----------------------------------------------------------------------------------------

    def lose_link(self, link: AgentLink) -> None:
        """The sockets are gone or given up; the session waits for its agent until the lease is over."""
        if not link.routing_ids:
            return
        self._journal.link_lost()
        self._sightings.lost(link, several=len(self.routers) > 1)
        self._links.unbind(link)
        link.session.link_lost()
        self._announce(link)

    def end_session(self, link: AgentLink, code: GoodbyeCode | None, message: str) -> None:
        """End a session: its requests are dispatched again or fail, its sockets are shut."""
        if not self._links.remove(link):
            return
        self._sightings.ended(link, code, message, several=len(self.routers) > 1)
        link.session.end(code, message)
        # By this end's own books: a session forgets the streams that ended in a message before it came to its fault.
        cut = [each for each in self._exchanges.values() if each.agent == link.agent and each.stream is not None]
        if link.routing_ids:
            link.flush(self._links.transport)
        self._links.unbind(link)
        self._leases.release(link.agent)
        self._perform(self.dispatcher.agent_down(link.agent, self._loop.time()))
        for exchange in cut:
            self._failed(exchange, FailCode.AGENT_LOST, "", retryable=True)

    def _fault(self, link: AgentLink, error: RemoteProtocolError) -> None:
        self._journal.fault(error.reason)
        self.end_session(link, GoodbyeCode.PROTOCOL_ERROR, str(error))

    def _announce(self, link: AgentLink) -> None:
        """Tell the dispatcher how an agent stands now."""
        report = link.session.report
        registered = self.catalog.agents.get(link.agent)
        assignment = None if registered is None else self.catalog.assignment_of(registered)
        state, served = report.state, report.served_model
        if state is AgentState.READY and assignment is not None and served not in (None, assignment.served_name):
            # The engine still serves what was assigned before.
            state = AgentState.STARTING
        view = AgentView(
            agent=link.agent,
            endpoint=None if assignment is None else assignment.endpoint,
            capacity=report.capacity,
            state=state,
            connected=link.session.phase is Phase.OPEN,
        )
        self._perform(self.dispatcher.agent_up(view, self._loop.time()))

    # --- Time, and the end -----------------------------------------------------------------------------------------

    def _rearm(self) -> None:
        """One timer for the earliest deadline of queue and leases."""
        deadlines = [d for d in (self.dispatcher.next_deadline(), self._leases.next_deadline()) if d is not None]
        deadline = min(deadlines, default=None)
        if deadline == self._timer_deadline:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_deadline = deadline
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        due, self._timer, self._timer_deadline = self._timer_deadline or 0.0, None, None
        late_s = self._loop.time() - due
        if late_s > LATE_S:
            log.warning("the event loop stood still", extra={"late_s": round(late_s, 3)})
            self._leases.postpone(late_s)
        # What arrived while nobody looked may renew a lease that seems to be over.
        self._links.transport.drain()
        now = self._loop.time()
        for agent in self._leases.expire(now):
            link = self._links.get(agent)
            if link is not None:
                self._journal.lease_expired()
                log.warning("lease expired", extra={"agent": agent})
                control = link.routing_ids.get(Channel.CONTROL)
                if control is not None:
                    self._links.reply(control, Expired())
                self.end_session(link, None, "")
        self._perform(self.dispatcher.expire(now))

    def drain(self) -> None:
        """Take nothing new and turn away what is parked; what is in flight goes on."""
        self._perform(self.dispatcher.shut(self._loop.time()))

    @property
    def in_flight(self) -> int:
        """Requests whose client still waits."""
        return sum(not exchange.concluded for exchange in self._exchanges.values())

    def shut(self) -> None:
        """Tell clients and agents that this router ends."""
        self._reception.close()
        for exchange in list(self._exchanges.values()):
            if not exchange.concluded:
                self._conclude(exchange, exchange.sink.fail(FailCode.AGENT_LOST, SHUTTING_DOWN))
        for link in self._links:
            self.end_session(link, GoodbyeCode.SHUTDOWN, SHUTTING_DOWN)
        if self._timer is not None:
            self._timer.cancel()

    def statistics(self) -> DispatcherStatistics:
        """What is where, for metrics, readiness and tests."""
        return self.dispatcher.statistics()

    @property
    def open_exchanges(self) -> int:
        """Requests that still hold a place or a slot."""
        return len(self._exchanges)

    def reading(self) -> LinkReading:
        """What requests and sessions hold, for metrics."""
        sessions = [link.session.statistics() for link in self._links]
        return LinkReading(
            exchanges=len(self._exchanges),
            streams=sum(session.streams for session in sessions),
            credit_owed_bytes=sum(session.credit_owed_bytes for session in sessions),
        )
