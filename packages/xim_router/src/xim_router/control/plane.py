"""The control plane as one part: opened, run and closed by the composition root.

It hands catalogs to the data plane and takes reports of agents seen; inference never waits for it.
"""

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TypeVar

from fastapi import FastAPI

from xim_protocol.enrollment import RouterAddress
from xim_protocol.ids import AgentId
from xim_protocol.messages import RouterMember
from xim_router.control.accounts import Accounts
from xim_router.control.enrollment import Enroller
from xim_router.control.errors import DatabaseUnavailable
from xim_router.control.keys import CurveKeypair, RouterKeys, load_curve_keypair
from xim_router.control.membership import RENEW_S, MemberConflict, Membership, mesh_of
from xim_router.control.opening import open_storage
from xim_router.control.publisher import POLL_INTERVAL_S, Publisher
from xim_router.control.routes.enroll import enroll_routes
from xim_router.control.store import Store
from xim_router.dispatch.catalog import Catalog
from xim_router.dispatch.reports import AgentSeen
from xim_router.http.errors import install_error_handlers
from xim_router.settings import RouterSettings

log = logging.getLogger(__name__)

SEEN_INTERVAL_S = 1.0
"""How long the first report waits for more before they are written."""
_SEEN_BOUND = 10_000

_Part = TypeVar("_Part")


