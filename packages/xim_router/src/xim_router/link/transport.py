"""The router's two ROUTER sockets: the only module that moves frames.

One reader callback per socket drains what arrived and hands each message on, synchronously, with the authenticated
agent it came from. The descriptor of a ZeroMQ socket is edge-triggered for both directions, so EVENTS is read after
every batch of receives and after every send. Sends never block.
"""

import asyncio
import logging
import socket as stdlib_socket
from collections.abc import Callable
from enum import Enum, StrEnum
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from xim_protocol.codec import MAX_FRAME_BYTES, MAX_FRAMES, Frames
from xim_protocol.ids import AgentId
from xim_protocol.messages import Channel
from xim_router.link.gatekeeper import ZAP_DOMAIN

log = logging.getLogger(__name__)

# As plain integers: pyzmq's are IntFlags, whose every `|` and `&` runs Python code, in the loop of every message.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)

MESSAGES_PER_WAKE_UP = 256
"""A drain stops here and goes on in the next loop tick, so that timers and clients get their turn."""
DRAIN_ROUNDS = 64
"""So many times that are taken in before leases are judged; more than the high-water marks of many agents hold."""
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
"""Asked of the kernel for each TCP connection; Linux caps it at net.core.{r,w}mem_max."""

RoutingId = bytes

_MONITORED = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class SendResult(Enum):
    """What became of a send."""

    SENT = "sent"
    FULL = "full"
    """The peer's pipe is full; keep the message and try again."""
    UNREACHABLE = "unreachable"
    """No such peer any more: the link is lost."""


class HandshakeFailure(StrEnum):
    """Why a connection never became a link, as libzmq counts it."""

    AUTH = "auth"
    PROTOCOL = "protocol"
    OTHER = "other"


class Receiver(Protocol):
    """Who takes what the transport receives."""

    def on_message(
        self, channel: Channel, routing_id: RoutingId, agent: AgentId, descriptor: Callable[[], int], frames: Frames
    ) -> None:
        """One message of the authenticated `agent`; `descriptor()` is the TCP connection it came through."""

    def on_oversized(
        self, channel: Channel, routing_id: RoutingId, agent: AgentId, descriptor: Callable[[], int], frames: int
    ) -> None:
        """A message with too many frames; they were thrown away."""

    def on_accepted(self, channel: Channel, descriptor: int) -> None:
        """There is a new TCP connection `descriptor`; whose it is, its handshake and its messages tell."""

    def on_disconnected(self, channel: Channel, descriptor: int) -> None:
        """The TCP connection `descriptor` is gone."""


