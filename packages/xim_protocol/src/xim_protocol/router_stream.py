"""What a router knows of one session and of one stream in it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic

from xim_protocol.credit import CreditReceiver
from xim_protocol.events import C
from xim_protocol.ids import StreamId
from xim_protocol.messages import StreamVerdict, Submit, Verdict
from xim_protocol.stream import StreamState

CLOSED_AT_ONCE = 32
"""So many closed streams are worth a message of their own."""


class Phase(StrEnum):
    """Where a session stands at the router."""

    WELCOMED = "welcomed"
    """The Hello was answered; the streaming socket is not attached yet."""
    OPEN = "open"
    LINK_LOST = "link_lost"
    ENDED = "ended"


@dataclass(kw_only=True, slots=True, eq=False)
class RouterStream(Generic[C]):
    """One stream as the router sees it."""

    context: C
    stream: StreamId
    submit: Submit | None
    """None once no new link can need it again; so with `body`."""
    body: bytes
    credit: CreditReceiver
    state: StreamState = StreamState.SUBMITTED
    started: bool = False
    body_limit: int = 0
    """How much of a long body the agent asked for so far."""
    body_sent: int = 0

    def answered(self) -> None:
        """The agent began its answer."""
        self.started = True
        self.forget_body()

    def forget_body(self) -> None:
        """No link is sent it again: the agent has it whole, or nobody waits. It may be 20 MB, and an answer lasts."""
        self.submit = None
        self.body = b""

    def resumed(self) -> StreamVerdict:
        """How the stream goes on over a new link; the limit counts as told."""
        return StreamVerdict(
            stream=self.stream,
            verdict=Verdict.RESUME,
            started=self.started,
            received=self.credit.received,
            limit=self.credit.grant(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSessionStatistics:
    """What a session holds, for metrics and for tests that nothing leaks."""

    streams: int
    credit_owed_bytes: int
    queued_messages: int
