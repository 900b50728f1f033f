"""Where links begin: the messages of sockets that belong to no link yet.

A Hello begins or resumes a session, an Attach binds its streaming half; a late Renew is told that its lease is over;
anything else comes by a link that was replaced, and is dropped and counted.
"""

import logging
import secrets
from collections.abc import Callable
from typing import Protocol

from xim_protocol.codec import Frames, decode
from xim_protocol.errors import RemoteProtocolError
from xim_protocol.events import RouterEvent
from xim_protocol.ids import AgentId, SessionId
from xim_protocol.messages import (
    PROTOCOL_VERSION,
    Attach,
    Channel,
    Expired,
    GoodbyeCode,
    Hello,
    Renew,
    RouterMember,
)
from xim_protocol.router_session import Phase, RouterSession, negotiate_version
from xim_router.dispatch.catalog import Catalog, RegisteredAgent
from xim_router.link.agent_link import AgentLink
from xim_router.link.exchange import Exchange
from xim_router.link.journal import Journal
from xim_router.link.links import Links
from xim_router.link.transport import RoutingId

log = logging.getLogger(__name__)

SHUTTING_DOWN = "The router is shutting down."


class Host(Protocol):
    """What the reception needs of the broker."""

    catalog: Catalog
    routers: tuple[RouterMember, ...]

    def lose_link(self, link: AgentLink) -> None:
        """The sockets of `link` are given up; its session lives on."""

    def end_session(self, link: AgentLink, code: GoodbyeCode | None, message: str) -> None:
        """The session of `link` is over."""

    def handle(self, link: AgentLink, event: RouterEvent[Exchange]) -> None:
        """Something happened in the session of `link`."""

    def on_message(
        self, channel: Channel, routing_id: RoutingId, agent: AgentId, descriptor: Callable[[], int], frames: Frames
    ) -> None:
        """A message that belongs to a link now."""


class Reception:
    """See the module's docstring."""

    def __init__(self, host: Host, links: Links, journal: Journal) -> None:
        self._host = host
        self._links = links
        self._journal = journal
        self._closed = False

    def close(self) -> None:
        """Begin no session any more: the router ends, and who comes again is to come later."""
        self._closed = True

    def receive(
        self, channel: Channel, routing_id: RoutingId, agent: AgentId, descriptor: Callable[[], int], frames: Frames
    ) -> None:
        """Take in one message of the authenticated `agent` that came by no link."""
        try:
            message = decode(frames)
        except RemoteProtocolError as error:
            self.fault(channel, descriptor, error)
            return
        link = self._links.get(agent)
        if isinstance(message, Hello) and channel is Channel.CONTROL:
            # Before a descriptor is noted: the monitor may still hold the end of an older connection of that number.
            self._links.transport.read_monitors()
            self._hello(agent, routing_id, descriptor(), message)
        elif isinstance(message, Attach) and channel is Channel.STREAMING and link and _awaits(link, message):
            self._links.transport.read_monitors()
            self._links.bind(link, channel, routing_id, descriptor())
            self._host.on_message(channel, routing_id, agent, descriptor, frames)
        elif isinstance(message, Renew) and channel is Channel.CONTROL:
            # Its lease is over, which it cannot know when it was the one that stood still.
            self._links.reply(routing_id, Expired())
        else:
            self._journal.fenced()

    def fault(self, channel: Channel, descriptor: Callable[[], int], error: RemoteProtocolError) -> None:
        """A peer without a link broke the protocol: its connection is shut."""
        self._journal.fault(error.reason)
        self._links.shut_later(channel, descriptor())

    def _hello(self, agent: AgentId, routing_id: RoutingId, descriptor: int, hello: Hello) -> None:
        registered = self._host.catalog.agents.get(agent)
        refusal = (GoodbyeCode.SHUTDOWN, SHUTTING_DOWN) if self._closed else _refusal(registered, hello)
        if registered is None or refusal is not None:
            code, message = refusal or (GoodbyeCode.REVOKED, "")
            self._links.turn_away(routing_id, descriptor, code, message)
            return
        link = self._links.get(agent)
        events: list[RouterEvent[Exchange]]
        if link is not None and link.session.instance == hello.instance:
            self._host.lose_link(link)
            self._links.bind(link, Channel.CONTROL, routing_id, descriptor)
            events = link.session.resume(hello)
        else:
            if link is not None:
                superseded = "Another process said Hello with this agent's identity."
                self._host.end_session(link, GoodbyeCode.SUPERSEDED, superseded)
            link = self._new_link(registered, hello)
            self._links.bind(link, Channel.CONTROL, routing_id, descriptor)
            events = [link.session.report]
        log.info(
            "agent connected",
            extra={"agent": agent, "agent_name": registered.name, "state": hello.state.value},
        )
        for event in events:
            self._host.handle(link, event)
        self._links.touch(link)

    def _new_link(self, registered: RegisteredAgent, hello: Hello) -> AgentLink:
        session: RouterSession[Exchange] = RouterSession(
            agent=registered.agent,
            session=SessionId(secrets.token_hex(12)),
            hello=hello,
            assignment=self._host.catalog.assignment_of(registered),
            routers=self._host.routers,
        )
        link = AgentLink(agent=registered.agent, session=session)
        self._links.add(link)
        return link


def _awaits(link: AgentLink, attach: Attach) -> bool:
    return link.session.session == attach.session and link.session.phase is Phase.WELCOMED


def _refusal(registered: RegisteredAgent | None, hello: Hello) -> tuple[GoodbyeCode, str] | None:
    """Why this agent gets no session, or None."""
    if registered is None:
        return GoodbyeCode.REVOKED, "The credentials of this agent were revoked."
    if registered.suspended:
        return GoodbyeCode.SUSPENDED, "This agent is suspended."
    if negotiate_version(hello.versions) is None:
        spoken = f"This router speaks version {PROTOCOL_VERSION}, the agent {list(hello.versions)}."
        return GoodbyeCode.VERSION_UNSUPPORTED, spoken
    return None
