"""How a link ends, what the operator is told of it, and when the next one is tried. Pure."""

import random
from dataclasses import dataclass
from enum import StrEnum

from xim_protocol.enrollment import FAILURES, EnrollmentCode
from xim_protocol.messages import Channel, GoodbyeCode

FIRST_DELAY_S = 0.1
LEASED_CAP_S = 2.0
"""While a lease is held, streams may still be saved: look often."""
CAP_S = 30.0
UNKNOWN_KEY_DELAY_S = 0.5
"""A router learns a new agent's key within moments of its enrollment."""
UNKNOWN_KEY_ATTEMPTS = 20
"""So many quick attempts; then it is no matter of moments."""
REFUSED_DELAY_S = 30.0
"""Before it asks a router again that knows it and does not want it now."""
VERSION_REMEDY = "Update the older of the two: agent or router."


class LinkCause(StrEnum):
    """Why a link ended."""

    UNREACHABLE = "unreachable"
    """The port takes no connections."""
    NO_ANSWER = "no_answer"
    """Neither refused nor answered in time."""
    KEY_UNKNOWN = "key_unknown"
    """The router let the handshake end without a word: it does not know this agent's key, or its own key changed."""
    KEY_REVOKED = "key_revoked"
    DISCONNECTED = "disconnected"
    CONGESTED = "congested"
    """The router took nothing for too long."""
    PROTOCOL_ERROR = "protocol_error"
    """The router sent what it must not."""
    EXPIRED = "expired"
    """The lease is over."""
    GOODBYE = "goodbye"
    """The router said so; `code` says why."""
    CLOSED = "closed"
    """This agent leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkEnd:
    """The end of one link."""

    cause: LinkCause
    channel: Channel | None = None
    """The socket it showed on, where that matters."""
    code: GoodbyeCode | None = None
    detail: str = ""


class LinkStopped(Exception):
    """This agent must not come again; `remedy` says what the operator does."""

    lasting = True
    """Another start would end the same way."""

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(f"{message} [{code}] {remedy}")
        self.code, self.message, self.remedy = code, message, remedy


def stop_for(end: LinkEnd, *, elsewhere: bool = False) -> LinkStopped | None:
    """The error that this end is, or None when another link may be tried.

    `elsewhere` says that another router may serve this agent: then a version is that one router's matter, as it is
    while the routers of a mesh are updated one by one.
    """
    if end.cause is LinkCause.KEY_REVOKED or end.code is GoodbyeCode.REVOKED:
        failure = FAILURES[EnrollmentCode.AGENT_REVOKED]
        return LinkStopped(EnrollmentCode.AGENT_REVOKED.value, failure.message, failure.remedy)
    if end.code is GoodbyeCode.SUPERSEDED:
        return LinkStopped(
            "superseded",
            "Another process connected with this agent's identity.",
            "Two agents share one config directory, or a copy of it. Stop one of them, or give each a directory of its "
            "own (XEROTIER_AGENT_CONFIG_DIR) and enroll it with a join key of its own.",
        )
    if end.code is GoodbyeCode.VERSION_UNSUPPORTED and not elsewhere:
        detail = f" {end.detail}" if end.detail else ""
        return LinkStopped(
            "version_unsupported",
            f"The router speaks no protocol version that this agent speaks.{detail}",
            VERSION_REMEDY,
        )
    return None


def remedy_for(end: LinkEnd) -> str:
    """What the operator may do about a link that is tried again; empty when there is nothing to do."""
    if end.cause in (LinkCause.UNREACHABLE, LinkCause.NO_ANSWER):
        return FAILURES[port_code(end.channel)].remedy
    if end.cause is LinkCause.KEY_UNKNOWN:
        return (
            "If this lasts, the router's database no longer has this agent, or the router has a new key: enroll the "
            "agent again with a new join key (xerotier-router join-key create --project P --endpoint E)."
        )
    if end.code is GoodbyeCode.SUSPENDED:
        return FAILURES[EnrollmentCode.AGENT_SUSPENDED].remedy
    if end.code is GoodbyeCode.VERSION_UNSUPPORTED:
        return VERSION_REMEDY
    return ""


def problem_of(end: LinkEnd) -> str:
    """The code by which an end is named in logs: which port, or which cause."""
    if end.cause in (LinkCause.UNREACHABLE, LinkCause.NO_ANSWER):
        return port_code(end.channel).value
    return str(end.code or end.cause)


def port_code(channel: Channel | None) -> EnrollmentCode:
    """Which port does not answer."""
    if channel is Channel.STREAMING:
        return EnrollmentCode.STREAMING_PORT_UNREACHABLE
    return EnrollmentCode.CONTROL_PORT_UNREACHABLE


class LinkBackoff:
    """When the next link is tried; forgets everything once a link is open."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self._delay_s = FIRST_DELAY_S
        self._unknown = 0

    def opened(self) -> None:
        """A link came up whole."""
        self._delay_s = FIRST_DELAY_S
        self._unknown = 0

    def delay_s(self, end: LinkEnd, *, leased: bool) -> float:
        """Seconds to wait after `end`; the ordinary delay is jittered between half of it and the whole."""
        if end.code in (GoodbyeCode.SUSPENDED, GoodbyeCode.VERSION_UNSUPPORTED):
            return REFUSED_DELAY_S
        if end.cause is LinkCause.KEY_UNKNOWN and self._unknown < UNKNOWN_KEY_ATTEMPTS:
            self._unknown += 1
            return UNKNOWN_KEY_DELAY_S
        delay_s = min(self._delay_s, LEASED_CAP_S if leased else CAP_S)
        self._delay_s = min(2.0 * self._delay_s, CAP_S)
        return delay_s * (0.5 + 0.5 * self._source.random())
