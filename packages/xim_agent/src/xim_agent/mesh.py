"""The routers this agent is linked to: who is dialled, who is given up, and what is remembered for the next start.

A router is known by its CURVE key. What it says of the mesh counts while its link is open, and the lists of all open
links together are the mesh. So a router that drains keeps its link until its own end, a dead one is tried until its
place in the mesh is over, and while no link is open nobody is given up.
"""

import logging
from collections.abc import Callable, Iterable, Iterator

from xim_agent.link.connection import Connection
from xim_protocol.enrollment import RouterAddress
from xim_protocol.messages import RouterMember

log = logging.getLogger(__name__)


class Mesh:
    """See the module's docstring. Everything happens in one loop."""

    def __init__(
        self,
        *,
        dial: Callable[[RouterAddress], Connection],
        given_up: Callable[[Connection], None],
        remember: Callable[[tuple[RouterAddress, ...]], None],
    ) -> None:
        """`dial` makes a connection and lets it run; `given_up` is told of one that will say nothing more; `remember`
        takes the mesh whenever it is another."""
        self._dial = dial
        self._given_up = given_up
        self._remember = remember
        self._connections: dict[bytes, Connection] = {}
        self._lists: dict[bytes, tuple[RouterAddress, ...]] = {}
        self._known: frozenset[RouterAddress] = frozenset()
        self._closed = False

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._connections.values()))

    @property
    def is_linked(self) -> bool:
        """True while at least one link is open."""
        return any(connection.is_open for connection in self)

    @property
    def is_leased(self) -> bool:
        """True while at least one router holds a lease of this agent."""
        return any(connection.session.lease.held for connection in self)

    def has_other_than(self, connection: Connection) -> bool:
        """True when another router may serve this agent, linked at the moment or not."""
        return any(other is not connection and not other.refused for other in self)

    def start(self, routers: Iterable[RouterAddress]) -> None:
        """Dial the routers that are remembered."""
        self._known = frozenset(routers)
        for router in routers:
            self._connect(router)

    def told(self, connection: Connection, members: Iterable[RouterMember]) -> None:
        """A router said who is in the mesh."""
        self._lists[connection.router.server_curve_key] = tuple([_address(member) for member in members])
        self.review()

    def review(self) -> None:
        """A list or a link changed: dial who is new, give up who is gone."""
        mesh: dict[bytes, RouterAddress] = {}
        for key, connection in self._connections.items():
            if connection.is_open:
                mesh |= {each.server_curve_key: each for each in self._lists.get(key, ())}
        if not mesh or self._closed:
            return
        for key, connection in list(self._connections.items()):
            if mesh.get(key) != connection.router and not connection.is_open and not connection.session.lease.held:
                self._give_up(key, connection)
        for router in mesh.values():
            self._connect(router)
        if self._known != frozenset(mesh.values()):
            self._known = frozenset(mesh.values())
            self._remember(tuple(mesh.values()))

    def close(self) -> None:
        """Say Goodbye to every router and dial no more."""
        self._closed = True
        for connection in self:
            connection.close()

    def _connect(self, router: RouterAddress) -> None:
        if router.server_curve_key not in self._connections and not self._closed:
            self._connections[router.server_curve_key] = self._dial(router)

    def _give_up(self, key: bytes, connection: Connection) -> None:
        log.info("router left the mesh", extra={"router": connection.name})
        del self._connections[key]
        self._lists.pop(key, None)
        connection.close()
        self._given_up(connection)


def _address(member: RouterMember) -> RouterAddress:
    return RouterAddress(
        control_addr=member.control_address,
        streaming_addr=member.streaming_address,
        server_curve_key=member.curve_public_key,
    )
