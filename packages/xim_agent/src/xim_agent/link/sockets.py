"""The two sockets of one link, and the one place of the agent that knows ZeroMQ.

A link is used once: libzmq's own reconnect is off, because it would go on after a hole in the middle of the messages.
Plain sockets on their descriptors, not `zmq.asyncio`: a wake-up drains everything, and a message costs no future. The
descriptor is edge-triggered for both directions, so EVENTS is read after every batch of receives and every send.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from xim_agent.link.ends import LinkCause, LinkEnd
from xim_protocol.codec import MAX_FRAME_BYTES, Frames
from xim_protocol.enrollment import RouterAddress
from xim_protocol.lease import heartbeat_s
from xim_protocol.messages import Channel

log = logging.getLogger(__name__)

DRAIN_MESSAGES = 256
"""Messages taken per wake-up; the rest waits a turn of the loop, so that a flood does not starve the streams."""
RETRY_S = 0.01
QUEUE_BYTES = 1024 * 1024
QUEUE_AGE_S = 5.0
LEAVE_S = 0.5
"""How long a Goodbye may take to leave after its socket was closed."""
HANDSHAKE_S = 2.0
"""Connected, but no handshake by then: the router turned the key away without a word. Four ways of 300 ms fit in."""

_WATCHED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

_NOBLOCK, _EVENTS, _POLLIN = int(zmq.NOBLOCK), int(zmq.EVENTS), int(zmq.POLLIN)
"""As plain integers: pyzmq's enums cost more than the calls they are arguments of."""

