"""Which agent gets a request, and what becomes of one that no agent can take now. Pure functions of nodes."""

from collections.abc import Collection, Iterable

from xim_protocol.ids import AgentId
from xim_router.dispatch.effects import Rejection
from xim_router.dispatch.roster import Node, Standing


def rank(node: Node, avoid: AgentId | None) -> tuple[bool, float, int, int]:
    """The order of open nodes, best first.

    Any node before the one that just failed this request; then the least part of its capacity in use, the fewest in
    flight, and the one left alone longest, so that equals alternate.
    """
    return node.agent == avoid, node.in_flight / node.capacity, node.in_flight, node.last_assigned


def choose(nodes: Iterable[Node], avoid: AgentId | None = None) -> Node | None:
    """The node with a free slot that a request should go to, or None when there is none."""
    return min((node for node in nodes if node.open), key=lambda node: rank(node, avoid), default=None)


def why_not_park(nodes: Collection[Node]) -> Rejection | None:
    """Why a request that no node can take now may not wait for one, or None when it may.

    It may wait where it is plain which node it waits for: the sole one that serves; where none serves, the sole one
    with a session; where none has a session, the sole one that is absent. Several that serve and are all full are
    a sign of load that waiting would only hide, so the client learns it at once.
    """
    standings = [node.standing for node in nodes]
    serving = standings.count(Standing.SERVING)
    if serving > 1:
        return Rejection.AT_CAPACITY
    awaited = serving or standings.count(Standing.RETURNING) or standings.count(Standing.ABSENT)
    return None if awaited == 1 else Rejection.NO_AGENT
