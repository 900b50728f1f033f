"""Who may be given requests: every enrolled agent and every agent with a session, with its slots.

A node stands in the roster while the catalog lists its agent, while it has a session, or while requests are in
flight there. Its standing is computed when something about it changes, never while a request is placed.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from xim_protocol.ids import AgentId, EndpointId
from xim_protocol.messages import AgentState
from xim_router.dispatch.catalog import RegisteredAgent


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentView:
    """An agent's session as the dispatcher sees it."""

    agent: AgentId
    endpoint: EndpointId | None
    """The endpoint this session serves; while it differs from the catalog's assignment, nothing is placed there."""
    capacity: int
    """Most requests at once."""
    state: AgentState
    connected: bool
    """The link is up and attached; False while only the lease is left of it."""


class Standing(StrEnum):
    """What an agent means for a request of the endpoint that it is assigned to."""

    SERVING = "serving"
    """Takes requests while it has a free slot."""
    RETURNING = "returning"
    """Has a session and will serve again: its link is down, it loads, restarts its engine or drains."""
    ABSENT = "absent"
    """Enrolled, without a session; it had one, and was seen not too long ago."""
    OUT = "out"
    """Never counts: failed, suspended, dead, not enrolled, or enrolled and never connected."""


@dataclass(slots=True, eq=False)
class Node:
    """One agent in the roster."""

    agent: AgentId
    registered: RegisteredAgent | None = None
    view: AgentView | None = None
    standing: Standing = Standing.OUT
    met: bool = False
    """It had a session with this router, whatever the catalog knows of that yet."""
    in_flight: int = 0
    held_back: bool = False
    """It refused a request: nothing more than it named since, until it names slots for all that it refused or serves
    anew; one that refused for another reason than its capacity takes requests again when one of its streams ends."""
    refused: int = 0
    """Requests that it refused for its capacity and has named no slot for yet; it keeps the same count."""
    named: int = 0
    """Slots that it named while it is held back, and that were not used yet."""
    released_at: int = 0
    """Its newest assignment when it named slots last, or began to serve. A refusal of that one or an older one came
    late, since the two sockets have no common order, and holds nothing back."""
    refused_in_flight: int | None = None
    """Its total in flight, over all routers, as its last refusal named it."""
    last_assigned: int = 0
    """Rises with every assignment of the router; 0 for none yet."""

    @property
    def endpoint(self) -> EndpointId | None:
        return None if self.registered is None else self.registered.endpoint

    @property
    def capacity(self) -> int:
        return 0 if self.view is None else self.view.capacity

    @property
    def open(self) -> bool:
        """It can be given a request now."""
        room = not self.held_back or self.named > 0
        return self.standing is Standing.SERVING and room and self.in_flight < self.capacity

    def hold_back(self, in_flight_total: int | None) -> None:
        self.held_back = True
        self.refused_in_flight = in_flight_total
        if in_flight_total is not None:
            self.refused += 1

    def name_slots(self, free: int) -> None:
        self.released_at = self.last_assigned
        self.refused = max(0, self.refused - free)
        self.named += free
        if not self.refused:
            self.release_hold()

    def open_anew(self) -> None:
        self.released_at = self.last_assigned
        self.release_hold()

    def release_hold(self) -> None:
        self.held_back = False
        self.refused = self.named = 0
        self.refused_in_flight = None


def standing_of(registered: RegisteredAgent | None, view: AgentView | None, *, met: bool) -> Standing:
    """The one place where enrolment and session become a standing."""
    if registered is None or registered.suspended:
        return Standing.OUT
    if view is None:
        return Standing.OUT if registered.dead or (registered.pending and not met) else Standing.ABSENT
    if view.state is AgentState.FAILED:
        return Standing.OUT
    if view.connected and view.state is AgentState.READY and view.endpoint == registered.endpoint:
        return Standing.SERVING
    return Standing.RETURNING


class Roster:
    """The nodes, by agent and by the endpoint they are assigned to."""

    def __init__(self) -> None:
        self._nodes: dict[AgentId, Node] = {}
        self._nodes_by_endpoint: dict[EndpointId, list[Node]] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, agent: AgentId) -> Node | None:
        return self._nodes.get(agent)

    def candidates(self, endpoint: EndpointId) -> Collection[Node]:
        """The nodes assigned to `endpoint`, whatever their standing."""
        return self._nodes_by_endpoint.get(endpoint, ())

    def set_registered(self, agents: Mapping[AgentId, RegisteredAgent]) -> None:
        """Replace what the catalog says of all agents at once."""
        for agent in agents:
            self._nodes.setdefault(agent, Node(agent=agent))
        for node in list(self._nodes.values()):
            node.registered = agents.get(node.agent)
            self._refresh(node)
        self._index()

    def set_view(self, view: AgentView) -> Node:
        """Record a session that began or changed; a node that takes more than before is no longer held back."""
        node = self._nodes.setdefault(view.agent, Node(agent=view.agent))
        if view.capacity > node.capacity:
            node.open_anew()
        node.view = view
        node.met = True
        self._refresh(node)
        return node

    def drop_view(self, agent: AgentId) -> None:
        """Record that `agent` has no session any more; slots stay taken until its requests are reported."""
        node = self._nodes.get(agent)
        if node is not None:
            node.view = None
            self._refresh(node)

    def give_back(self, agent: AgentId) -> Node:
        """Free one slot of `agent`, which holds at least one."""
        node = self._nodes[agent]
        node.in_flight -= 1
        self._refresh(node)
        return node

    def _refresh(self, node: Node) -> None:
        before, node.standing = node.standing, standing_of(node.registered, node.view, met=node.met)
        if node.standing is Standing.SERVING and before is not Standing.SERVING:
            node.open_anew()
        if node.registered is None and node.view is None and node.in_flight == 0:
            del self._nodes[node.agent]

    def _index(self) -> None:
        self._nodes_by_endpoint = {}
        for node in self._nodes.values():
            if node.endpoint is not None:
                self._nodes_by_endpoint.setdefault(node.endpoint, []).append(node)