OnMessage = Callable[[Channel, list[bytes]], None]
OnEnd = Callable[[LinkEnd], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveKeys:
    """The agent's CURVE keypair, 32 raw bytes each."""

    public: bytes
    secret: bytes = field(repr=False)


class Transport:
    """Makes links; owns the process's ZeroMQ context. A context manager.

    `secure=False` leaves CURVE out. It exists so that a test can show what CURVE hides; no setting reaches it.
    """

    def __init__(self, *, secure: bool = True) -> None:
        self._secure = secure
        self._context = zmq.Context()

    def __enter__(self) -> "Transport":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the context; waits for Goodbyes that still leave, at most `LEAVE_S`."""
        self._context.term()

    def open(
        self,
        router: RouterAddress,
        keys: CurveKeys,
        *,
        lease_s: float,
        streaming: bool,
        on_message: OnMessage,
        on_end: OnEnd,
    ) -> "LinkSockets":
        """Dial `router`; the sockets take messages at once and send them when they are connected.

        Raises:
            OSError: no socket is to be had, or the address is none.
        """
        addresses = {Channel.CONTROL: router.control_addr}
        if streaming:
            addresses[Channel.STREAMING] = router.streaming_addr
        halves: dict[Channel, _Half] = {}
        try:
            for channel, address in addresses.items():
                dealer = self._dealer(router, keys, round(heartbeat_s(lease_s) * 1000))
                halves[channel] = _Half(channel, dealer, on_message, on_end)
                halves[channel].connect(address)
        except zmq.ZMQError as error:
            for half in halves.values():
                half.close(leave=False)
            raise OSError(error.errno, str(error)) from error
        return LinkSockets(halves)

    def _dealer(self, router: RouterAddress, keys: CurveKeys, interval_ms: int) -> "zmq.Socket[bytes]":
        dealer = self._context.socket(zmq.DEALER)
        set_option = dealer.setsockopt
        set_option(zmq.RECONNECT_IVL, -1)
        set_option(zmq.IPV6, 1)  # off by default: a router known by an IPv6 address only would be unreachable
        set_option(zmq.LINGER, 0)  # what a lost link did not send is said again on the next one
        set_option(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)  # nothing larger is ever one frame
        # Credit lets 256 KiB be under way, which is fewer messages than this unless they are tiny; without flow
        # control this times the largest batch bounds memory to 16 MiB.
        set_option(zmq.SNDHWM, 256)
        # Beyond it TCP holds the router back. Submits are bounded by the capacity, bodies by 1 MiB ahead each.
        set_option(zmq.RCVHWM, 1024)
        set_option(zmq.SNDBUF, 4 * 1024 * 1024)  # a fast link with a long way needs more than Linux's default
        set_option(zmq.RCVBUF, 4 * 1024 * 1024)
        set_option(zmq.HANDSHAKE_IVL, round(HANDSHAKE_S * 1000))
        set_option(zmq.HEARTBEAT_IVL, interval_ms)
        set_option(zmq.HEARTBEAT_TIMEOUT, interval_ms)
        # The router's clock for our silence, by our lease: its own heartbeats are one for all its agents. Equal to the
        # interval it loses the race against the next one: an idle connection then breaks after two intervals
        # (libzmq 4.3.5, measured).
        set_option(zmq.HEARTBEAT_TTL, 2 * interval_ms)
        set_option(zmq.TCP_KEEPALIVE, 1)  # for what lies between and counts TCP's own signs of life only
        set_option(zmq.TCP_KEEPALIVE_IDLE, 30)
        if self._secure:
            dealer.curve_serverkey = z85.encode(router.server_curve_key)
            dealer.curve_publickey = z85.encode(keys.public)
            dealer.curve_secretkey = z85.encode(keys.secret)
        return dealer


class LinkSockets:
    """The open sockets of one link. `on_end` is called at most once per half; then the owner calls `close`."""

    def __init__(self, halves: "dict[Channel, _Half]") -> None:
        self._halves = halves

    def send(self, messages: list[tuple[Channel, Frames]]) -> None:
        """Send in order per channel; never blocks. What a socket does not take waits in a bounded queue."""
        used: set[Channel] = set()
        for channel, frames in messages:
            self._halves[channel].send(frames)
            used.add(channel)
        for channel in used:
            self._halves[channel].look_again()

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait because a socket is full."""
        return sum(half.queued_bytes for half in self._halves.values())

    def close(self, *, leave: bool = False) -> None:
        """Close both sockets; with `leave`, what was just sent gets a moment to go out."""
        for half in self._halves.values():
            half.close(leave=leave)


class _Half:
    """One DEALER, its monitor, and the queue before it."""

    def __init__(self, channel: Channel, dealer: "zmq.Socket[bytes]", on_message: OnMessage, on_end: OnEnd) -> None:
        self._channel = channel
        self._dealer = dealer
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._monitor: zmq.Socket[bytes] = dealer.get_monitor_socket(_WATCHED)
        self._queue: deque[tuple[float, Frames]] = deque()
        self.queued_bytes = 0
        self._retry: asyncio.TimerHandle | None = None
        self._again: asyncio.Handle | None = None
        self._connected = False
        self._shaken = False
        self._ended = False
        self._closed = False

    def connect(self, address: str) -> None:
        self._loop.add_reader(self._dealer.FD, self._drain)
        self._loop.add_reader(self._monitor.FD, self._watch)
        self._dealer.connect(address)
        # The descriptor may have been signalled before the loop listened.
        self._loop.call_soon(self._watch)

    def close(self, *, leave: bool) -> None:
        if self._closed:
            return
        self._closed = self._ended = True
        for handle in (self._retry, self._again):
            if handle is not None:
                handle.cancel()
        self._loop.remove_reader(self._dealer.FD)
        self._loop.remove_reader(self._monitor.FD)
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close(linger=round(LEAVE_S * 1000) if leave else 0)

    # --- Receiving -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Take what has come, up to the bound."""
        self._again = None
        for _ in range(DRAIN_MESSAGES):
            # Asked first: a receive that finds nothing raises, which costs twice as much. Once EVENTS is clear, the
            # next message signals the descriptor.
            if self._closed or not self._readable():
                return
            try:
                frames = self._receive()
            except zmq.Again:
                return  # the link ended in between
            self._on_message(self._channel, frames)
        self.look_again()

    def _receive(self) -> list[bytes]:
        frame = self._dealer.recv(_NOBLOCK, copy=False)
        frames = [frame.bytes]
        while frame.more:
            frame = self._dealer.recv(_NOBLOCK, copy=False)
            frames.append(frame.bytes)
        return frames

    def _readable(self) -> bool:
        return bool(int(self._dealer.getsockopt(_EVENTS)) & _POLLIN)

    def look_again(self) -> None:
        """Messages that came while the socket was used otherwise raise no new signal: come back for them."""
        if not self._closed and self._again is None and self._readable():
            self._again = self._loop.call_soon(self._drain)

    # --- Sending ---------------------------------------------------------------------------------------------------

    def send(self, frames: Frames) -> None:
        if self._closed:
            return
        if self._queue or not self._try_send(frames):
            self._queue.append((self._loop.time(), frames))
            self.queued_bytes += sum(map(len, frames))
            if self.queued_bytes > QUEUE_BYTES:
                self._end(LinkCause.CONGESTED, f"{self.queued_bytes} bytes wait")
            elif self._retry is None:
                self._retry = self._loop.call_later(RETRY_S, self._send_queue)

    def _send_queue(self) -> None:
        self._retry = None
        while self._queue and self._try_send(self._queue[0][1]):
            self.queued_bytes -= sum(map(len, self._queue.popleft()[1]))
        if self._queue:
            waited_s = self._loop.time() - self._queue[0][0]
            if waited_s > QUEUE_AGE_S:
                self._end(LinkCause.CONGESTED, f"a message waits for {waited_s:.1f} s")
                return
            self._retry = self._loop.call_later(RETRY_S, self._send_queue)
        self.look_again()

    def _try_send(self, frames: Frames) -> bool:
        try:
            if len(frames) == 1:
                self._dealer.send(frames[0], _NOBLOCK)
            else:
                self._dealer.send_multipart(frames, _NOBLOCK)
        except zmq.Again:
            return False
        return True

    # --- Watching --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Read what the monitor says."""
        while not self._closed:
            try:
                message = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(message)
            self._note(event["event"], event["value"])

    def _note(self, event: int, value: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self._connected = True
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._shaken = True
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == 400:
            self._end(LinkCause.KEY_REVOKED, "the router refuses the key")
        elif self._shaken:
            self._drain_rest()
            self._end(LinkCause.DISCONNECTED, str(zmq.Event(event).name))
        elif self._connected:
            self._end(LinkCause.KEY_UNKNOWN, str(zmq.Event(event).name))
        else:
            self._end(LinkCause.UNREACHABLE, "connection refused")

    def _drain_rest(self) -> None:
        """A Goodbye may lie before the end; what libzmq still holds is taken first."""
        with contextlib.suppress(zmq.ZMQError):
            self._drain()

    def _end(self, cause: LinkCause, detail: str) -> None:
        if not self._ended:
            self._ended = True
            self._on_end(LinkEnd(cause=cause, channel=self._channel, detail=detail))
