"""The agents' links: which sockets belong to whose session, and what waits to be sent.

Per agent only the routing ids of its latest Hello and Attach count; what comes by any other is nobody's. That is the
fence. Sends are gathered and leave once per loop tick.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator

from xim_protocol.codec import encode
from xim_protocol.ids import AgentId
from xim_protocol.messages import Channel, Goodbye, GoodbyeCode, Message
from xim_router import descriptors
from xim_router.link.agent_link import RETRY_INTERVAL_S, AgentLink
from xim_router.link.silence import too_silent, watch_interval_s
from xim_router.link.transport import RoutingId, SendResult, Transport

log = logging.getLogger(__name__)

LATER_S = 0.05
"""How long an agent may remember a closed stream, so that one message tells of many and none delays a request."""
SHUT_DELAY_S = 0.2
"""Between a Goodbye and the end of its TCP connection, so that the Goodbye arrives."""
UNATTACHED_S = 20.0
"""How long a connection may belong to no link: an agent gives up what brings no Welcome, or no Attached, in 10 s."""
REVOKED_UNATTACHED_S = 0.5
"""The same when somebody was revoked: time enough for others to say Hello and Attach."""
WARN_S = 60.0
"""Of too many of them is told once in this time."""


class Links:
    """Binds sessions to sockets; knows nothing of requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lost: Callable[[AgentLink], None]) -> None:
        """`on_lost` is told of a link whose peer is gone or takes nothing any more."""
        self._loop = loop
        self._on_lost = on_lost
        self._transport: Transport | None = None
        self._by_agent: dict[AgentId, AgentLink] = {}
        self._bound: dict[Channel, dict[RoutingId, AgentLink]] = {channel: {} for channel in Channel}
        self._shutting: set[tuple[Channel, int]] = set()
        self._unattached: dict[tuple[Channel, int], asyncio.TimerHandle] = {}
        """In the order in which they came."""
        # Beyond them the oldest are shut. An agent's two are among them for the moments of a handshake.
        self._most_unattached = descriptors.for_unattached(descriptors.limit())
        self._thinning = False
        self._warned_at = -WARN_S
        self._touched: dict[AgentLink, None] = {}
        self._flush_scheduled = False

    @property
    def transport(self) -> Transport:
        """The sockets; attached before the first message comes."""
        assert self._transport is not None, "attach a transport first"
        return self._transport

    def attach(self, transport: Transport) -> None:
        """Send through `transport` from here on."""
        self._transport = transport

    def __iter__(self) -> Iterator[AgentLink]:
        return iter(list(self._by_agent.values()))

    def get(self, agent: AgentId | None) -> AgentLink | None:
        """The latest link of `agent`."""
        return None if agent is None else self._by_agent.get(agent)

    def bound(self, channel: Channel, routing_id: RoutingId) -> AgentLink | None:
        """Whose link a message came by."""
        return self._bound[channel].get(routing_id)

    # --- Binding ---------------------------------------------------------------------------------------------------

    def add(self, link: AgentLink) -> None:
        """`link` is its agent's latest from here on."""
        self._by_agent[link.agent] = link

    def remove(self, link: AgentLink) -> bool:
        """Forget `link`; false when it was forgotten before."""
        return self._by_agent.pop(link.agent, None) is not None

    def bind(self, link: AgentLink, channel: Channel, routing_id: RoutingId, descriptor: int) -> None:
        """One half of `link` runs over this connection."""
        link.routing_ids[channel] = routing_id
        link.descriptors[channel] = descriptor
        self._attached(channel, descriptor)
        self._bound[channel][routing_id] = link
        if channel is Channel.CONTROL:
            self._watch(link, routing_id)

    def unbind(self, link: AgentLink) -> None:
        """Nothing is taken from or sent to the sockets of `link` any more; they are shut."""
        for channel, routing_id in link.routing_ids.items():
            self._bound[channel].pop(routing_id, None)
        link.routing_ids.clear()
        link.drop_queue()
        for channel, descriptor in link.descriptors.items():
            self.shut_later(channel, descriptor)
        link.descriptors.clear()

    def disconnected(self, channel: Channel, descriptor: int) -> AgentLink | None:
        """A TCP connection is gone; returns the link it belonged to, if that still counts."""
        self._shutting.discard((channel, descriptor))
        self._attached(channel, descriptor)
        for link in self._by_agent.values():
            if link.descriptors.get(channel) == descriptor:
                del link.descriptors[channel]
                return link
        return None

    # --- Connections of no link ------------------------------------------------------------------------------------

    @property
    def unattached(self) -> int:
        """Connections that belong to no link."""
        return len(self._unattached)

    def accepted(self, channel: Channel, descriptor: int) -> None:
        """A connection came; it must become part of a link in time."""
        self._give_time(channel, descriptor, UNATTACHED_S)
        if len(self._unattached) > self._most_unattached and not self._thinning:
            self._thinning = True
            self._loop.call_soon(self._thin_out)

    def _thin_out(self) -> None:
        """Shut the oldest of too many connections, so that whoever opens them leaves descriptors for others."""
        self._thinning = False
        # What has come is taken in first: a Hello or an Attach in it makes its connection part of a link.
        self.transport.drain()
        self.transport.read_monitors()
        while len(self._unattached) > self._most_unattached:
            channel, descriptor = next(iter(self._unattached))
            self._attached(channel, descriptor)
            self.transport.shut_connection(descriptor)
            self._warn()

    def _warn(self) -> None:
        now = self._loop.time()
        if now >= self._warned_at + WARN_S:
            self._warned_at = now
            remedy = "Let only agents reach the agents' ports, or limit what one address may open there."
            facts = {"most": self._most_unattached, "remedy": remedy}
            log.warning("too many connections of no agent, ending the oldest", extra=facts)

    def shut_unattached(self) -> None:
        """Somebody was revoked, whose connections may be among those that said nothing yet."""
        for channel, descriptor in list(self._unattached):
            self._give_time(channel, descriptor, REVOKED_UNATTACHED_S)

    def _give_time(self, channel: Channel, descriptor: int, time_s: float) -> None:
        self._attached(channel, descriptor)
        handle = self._loop.call_later(time_s, self._shut_unattached, channel, descriptor)
        self._unattached[channel, descriptor] = handle

    def _attached(self, channel: Channel, descriptor: int) -> None:
        handle = self._unattached.pop((channel, descriptor), None)
        if handle is not None:
            handle.cancel()

    def _shut_unattached(self, channel: Channel, descriptor: int) -> None:
        mine = self._unattached.get((channel, descriptor))
        self.transport.read_monitors()
        # Listed by the same timer still: no event reported it gone, and the number is not another connection's by now.
        if self._unattached.get((channel, descriptor)) is mine:
            del self._unattached[channel, descriptor]
            self.transport.shut_connection(descriptor)

    # --- Silence ---------------------------------------------------------------------------------------------------

    def _watch(self, link: AgentLink, control: RoutingId) -> None:
        """Give a link up when the agent falls silent; ends with the link's control connection."""
        interval_s = watch_interval_s(link.session.lease_s)
        if interval_s is not None:
            self._loop.call_later(interval_s, self._look_after, link, control)

    def _look_after(self, link: AgentLink, control: RoutingId) -> None:
        # Before the descriptors are trusted: the number of one that is gone may be another peer's by now.
        self.transport.read_monitors()
        if link.routing_ids.get(Channel.CONTROL) != control:
            return
        if any(too_silent(descriptor, link.session.lease_s) for descriptor in link.descriptors.values()):
            self._on_lost(link)
        else:
            self._watch(link, control)

    # --- Sending ---------------------------------------------------------------------------------------------------

    def touch(self, link: AgentLink) -> None:
        """`link` has something to send: once per tick, however often it is touched."""
        self._touched[link] = None
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def touch_later(self, link: AgentLink) -> None:
        """`link` has something to send that can wait for company."""
        if not link.touched_later:
            link.touched_later = True
            self._loop.call_later(LATER_S, self._touch_now, link)

    def _touch_now(self, link: AgentLink) -> None:
        link.touched_later = False
        link.tells_closed = True
        self.touch(link)

    def _flush(self) -> None:
        self._flush_scheduled = False
        touched, self._touched = self._touched, {}
        for link in touched:
            if not link.routing_ids:
                continue
            result = link.flush(self.transport)
            if result is SendResult.FULL:
                self._loop.call_later(RETRY_INTERVAL_S, self.touch, link)
            elif result is SendResult.UNREACHABLE:
                self._on_lost(link)
        self.transport.after_sends()

    def reply(self, routing_id: RoutingId, message: Message) -> None:
        """Answer a control peer that has no link; if it takes nothing, nothing is lost."""
        self.transport.send(Channel.CONTROL, routing_id, encode(message))

    def turn_away(self, routing_id: RoutingId, descriptor: int, code: GoodbyeCode, message: str) -> None:
        """Say Goodbye to a peer that gets no link."""
        self.reply(routing_id, Goodbye(code=code, message=message))
        self.shut_later(Channel.CONTROL, descriptor)

    def shut_later(self, channel: Channel, descriptor: int) -> None:
        """Shut a TCP connection in a moment, unless it is gone by then."""
        self._shutting.add((channel, descriptor))
        self._loop.call_later(SHUT_DELAY_S, self._shut, channel, descriptor)

    def _shut(self, channel: Channel, descriptor: int) -> None:
        self.transport.read_monitors()
        # Still listed means that no monitor event reported it gone, so the number was not used again.
        if (channel, descriptor) in self._shutting:
            self._shutting.discard((channel, descriptor))
            self.transport.shut_connection(descriptor)
