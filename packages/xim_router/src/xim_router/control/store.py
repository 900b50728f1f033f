"""Every query of the control plane: records in, records out.

A `Transaction` reads and writes inside one database transaction. `Store.change` raises the catalog's version with
it, in the same transaction, so that every router learns of the change; `Store.record` is for what the data plane
need not know.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Literal

from sqlalchemy import ColumnElement, Delete, Row, Select, Table, Update, bindparam, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from xim_protocol.ids import AgentId, EndpointId, ProjectId
from xim_router.control import tables
from xim_router.control.database import Database
from xim_router.control.database_clock import unix_now
from xim_router.control.records import (
    AgentRecord,
    ApiKeyRecord,
    EndpointRecord,
    JoinKeyRecord,
    MemberRecord,
    ProjectRecord,
    RefreshTokenRecord,
    Snapshot,
)
from xim_router.dispatch.catalog import Scope, TaskMode
from xim_router.dispatch.reports import AgentSeen

# Tokens that many generations back are forgotten: two weeks of refreshes. They are refused then as unknown.
_GENERATIONS_KEPT = 512
# So much later than another router's may a report of an agent be written.
_LATE_S = 60.0

# What a router asks and writes all the time is made once. A statement's parameters refer to themselves: made anew each
# time, they would wait for the garbage collector, up to 150 KB of them.
_VERSION = select(tables.installation.c.catalog_version)
_RAISE_VERSION = update(tables.installation).values(catalog_version=tables.installation.c.catalog_version + 1)
# Every router writes of the same agents: they lock the rows in one order, or two could wait for each other.
_LOCK_AGENTS = (
    select(tables.agents.c.id)
    .where(tables.agents.c.id.in_(bindparam("agents", expanding=True)))
    .order_by(tables.agents.c.id)
    .with_for_update(key_share=True)
)
_SEEN: ColumnElement[float] = bindparam("seen")
_LAST = tables.agents.c.last_seen_at
_AGENT_SEEN = (
    update(tables.agents)
    .where(
        tables.agents.c.id == bindparam("agent"),
        # What is later by more than reports are late was written by a clock that was wrong, and would stay for long.
        or_(_LAST.is_(None), _LAST <= _SEEN, _LAST > _SEEN + _LATE_S),
    )
    .values(last_seen_at=_SEEN, state=bindparam("state_word"))
)
_EXTEND_MEMBER = (
    update(tables.members)
    .where(tables.members.c.id == bindparam("member"))
    .values(seen_at=unix_now(), expires_at=unix_now() + bindparam("lease_s", type_=tables.members.c.expires_at.type))
)
# One that renews its lease at this moment is not over, and may be about to wait for us in its turn.
_DROP_EXPIRED_MEMBERS = delete(tables.members).where(
    tables.members.c.id.in_(
        select(tables.members.c.id).where(tables.members.c.expires_at <= unix_now()).with_for_update(skip_locked=True)
    )
)


class Taken(Exception):
    """A row breaks a constraint: its name, slug or key is taken, or what it refers to is gone by now."""


class Transaction:
    """The queries, inside one transaction."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def version(self) -> int:
        """The catalog's version."""
        return int((await self._connection.execute(_VERSION)).scalar_one())

    async def raise_version(self) -> None:
        """Tell every router that the catalog changed."""
        await self._connection.execute(_RAISE_VERSION)

    async def canary(self) -> bytes | None:
        """What proves the secret key, or None when no router has written it yet."""
        query = select(tables.installation.c.canary).with_for_update()
        stored: bytes | None = (await self._connection.execute(query)).scalar_one()
        return stored

    async def set_canary(self, canary: bytes) -> None:
        """Bind the database to a secret key."""
        await self._connection.execute(update(tables.installation).values(canary=canary))

    async def snapshot(self) -> Snapshot:
        """Everything the catalog is built from."""
        keys = select(tables.api_keys).where(tables.api_keys.c.revoked_at.is_(None))
        # By age, so that what an ambiguous model name means does not change with a new endpoint.
        endpoints = select(tables.endpoints).order_by(tables.endpoints.c.created_at, tables.endpoints.c.id)
        return Snapshot(
            version=await self.version(),
            endpoints=tuple([_endpoint(row) for row in await self._rows(endpoints)]),
            api_keys=tuple([_api_key(row) for row in await self._rows(keys)]),
            agents=tuple([_agent(row) for row in await self._rows(select(tables.agents))]),
            members=tuple(await self.members()),
        )

    async def add(
        self, record: ProjectRecord | EndpointRecord | ApiKeyRecord | JoinKeyRecord | AgentRecord | RefreshTokenRecord
    ) -> None:
        """Insert one row.

        Raises:
            Taken: its name, slug or key is taken, or what it refers to is gone by now.
        """
        values = asdict(record)
        if isinstance(record, ApiKeyRecord):
            values["scopes"] = " ".join(sorted(record.scopes))
        try:
            await self._connection.execute(insert(_TABLES[type(record)]).values(values))
        except IntegrityError as error:
            raise Taken from error

    async def projects(self) -> list[ProjectRecord]:
        """Every project, by slug."""
        return [_project(row) for row in await self._rows(select(tables.projects).order_by(tables.projects.c.slug))]

    async def project_by_slug(self, slug: str) -> ProjectRecord | None:
        """The project that is called `slug`."""
        row = await self._row(select(tables.projects).where(tables.projects.c.slug == slug))
        return None if row is None else _project(row)

    async def endpoints(self, project: ProjectId | None = None) -> list[EndpointRecord]:
        """The endpoints of `project`, or all, by slug."""
        query = _of_project(tables.endpoints, project).order_by(tables.endpoints.c.slug)
        return [_endpoint(row) for row in await self._rows(query)]

    async def endpoint_by_slug(self, project: ProjectId, slug: str) -> EndpointRecord | None:
        """The endpoint that `project` calls `slug`."""
        table = tables.endpoints
        row = await self._row(select(table).where(table.c.project_id == project, table.c.slug == slug))
        return None if row is None else _endpoint(row)

    async def delete_endpoint(self, endpoint: EndpointId, now: float) -> None:
        """Delete an endpoint; its agents become free, and keys that were for it alone are revoked.

        A key restricted to an endpoint must not come to stand for the whole project when the endpoint goes.
        """
        # In the order of an enrollment, which takes its join key first. Once the endpoint is locked nothing more can
        # come to refer to it, and what did is seen below.
        for table, column in (
            (tables.join_keys, "endpoint_id"),
            (tables.endpoints, "id"),
            (tables.agents, "endpoint_id"),
        ):
            rows = select(table.c.id).where(table.c[column] == endpoint).order_by(table.c.id)
            await self._connection.execute(rows.with_for_update())
        for table in (tables.api_keys, tables.join_keys):
            bound = update(table).where(table.c.endpoint_id == endpoint)
            await self._connection.execute(bound.where(table.c.revoked_at.is_(None)).values(revoked_at=now))
            await self._connection.execute(bound.values(endpoint_id=None))
        agents = tables.agents
        await self._connection.execute(update(agents).where(agents.c.endpoint_id == endpoint).values(endpoint_id=None))
        await self._connection.execute(delete(tables.endpoints).where(tables.endpoints.c.id == endpoint))

    async def api_keys(self, project: ProjectId | None = None) -> list[ApiKeyRecord]:
        """The API keys of `project`, or all, oldest first."""
        query = _of_project(tables.api_keys, project).order_by(tables.api_keys.c.created_at)
        return [_api_key(row) for row in await self._rows(query)]

    async def join_keys(self, project: ProjectId | None = None) -> list[JoinKeyRecord]:
        """The join keys of `project`, or all, oldest first."""
        query = _of_project(tables.join_keys, project).order_by(tables.join_keys.c.created_at)
        return [JoinKeyRecord(**row._mapping) for row in await self._rows(query)]

    async def lock_join_key(self, key_id: str) -> JoinKeyRecord | None:
        """The join key `key_id`; nobody else changes it before this transaction ends."""
        row = await self._row(select(tables.join_keys).where(tables.join_keys.c.id == key_id).with_for_update())
        return None if row is None else JoinKeyRecord(**row._mapping)

    async def use_join_key(self, key_id: str) -> None:
        """Count one use of a join key that this transaction has locked."""
        table = tables.join_keys
        await self._connection.execute(update(table).where(table.c.id == key_id).values(uses=table.c.uses + 1))

    async def revoke_key(self, kind: Literal["api_keys", "join_keys"], key_id: str, now: float) -> bool:
        """Revoke an API key or a join key, for good; False when there is none. Revoking again changes nothing."""
        table = getattr(tables, kind)
        found = await self._row(select(table.c.id).where(table.c.id == key_id))
        await self._connection.execute(
            update(table).where(table.c.id == key_id, table.c.revoked_at.is_(None)).values(revoked_at=now)
        )
        return found is not None

    async def agents(self, project: ProjectId | None = None) -> list[AgentRecord]:
        """The agents of `project`, or all, oldest first; with the revoked ones."""
        query = _of_project(tables.agents, project).order_by(tables.agents.c.enrolled_at)
        return [_agent(row) for row in await self._rows(query)]

    async def lock_agent(self, agent: AgentId) -> AgentRecord | None:
        """The agent; nobody else changes it before this transaction ends."""
        row = await self._row(select(tables.agents).where(tables.agents.c.id == agent).with_for_update())
        return None if row is None else _agent(row)

    async def living_agent_with_curve_key(self, curve_public_key: bytes) -> AgentRecord | None:
        """The agent that has this CURVE key and is not revoked."""
        table = tables.agents
        query = select(table).where(table.c.curve_public_key == curve_public_key, table.c.revoked_at.is_(None))
        row = await self._row(query)
        return None if row is None else _agent(row)

    async def update_agent(self, agent: AgentId, values: Mapping[str, object]) -> None:
        """Change columns of one agent.

        Raises:
            Taken: the new CURVE key is another agent's, or the new endpoint is gone by now.
        """
        try:
            await self._connection.execute(update(tables.agents).where(tables.agents.c.id == agent).values(**values))
        except IntegrityError as error:
            raise Taken from error

    async def delete_agent(self, agent: AgentId) -> None:
        """Forget an agent and its family of refresh tokens."""
        tokens = tables.refresh_tokens
        await self._connection.execute(delete(tokens).where(tokens.c.agent_id == agent))
        await self._connection.execute(delete(tables.agents).where(tables.agents.c.id == agent))

    async def agents_seen(self, reports: Iterable[AgentSeen]) -> None:
        """Write when agents were last seen, and in which state; one that has left has none.

        That an agent has left says the router that lost it. The latest report counts, in whichever order they come.
        """
        rows = [{"agent": each.agent, "seen": each.seen_at, "state_word": each.state} for each in reports]
        if rows:
            await self._connection.execute(_LOCK_AGENTS, {"agents": [row["agent"] for row in rows]})
            await self._connection.execute(_AGENT_SEEN, rows)

    async def refresh_tokens(self, agent: AgentId) -> list[RefreshTokenRecord]:
        """The agent's whole family of refresh tokens."""
        query = select(tables.refresh_tokens).where(tables.refresh_tokens.c.agent_id == agent)
        return [RefreshTokenRecord(**row._mapping) for row in await self._rows(query)]

    async def use_refresh_token(self, token: RefreshTokenRecord, now: float) -> None:
        """Mark `token` used, and forget what is very old."""
        table = tables.refresh_tokens
        await self._connection.execute(
            update(table).where(table.c.token_hash == token.token_hash, table.c.used_at.is_(None)).values(used_at=now)
        )
        old = delete(table).where(table.c.agent_id == token.agent_id)
        await self._connection.execute(old.where(table.c.generation < token.generation - _GENERATIONS_KEPT))

    async def members(self) -> list[MemberRecord]:
        """The routers whose lease runs, oldest first."""
        table = tables.members
        query = select(table).where(table.c.expires_at > unix_now()).order_by(table.c.started_at, table.c.id)
        return [_member(row) for row in await self._rows(query)]

    async def member_in_place_of(self, curve_public_key: bytes, control_address: str) -> MemberRecord | None:
        """A router that is registered with this CURVE key or at this address, whether its lease runs or not."""
        query = select(tables.members).where(_same_place(curve_public_key, control_address))
        row = (await self._connection.execute(query.order_by(tables.members.c.id))).first()
        return None if row is None else _member(row)

    async def replace_member(self, member: MemberRecord, lease_s: float) -> None:
        """Register `member` for `lease_s`, in the place of any with its key or its address.

        Raises:
            Taken: another process registers the same key at this moment.
        """
        table = tables.members
        same = _same_place(member.curve_public_key, member.control_address)
        await self._connection.execute(delete(table).where(same))
        values = {**asdict(member), "seen_at": unix_now(), "expires_at": unix_now() + lease_s}
        try:
            await self._connection.execute(insert(table).values(values))
        except IntegrityError as error:
            raise Taken from error

    async def extend_member(self, member_id: str, lease_s: float) -> bool:
        """Renew the lease of a registered router; False when there is none."""
        return await self._changed(_EXTEND_MEMBER, {"member": member_id, "lease_s": lease_s})

    async def drop_member(self, member_id: str) -> bool:
        """Take a router out; False when there is none."""
        return await self._changed(delete(tables.members).where(tables.members.c.id == member_id))

    async def drop_expired_members(self) -> bool:
        """Take out every router whose lease is over; False when there is none."""
        return await self._changed(_DROP_EXPIRED_MEMBERS)

    async def _changed(self, statement: Update | Delete, values: Mapping[str, object] | None = None) -> bool:
        return (await self._connection.execute(statement, values)).rowcount > 0

    async def _rows(self, query: Select[Any]) -> Iterable[Row[Any]]:
        rows: Iterable[Row[Any]] = (await self._connection.execute(query)).all()
        return rows

    async def _row(self, query: Select[Any]) -> Row[Any] | None:
        row: Row[Any] | None = (await self._connection.execute(query)).one_or_none()
        return row


