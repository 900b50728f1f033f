"""The entries of a Batch that an agent makes once per stream, checked before they leave.

The router ends the whole session over one wrong entry, so a bug in one response must show at the agent, at its cause.
"""

from xim_protocol.codec import MAX_TEXT, USAGE
from xim_protocol.errors import LocalProtocolError, MalformedMessage
from xim_protocol.ids import StreamId
from xim_protocol.messages import Entry, EntryKind, FailCode, Usage


def start_entry(stream: StreamId, status: int, content_type: str) -> Entry:
    """A START of `stream`.

    Raises:
        LocalProtocolError: `status` is not an HTTP status.
    """
    if not 100 <= status <= 999:
        raise LocalProtocolError(f"status {status} of stream {stream}")
    return (EntryKind.START, stream, status, _printable(content_type, 256))


def end_entry(stream: StreamId, usage: Usage | None) -> Entry:
    """An END of `stream` without its size, which is known when it leaves.

    Raises:
        LocalProtocolError: `usage` is not a `Usage`.
    """
    return (EntryKind.END, stream, _checked(usage))


def fail_entry(stream: StreamId, code: FailCode, message: str, *, retryable: bool, usage: Usage | None = None) -> Entry:
    """A FAIL of `stream`.

    Raises:
        LocalProtocolError: `usage` is not a `Usage`.
    """
    return (EntryKind.FAIL, stream, code.value, _printable(message, MAX_TEXT), retryable, _checked(usage))


def _printable(value: str, limit: int) -> str:
    """The first `limit` characters of `value`; what UTF-8 cannot say becomes a question mark."""
    return value[:limit].encode("utf-8", "replace").decode("utf-8")


def _checked(usage: Usage | None) -> Usage | None:
    try:
        if usage is not None:
            USAGE.check(usage)
    except MalformedMessage as error:
        raise LocalProtocolError(f"usage: {error}") from None
    return usage
