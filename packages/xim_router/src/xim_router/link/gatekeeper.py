"""Who may connect: ZAP (ZeroMQ RFC 27), answered from the catalog.

Registered keys only. The answer's user id is the agent, and libzmq stamps it on every frame of that connection: that
is the identity the router works with, never one that a message claims. The handler must be bound before any socket
that relies on it, because without a handler CURVE admits every key.
"""

import asyncio
import logging
from collections.abc import Callable
from enum import StrEnum

import zmq

from xim_protocol.ids import AgentId

log = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"xim"
_VERSION = b"1.0"


class Admission(StrEnum):
    """What the catalog says of a key."""

    UNKNOWN = "unknown"
    """Not registered (yet): answered 300, so that the agent comes again."""
    REVOKED = "revoked"
    """Answered 400: the agent gives up and says so."""


Lookup = Callable[[bytes], AgentId | Admission]
"""From a CURVE public key (32 raw bytes) to its agent, or why there is none."""


class Gatekeeper:
    """Answers every handshake of one ZeroMQ context."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        lookup: Lookup,
        *,
        plain_agent: AgentId | None = None,
    ) -> None:
        """`plain_agent` is who connects without CURVE, for the test that shows what CURVE hides; no setting sets it."""
        self.refused: dict[Admission, int] = dict.fromkeys(Admission, 0)
        self._lookup = lookup
        self._plain_agent = plain_agent
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ZAP_ADDRESS)
        self._fd = self._socket.fileno()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer from `loop` on."""
        loop.add_reader(self._fd, self._answer_all)
        self._answer_all()

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer no more; handshakes fail from here on."""
        loop.remove_reader(self._fd)
        self._socket.close()

    def _answer_all(self) -> None:
        # The descriptor is edge-triggered: go on until there is nothing left.
        while True:
            try:
                request = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._answer(request))

    def _answer(self, request: list[bytes]) -> list[bytes]:
        if len(request) < 6 or request[0] != _VERSION:
            return [_VERSION, request[1] if len(request) > 1 else b"", b"500", b"not ZAP 1.0", b"", b""]
        request_id, domain, mechanism, credentials = request[1], request[2], request[5], request[6:]
        status, reason, agent = self._judge(domain, mechanism, credentials)
        return [_VERSION, request_id, status, reason, agent.encode(), b""]

    def _judge(self, domain: bytes, mechanism: bytes, credentials: list[bytes]) -> tuple[bytes, bytes, str]:
        if domain != ZAP_DOMAIN:
            return b"400", b"unknown domain", ""
        if mechanism == b"NULL" and self._plain_agent is not None:
            return b"200", b"OK", self._plain_agent
        if mechanism != b"CURVE" or len(credentials) != 1:
            return b"400", b"CURVE is required", ""
        found = self._lookup(credentials[0])
        if not isinstance(found, Admission):
            return b"200", b"OK", found
        self.refused[found] += 1
        log.info("handshake refused", extra={"reason": found.value})
        # 300 is "try again later": an agent may dial before its enrollment reached every router.
        return (b"400", b"revoked", "") if found is Admission.REVOKED else (b"300", b"unknown key", "")
