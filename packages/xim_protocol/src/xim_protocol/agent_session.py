"""The agent's end of its session with one router.

The owner calls, in this order: `connect` when a new link's sockets are open; `receive` with every message; for each
`RequestReceived` one of `refuse`, or `start_response`, `produce` and `end` or `fail`; `gather` to turn what streams
produced into batches; `frames_to_send` to send. `link_lost` when the sockets are gone, then `connect` again: streams
live on, and what the router did not receive is repeated. `next_deadline` says when to call `handle_timeout`.
No clock, no socket: `now` is monotonic seconds and should count suspend.
"""

from collections.abc import Sequence

from xim_protocol.agent_config import AgentConfig, AgentReport, AgentSessionStatistics, Link, hello_of, renew_of
from xim_protocol.agent_outbox import AgentOutbox, AgentStream
from xim_protocol.codec import Frames, decode, encode, encode_batch
from xim_protocol.credit import CreditSender
from xim_protocol.entries import end_entry, fail_entry, start_entry
from xim_protocol.errors import LocalProtocolError, OffsetMismatch, UnexpectedMessage
from xim_protocol.events import (
    AgentEvent,
    Assigned,
    BodyReceived,
    CreditGranted,
    GoodbyeReceived,
    LinkFailed,
    LinkReady,
    MembersChanged,
    RequestReceived,
    SessionExpired,
    StreamAborted,
    StreamCancelled,
    StreamFailed,
    Welcomed,
)
from xim_protocol.ids import SessionId, StreamId
from xim_protocol.lease import LeaseHolder
from xim_protocol.messages import (
    PROTOCOL_VERSION,
    AgentState,
    Assign,
    Attach,
    Attached,
    Body,
    Cancel,
    Channel,
    Counted,
    Credit,
    Draining,
    Entry,
    EntryKind,
    Expired,
    FailCode,
    Goodbye,
    GoodbyeCode,
    Members,
    Message,
    RefusalReason,
    Renewed,
    Slots,
    StreamVerdict,
    Submit,
    Usage,
    Verdict,
    Welcome,
)
from xim_protocol.stall import StallClocks
from xim_protocol.stream import TERMINAL, Step, StreamState, next_state

__all__ = ["AgentConfig", "AgentReport", "AgentSession", "AgentSessionStatistics", "Link"]

ANSWER_TIMEOUT_S = 10.0
"""Welcome, or Attached, must come within this."""
BODY_AHEAD_BYTES = 1024 * 1024
"""A long request body may run this far ahead of what was received."""


