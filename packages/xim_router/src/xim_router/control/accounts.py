"""Projects, endpoints, API keys, join keys and agents: what an operator makes, lists and ends.

A secret is returned once, beside the record of its hash, by the call that made it.
"""

import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from xim_protocol.enrollment import JoinKey
from xim_protocol.ids import AgentId, EndpointId, ProjectId
from xim_protocol.join_key import JOIN_KEY_ENTROPY_BYTES, JoinKeyError
from xim_router.control.errors import AlreadyExists, InvalidValue, NotFound, NotRevoked
from xim_router.control.keys import RouterKeys, keyed_hash
from xim_router.control.records import (
    AgentRecord,
    ApiKeyRecord,
    EndpointRecord,
    JoinKeyRecord,
    ProjectRecord,
)
from xim_router.control.store import Store, Taken, Transaction
from xim_router.control.tokens import TOKEN_ENTROPY_BYTES, join_key_hash, mint_api_key
from xim_router.dispatch.catalog import Scope, TaskMode

_PROJECT_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?")
_ENDPOINT_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
# A URL is /{project}/{endpoint}/v1/...: no name may look like the version or like one of the router's own routes.
_RESERVED = frozenset({"v1", "healthz", "readyz", "metrics", "status"})


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentStanding:
    """An agent with the names that its ids stand for."""

    agent: AgentRecord
    project_slug: str
    endpoint_slug: str | None


