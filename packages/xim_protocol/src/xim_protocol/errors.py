"""What can go wrong, by whose fault.

    ProtocolError
    ├── LocalProtocolError      our own bug: never caught, fails the task
    └── RemoteProtocolError     the peer's fault: end that session, count it by `reason`, go on
        ├── MalformedMessage    not a message, or a field of the wrong type or range
        ├── MessageTooLarge     over a limit of bytes, frames or entries
        ├── UnexpectedMessage   a message that this state of the session has no place for
        ├── CreditExceeded      bytes beyond the limit of a stream or of the link
        └── OffsetMismatch      a gap or a wrong total in a stream's bytes

No message of these errors holds payload or other bytes of the peer, so they may be logged.
"""

from enum import StrEnum

from xim_protocol.ids import StreamId


class FaultReason(StrEnum):
    """Label by which a peer's faults are counted."""

    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    UNEXPECTED = "unexpected"
    CREDIT = "credit"
    OFFSET = "offset"


class ProtocolError(Exception):
    """Root of this package's errors."""


class LocalProtocolError(ProtocolError):
    """The caller of this package broke its rules."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol; its session must end."""

    reason = FaultReason.UNEXPECTED


class MalformedMessage(RemoteProtocolError):
    """Not a message, or a field of the wrong type or range."""

    reason = FaultReason.MALFORMED


class MessageTooLarge(RemoteProtocolError):
    """Over a limit of bytes per frame or message, frames per message or entries per batch."""

    reason = FaultReason.TOO_LARGE

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(f"{what}: {size}, limit {limit}")
        self.what, self.size, self.limit = what, size, limit


class UnexpectedMessage(RemoteProtocolError):
    """A message that this state of the session or stream has no place for."""

    def __init__(self, kind: str, state: str) -> None:
        super().__init__(f"{kind} while {state}")
        self.kind, self.state = kind, state


class CreditExceeded(RemoteProtocolError):
    """The agent sent beyond a stream's limit, or (None) beyond the pause threshold of the whole link."""

    reason = FaultReason.CREDIT

    def __init__(self, stream: StreamId | None, offset: int, limit: int) -> None:
        where = "link" if stream is None else f"stream {stream}"
        super().__init__(f"{where}: sent up to {offset}, limit {limit}")
        self.stream, self.offset, self.limit = stream, offset, limit


class OffsetMismatch(RemoteProtocolError):
    """Bytes of a stream (of the whole link: None) are missing, or a stated length is wrong."""

    reason = FaultReason.OFFSET

    def __init__(self, stream: StreamId | None, offset: int, expected: int) -> None:
        where = "link" if stream is None else f"stream {stream}"
        super().__init__(f"{where}: offset {offset}, expected {expected}")
        self.stream, self.offset, self.expected = stream, offset, expected