class Store:
    """Transactions over one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._notifications = database.notifications

    def change_mark(self) -> object | None:
        """As `Database.change_mark`."""
        return self._database.change_mark()

    @property
    def hears_of_changes(self) -> bool:
        """The database tells of every change at once; where it does not, only asking helps."""
        return self._notifications is not None and self._notifications.arrive

    async def change_told(self, within_s: float) -> bool:
        """Return when the database tells of a change, or is lost, or else after `within_s` seconds with False."""
        if self._notifications is None:
            await asyncio.sleep(within_s)
            return False
        return await self._notifications.wait(within_s)

    def not_told(self) -> None:
        """A change was found that the database did not tell of."""
        if self._notifications is not None:
            self._notifications.doubt()

    async def version(self) -> int:
        """The catalog's version, as routers poll it; one caller at a time.

        Raises:
            DatabaseUnavailable: it does not answer.
        """
        return int(await self._database.value(_VERSION))

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        """Read one state of the database.

        Raises:
            DatabaseUnavailable: it does not answer.
        """
        async with self._database.read() as connection:
            yield Transaction(connection)

    @asynccontextmanager
    async def change(self) -> AsyncIterator[Transaction]:
        """Change what the data plane knows; committed, with a new catalog version, unless an exception leaves.

        Raises:
            DatabaseUnavailable: it does not answer; nothing was changed.
        """
        async with self._database.write() as connection:
            transaction = Transaction(connection)
            yield transaction
            # Last: on PostgreSQL this row is locked from here to the commit, for every other change too.
            await transaction.raise_version()

    @asynccontextmanager
    async def record(self) -> AsyncIterator[Transaction]:
        """Change what the data plane need not know.

        Raises:
            DatabaseUnavailable: it does not answer; nothing was changed.
        """
        async with self._database.write() as connection:
            yield Transaction(connection)


_TABLES: dict[type, Table] = {
    ProjectRecord: tables.projects,
    EndpointRecord: tables.endpoints,
    ApiKeyRecord: tables.api_keys,
    JoinKeyRecord: tables.join_keys,
    AgentRecord: tables.agents,
    RefreshTokenRecord: tables.refresh_tokens,
}


def _same_place(curve_public_key: bytes, control_address: str) -> ColumnElement[bool]:
    table = tables.members
    return or_(table.c.curve_public_key == curve_public_key, table.c.control_address == control_address)


def _of_project(table: Table, project: ProjectId | None) -> Select[Any]:
    query = select(table)
    return query if project is None else query.where(table.c.project_id == project)


def _project(row: Row[Any]) -> ProjectRecord:
    return ProjectRecord(**row._mapping)


def _endpoint(row: Row[Any]) -> EndpointRecord:
    return EndpointRecord(**{**row._mapping, "task_mode": TaskMode(row.task_mode)})


def _api_key(row: Row[Any]) -> ApiKeyRecord:
    scopes = frozenset(Scope(word) for word in row.scopes.split())
    return ApiKeyRecord(**{**row._mapping, "scopes": scopes})


def _member(row: Row[Any]) -> MemberRecord:
    return MemberRecord(
        id=row.id,
        control_address=row.control_address,
        streaming_address=row.streaming_address,
        curve_public_key=row.curve_public_key,
        started_at=row.started_at,
    )


def _agent(row: Row[Any]) -> AgentRecord:
    return AgentRecord(**row._mapping)
