"""Enroll, refresh, rotate: how an agent gets its credentials and keeps them.

What is expected to happen, such as an expired key, is a value (`EnrollmentCode`), not an exception.

A refresh token is good once. Its predecessor stays good until it has itself been used, so an answer that was lost
on the way never locks a node out. A token used after that is held by somebody else too: the family is cut off.
"""

import hmac
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from xim_protocol.enrollment import (
    AssignedEndpoint,
    Enrollment,
    EnrollmentCode,
    EnrollRequest,
    LeaseTerms,
    RefreshRequest,
    RouterAddress,
)
from xim_protocol.ids import AgentId, EndpointId
from xim_router.control.keys import RouterKeys, keyed_hash
from xim_router.control.records import AgentRecord, EndpointRecord, JoinKeyRecord, RefreshTokenRecord
from xim_router.control.store import Store, Taken, Transaction
from xim_router.control.tokens import (
    TOKEN_ENTROPY_BYTES,
    XEM_TOKEN_LIFETIME_S,
    join_key_hash,
    mint_refresh_token,
    mint_xem_token,
)

log = logging.getLogger(__name__)

# What an agent asks for by default: a lease that outlives two missed renewals.
LEASE = LeaseTerms(duration_ms=30_000, renewal_interval_ms=10_000)
# An agent whose enrollment was answered into the void asks again within this time, with the same keys.
REPEAT_WINDOW_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Issued:
    """What a transaction decided, to be answered once it is committed."""

    agent: AgentRecord
    endpoint: EndpointRecord | None
    refresh_token: str