class AgentSession:
    """See the module's docstring."""

    def __init__(self, config: AgentConfig, report: AgentReport) -> None:
        self.config = config
        self.report = report
        self.link = Link.DOWN
        self.session: SessionId | None = None
        self.flow = config.flow
        self.lease = LeaseHolder(config.renewal_interval_s)
        self._streams: dict[StreamId, AgentStream] = {}
        self._stalls = StallClocks()
        self._outbox = AgentOutbox(config.flow)
        self._outgoing: list[tuple[Channel, Frames]] = []
        self._answer_deadline: float | None = None
        self._news_waits = False

    # --- Link ------------------------------------------------------------------------------------------------------

    def connect(self, now: float) -> None:
        """A new link's control socket is open: say Hello.

        Raises:
            LocalProtocolError: the old link was not given up by `link_lost`.
        """
        if self.link is not Link.DOWN:
            raise LocalProtocolError(f"connect while {self.link}")
        self.link = Link.HELLO_SENT
        self._answer_deadline = now + ANSWER_TIMEOUT_S
        self._news_waits = False
        self.lease.asked(now)
        streams = [stream.report() for stream in self._streams.values()]
        self._send(hello_of(self.config, self.report, streams))

    def link_lost(self, now: float) -> list[AgentEvent]:
        """The sockets are gone. Streams live on; requests whose body was not whole are forgotten.

        The router submits those again. Stall clocks stand still from here until the next link is open.
        """
        self._stalls.stand_still(now)
        self._take_down()
        return self._abort([stream for stream in self._streams.values() if stream.body is not None])

    def _take_down(self) -> None:
        self.link = Link.DOWN
        self._answer_deadline = None
        self._outgoing.clear()
        self.lease.link_lost()

    def leave(self, code: GoodbyeCode = GoodbyeCode.LEAVING, message: str = "") -> None:
        """Say Goodbye; the owner closes the link after sending it."""
        if self.link is not Link.DOWN:
            self._send(Goodbye(code=code, message=message))

    # --- Receiving -------------------------------------------------------------------------------------------------

    def receive(self, channel: Channel, frames: Sequence[bytes], now: float) -> list[AgentEvent]:
        """Take in one message from the router. What still comes from a link that is down is dropped.

        Raises:
            RemoteProtocolError: the router broke the protocol; lose the link.
        """
        message = decode(frames)
        if message is None or self.link is Link.DOWN:
            return []
        if channel is Channel.CONTROL:
            events = self._receive_control(message, now)
        else:
            events = self._receive_streaming(message, now)
        if events is None:
            raise UnexpectedMessage(f"{type(message).__name__} on {channel}", self.link)
        return events

    def _receive_control(self, message: Message, now: float) -> list[AgentEvent] | None:
        match message:
            case Goodbye():
                return [GoodbyeReceived(code=message.code, message=message.message)]
            case Welcome() if self.link is Link.HELLO_SENT:
                return self._welcomed(message, now)
            case _ if self.link not in (Link.ATTACHING, Link.OPEN):
                return None
            case Credit():
                return self._credited(message)
            case Submit():
                return self._submitted(message)
            case Cancel():
                return self._cancelled(message)
            case Renewed():
                self.lease.granted(message.lease_ms / 1000, now)
                return []
            case Expired():
                return self._expire()
            case Assign():
                return [Assigned(assignment=message.assignment)]
            case Members():
                return [MembersChanged(routers=message.routers)]
            case Body() if not self.config.streaming_socket:
                return self._received_body(message)
            case _:
                return None

    def _receive_streaming(self, message: Message, now: float) -> list[AgentEvent] | None:
        match message:
            case Attached() if self.link is Link.ATTACHING and message.session == self.session:
                return self._opened(now)
            case Body() if self.link is Link.OPEN:
                return self._received_body(message)
            case _:
                return None

    def _welcomed(self, welcome: Welcome, now: float) -> list[AgentEvent]:
        if welcome.version != PROTOCOL_VERSION:
            raise UnexpectedMessage(f"Welcome with version {welcome.version}", self.link)
        resumed = welcome.session == self.session
        survivors = {row.stream for row in welcome.streams if row.verdict is Verdict.RESUME} if resumed else set()
        self.session = welcome.session
        self.flow = welcome.flow
        self._outbox.new_link(welcome.flow)
        self.lease.granted(welcome.lease_ms / 1000, now)
        rows = [row for row in welcome.streams if row.stream in survivors and row.stream in self._streams]
        going_on = [event for row in rows for event in self._resume(self._streams[row.stream], row)]
        # Last: a Welcome that is a fault tells the owner nothing, and forgets no stream that it works on.
        gone = [stream for number, stream in self._streams.items() if number not in survivors]
        events: list[AgentEvent] = [*self._abort(gone), *going_on]
        events.append(
            Welcomed(
                session=welcome.session,
                resumed=resumed,
                lease_s=welcome.lease_ms / 1000,
                assignment=welcome.assignment,
                routers=welcome.routers,
            )
        )
        self.link = Link.ATTACHING
        if self._news_waits:
            self.renew(now)
        if self.config.streaming_socket:
            self._answer_deadline = now + ANSWER_TIMEOUT_S
            self._send(Attach(session=welcome.session), Channel.STREAMING)
        else:
            events.extend(self._opened(now))
        return events

    def _opened(self, now: float) -> list[AgentEvent]:
        self.link = Link.OPEN
        self._answer_deadline = None
        self._stalls.go_on(now)
        return [LinkReady()]

    def _resume(self, stream: AgentStream, row: StreamVerdict) -> list[AgentEvent]:
        """Go on with a stream from where the router has it."""
        stream.start_sent = row.started
        stream.terminal_sent = False
        self._outbox.mark(stream)
        if not stream.credit.resume(row.stream, row.received):
            # Only without flow control: what is missing was dropped from the replay buffer already.
            live = stream.terminal is None
            self._fail(stream, FailCode.OUTRUN, "The link was lost and the response had run ahead.")
            return [StreamFailed(stream=row.stream, code=FailCode.OUTRUN)] if live else []
        return self._refresh([row.stream]) if stream.credit.raise_limit(row.stream, row.limit) else []

    def _credited(self, credit: Credit) -> list[AgentEvent]:
        self._outbox.reported(credit.received)
        for number in credit.closed:
            closed = self._streams.get(number)
            if closed is not None:
                if closed.terminal is None:
                    raise UnexpectedMessage(f"closed stream {number}", closed.state)
                self._forget(closed)
        raised = [
            number
            for number, limit in credit.limits
            if (stream := self._streams.get(number)) is not None and stream.credit.raise_limit(number, limit)
        ]
        return self._refresh(raised)

    def _refresh(self, numbers: Sequence[StreamId]) -> list[AgentEvent]:
        for number in numbers:
            self._stalls.stop(number)
        return [CreditGranted(streams=tuple(numbers))] if numbers else []

    def _submitted(self, submit: Submit) -> list[AgentEvent]:
        # The router may send it as soon as it sent Attached, which travels on the other socket and may come later.
        if submit.stream in self._streams:
            raise UnexpectedMessage(f"Submit of stream {submit.stream}", self.link)
        whole = 0 if submit.body is None else len(submit.body)
        if (submit.body is None) != (submit.body_bytes > whole) or submit.body_bytes < whole:
            raise OffsetMismatch(submit.stream, submit.body_bytes, whole)
        credit = CreditSender(self.flow.window_bytes, enforced=self.flow.enabled)
        stream = AgentStream(submit=submit, credit=credit)
        if submit.body is None:
            stream.body = bytearray()
        self._streams[submit.stream] = stream
        return [RequestReceived(submit=submit)]

    def _received_body(self, piece: Body) -> list[AgentEvent]:
        stream = self._streams.get(piece.stream)
        whole = None if stream is None else stream.take_body(piece)
        if whole is not None:
            return [BodyReceived(stream=piece.stream, body=whole)]
        # Asked for again at every half of what may run ahead, long before it is used up.
        end = piece.offset + len(piece.payload)
        if stream is not None and stream.body is not None and end % (BODY_AHEAD_BYTES // 2) < len(piece.payload):
            self.continue_body(piece.stream)
        return []

    def _cancelled(self, cancel: Cancel) -> list[AgentEvent]:
        stream = self._streams.get(cancel.stream)
        if stream is None or stream.terminal is not None:
            return []
        self._step(stream, Step.CANCEL)
        self._fail(stream, FailCode.CANCELLED, "")
        return [StreamCancelled(stream=cancel.stream, reason=cancel.reason)]

    # --- Responses -------------------------------------------------------------------------------------------------

    def refuse(self, number: StreamId, reason: RefusalReason, in_flight: int) -> None:
        """Do not take the request; `in_flight` is the agent's total over all routers."""
        stream = self._stream(number, Step.REFUSE)
        self._finish(stream, (EntryKind.REFUSED, number, reason.value, in_flight))

    def continue_body(self, number: StreamId) -> None:
        """Ask for (more of) a long request body."""
        stream = self._streams.get(number)
        if stream is None or stream.body is None:
            raise LocalProtocolError(f"stream {number} awaits no body")
        self._outbox.ask_body(number, min(len(stream.body) + BODY_AHEAD_BYTES, stream.submit.body_bytes))

    def start_response(self, number: StreamId, status: int, content_type: str) -> None:
        """The engine answered; leaves with the first bytes or the end."""
        entry = start_entry(number, status, content_type)
        self._stream(number, Step.START).start = entry

    def produce(self, number: StreamId, payload: bytes, now: float) -> int:
        """Take as much of `payload` as the stream has credit for; returns how many bytes were taken.

        What was not taken must be offered again after `CreditGranted`; the stall clock runs until then. Without flow
        control everything is taken; what outruns the replay buffer while there is no link fails on the next one.
        """
        stream = self._streams.get(number)
        if stream is None or stream.state is not StreamState.RESPONDING:  # else nothing changes: nearly every chunk
            stream = self._stream(number, Step.CHUNK)
        taken = stream.credit.produce(payload)
        if taken:
            self._outbox.mark(stream)
        if not self.flow.enabled and self.link is not Link.OPEN:
            # Not after the Welcome: the router was told that all of it comes.
            share = self.flow.pause_threshold_bytes // len(self._streams)
            stream.credit.keep_at_most(share, unsent_too=self.link is not Link.ATTACHING)
        if taken < len(payload):
            self._stalls.start(number, now)
        return taken

    def end(self, number: StreamId, usage: Usage | None) -> None:
        """The response is whole."""
        entry = end_entry(number, usage)
        self._finish(self._stream(number, Step.END), entry)

    def fail(
        self, number: StreamId, code: FailCode, message: str, *, retryable: bool, usage: Usage | None = None
    ) -> None:
        """The stream ends without a whole response; what was produced before still leaves first."""
        entry = fail_entry(number, code, message, retryable=retryable, usage=usage)
        self._finish(self._stream(number, Step.FAIL), entry)

    def is_live(self, number: StreamId) -> bool:
        """True while the stream may still produce: not ended, cancelled, stalled or aborted."""
        stream = self._streams.get(number)
        return stream is not None and stream.terminal is None

    def room(self, number: StreamId) -> int:
        """Bytes that `produce` would take now; none when the stream is not live."""
        stream = self._streams.get(number)
        return stream.credit.room if stream is not None and stream.terminal is None else 0

    def _stream(self, number: StreamId, step: Step) -> AgentStream:
        stream = self._streams.get(number)
        if stream is None:
            raise LocalProtocolError(f"{step} of unknown stream {number}")
        self._step(stream, step)
        return stream

    def _step(self, stream: AgentStream, step: Step) -> None:
        state = next_state(stream.state, step)
        if state is None:
            raise LocalProtocolError(f"{step} of stream {stream.submit.stream} while {stream.state}")
        stream.state = state

    def _fail(self, stream: AgentStream, code: FailCode, message: str) -> None:
        """End a stream by the session's own decision; bytes not yet sent are dropped."""
        stream.credit.discard()
        if stream.state not in TERMINAL:
            self._step(stream, Step.FAIL)
        self._finish(stream, fail_entry(stream.submit.stream, code, message, retryable=False))

    def _finish(self, stream: AgentStream, terminal: Entry) -> None:
        stream.terminal = terminal
        stream.terminal_sent = False
        stream.body = None
        self._stalls.stop(stream.submit.stream)
        self._outbox.mark(stream)

    def _abort(self, streams: Sequence[AgentStream]) -> list[AgentEvent]:
        """Forget streams; says so of those that the owner still works on."""
        for stream in streams:
            self._forget(stream)
        return [StreamAborted(stream=stream.submit.stream) for stream in streams if stream.terminal is None]

    def _forget(self, stream: AgentStream) -> None:
        number = stream.submit.stream
        self._streams.pop(number, None)
        self._stalls.stop(number)
        self._outbox.drop(number)

    def _expire(self) -> list[AgentEvent]:
        # The router may still believe in the streams; only a Hello on a new link, without them, tells it.
        self._take_down()
        self.lease.lost()
        self.session = None
        return [*self._abort(list(self._streams.values())), SessionExpired()]

    # --- The agent's own news --------------------------------------------------------------------------------------

    def renew(self, now: float) -> None:
        """Send the report at once, as after a change of state; after the Welcome when that is still to come."""
        self._news_waits = self.link is Link.HELLO_SENT
        if self.link in (Link.ATTACHING, Link.OPEN):
            self.lease.asked(now)
            self._send(renew_of(self.report))

    def announce_slots(self, free: int) -> bool:
        """Places are free, after the router was refused for capacity. False while no link can carry it."""
        if self.link is not Link.OPEN:
            return False
        self._send(Slots(free=free))
        return True

    def report_counted(self, counted: Counted) -> None:
        """What a stream cost that ended without a report; lost where no link can carry it."""
        if self.link is Link.OPEN:
            self._send(counted)

    def announce_draining(self) -> None:
        """Take nothing new from here on; what is in flight is finished."""
        self.report.state = AgentState.DRAINING
        self._news_waits = self.link is Link.HELLO_SENT
        if self.link in (Link.ATTACHING, Link.OPEN):
            self._send(Draining())

    # --- Time ------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When to call `handle_timeout`, or None."""
        linked = self.link in (Link.ATTACHING, Link.OPEN)
        candidates = [self._answer_deadline, self.lease.next_deadline(linked=linked)]
        oldest = self._stalls.oldest()
        if self.link is Link.OPEN and oldest is not None:
            candidates.append(oldest + self.flow.stall_timeout_ms / 1000)
        known = [deadline for deadline in candidates if deadline is not None]
        return min(known) if known else None

    def handle_timeout(self, now: float) -> list[AgentEvent]:
        """Do what is due by `now`."""
        if self.lease.expired(now):
            return self._expire()
        if self._answer_deadline is not None and now >= self._answer_deadline:
            self._answer_deadline = None
            channel = Channel.CONTROL if self.link is Link.HELLO_SENT else Channel.STREAMING
            return [LinkFailed(channel=channel)]
        if self.lease.renewal_due(now):
            self.renew(now)
        return self._fail_stalled(now) if self.link is Link.OPEN else []

    def _fail_stalled(self, now: float) -> list[AgentEvent]:
        timeout_s = self.flow.stall_timeout_ms / 1000
        late = self._stalls.late(now, timeout_s)
        for number in late:
            self._fail(self._streams[number], FailCode.STALLED, f"No credit for {timeout_s:g} s.")
        return [StreamFailed(stream=number, code=FailCode.STALLED) for number in late]

    # --- Sending ---------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """True when `gather` has something to turn into batches."""
        return self.link is Link.OPEN and self._outbox.pending

    def gather(self) -> int:
        """Turn what streams produced into batches, taking turns; returns how many entries were queued.

        Stops at the link's pause threshold; what stays behind leaves when the router reports.
        """
        if not self.pending:
            return 0
        channel = Channel.STREAMING if self.config.streaming_socket else Channel.CONTROL
        count = 0
        for entries in self._outbox.gather():
            self._outgoing.append((channel, encode_batch(entries)))
            count += len(entries)
        if not self.flow.enabled:
            self._trim_replay()
        return count

    def _trim_replay(self) -> None:
        """Without flow control what is kept to be repeated stays within the pause threshold, shared by the streams."""
        share = self.flow.pause_threshold_bytes // max(1, len(self._streams))
        for stream in self._streams.values():
            stream.credit.keep_at_most(share)

    def frames_to_send(self) -> list[tuple[Channel, Frames]]:
        """What to send now, in order; the caller owns the list."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def statistics(self) -> AgentSessionStatistics:
        """A reading of what the session holds."""
        return AgentSessionStatistics(
            streams=len(self._streams),
            kept_bytes=sum(stream.credit.kept_bytes for stream in self._streams.values()),
            unacknowledged_bytes=self._outbox.sender.sent - self._outbox.sender.received,
            link_pauses=self._outbox.sender.pauses,
        )

    def _send(self, message: Message, channel: Channel = Channel.CONTROL) -> None:
        self._outgoing.append((channel, encode(message)))
