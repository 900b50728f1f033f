"""Drives one agent's session with one router: dials, keeps time, and comes again when a link is lost.

The session decides, this module does: it moves messages between the sockets and the session, arms one timer, and
tells its owner what happened. Streams live in the session and survive a lost link.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable

from xim_agent.link.ends import LinkBackoff, LinkCause, LinkEnd, problem_of, remedy_for, stop_for
from xim_agent.link.sockets import CurveKeys, LinkSockets, Transport
from xim_agent.link.writer import StreamWriter
from xim_protocol.agent_session import AgentConfig, AgentReport, AgentSession, AgentSessionStatistics, Link
from xim_protocol.codec import Frames
from xim_protocol.enrollment import RouterAddress
from xim_protocol.errors import RemoteProtocolError
from xim_protocol.events import (
    AgentEvent,
    CreditGranted,
    GoodbyeReceived,
    LinkFailed,
    LinkReady,
    SessionExpired,
    StreamAborted,
    StreamCancelled,
    StreamFailed,
    Welcomed,
)
from xim_protocol.messages import Channel, FlowControl, GoodbyeCode

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""The loop's timers stand still while the machine is suspended, leases do not: look at the clock so often."""
REPEAT_PROBLEM_S = 60.0
"""A problem that lasts is logged again after this time, and not with every attempt."""
ROOM_S = 0.01
"""How often a stream without flow control asks whether the sockets take more."""

_BOOTTIME: int | None = getattr(time, "CLOCK_BOOTTIME", None)

OnEvent = Callable[["Connection", AgentEvent], None]
Clock = Callable[[], float]


def boottime() -> float:
    """Monotonic seconds that count suspend, where the system has such a clock (Linux)."""
    return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)