class ControlPlane:
    """Database, keys, enrollment and the publisher of catalogs.

    `publish` is called on the event loop with each new catalog, for the first time inside `start`. `clock` gives
    Unix seconds, `monotonic` seconds that never go back. `member` is this process's number among several of one
    machine.
    """

    def __init__(
        self,
        settings: RouterSettings,
        publish: Callable[[Catalog], None],
        *,
        member: int = 0,
        report_dropped: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`publish` gets each new snapshot; `report_dropped` is told of each report that there is no room for."""
        self._settings = settings
        self._publish = publish
        self._member = member
        self._report_dropped = report_dropped
        self._clock = clock
        self._monotonic = monotonic
        self._routers: tuple[RouterMember, ...] = ()
        self._membership: Membership | None = None
        self._opened = AsyncExitStack()
        self._seen: dict[AgentId, AgentSeen] = {}
        self._reported = asyncio.Event()
        self._curve: CurveKeypair | None = None
        self._keys: RouterKeys | None = None
        self._keyed_hash: hmac.HMAC | None = None
        """Of API keys, with nothing in it yet."""
        self._store: Store | None = None
        self._publisher: Publisher | None = None

    async def start(self) -> None:
        """Open the database, bring it up to date, load the keys, publish the first catalog.

        Raises:
            ControlError: one of them cannot be used; the message and `remedy` are for the operator.
        """
        storage = await self._opened.enter_async_context(open_storage(self._settings))
        try:
            self._curve = await asyncio.to_thread(load_curve_keypair, self._settings, self._member)
            self._keys, self._store = storage.keys, storage.store
            self._keyed_hash = hmac.new(storage.keys.api_keys, digestmod="sha256")
            self._publisher = Publisher(self._store, self._hand_over, clock=self._clock, monotonic=self._monotonic)
            await self._publisher.load()
        except BaseException:
            await self._opened.aclose()
            raise

    async def join(self) -> None:
        """Become a member of the mesh, now that agents can connect. After `start`.

        A router on SQLite is alone: several processes share a PostgreSQL.

        Raises:
            ControlError: the database does not answer, or another router has this one's CURVE key.
        """
        if self._settings.is_sqlite:
            return
        membership = Membership(
            _started(self._store), self.own_member, member_id=secrets.token_hex(16), clock=self._clock
        )
        await membership.join()
        self._membership = membership
        await self.poll()

    async def leave(self) -> None:
        """Be a member no more: agents that are not connected here are not sent here. Harmless when repeated."""
        membership, self._membership = self._membership, None
        if membership is None:
            return
        try:
            await membership.leave()
        except DatabaseUnavailable as error:
            log.warning("left the mesh without telling it", extra={"why": str(error), "remedy": error.remedy})

    async def renew(self) -> None:
        """Renew the place in the mesh; what cannot be done now is done at the next turn."""
        if self._membership is None:
            return
        try:
            await self._membership.renew()
        except (DatabaseUnavailable, MemberConflict) as error:
            log.warning("place in the mesh not renewed", extra={"why": str(error), "remedy": error.remedy})

    async def run(self) -> None:
        """Publish changes, write down who was seen and stay a member, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_published())
            tasks.create_task(self._keep_written())
            tasks.create_task(self._keep_renewed())

    async def _keep_published(self) -> None:
        while True:
            await _started(self._publisher).turn()

    async def _keep_written(self) -> None:
        while True:
            await self._reported.wait()
            await asyncio.sleep(SEEN_INTERVAL_S)
            await self.write_seen()

    async def _keep_renewed(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self.renew()

    async def close(self) -> None:
        """Leave the mesh, write what was seen last and give the database back."""
        await self.leave()
        if self._store is not None:
            await self.write_seen()
        await self._opened.aclose()

    @property
    def curve_keypair(self) -> CurveKeypair:
        """The keys of this router's sockets; after `start`."""
        return _started(self._curve)

    @property
    def stale_s(self) -> float:
        """Seconds since the database last confirmed the published catalog; two at most while all is well."""
        return _started(self._publisher).stale_s

    @property
    def accounts(self) -> Accounts:
        """The operator's commands on the open database."""
        return Accounts(_started(self._store), _started(self._keys), clock=self._clock, entropy=secrets.token_bytes)

    def api_key_hash(self, secret: str) -> bytes:
        """What stands for the API key `secret` in `Catalog.principals`: 32 bytes, about a microsecond."""
        # A copy of one that has its key already: OpenSSL looks for its algorithm each time that one is made.
        keyed = _started(self._keyed_hash).copy()
        # A text that cannot be encoded is a wrong key, not an error.
        keyed.update(secret.encode("utf-8", "surrogatepass"))
        return keyed.digest()

    def report_seen(self, seen: AgentSeen) -> None:
        """Note a sign of life or a departure; the latest one per agent is written within seconds, and may be lost."""
        if seen.agent in self._seen or len(self._seen) < _SEEN_BOUND:
            self._seen[seen.agent] = seen
            self._reported.set()
        else:
            self._report_dropped()

    async def write_seen(self) -> None:
        """Write the reports that wait; where the database is away they wait on."""
        if not self._seen:
            return
        reports, self._seen = self._seen, {}
        self._reported.clear()
        with contextlib.suppress(DatabaseUnavailable):
            try:
                async with _started(self._store).record() as transaction:
                    await transaction.agents_seen(reports.values())
            except BaseException:
                # Cancelled at the router's end too, which writes once more; newer reports that came meanwhile stay.
                self._seen = reports | self._seen
                self._reported.set()
                raise

    async def poll(self) -> None:
        """Publish the database's catalog now, if it changed."""
        await _started(self._publisher).poll()

    def api(self) -> FastAPI:
        """The routes of enrollment; every answer and error in the router's one form. After `start`."""
        enroller = Enroller(
            store=_started(self._store),
            keys=_started(self._keys),
            mesh=self._mesh,
            published=self._published,
            clock=self._clock,
            entropy=secrets.token_bytes,
        )
        # No schema and no docs pages: an enrolling agent needs none, and they would load scripts from elsewhere.
        app = FastAPI(title="xerotier-router", openapi_url=None, docs_url=None, redoc_url=None)
        install_error_handlers(app)
        app.include_router(enroll_routes(enroller))
        return app

    async def _published(self) -> None:
        """Publish a change here, and give other members the time to see it too: an agent dials all of them at once."""
        await self.poll()
        if len(self._routers) > 1:
            await asyncio.sleep(POLL_INTERVAL_S)

    @property
    def own_member(self) -> RouterMember:
        """This router as agents reach it; after `start`."""
        return RouterMember(
            control_address=self._settings.control_address(),
            streaming_address=self._settings.streaming_address(),
            curve_public_key=self.curve_keypair.public_key,
        )

    def _hand_over(self, catalog: Catalog) -> None:
        self._routers = mesh_of(self.own_member, catalog.routers)
        self._publish(replace(catalog, routers=self._routers))

    def _mesh(self) -> tuple[RouterAddress, ...]:
        return tuple(
            RouterAddress(
                control_addr=each.control_address,
                streaming_addr=each.streaming_address,
                server_curve_key=each.curve_public_key,
            )
            for each in self._routers
        )


def _started(part: _Part | None) -> _Part:
    """`part`, which `start` sets."""
    if part is None:
        raise RuntimeError("the control plane is not started")
    return part