class Transport:
    """Binds, receives, sends; knows nothing of sessions."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        receiver: Receiver,
        *,
        server_secret_key: bytes,
        heartbeat_s: float = 5.0,
        secure: bool = True,
    ) -> None:
        """`server_secret_key` is this router's CURVE secret key, 32 raw bytes.

        `secure=False` turns CURVE off, for the test that shows what it hides; no setting reaches it.
        """
        self._receiver = receiver
        self._context = context
        self._server_secret_key = server_secret_key
        self._heartbeat_s = heartbeat_s
        self._secure = secure
        self._sockets: dict[Channel, zmq.Socket[bytes]] = {channel: self._make_socket() for channel in Channel}
        self._monitors: dict[Channel, zmq.Socket[bytes]] = {
            channel: socket.get_monitor_socket(_MONITORED) for channel, socket in self._sockets.items()
        }
        self._loop: asyncio.AbstractEventLoop | None = None
        self._continuing: set[Channel] = set()
        self._closed = False
        self._sent: set[Channel] = set()
        """Where something was sent since `after_sends`."""
        self.handshake_failures: dict[HandshakeFailure, int] = dict.fromkeys(HandshakeFailure, 0)

    def _make_socket(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        # A send to a peer that is gone fails loudly (EHOSTUNREACH) instead of vanishing: that is how a lost link shows.
        socket.router_mandatory = 1
        # Messages per peer. Towards an agent: requests and credit, or 64 KiB body pieces of at most 1 MiB a stream.
        socket.sndhwm = 1_000
        # From an agent: at the pause threshold it stops by itself, long before this many batches wait.
        socket.rcvhwm = 1_000
        # Nothing larger is ever one message; libzmq drops the connection of a peer that tries.
        socket.maxmsgsize = MAX_FRAME_BYTES
        # A connection that does not finish its handshake is a scan or a broken peer.
        socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
        # NAT forgets an idle mapping and a dead peer sends no FIN: heartbeats find out within interval + timeout.
        heartbeat_ms = max(1, round(self._heartbeat_s * 1000))
        socket.setsockopt(zmq.HEARTBEAT_IVL, heartbeat_ms)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, heartbeat_ms)
        # What is still queued at close is for peers that were told to come again: do not wait for them.
        socket.linger = 0
        socket.setsockopt(zmq.SNDBUF, SOCKET_BUFFER_BYTES)
        socket.setsockopt(zmq.RCVBUF, SOCKET_BUFFER_BYTES)
        socket.setsockopt(zmq.IPV6, 1)
        # ROUTER_HANDOVER stays off: with it, a peer that claims another's routing id would get that peer's requests.
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        # Without a ZAP handler CURVE admits every key; with this option it admits none.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if self._secure:
            socket.curve_server = True
            socket.curve_secretkey = self._server_secret_key
        return socket

    # --- Life ------------------------------------------------------------------------------------------------------

    def bind(self, host: str, control_port: int, streaming_port: int) -> tuple[int, int]:
        """Bind both sockets; port 0 takes a free one. Returns the ports.

        Raises:
            zmq.ZMQError: an address is in use or cannot be bound.
        """
        bound = []
        for channel, port in ((Channel.CONTROL, control_port), (Channel.STREAMING, streaming_port)):
            socket = self._sockets[channel]
            shown = f"[{host}]" if ":" in host else host
            socket.bind(f"tcp://{shown}:{port or '*'}")
            bound.append(int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]))
        return bound[0], bound[1]

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Receive from `loop` on."""
        self._loop = loop
        for channel in Channel:
            loop.add_reader(self._sockets[channel].fileno(), self._on_readable, channel)
            loop.add_reader(self._monitors[channel].fileno(), self._read_monitor, channel)
            # A descriptor announces nothing before its socket was found empty once.
            loop.call_soon(self._on_readable, channel)
            loop.call_soon(self._read_monitor, channel)

    def close(self) -> None:
        """Close both sockets; what was not sent is dropped."""
        self._closed = True
        for channel, socket in self._sockets.items():
            if self._loop is not None:
                self._loop.remove_reader(socket.fileno())
                self._loop.remove_reader(self._monitors[channel].fileno())
            socket.disable_monitor()
            self._monitors[channel].close(linger=0)
            socket.close(linger=0)

    # --- Receiving -------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take in everything that has arrived, before a deadline is judged."""
        for channel in Channel:
            # Bounded, so that a peer that never stops sending cannot hold the loop.
            for _ in range(DRAIN_ROUNDS):
                if self._receive_some(channel):
                    break

    def read_monitors(self) -> None:
        """Take in what is known of lost connections, so that a reused descriptor is not mistaken for the old one."""
        for channel in Channel:
            self._read_monitor(channel)

    def _on_readable(self, channel: Channel) -> None:
        self._continuing.discard(channel)
        drained = False
        try:
            drained = self._receive_some(channel)
        finally:
            # Also after an exception: without another look the descriptor would stay silent about what is left.
            if not drained:
                self._continue(channel)

    def _receive_some(self, channel: Channel) -> bool:
        """Take in up to a bound of messages; true when nothing is left."""
        socket = self._sockets[channel]
        for _ in range(MESSAGES_PER_WAKE_UP):
            # Asked rather than tried: an exception for "nothing more" costs more than the question.
            if self._closed or not socket.get(_EVENTS) & _POLLIN:  # type: ignore[operator]  # EVENTS is an int
                return True
            self._receive_one(socket, channel)
        return False

    def _receive_one(self, socket: zmq.Socket[bytes], channel: Channel) -> None:
        first = socket.recv(_NOBLOCK, copy=False)
        routing_id = first.bytes
        frames: Frames = []
        count = 0
        part = first
        while part.more:
            part = socket.recv(copy=False)
            count += 1
            if count <= MAX_FRAMES:
                frames.append(part.bytes)
        agent = _user_id(first)

        def descriptor() -> int:
            return int(first.get(zmq.SRCFD))

        if count > MAX_FRAMES:
            self._receiver.on_oversized(channel, routing_id, agent, descriptor, count)
        else:
            self._receiver.on_message(channel, routing_id, agent, descriptor, frames)

    def _continue(self, channel: Channel) -> None:
        if self._loop is not None and channel not in self._continuing:
            self._continuing.add(channel)
            self._loop.call_soon(self._on_readable, channel)

    def _read_monitor(self, channel: Channel) -> None:
        monitor = self._monitors[channel]
        while not self._closed:
            try:
                event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            kind: int = event["event"]
            if kind == zmq.EVENT_ACCEPTED:
                self._receiver.on_accepted(channel, int(event["value"]))
            elif kind == zmq.EVENT_DISCONNECTED:
                self._receiver.on_disconnected(channel, int(event["value"]))
            else:
                failures = {
                    zmq.EVENT_HANDSHAKE_FAILED_AUTH: HandshakeFailure.AUTH,
                    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: HandshakeFailure.PROTOCOL,
                }
                self.handshake_failures[failures.get(zmq.Event(kind), HandshakeFailure.OTHER)] += 1

    # --- Sending ---------------------------------------------------------------------------------------------------

    def send(self, channel: Channel, routing_id: RoutingId, frames: Frames) -> SendResult:
        """Send one message to one peer, without blocking."""
        socket = self._sockets[channel]
        self._sent.add(channel)
        try:
            socket.send(routing_id, _MORE)
            for frame in frames[:-1]:
                socket.send(frame, _MORE)
            socket.send(frames[-1], _NOBLOCK)
        except zmq.Again:
            return SendResult.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return SendResult.UNREACHABLE
        return SendResult.SENT

    def after_sends(self) -> None:
        """Look for what arrived while sending: a send may swallow the descriptor's edge."""
        if self._sent:
            for channel in self._sent:
                if self._sockets[channel].get(_EVENTS) & _POLLIN:  # type: ignore[operator]
                    self._continue(channel)
            self._sent.clear()

    def shut_connection(self, descriptor: int) -> None:
        """Shut the TCP connection `descriptor`; libzmq sees its end and forgets the peer.

        Only for a descriptor that no monitor event has reported as gone; after `close` its number may be anybody's.
        """
        if self._closed:
            return
        try:
            # fromfd duplicates, so libzmq's own descriptor stays its own to close.
            with stdlib_socket.fromfd(descriptor, stdlib_socket.AF_INET, stdlib_socket.SOCK_STREAM) as connection:
                connection.shutdown(stdlib_socket.SHUT_RDWR)
        except OSError:
            return  # closed in the same moment: what was wanted


def _user_id(frame: Any) -> AgentId:
    """The authenticated agent of a frame; empty for a frame without one, which no registered agent sends."""
    try:
        return AgentId(frame.get("User-Id"))
    except zmq.ZMQError:
        return AgentId("")