class Enroller:
    """Answers enrollments and refreshes.

    `published` is awaited after a change and before its answer, so that the data plane knows the agent when it dials.
    """

    def __init__(
        self,
        *,
        store: Store,
        keys: RouterKeys,
        mesh: Callable[[], tuple[RouterAddress, ...]],
        published: Callable[[], Awaitable[None]],
        clock: Callable[[], float],
        entropy: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._keys = keys
        self._mesh = mesh
        self._published = published
        self._clock = clock
        self._entropy = entropy

    async def enroll(self, request: EnrollRequest) -> Enrollment | EnrollmentCode:
        """Make the agent that `request` asks for, or say why not.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        now = self._clock()
        try:
            outcome = await self._recorded(request, now)
        except Taken:
            # Another enrollment with the same CURVE key was committed first, or the endpoint was deleted meanwhile:
            # what holds now says the second attempt.
            try:
                outcome = await self._recorded(request, now)
            except Taken:
                outcome = EnrollmentCode.CURVE_KEY_CONFLICT
        if isinstance(outcome, EnrollmentCode):
            log.warning("enrollment refused", extra={"code": outcome.value, "join_key": repr(request.join_key)})
            return outcome
        await self._published()
        log.info("agent enrolled", extra={"agent": outcome.agent.id, "agent_name": outcome.agent.name})
        return self._answer(outcome, now)

    async def refresh(self, request: RefreshRequest) -> Enrollment | EnrollmentCode:
        """New credentials for an agent that shows its current ones, or say why not.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        now = self._clock()
        try:
            async with self._store.record() as transaction:
                version = await transaction.version()
                outcome = await self._refresh(transaction, request, now)
                changed = await transaction.version() != version
        except Taken:
            return EnrollmentCode.CURVE_KEY_CONFLICT
        if changed:
            await self._published()
        if isinstance(outcome, EnrollmentCode):
            log.warning("refresh refused", extra={"code": outcome.value, "agent": request.agent_id})
            return outcome
        return self._answer(outcome, now)

    async def _recorded(self, request: EnrollRequest, now: float) -> _Issued | EnrollmentCode:
        async with self._store.record() as transaction:
            outcome = await self._enroll(transaction, request, now)
            if isinstance(outcome, _Issued):
                # Only then: whoever knocks with a bad key must not make every router read its catalog anew.
                await transaction.raise_version()
        return outcome

    async def _enroll(self, transaction: Transaction, request: EnrollRequest, now: float) -> _Issued | EnrollmentCode:
        key = await transaction.lock_join_key(request.join_key.key_id)
        shown = join_key_hash(self._keys.join_keys, request.join_key.key_id, request.join_key.secret)
        known = judge_join_key(key, shown, now)
        if key is None or known in (EnrollmentCode.JOIN_KEY_UNKNOWN, EnrollmentCode.JOIN_KEY_REVOKED):
            return known or EnrollmentCode.JOIN_KEY_UNKNOWN
        holder = await transaction.living_agent_with_curve_key(request.curve_public_key)
        if holder is not None:
            if await self._is_repeat(transaction, holder, key, request, now):
                return await self._issue(transaction, holder, None, now)
            return EnrollmentCode.CURVE_KEY_CONFLICT
        if known is not None:
            return known
        agent = await self._new_agent(transaction, request, key, now)
        await transaction.add(agent)
        await transaction.use_join_key(key.id)
        return await self._issue(transaction, agent, None, now)

    async def _is_repeat(
        self, transaction: Transaction, holder: AgentRecord, key: JoinKeyRecord, request: EnrollRequest, now: float
    ) -> bool:
        """Whether this is the enrollment that made `holder`, whose answer was lost: same key, same keypairs, recent."""
        same = holder.join_key_id == key.id and holder.signing_public_key == request.signing_public_key
        if not same or now - holder.enrolled_at > REPEAT_WINDOW_S:
            return False
        return all(token.used_at is None for token in await transaction.refresh_tokens(holder.id))

    async def _new_agent(
        self, transaction: Transaction, request: EnrollRequest, key: JoinKeyRecord, now: float
    ) -> AgentRecord:
        return AgentRecord(
            id=AgentId(str(uuid.UUID(bytes=self._entropy(16), version=4))),
            project_id=key.project_id,
            endpoint_id=choose_endpoint(key.endpoint_id, await transaction.endpoints(key.project_id)),
            join_key_id=key.id,
            name=request.name or request.hostname[:64],
            region=key.region,
            hostname=request.hostname,
            agent_version=request.agent_version,
            protocol_version=request.protocol_version,
            curve_public_key=request.curve_public_key,
            signing_public_key=request.signing_public_key,
            accelerator=json.dumps(request.accelerator),
            max_concurrent=request.max_concurrent,
            enrolled_at=now,
        )

    async def _refresh(self, transaction: Transaction, request: RefreshRequest, now: float) -> _Issued | EnrollmentCode:
        agent = await transaction.lock_agent(request.agent_id)
        if agent is None:
            return EnrollmentCode.REFRESH_TOKEN_UNKNOWN
        if not signed_by(agent.signing_public_key, request):
            return EnrollmentCode.SIGNATURE_INVALID
        if agent.revoked_at is not None:
            return EnrollmentCode.AGENT_REVOKED
        if agent.suspended_at is not None:
            return EnrollmentCode.AGENT_SUSPENDED
        shown = keyed_hash(self._keys.refresh_tokens, request.refresh_token)
        token = judge_refresh_token(await transaction.refresh_tokens(agent.id), shown)
        if isinstance(token, EnrollmentCode):
            if token is EnrollmentCode.REFRESH_TOKEN_REUSED:
                await transaction.update_agent(agent.id, {"revoked_at": now})
                await transaction.raise_version()
            return token
        await transaction.use_refresh_token(token, now)
        if request.curve_public_key != agent.curve_public_key:
            await transaction.update_agent(agent.id, {"curve_public_key": request.curve_public_key})
            await transaction.raise_version()
        return await self._issue(transaction, agent, token, now)

    async def _issue(
        self, transaction: Transaction, agent: AgentRecord, parent: RefreshTokenRecord | None, now: float
    ) -> _Issued:
        refresh_token = mint_refresh_token(self._entropy(TOKEN_ENTROPY_BYTES))
        record = RefreshTokenRecord(
            token_hash=keyed_hash(self._keys.refresh_tokens, refresh_token),
            agent_id=agent.id,
            parent_hash=None if parent is None else parent.token_hash,
            generation=1 if parent is None else parent.generation + 1,
            issued_at=now,
        )
        await transaction.add(record)
        endpoints = await transaction.endpoints(agent.project_id)
        endpoint = next((each for each in endpoints if each.id == agent.endpoint_id), None)
        return _Issued(agent=agent, endpoint=endpoint, refresh_token=refresh_token)

    def _answer(self, issued: _Issued, now: float) -> Enrollment:
        agent, endpoint = issued.agent, issued.endpoint
        assignment = None if endpoint is None else _assignment(endpoint)
        return Enrollment(
            agent_id=agent.id,
            project_id=agent.project_id,
            region=agent.region,
            name=agent.name,
            xem_token=mint_xem_token(self._keys.xem_tokens, agent.id, agent.project_id, now),
            token_expires_in_s=XEM_TOKEN_LIFETIME_S,
            refresh_token=issued.refresh_token,
            mesh=self._mesh(),
            lease=LEASE,
            assignment=assignment,
        )


def judge_join_key(key: JoinKeyRecord | None, shown_hash: bytes, now: float) -> EnrollmentCode | None:
    """Why `key` does not let one more agent in, or None when it does."""
    if key is None or not hmac.compare_digest(key.secret_hash, shown_hash):
        return EnrollmentCode.JOIN_KEY_UNKNOWN
    if key.revoked_at is not None:
        return EnrollmentCode.JOIN_KEY_REVOKED
    if now >= key.expires_at:
        return EnrollmentCode.JOIN_KEY_EXPIRED
    return EnrollmentCode.JOIN_KEY_USED_UP if key.uses >= key.max_uses else None


def judge_refresh_token(family: Iterable[RefreshTokenRecord], shown_hash: bytes) -> RefreshTokenRecord | EnrollmentCode:
    """The token that was shown when it may be used, else why not.

    Tokens form a tree: each use of one issues a child. An unused token is good unless a sibling was used: of two
    copies of the config directory, each got a child of the same token, and both come back. A used token is good
    as long as none of its children was used: its holder never saw the answer.
    """
    tokens = list(family)
    shown = next((each for each in tokens if hmac.compare_digest(each.token_hash, shown_hash)), None)
    if shown is None:
        return EnrollmentCode.REFRESH_TOKEN_UNKNOWN
    if shown.used_at is None:
        rivals = [each for each in tokens if each.parent_hash == shown.parent_hash]
    else:
        rivals = [each for each in tokens if each.parent_hash == shown.token_hash]
    if any(each.used_at is not None for each in rivals):
        return EnrollmentCode.REFRESH_TOKEN_REUSED
    return shown


def choose_endpoint(named: EndpointId | None, endpoints: Iterable[EndpointRecord]) -> EndpointId | None:
    """What a new agent serves: the endpoint its join key names, else the project's only one, else nothing yet."""
    known = [each.id for each in endpoints]
    return named or (known[0] if len(known) == 1 else None)


def signed_by(signing_public_key: bytes, request: RefreshRequest) -> bool:
    """Whether `request` carries the signature of this Ed25519 key."""
    try:
        Ed25519PublicKey.from_public_bytes(signing_public_key).verify(request.signature, request.signed_message())
    except (InvalidSignature, ValueError):
        return False
    return True


def _assignment(endpoint: EndpointRecord) -> AssignedEndpoint:
    return AssignedEndpoint(
        endpoint_id=endpoint.id,
        served_name=endpoint.slug,
        model=endpoint.model,
        task_mode=endpoint.task_mode.value,
        quantization=endpoint.quantization,
    )
