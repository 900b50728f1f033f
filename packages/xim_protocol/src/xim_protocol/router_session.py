"""The router's end of one agent's session.

The owner calls, in this order: the constructor with the agent's Hello; `receive` with every message of the session's
sockets; `submit`, `cancel` and `consumed` as clients come, leave and read; `flush_credit` at most once per loop tick;
`frames_to_send` and `next_body` to send. `link_lost` and `resume` are called around a lost link; `end` once.
No clock, no socket: `now` is the owner's monotonic clock in seconds.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Generic

from xim_protocol.codec import INLINE_BODY_BYTES, Frames, decode, encode
from xim_protocol.credit import CreditReceiver, LinkReceiver
from xim_protocol.errors import LocalProtocolError, OffsetMismatch, UnexpectedMessage
from xim_protocol.events import (
    AgentReported,
    C,
    GoodbyeReceived,
    LinkReady,
    RequestRefused,
    ResponseEnded,
    ResponseFailed,
    ResponseStarted,
    RouterEvent,
    SlotsFree,
)
from xim_protocol.grants import clamp_flow, clamp_lease_s, negotiate_version, report_of
from xim_protocol.ids import AgentId, ProjectId, RequestId, SessionId, StreamId
from xim_protocol.messages import (
    PROTOCOL_VERSION,
    AgentState,
    Assign,
    Assignment,
    Attach,
    Attached,
    Batch,
    Body,
    Cancel,
    CancelReason,
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
    Hello,
    Members,
    Message,
    Renew,
    Renewed,
    RouterMember,
    Slots,
    StreamVerdict,
    Submit,
    Verdict,
    Welcome,
)
from xim_protocol.router_stream import CLOSED_AT_ONCE, Phase, RouterSessionStatistics, RouterStream
from xim_protocol.stream import TERMINAL, Step, StreamState, next_state

__all__ = ["Phase", "RouterSession", "RouterSessionStatistics", "RouterStream", "negotiate_version"]


class RouterSession(Generic[C]):
    """See the module's docstring."""

    def __init__(
        self,
        *,
        agent: AgentId,
        session: SessionId,
        hello: Hello,
        assignment: Assignment | None,
        routers: tuple[RouterMember, ...],
    ) -> None:
        self.agent = agent
        self.session = session
        self.instance = hello.instance
        self.flow = clamp_flow(hello.flow)
        self.lease_s = clamp_lease_s(hello.lease_ms, hello.renewal_interval_ms)
        self.streaming_socket = hello.streaming_socket
        self.report = report_of(hello)
        self.phase = Phase.WELCOMED
        self.batches = 0
        """Batches received, for metrics."""
        self.entries = 0
        """Entries received in them."""
        self._assignment = assignment
        self._routers = routers
        self._streams: dict[StreamId, RouterStream[C]] = {}
        self._last_stream = 0
        self._outgoing: list[tuple[Channel, Frames]] = []
        self._due: dict[StreamId, RouterStream[C]] = {}
        self._closed: list[StreamId] = []
        self._report_due = False
        self._bodies: dict[StreamId, RouterStream[C]] = {}
        self._new_link()
        # Streams that a Hello brings to a fresh session belong to a session that is gone. Without a streaming socket
        # the session is open at once: `phase` says so.
        gone = tuple([StreamVerdict(stream=row.stream, verdict=Verdict.GONE) for row in hello.streams])
        self._welcome(gone)

    # --- Receiving -------------------------------------------------------------------------------------------------

    def receive(self, channel: Channel, frames: Sequence[bytes]) -> list[RouterEvent[C]]:
        """Take in one message of this session. What still comes from a link that is gone is dropped.

        Raises:
            RemoteProtocolError: the agent broke the protocol; `end` the session.
        """
        message = decode(frames)
        if self.phase in (Phase.LINK_LOST, Phase.ENDED):
            return []
        if type(message) is Batch:
            if self.phase is not Phase.OPEN or channel is not self._entry_channel:
                raise UnexpectedMessage(f"Batch on {channel}", self.phase)
            return self._receive_entries(message.entries)
        if message is None:
            return []
        return self._receive_message(channel, message)

    def _receive_message(self, channel: Channel, message: Message) -> list[RouterEvent[C]]:
        if channel is Channel.CONTROL:
            match message:
                case Renew():
                    self.report = AgentReported(
                        state=message.state,
                        capacity=message.capacity,
                        in_flight=message.in_flight,
                        served_model=message.served_model,
                        statistics=message.statistics,
                    )
                    self._send(Renewed(lease_ms=round(self.lease_s * 1000)))
                    return [self.report]
                case Draining():
                    self.report = replace(self.report, state=AgentState.DRAINING)
                    return [self.report]
                case Slots():
                    return [SlotsFree(free=message.free)]
                case Counted():
                    return [message]
                case Goodbye():
                    return [GoodbyeReceived(code=message.code, message=message.message)]
        if (
            isinstance(message, Attach)
            and channel is Channel.STREAMING
            and self.phase is Phase.WELCOMED
            and self.streaming_socket
            and message.session == self.session
        ):
            self._send(Attached(session=self.session), Channel.STREAMING)
            return self._open()
        raise UnexpectedMessage(f"{type(message).__name__} on {channel}", self.phase)

    def _receive_entries(self, entries: Sequence[Entry]) -> list[RouterEvent[C]]:
        """The hot path: one pass over the entries, one tuple per chunk."""
        events: list[RouterEvent[C]] = []
        streams = self._streams
        responding = StreamState.RESPONDING
        size = 0
        for entry in entries:
            number: StreamId = entry[1]  # type: ignore[assignment]  # the codec checked it
            stream = streams.get(number)
            if entry[0] == 1:
                payload: bytes = entry[3]  # type: ignore[assignment]
                size += len(payload)
                if stream is None:
                    self._check_known(number)
                elif stream.state is responding:
                    fresh = stream.credit.receive(number, entry[2], payload)  # type: ignore[arg-type]
                    if fresh:
                        events.append((stream.context, fresh))
                else:
                    self._step(stream, Step.CHUNK)
            elif stream is None:
                # A repetition of what was answered before the link was lost: closed already, harmless.
                self._check_known(number)
            else:
                self._receive_entry(stream, entry, events)
        self.batches += 1
        self.entries += len(entries)
        if size and self._link.receive(size):
            self._report_due = True
        return events

    def _check_known(self, number: StreamId) -> None:
        if number > self._last_stream:
            raise UnexpectedMessage(f"entry of stream {number}", f"the newest is {self._last_stream}")

    def _receive_entry(self, stream: RouterStream[C], entry: Entry, events: list[RouterEvent[C]]) -> None:
        cancelled = stream.state is StreamState.CANCELLED
        fields: tuple[object, ...] = entry
        match fields:
            case (EntryKind.START, _, int(status), str(content_type), *_):
                self._step(stream, Step.START)
                self._bodies.pop(stream.stream, None)
                stream.answered()
                if not cancelled:
                    events.append(ResponseStarted(context=stream.context, status=status, content_type=content_type))
            case (EntryKind.END, _, int(size), usage, *_):
                # Of a cancelled stream the bytes were not counted any more.
                if not cancelled and size != stream.credit.received:
                    raise OffsetMismatch(stream.stream, size, stream.credit.received)
                self._step(stream, Step.END)
                self._close(stream)
                events.append(ResponseEnded(context=stream.context, size=size, usage=usage))  # type: ignore[arg-type]
            case (EntryKind.FAIL, _, FailCode() as code, str(message), bool(retryable), usage, *_):
                self._step(stream, Step.FAIL)
                self._close(stream)
                events.append(
                    ResponseFailed(
                        context=stream.context,
                        code=code,
                        message=message,
                        retryable=retryable,
                        usage=usage,  # type: ignore[arg-type]
                    )
                )
            case (EntryKind.REFUSED, _, reason, int(in_flight), *_):
                self._step(stream, Step.REFUSE)
                self._close(stream)
                events.append(
                    RequestRefused(context=stream.context, reason=reason, in_flight=in_flight)  # type: ignore[arg-type]
                )
            case _:
                self._continue_body(stream, limit=fields[2])  # type: ignore[arg-type]

    def _continue_body(self, stream: RouterStream[C], limit: int) -> None:
        if stream.state is StreamState.CANCELLED:
            return
        if stream.state is not StreamState.SUBMITTED or stream.submit is None or stream.submit.body is not None:
            raise UnexpectedMessage(f"Continue of stream {stream.stream}", stream.state)
        stream.body_limit = min(max(stream.body_limit, limit), len(stream.body))
        if stream.body_sent < stream.body_limit:
            self._bodies[stream.stream] = stream

    def _step(self, stream: RouterStream[C], step: Step) -> None:
        state = next_state(stream.state, step)
        if state is None:
            raise UnexpectedMessage(f"{step} of stream {stream.stream}", stream.state)
        stream.state = state

    def _close(self, stream: RouterStream[C]) -> None:
        del self._streams[stream.stream]
        self._due.pop(stream.stream, None)
        self._bodies.pop(stream.stream, None)
        self._closed.append(stream.stream)

    # --- Requests --------------------------------------------------------------------------------------------------

    def submit(
        self,
        context: C,
        *,
        request: RequestId,
        attempt: int,
        project: ProjectId,
        path: str,
        body: bytes,
        headers: tuple[tuple[str, str], ...] = (),
        time_left_ms: int | None = None,
        traceparent: str | None = None,
    ) -> RouterStream[C]:
        """Send a request to the agent as a new stream.

        Raises:
            LocalProtocolError: the link is not open.
        """
        if self.phase is not Phase.OPEN:
            raise LocalProtocolError(f"submit while {self.phase}")
        self._last_stream += 1
        submit = Submit(
            stream=StreamId(self._last_stream),
            request=request,
            attempt=attempt,
            project=project,
            path=path,
            body=body if len(body) <= INLINE_BODY_BYTES else None,
            body_bytes=len(body),
            headers=headers,
            time_left_ms=time_left_ms,
            traceparent=traceparent,
        )
        flow = self.flow
        credit = CreditReceiver(flow.window_bytes, flow.replenish_threshold, enforced=flow.enabled)
        stream = RouterStream(context=context, stream=submit.stream, submit=submit, body=body, credit=credit)
        self._streams[submit.stream] = stream
        self._send(submit)
        return stream

    def cancel(self, stream: RouterStream[C], reason: CancelReason) -> None:
        """Nobody waits for `stream` any more. Harmless when it ended already."""
        if stream.state in TERMINAL or stream.state is StreamState.CANCELLED:
            return
        stream.state = StreamState.CANCELLED
        self._bodies.pop(stream.stream, None)
        stream.forget_body()
        self._due.pop(stream.stream, None)
        if self.phase in (Phase.WELCOMED, Phase.OPEN):
            self._send(Cancel(stream=stream.stream, reason=reason))

    def consumed(self, stream: RouterStream[C], size: int) -> None:
        """`size` more bytes of `stream` left for the client."""
        if stream.credit.consume(size) and stream.state is StreamState.RESPONDING:
            self._due[stream.stream] = stream

    def assign(self, assignment: Assignment | None) -> None:
        """Tell the agent a new assignment."""
        if assignment != self._assignment:
            self._assignment = assignment
            if self.phase in (Phase.WELCOMED, Phase.OPEN):
                self._send(Assign(assignment=assignment))

    def tell_routers(self, routers: tuple[RouterMember, ...]) -> None:
        """Tell the agent who is in the mesh now, where that changed."""
        if routers != self._routers:
            self._routers = routers
            if self.phase in (Phase.WELCOMED, Phase.OPEN):
                self._send(Members(routers=routers))

    # --- Link and session ------------------------------------------------------------------------------------------

    def link_lost(self) -> None:
        """The sockets are gone; streams wait for `resume` until the lease is over."""
        if self.phase is not Phase.ENDED:
            self.phase = Phase.LINK_LOST
            self._outgoing.clear()
            self._bodies.clear()

    def resume(self, hello: Hello) -> list[RouterEvent[C]]:
        """The same agent process is back on a new link; compare streams and answer.

        Returns the ends of streams that did not survive, and the agent's state.

        Raises:
            LocalProtocolError: the session ended, or the Hello is of another process: make a new session.
        """
        if self.phase is Phase.ENDED or hello.instance != self.instance:
            raise LocalProtocolError(f"resume of session {self.session} while {self.phase}")
        self.link_lost()
        self.report = report_of(hello)
        self.streaming_socket = hello.streaming_socket
        self._new_link()
        reported = {row.stream for row in hello.streams}
        events: list[RouterEvent[C]] = [self.report]
        verdicts = [self._verdict_on(row.stream) for row in hello.streams]
        again: list[RouterStream[C]] = []
        for stream in list(self._streams.values()):
            cancelled = stream.state is StreamState.CANCELLED
            if stream.stream not in reported and not cancelled and not stream.started:
                # Its Submit was lost, or its body did not arrive whole: the same id once more.
                stream.body_sent = stream.body_limit = 0
                verdicts.append(StreamVerdict(stream=stream.stream, verdict=Verdict.SUBMIT_AGAIN))
                again.append(stream)
            elif stream.stream not in reported or cancelled:
                self._drop(stream, events, cancelled=cancelled)
        self._closed.clear()
        return events + self._welcome(tuple(verdicts), again)

    def _verdict_on(self, number: StreamId) -> StreamVerdict:
        stream = self._streams.get(number)
        if stream is None or stream.state is StreamState.CANCELLED:
            return StreamVerdict(stream=number, verdict=Verdict.GONE)
        self._due.pop(number, None)
        return stream.resumed()

    def _drop(self, stream: RouterStream[C], events: list[RouterEvent[C]], *, cancelled: bool) -> None:
        stream.state = StreamState.FAILED
        del self._streams[stream.stream]
        self._due.pop(stream.stream, None)
        code = FailCode.CANCELLED if cancelled else FailCode.AGENT_LOST
        events.append(
            ResponseFailed(
                context=stream.context, code=code, message="The agent no longer has this stream.", retryable=True
            )
        )

    def expire(self) -> list[C]:
        """The lease ran out: end the session and tell the agent, should it still be there. Returns as `end` does."""
        if self.phase in (Phase.WELCOMED, Phase.OPEN):
            self._send(Expired())
        return self.end(None)

    def end(self, code: GoodbyeCode | None, message: str = "") -> list[C]:
        """End the session; says Goodbye when `code` is given. Returns the contexts of the streams it cut off."""
        if self.phase is Phase.ENDED:
            return []
        if code is not None and self.phase is not Phase.LINK_LOST:
            self._send(Goodbye(code=code, message=message))
        self.phase = Phase.ENDED
        cut = [stream.context for stream in self._streams.values()]
        for stream in self._streams.values():
            stream.state = StreamState.FAILED
        self._streams.clear()
        self._due.clear()
        self._bodies.clear()
        return cut

    def _new_link(self) -> None:
        flow = self.flow
        self._link = LinkReceiver(flow.pause_threshold_bytes, flow.replenish_threshold, enforced=flow.enabled)
        self._report_due = False
        self._entry_channel = Channel.STREAMING if self.streaming_socket else Channel.CONTROL

    def _welcome(
        self, verdicts: tuple[StreamVerdict, ...], again: Sequence[RouterStream[C]] = ()
    ) -> list[RouterEvent[C]]:
        self.phase = Phase.WELCOMED
        self._again = again
        self._send(
            Welcome(
                version=PROTOCOL_VERSION,
                session=self.session,
                lease_ms=round(self.lease_s * 1000),
                flow=self.flow,
                assignment=self._assignment,
                routers=self._routers,
                streams=verdicts,
            )
        )
        return [] if self.streaming_socket else self._open()

    def _open(self) -> list[RouterEvent[C]]:
        """Requests may go from here on, first those that were lost."""
        self.phase = Phase.OPEN
        events: list[RouterEvent[C]] = [LinkReady()]
        for stream in self._again:
            if stream.submit is not None:
                self._send(stream.submit)
            else:
                # Cancelled since the Welcome: the agent never had it, so no terminal entry will come.
                self._drop(stream, events, cancelled=True)
        self._again = ()
        return events

    # --- Sending ---------------------------------------------------------------------------------------------------

    @property
    def credit_due(self) -> bool:
        """True when `flush_credit` has something to say."""
        return self.phase is Phase.OPEN and bool(self._due or self._closed or self._report_due)

    @property
    def wants_to_send(self) -> bool:
        """True when something should leave in this tick; that streams are closed can wait (`closes_streams`)."""
        return self.credit_urgent or bool(self._outgoing or self._bodies)

    @property
    def credit_urgent(self) -> bool:
        """True when `flush_credit` has something to say that the agent may be waiting for."""
        return bool(self._due) or self._report_due or len(self._closed) >= CLOSED_AT_ONCE

    @property
    def closes_streams(self) -> bool:
        """True when the agent is still to be told of closed streams; until then it only remembers them."""
        return bool(self._closed)

    def flush_credit(self) -> None:
        """Queue one Credit with everything that is due; call it at most once per loop tick."""
        if not self.credit_due:
            return
        limits = tuple([(number, stream.credit.grant()) for number, stream in self._due.items()])
        self._send(Credit(received=self._link.report(), limits=limits, closed=tuple(self._closed)))
        self._due.clear()
        self._closed.clear()
        self._report_due = False

    def frames_to_send(self) -> list[tuple[Channel, Frames]]:
        """What to send now, in order; the caller owns the list."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def next_body(self) -> tuple[Channel, Frames] | None:
        """The next piece of a long request body, taking turns between streams; None when none may leave."""
        if self.phase is not Phase.OPEN or not self._bodies:
            return None
        number, stream = next(iter(self._bodies.items()))
        del self._bodies[number]
        end = min(stream.body_sent + INLINE_BODY_BYTES, stream.body_limit)
        piece = Body(stream=number, offset=stream.body_sent, payload=stream.body[stream.body_sent : end])
        stream.body_sent = end
        if end < stream.body_limit:
            self._bodies[number] = stream
        return self._entry_channel, encode(piece)

    def statistics(self) -> RouterSessionStatistics:
        """A reading of what the session holds."""
        return RouterSessionStatistics(
            streams=len(self._streams),
            credit_owed_bytes=sum(stream.credit.owed for stream in self._streams.values()),
            queued_messages=len(self._outgoing),
        )

    def _send(self, message: Message, channel: Channel = Channel.CONTROL) -> None:
        self._outgoing.append((channel, encode(message)))