class Accounts:
    """The operator's commands.

    Every method raises `DatabaseUnavailable` when the database does not answer; nothing was changed then.
    """

    def __init__(
        self, store: Store, keys: RouterKeys, *, clock: Callable[[], float], entropy: Callable[[int], bytes]
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._entropy = entropy

    async def create_project(self, slug: str, name: str | None = None) -> ProjectRecord:
        """A new project.

        Raises:
            InvalidValue, AlreadyExists
        """
        _check_slug("the project's slug", slug, _PROJECT_SLUG, "letters a to z, digits and '-', at most 48")
        _check_text("the project's name", name or slug, 128)
        project = ProjectRecord(
            id=ProjectId(f"proj_{self._entropy(8).hex()}"), slug=slug, name=name or slug, created_at=self._clock()
        )
        await self._add(project, "project", slug)
        return project

    async def projects(self) -> list[ProjectRecord]:
        """Every project, by slug."""
        async with self._store.read() as transaction:
            return await transaction.projects()

    async def create_endpoint(
        self, project_slug: str, slug: str, model: str, *, task_mode: TaskMode, quantization: str | None = None
    ) -> EndpointRecord:
        """A new endpoint of a project.

        Raises:
            InvalidValue, NotFound, AlreadyExists
        """
        _check_slug("the endpoint's slug", slug, _ENDPOINT_SLUG, "letters a to z, digits, '.', '_' and '-', at most 64")
        _check_text("the model's name", model, 255)
        _check_text("the quantization", quantization or "none", 64)
        project = await self._project(project_slug)
        endpoint = EndpointRecord(
            id=EndpointId(self._uuid()),
            project_id=project.id,
            slug=slug,
            model=model,
            task_mode=task_mode,
            quantization=quantization or None,  # vLLM ends at once when it is given an empty one
            created_at=self._clock(),
        )
        await self._add(endpoint, "endpoint", slug)
        return endpoint

    async def endpoints(self, project_slug: str | None = None) -> list[EndpointRecord]:
        """The endpoints of a project, or all.

        Raises:
            NotFound
        """
        project = None if project_slug is None else await self._project(project_slug)
        async with self._store.read() as transaction:
            return await transaction.endpoints(None if project is None else project.id)

    async def delete_endpoint(self, project_slug: str, slug: str) -> None:
        """Delete an endpoint; its agents become free, and keys that were for it alone are revoked.

        Raises:
            NotFound
        """
        project = await self._project(project_slug)
        async with self._store.change() as transaction:
            endpoint = await _endpoint(transaction, project, slug)
            await transaction.delete_endpoint(endpoint.id, self._clock())

    async def create_api_key(
        self,
        project_slug: str,
        name: str,
        *,
        scopes: Iterable[Scope] = (Scope.INFERENCE,),
        endpoint_slug: str | None = None,
        expires_in_s: float | None = None,
    ) -> tuple[str, ApiKeyRecord]:
        """A new API key, its secret first, which is shown once.

        Raises:
            InvalidValue, NotFound
        """
        _check_text("the key's name", name, 128)
        now = self._clock()
        project = await self._project(project_slug)
        secret = mint_api_key(project.slug, self._entropy(TOKEN_ENTROPY_BYTES))
        async with _meeting_the_end_of(endpoint_slug), self._store.change() as transaction:
            endpoint = None if endpoint_slug is None else await _endpoint(transaction, project, endpoint_slug)
            record = ApiKeyRecord(
                id=self._uuid(),
                project_id=project.id,
                name=name,
                key_hash=keyed_hash(self._keys.api_keys, secret),
                scopes=frozenset(scopes),
                endpoint_id=None if endpoint is None else endpoint.id,
                created_at=now,
                expires_at=None if expires_in_s is None else now + expires_in_s,
            )
            await transaction.add(record)
        return secret, record

    async def api_keys(self, project_slug: str | None = None) -> list[ApiKeyRecord]:
        """The API keys of a project, or all; with the revoked ones.

        Raises:
            NotFound
        """
        project = None if project_slug is None else await self._project(project_slug)
        async with self._store.read() as transaction:
            return await transaction.api_keys(None if project is None else project.id)

    async def revoke_api_key(self, key_id: str) -> None:
        """End an API key, for good.

        Raises:
            NotFound
        """
        async with self._store.change() as transaction:
            if not await transaction.revoke_key("api_keys", key_id, self._clock()):
                raise NotFound("API key", key_id)

    async def create_join_key(
        self,
        project_slug: str,
        *,
        enroll_url: str,
        endpoint_slug: str | None = None,
        name: str | None = None,
        region: str | None = None,
        expires_in_s: float = 86_400.0,
        max_uses: int = 1,
    ) -> tuple[JoinKey, JoinKeyRecord]:
        """A new join key, which is shown once.

        Raises:
            InvalidValue, NotFound
        """
        _check_text("the key's name", name or "join key", 128)
        if not 1 <= max_uses <= 10_000:
            raise InvalidValue("max-uses", "must be from 1 to 10000")
        now = self._clock()
        project = await self._project(project_slug)
        key = self._mint_join_key(project, enroll_url, region)
        async with _meeting_the_end_of(endpoint_slug), self._store.change() as transaction:
            endpoint = None if endpoint_slug is None else await _endpoint(transaction, project, endpoint_slug)
            record = JoinKeyRecord(
                id=key.key_id,
                project_id=project.id,
                endpoint_id=None if endpoint is None else endpoint.id,
                name=name or "join key",
                secret_hash=join_key_hash(self._keys.join_keys, key.key_id, key.secret),
                region=region,
                max_uses=max_uses,
                uses=0,
                created_at=now,
                expires_at=now + expires_in_s,
            )
            await transaction.add(record)
        return key, record

    async def join_keys(self, project_slug: str | None = None) -> list[JoinKeyRecord]:
        """The join keys of a project, or all; with those that are expired, used up or revoked.

        Raises:
            NotFound
        """
        project = None if project_slug is None else await self._project(project_slug)
        async with self._store.read() as transaction:
            return await transaction.join_keys(None if project is None else project.id)

    async def revoke_join_key(self, key_id: str) -> None:
        """End a join key; agents that enrolled with it stay.

        Raises:
            NotFound
        """
        async with self._store.change() as transaction:
            if not await transaction.revoke_key("join_keys", key_id, self._clock()):
                raise NotFound("join key", key_id)

    async def agents(self, project_slug: str | None = None) -> list[AgentStanding]:
        """The agents of a project, or all, oldest first; with the revoked ones.

        Raises:
            NotFound
        """
        project = None if project_slug is None else await self._project(project_slug)
        async with self._store.read() as transaction:
            projects = {each.id: each.slug for each in await transaction.projects()}
            endpoints = {each.id: each.slug for each in await transaction.endpoints()}
            found = await transaction.agents(None if project is None else project.id)
        return [
            AgentStanding(
                agent=each,
                project_slug=projects[each.project_id],
                endpoint_slug=None if each.endpoint_id is None else endpoints[each.endpoint_id],
            )
            for each in found
        ]

    async def revoke_agent(self, agent: AgentId) -> None:
        """End an agent's credentials, for good: it must enroll again.

        Raises:
            NotFound
        """
        await self._change_agent(agent, "revoked_at", self._clock())

    async def delete_agent(self, agent: AgentId) -> None:
        """Forget a revoked agent. Its node is unknown from then on, which is refused as well.

        Raises:
            NotFound, NotRevoked
        """
        async with self._store.change() as transaction:
            record = await _agent(transaction, agent)
            if record.revoked_at is None:
                raise NotRevoked(agent)
            await transaction.delete_agent(agent)

    async def suspend_agent(self, agent: AgentId) -> None:
        """Give the agent no more requests until it is resumed.

        Raises:
            NotFound
        """
        await self._change_agent(agent, "suspended_at", self._clock())

    async def resume_agent(self, agent: AgentId) -> None:
        """End a suspension.

        Raises:
            NotFound
        """
        await self._change_agent(agent, "suspended_at", None)

    async def assign_agent(self, agent: AgentId, endpoint_slug: str | None) -> None:
        """Let the agent serve an endpoint of its project, or none.

        Raises:
            NotFound
        """
        async with _meeting_the_end_of(endpoint_slug), self._store.change() as transaction:
            record = await _agent(transaction, agent)
            known = {each.slug: each.id for each in await transaction.endpoints(record.project_id)}
            if endpoint_slug is not None and endpoint_slug not in known:
                raise NotFound("endpoint", endpoint_slug)
            endpoint = None if endpoint_slug is None else known[endpoint_slug]
            await transaction.update_agent(agent, {"endpoint_id": endpoint})

    async def _change_agent(self, agent: AgentId, column: str, value: float | None) -> None:
        async with self._store.change() as transaction:
            record = await _agent(transaction, agent)
            # What ended or was suspended first keeps its time.
            if value is None or getattr(record, column) is None:
                await transaction.update_agent(agent, {column: value})

    async def _add(self, record: ProjectRecord | EndpointRecord, kind: str, name: str) -> None:
        try:
            async with self._store.change() as transaction:
                await transaction.add(record)
        except Taken as error:
            raise AlreadyExists(kind, name) from error

    async def _project(self, slug: str) -> ProjectRecord:
        async with self._store.read() as transaction:
            project = await transaction.project_by_slug(slug)
        if project is None:
            raise NotFound("project", slug)
        return project

    def _mint_join_key(self, project: ProjectRecord, enroll_url: str, region: str | None) -> JoinKey:
        entropy = self._entropy(JOIN_KEY_ENTROPY_BYTES)
        try:
            return JoinKey.from_entropy(entropy, project_slug=project.slug, enroll_url=enroll_url, region=region)
        except JoinKeyError as error:
            raise InvalidValue("the join key", f"cannot be made: {error.detail}") from error

    def _uuid(self) -> str:
        return str(uuid.UUID(bytes=self._entropy(16), version=4))


@asynccontextmanager
async def _meeting_the_end_of(endpoint_slug: str | None) -> AsyncIterator[None]:
    """For a change that refers to the endpoint, which another process may delete between its look-up and the change."""
    try:
        yield
    except Taken:
        if endpoint_slug is None:
            raise
        raise NotFound("endpoint", endpoint_slug) from None


async def _endpoint(transaction: Transaction, project: ProjectRecord, slug: str) -> EndpointRecord:
    endpoint = await transaction.endpoint_by_slug(project.id, slug)
    if endpoint is None:
        raise NotFound("endpoint", slug)
    return endpoint


async def _agent(transaction: Transaction, agent: AgentId) -> AgentRecord:
    record = await transaction.lock_agent(agent)
    if record is None:
        raise NotFound("agent", agent)
    return record


def _check_slug(name: str, value: str, form: re.Pattern[str], rule: str) -> None:
    if form.fullmatch(value) is None or value in _RESERVED:
        raise InvalidValue(name, f"must be {rule}, beginning and ending with a letter or digit, and not a route's name")


def _check_text(name: str, value: str, most: int) -> None:
    if not 1 <= len(value) <= most or not value.isprintable():
        raise InvalidValue(name, f"must be 1 to {most} printable characters")
