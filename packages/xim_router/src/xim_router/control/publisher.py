"""From the database to the data plane: builds the `Catalog` and hands over a whole new one whenever it changed.

Every change raises one counter in its own transaction, so a change made by the command line in another process takes
effect at once: PostgreSQL tells of it, SQLite is asked four times a second. While the database is away the last catalog
stays.
"""

import asyncio
import logging
from collections.abc import Callable
from types import MappingProxyType

from xim_protocol.ids import AgentId, EndpointId, ProjectId
from xim_protocol.messages import RouterMember
from xim_router.control.errors import DatabaseUnavailable
from xim_router.control.records import AgentRecord, EndpointRecord, MemberRecord, Snapshot
from xim_router.control.store import Store
from xim_router.dispatch.catalog import Catalog, Endpoint, Principal, RegisteredAgent

log = logging.getLogger(__name__)

DEAD_AFTER_S = 24 * 3600.0
"""An agent not seen for so long is dead: no request waits for it any more."""
POLL_INTERVAL_S = 0.25
"""How often the database is asked that tells of no change by itself, and how long a told change waits for the next."""
ASK_S = 2.0
"""A query at least this often, even where nothing was told and the database's files say that nothing was committed.

It confirms the catalog, well within what `/readyz` calls fresh, and bounds what a notification that was lost costs.
"""
REBUILD_S = 300.0
"""How often the catalog is built anew without a change: agents die by time alone."""


class Publisher:
    """Publishes the database's current catalog; one `turn` after the other is its whole life."""

    def __init__(
        self,
        store: Store,
        publish: Callable[[Catalog], None],
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        """`clock` gives Unix seconds, `monotonic` seconds that never go back."""
        self._store = store
        self._publish = publish
        self._clock = clock
        self._monotonic = monotonic
        self._published: int | None = None
        self._published_at = monotonic()
        self._mark: object | None = None
        self._asked_at = monotonic()
        self._confirmed_at = monotonic()
        self._away = False
        # Two polls at once could publish the older catalog last.
        self._one_at_a_time = asyncio.Lock()

    @property
    def stale_s(self) -> float:
        """Seconds since the database last confirmed that the published catalog is its current one."""
        return self._monotonic() - self._confirmed_at

    async def load(self) -> None:
        """Publish the current catalog unless it is published already.

        Raises:
            DatabaseUnavailable: the database does not answer; the last catalog stays.
        """
        async with self._one_at_a_time:
            asked_at = self._monotonic()
            # Read before the query: a commit between the two shows again at the next look.
            mark = self._store.change_mark()
            if mark is not None and mark == self._mark and asked_at - self._asked_at < ASK_S:
                self._confirmed_at = asked_at
                return
            # Not "greater": a database restored from a backup may have counted less far.
            changed = await self._store.version() != self._published
            if changed or asked_at - self._published_at >= REBUILD_S:
                async with self._store.read() as transaction:
                    snapshot = await transaction.snapshot()
                self._publish(build_catalog(snapshot, self._clock()))
                self._published = snapshot.version
                self._published_at = asked_at
            self._confirmed_at = self._asked_at = asked_at
            self._mark = mark

    async def turn(self) -> None:
        """Wait until the database should be looked at, and `poll`."""
        hears, published = self._store.hears_of_changes, self._published
        told = await self._store.change_told(ASK_S if hears else POLL_INTERVAL_S)
        await self.poll()
        if told:
            # Many changes in a row make few catalogs.
            await asyncio.sleep(POLL_INTERVAL_S)
        elif hears and self._published != published and not await self._store.change_told(POLL_INTERVAL_S):
            # Nor a moment later: a change that was made while it was asked for is told as well.
            self._store.not_told()

    async def poll(self) -> None:
        """As `load`, but a database that is away is logged, once, and leaves the last catalog in place."""
        try:
            await self.load()
        except DatabaseUnavailable as error:
            if not self._away:
                log.warning(
                    "database away, serving the last catalog", extra={"why": str(error), "remedy": error.remedy}
                )
            self._away = True
        else:
            if self._away:
                log.info("database back")
            self._away = False


def build_catalog(snapshot: Snapshot, now: float) -> Catalog:
    """The catalog that follows from the database's rows at `now`, in Unix seconds."""
    living = [agent for agent in snapshot.agents if agent.revoked_at is None]
    living_keys = {agent.curve_public_key for agent in living}
    # A node that enrolled again after it was revoked may have kept its key: the living agent decides.
    revoked = {agent.curve_public_key for agent in snapshot.agents} - living_keys
    principals = {
        key.key_hash: Principal(
            key_id=key.id,
            project=key.project_id,
            scopes=key.scopes,
            endpoint=key.endpoint_id,
            expires_at=key.expires_at,
        )
        for key in snapshot.api_keys
    }
    return Catalog(
        version=snapshot.version,
        principals=MappingProxyType(principals),
        endpoints=MappingProxyType({record.id: _endpoint(record) for record in snapshot.endpoints}),
        endpoints_by_name=MappingProxyType(_by_name(snapshot.endpoints)),
        agents=MappingProxyType({agent.id: _agent(agent, now) for agent in living}),
        agents_by_curve_key=MappingProxyType[bytes, AgentId]({agent.curve_public_key: agent.id for agent in living}),
        revoked_curve_keys=frozenset(revoked),
        routers=tuple(_router(member) for member in snapshot.members),
    )


def _by_name(endpoints: tuple[EndpointRecord, ...]) -> dict[tuple[ProjectId, str], EndpointId]:
    """Model names, the oldest endpoint of a model first, then slugs over them."""
    names = {(each.project_id, each.model): each.id for each in reversed(endpoints)}
    return names | {(each.project_id, each.slug): each.id for each in endpoints}


def _endpoint(record: EndpointRecord) -> Endpoint:
    return Endpoint(
        endpoint=record.id,
        project=record.project_id,
        slug=record.slug,
        model=record.model,
        task_mode=record.task_mode,
        quantization=record.quantization,
        created_at=int(record.created_at),
    )


def _router(record: MemberRecord) -> RouterMember:
    return RouterMember(
        control_address=record.control_address,
        streaming_address=record.streaming_address,
        curve_public_key=record.curve_public_key,
    )


def _agent(record: AgentRecord, now: float) -> RegisteredAgent:
    last_sign = record.enrolled_at if record.last_seen_at is None else max(record.enrolled_at, record.last_seen_at)
    return RegisteredAgent(
        agent=record.id,
        name=record.name,
        project=record.project_id,
        curve_public_key=record.curve_public_key,
        endpoint=record.endpoint_id,
        suspended=record.suspended_at is not None,
        dead=now - last_sign >= DEAD_AFTER_S,
        pending=record.last_seen_at is None,
    )
