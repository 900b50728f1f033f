"""This router's place in the mesh: registered, renewed, given up; and who else is there.

Every member of a mesh shares one database. A member's row lives for a lease by the database's clock, so that clocks of
machines need not agree; a row that is not renewed drops out. Agents hear of a change from every member that is left.
"""

import logging
from collections.abc import Callable, Iterable

from xim_protocol.messages import RouterMember
from xim_router.control.errors import ControlError
from xim_router.control.records import MemberRecord
from xim_router.control.store import Store, Taken
from xim_router.settings import ADVERTISE_HOST

log = logging.getLogger(__name__)

RENEW_S = 5.0
"""How often a member renews its row."""
MEMBER_LEASE_S = 15.0
"""A member that was not heard of for so long has left: two renewals may be lost."""

_OWN_DATA_DIR = (
    "Give each router a data directory of its own (XEROTIER_ROUTER_DATA_DIR); only the secret key is shared."
)
_OWN_ADDRESS = (
    f"Give each router an address of its own for agents to dial: {ADVERTISE_HOST}, or XEROTIER_ROUTER_CONTROL_PORT and "
    "XEROTIER_ROUTER_STREAMING_PORT."
)


class MemberConflict(ControlError):
    """Another router registers with the same CURVE key at this moment."""

    def __init__(self) -> None:
        super().__init__(
            "Another router registers with this router's CURVE key at this moment.",
            _OWN_DATA_DIR,
        )


class Membership:
    """See the module's docstring."""

    def __init__(self, store: Store, member: RouterMember, *, member_id: str, clock: Callable[[], float]) -> None:
        """`member_id` is this process's own; `clock` gives Unix seconds, for people to read in the table."""
        self._store = store
        self._member = member
        self._id = member_id
        self._clock = clock
        self._replaced = False

    async def join(self) -> None:
        """Register; a row of the same key or address, left by a process before this one, gives way.

        Raises:
            DatabaseUnavailable: nothing was changed.
            MemberConflict: another process with the same key does the same at this moment.
        """
        record = MemberRecord(
            id=self._id,
            control_address=self._member.control_address,
            streaming_address=self._member.streaming_address,
            curve_public_key=self._member.curve_public_key,
            started_at=self._clock(),
        )
        try:
            async with self._store.change() as transaction:
                await transaction.drop_expired_members()
                await transaction.replace_member(record, MEMBER_LEASE_S)
        except Taken:
            raise MemberConflict from None
        log.info("joined the mesh", extra={"member_id": self._id, "control": record.control_address})

    async def renew(self) -> None:
        """Renew the lease, and take out members that did not renew theirs. A row that is gone is made anew.

        Raises:
            DatabaseUnavailable: nothing was changed; the lease may outlast that.
            MemberConflict: as for `join`.
        """
        async with self._store.record() as transaction:
            renewed = await transaction.extend_member(self._id, MEMBER_LEASE_S)
            place = self._member.curve_public_key, self._member.control_address
            holder = None if renewed else await transaction.member_in_place_of(*place)
            if await transaction.drop_expired_members():
                await transaction.raise_version()
        if renewed:
            self._replaced = False
        elif holder is None:
            # The database was away, or this process stood still, for longer than the lease.
            await self.join()
        elif not self._replaced:
            # The newer one stays: two that took the row from each other would drive the agents to and fro.
            self._replaced = True
            same_key = holder.curve_public_key == self._member.curve_public_key
            log.error(
                "another router took this router's place in the mesh: "
                + ("it has the same CURVE key" if same_key else "it advertises the same address"),
                extra={"other": holder.control_address, "remedy": _OWN_DATA_DIR if same_key else _OWN_ADDRESS},
            )

    async def leave(self) -> None:
        """Take the row away; agents that are not connected here are not sent here any more.

        Raises:
            DatabaseUnavailable: the row stays until its lease is over.
        """
        async with self._store.record() as transaction:
            if await transaction.drop_member(self._id):
                await transaction.raise_version()


def mesh_of(own: RouterMember, registered: Iterable[RouterMember]) -> tuple[RouterMember, ...]:
    """Every router of the mesh, in one order for all members; `own` is in it whatever the database says."""
    others = (each for each in registered if each.curve_public_key != own.curve_public_key)
    return tuple(sorted((own, *others), key=lambda each: (each.control_address, each.curve_public_key)))