class Connection:
    """One router of the mesh; `run` in a task of its own, `close` from anywhere in the loop."""

    def __init__(
        self,
        *,
        transport: Transport,
        router: RouterAddress,
        keys: CurveKeys,
        config: AgentConfig,
        report: AgentReport,
        on_event: OnEvent,
        on_renewed: Callable[[], None] = lambda: None,
        on_down: Callable[[], None] = lambda: None,
        elsewhere: Callable[[], bool] = lambda: False,
        coalesce_s: float = 0.002,
        source: random.Random | None = None,
        clock: Clock = boottime,
    ) -> None:
        """`report` may be shared between connections: it is what the agent says of itself to every router.
        `on_renewed` is told of every lease granted, `on_down` of every link that ended; `elsewhere` tells whether
        another router may serve the agent; `source` is the randomness of the backoff."""
        self.router = router
        self.session = AgentSession(config, report)
        self.writer = StreamWriter(
            self.session,
            self._send,
            clock=clock,
            coalesce_s=coalesce_s,
            on_stall=self._rearm,
            congested=self._is_congested,
        )
        self.refused = False
        """The router spoke none of the agent's versions when it was last asked."""
        self.links = 0
        """Links that came up whole, for metrics."""
        self._transport = transport
        self._keys = keys
        self._on_event = on_event
        self._on_renewed = on_renewed
        self._on_down = on_down
        self._elsewhere = elsewhere
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._backoff = LinkBackoff(source or random.Random())
        self._lease_s = config.lease_s
        self._asked = config
        self._sockets: LinkSockets | None = None
        self._end: asyncio.Future[LinkEnd] | None = None
        self._closing = asyncio.Event()
        self._settled: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._room: asyncio.TimerHandle | None = None
        self._told: tuple[str, float] = ("", 0.0)

    @property
    def name(self) -> str:
        """The router's control address."""
        return self.router.control_addr

    @property
    def is_open(self) -> bool:
        """True while requests may come over this link."""
        return self.session.link is Link.OPEN

    def statistics(self) -> AgentSessionStatistics:
        """What the session holds."""
        return self.session.statistics()

    # --- For the owner ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a link to the router until `close`; cancelling cuts it.

        Raises:
            LinkStopped: the router wants this agent not to come again; it carries the remedy.
        """
        try:
            while not self._closing.is_set():
                end = await self._one_link()
                if end.cause is LinkCause.CLOSED:
                    break
                await self._pause_after(end)
            self._release_lease()  # no link comes any more: who waits for credit would wait for ever
        finally:
            self.writer.close()
            for timer in (self._timer, self._room):
                if timer is not None:
                    timer.cancel()

    def renew(self) -> None:
        """Tell the router the report as it is now."""
        self.session.renew(self._clock())
        self.flush()

    def announce_draining(self) -> None:
        """Nothing new from here on."""
        self.session.announce_draining()
        self.flush()

    def flush(self) -> None:
        """Send everything that may leave now."""
        self.writer.flush()
        self._rearm()

    async def settle(self) -> None:
        """Wait until the router has everything of every stream. The caller sets the deadline."""
        while self.session.statistics().streams:
            self._settled = asyncio.Event()
            await self._settled.wait()

    def close(self, code: GoodbyeCode = GoodbyeCode.LEAVING, message: str = "") -> None:
        """Say Goodbye and let `run` return."""
        self._closing.set()
        self.session.leave(code, message)
        self.flush()
        self._end_link(LinkEnd(cause=LinkCause.CLOSED))

    # --- Links -----------------------------------------------------------------------------------------------------

    async def _one_link(self) -> LinkEnd:
        """Dial, and serve the link until it ends."""
        try:
            self._sockets = self._transport.open(
                self.router,
                self._keys,
                lease_s=self._lease_s,
                streaming=self.session.config.streaming_socket,
                on_message=self._received,
                on_end=self._end_link,
            )
        except OSError as error:  # this router's matter: the links to others go on
            return LinkEnd(cause=LinkCause.UNREACHABLE, channel=Channel.CONTROL, detail=str(error))
        ended = self._end = self._loop.create_future()
        end: LinkEnd | None = None
        try:
            self.session.connect(self._clock())
            self.flush()
            end = await ended  # by the monitor, the router, the answer deadline, or close()
            return end
        finally:
            said_goodbye = self._closing.is_set() or (end is not None and end.cause is LinkCause.PROTOCOL_ERROR)
            self._sockets.close(leave=said_goodbye)
            self._sockets = self._end = None
            self._tell(self.session.link_lost(self._clock()))
            self._on_down()
            self._rearm()

    def _end_link(self, end: LinkEnd) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_result(end)

    async def _pause_after(self, end: LinkEnd) -> None:
        """Wait before the next link, or raise when there must be none."""
        self.refused = end.code is GoodbyeCode.VERSION_UNSUPPORTED
        stopped = stop_for(end, elsewhere=self._elsewhere())
        if stopped is not None:
            raise stopped
        delay_s = self._backoff.delay_s(end, leased=self.session.lease.held)
        self._report_end(end, delay_s)
        try:
            async with asyncio.timeout(delay_s):
                await self._closing.wait()
        except TimeoutError:
            return

    def _report_end(self, end: LinkEnd, delay_s: float) -> None:
        problem, now = problem_of(end), self._loop.time()
        facts = {"router": self.name, "problem": problem, "detail": end.detail, "retry_s": round(delay_s, 2)}
        if remedy := remedy_for(end):
            facts["remedy"] = remedy
        if self._told[0] == problem and now < self._told[1] + REPEAT_PROBLEM_S:
            log.debug("no link to the router", extra=facts)
            return
        self._told = (problem, now)
        log.warning("no link to the router", extra=facts)

    # --- Messages --------------------------------------------------------------------------------------------------

    def _received(self, channel: Channel, frames: list[bytes]) -> None:
        if self._end is None or self._end.done():
            return
        try:
            self._take(channel, frames)
        except RemoteProtocolError as error:
            log.error("router broke the protocol", extra={"router": self.name, "reason": error.reason, "fault": error})
            self.session.leave(GoodbyeCode.PROTOCOL_ERROR, str(error))
            self.flush()
            self._end_link(LinkEnd(cause=LinkCause.PROTOCOL_ERROR, channel=channel, detail=str(error)))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """A callback of the loop has no task to fail: `run` is the one whose error this is."""
        if self._end is not None and not self._end.done():
            self._end.set_exception(error)
        else:
            log.error("a fault between two links", extra={"router": self.name}, exc_info=error)

    def _take(self, channel: Channel, frames: list[bytes]) -> None:
        lease_until = self.session.lease.deadline
        self._tell(self.session.receive(channel, frames, self._clock()))
        if self.session.lease.deadline != lease_until and self.session.lease.held:
            self._on_renewed()
        self.writer.flush_pending()
        self._rearm()

    def _send(self, messages: list[tuple[Channel, Frames]]) -> None:
        if self._sockets is not None:
            self._sockets.send(messages)

    def _tell(self, events: list[AgentEvent]) -> None:
        for event in events:
            self._note(event)
            self._on_event(self, event)
        if self._settled is not None:
            self._settled.set()

    def _note(self, event: AgentEvent) -> None:
        """What an event means for the link itself."""
        match event:
            case Welcomed():
                self._lease_s = event.lease_s
            case LinkReady():
                self._ready()
            case CreditGranted():
                self.writer.credited(event.streams)
            case StreamCancelled() | StreamAborted() | StreamFailed():
                self.writer.gone(event.stream)
            case SessionExpired():
                self._end_link(LinkEnd(cause=LinkCause.EXPIRED, detail="the lease is over"))
            case LinkFailed():
                self._end_link(LinkEnd(cause=LinkCause.NO_ANSWER, channel=event.channel, detail="no answer in time"))
            case GoodbyeReceived():
                self._end_link(LinkEnd(cause=LinkCause.GOODBYE, code=event.code, detail=event.message))
                self._release_lease()

    def _ready(self) -> None:
        self.links += 1
        self._backoff.opened()
        self._told = ("", 0.0)
        log.info("connected", extra={"router": self.name, "session": self.session.session, "lease_s": self._lease_s})
        self._tell_of_limits()
        self.writer.linked()

    def _tell_of_limits(self) -> None:
        """A setting beyond what the router takes has no effect: say so."""
        asked, granted = _limits(self._asked.flow, self._asked.lease_s), _limits(self.session.flow, self._lease_s)
        other = {name: value for name, value in granted.items() if value != asked[name]}
        if other:
            facts = {"router": self.name, **other, **{f"asked_{name}": asked[name] for name in other}}
            log.warning("router grants other limits than were asked", extra=facts)

    def _release_lease(self) -> None:
        """One of the two ends left, so the lease is over now: its streams have nobody to answer to."""
        deadline = self.session.lease.deadline
        if deadline is not None:
            self._tell(self.session.handle_timeout(deadline))

    # --- Time ------------------------------------------------------------------------------------------------------

    def _rearm(self) -> None:
        """Keep the one timer at the session's next deadline. A timer that is early finds nothing to do."""
        deadline = self.session.next_deadline()
        if deadline is None:
            return
        now = self._clock()
        if self._timer is not None and self._timer_at <= deadline:
            return
        if self._timer is not None:
            self._timer.cancel()
        delay_s = min(max(0.0, deadline - now), LOOK_S)
        self._timer_at = now + delay_s
        self._timer = self._loop.call_later(delay_s, self._timed_out)

    def _timed_out(self) -> None:
        self._timer = None
        deadline, now = self.session.next_deadline(), self._clock()
        try:
            if deadline is not None and now >= deadline:
                self._tell(self.session.handle_timeout(now))
                self.writer.flush_pending()
            self._rearm()
        except Exception as error:
            self._fail(error)
            # Not at once: the deadline may be as it was.
            self._timer_at, self._timer = now + LOOK_S, self._loop.call_later(LOOK_S, self._timed_out)

    # --- Without flow control --------------------------------------------------------------------------------------

    def _is_congested(self) -> bool:
        """True while no link is open or its sockets are full; then streams are woken when that may have changed."""
        if self.is_open and self._sockets is not None and not self._sockets.backlog_bytes:
            return False
        if self.is_open and self._room is None:
            self._room = self._loop.call_later(ROOM_S, self._look_for_room)
        return True

    def _look_for_room(self) -> None:
        self._room = None
        self.writer.linked()


def _limits(flow: FlowControl, lease_s: float) -> dict[str, float]:
    return {
        "lease_s": lease_s,
        "window_bytes": flow.window_bytes,
        "pause_threshold_bytes": flow.pause_threshold_bytes,
    }
