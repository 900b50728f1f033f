"""Enrolls the node over HTTPS, keeps its token fresh, and explains every way this fails.

A refresh token is good once, but stays good until its successor has been used: an answer that is lost, or that cannot
be stored, is asked for again with the token at hand, and a new token is used only after it is on the disk.
"""

import asyncio
import json
import logging
import time
from dataclasses import dataclass, replace

import aiohttp

from xim_agent.link.credentials import CredentialsError, CredentialStore, NodeKeys, StoredEnrollment
from xim_protocol.enrollment import (
    FAILURES,
    Enrollment,
    EnrollmentBodyInvalid,
    EnrollmentCode,
    EnrollRequest,
    JoinKey,
    RefreshRequest,
    RouterAddress,
    refresh_message,
)

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10.0
ANSWER_BYTES = 1024 * 1024
"""An answer is a few kilobytes; what is longer comes from somebody else."""
ATTEMPTS = 3
ATTEMPT_DELAYS_S = (0.5, 1.0)
REFRESH_RETRY_S = 10.0
REFRESH_RETRY_CAP_S = 300.0
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"})
"""What OpenSSL calls an answer that is no TLS; the word depends on its version."""
_CODES = frozenset(code.value for code in EnrollmentCode)


_LASTING = frozenset(
    {
        "not_enrolled",
        EnrollmentCode.JOIN_KEY_MALFORMED,
        EnrollmentCode.JOIN_KEY_TRUNCATED,
        EnrollmentCode.JOIN_KEY_UNKNOWN,
        EnrollmentCode.JOIN_KEY_EXPIRED,
        EnrollmentCode.JOIN_KEY_REVOKED,
        EnrollmentCode.JOIN_KEY_USED_UP,
        EnrollmentCode.REFRESH_TOKEN_UNKNOWN,
        EnrollmentCode.REFRESH_TOKEN_REUSED,
        EnrollmentCode.SIGNATURE_INVALID,
        EnrollmentCode.AGENT_REVOKED,
        EnrollmentCode.CURVE_KEY_CONFLICT,
        EnrollmentCode.INSECURE_TRANSPORT,
    }
)
"""What only a new key or another setting mends. A suspended agent is not among them: it may be resumed."""


class EnrollmentFailed(Exception):
    """No enrollment. `code` is one of `EnrollmentCode`, or `http_<status>` and `answer_invalid` for the rest."""

    def __init__(self, code: str, message: str, remedy: str, *, status: int | None = None) -> None:
        super().__init__(f"{message} [{code}] {remedy}")
        self.code, self.message, self.remedy, self.status = code, message, remedy, status

    @classmethod
    def known(cls, code: EnrollmentCode, *, status: int | None = None, detail: str = "") -> "EnrollmentFailed":
        """A failure of the common table, with what was seen here."""
        failure = FAILURES[code]
        message = f"{failure.message} ({detail})" if detail else failure.message
        return cls(code, message, failure.remedy, status=status)

    @property
    def final(self) -> bool:
        """The router refuses this agent (401, 403); anything else may be different later."""
        return self.status in (401, 403)

    @property
    def lasting(self) -> bool:
        """Another start would end the same way."""
        return self.code in _LASTING

    @property
    def may_be_retried(self) -> bool:
        """Unreachable, overloaded or failing: the same request may succeed in a moment."""
        if self.status is None:
            return self.code == EnrollmentCode.ENROLL_UNREACHABLE
        return self.status == 429 or self.status >= 500


class NotEnrolled(EnrollmentFailed):
    """Nothing stored and no join key given."""

    def __init__(self) -> None:
        super().__init__(
            "not_enrolled",
            "This node is not enrolled and no join key was given.",
            "Make one (xerotier-router join-key create --project P --endpoint E) and pass it: "
            "--join-key KEY or XEROTIER_AGENT_JOIN_KEY",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """What a node says about itself when it enrolls."""

    hostname: str
    agent_version: str
    protocol_version: int
    name: str | None = None
    max_concurrent: int = 0
    """0 is automatic."""


class Enroller:
    """The node's enrollment: made once, refreshed for ever. Holds the newest one in `stored`."""

    def __init__(self, store: CredentialStore, facts: NodeFacts, *, allow_insecure: bool) -> None:
        self._store = store
        self._facts = facts
        self._allow_insecure = allow_insecure
        self._warned = False
        self._stored: StoredEnrollment | None = store.load()
        self.keys: NodeKeys = store.keys()
        """The node's identity; replaced when a revoked node enrolls again."""

    @property
    def stored(self) -> StoredEnrollment | None:
        """The newest enrollment, or None before the first."""
        return self._stored

    async def start(self, join_key: JoinKey | None) -> StoredEnrollment:
        """Be enrolled: refresh what is stored, or enroll with the join key.

        A refresh that fails by the network, by a 5xx or a 429 leaves the stored addresses in force. A node whose
        credentials the router refuses is enrolled again when a join key is given.

        Raises:
            EnrollmentFailed: the router refuses, or there is nothing to go on with.
            CredentialsError: the result cannot be stored.
        """
        stored = self._stored
        if stored is None:
            if join_key is None:
                raise NotEnrolled
            return await self.enroll(join_key)
        try:
            return await self.refresh()
        except EnrollmentFailed as failure:
            if not failure.final:
                log.warning("refresh failed, going on with stored addresses", extra=_facts_of(failure))
                return stored
            if join_key is None:
                raise
            log.warning("stored credentials are refused, enrolling again", extra=_facts_of(failure))
            return await self._enroll_after(failure, join_key)

    async def enroll(self, join_key: JoinKey) -> StoredEnrollment:
        """Exchange the join key for credentials and store them. A node enrolled before gets new keys.

        Raises:
            EnrollmentFailed: with the code, the cause and the remedy.
            CredentialsError: the result cannot be stored.
        """
        # The router refuses a revoked CURVE key for good. The new ones replace the old when the router has them.
        keys = self.keys if self._stored is None else NodeKeys.make()
        request = EnrollRequest(
            join_key=join_key,
            hostname=self._facts.hostname,
            agent_version=self._facts.agent_version,
            protocol_version=self._facts.protocol_version,
            curve_public_key=keys.curve_public,
            signing_public_key=keys.signing_public,
            name=self._facts.name,
            max_concurrent=self._facts.max_concurrent,
        )
        enrollment = await self._exchange(join_key.enroll_url, "/v1/enroll", request.to_json())
        if keys is not self.keys:
            self._store.save_keys(keys)
            self.keys = keys
        stored = self._keep(join_key.enroll_url, enrollment)
        facts = {"agent_id": enrollment.agent_id, "project": enrollment.project_id, "agent_name": enrollment.name}
        log.info("enrollment successful", extra=facts)
        return stored

    async def refresh(self) -> StoredEnrollment:
        """Exchange the refresh token for new credentials and store them before they are used.

        Raises:
            EnrollmentFailed: the stored credentials stay as they are.
            CredentialsError: the result cannot be stored; the old token is still good.
        """
        if self._stored is None:
            raise NotEnrolled
        enrolled = self._stored.enrollment
        public = self.keys.curve_public
        request = RefreshRequest(
            agent_id=enrolled.agent_id,
            refresh_token=enrolled.refresh_token,
            curve_public_key=public,
            signature=self.keys.sign(refresh_message(enrolled.agent_id, enrolled.refresh_token, public)),
        )
        renewed = await self._exchange(self._stored.enroll_url, "/v1/enroll/refresh", request.to_json())
        stored = self._keep(self._stored.enroll_url, renewed)
        log.info("credentials refreshed", extra={"agent_id": renewed.agent_id})
        return stored

    def remember_mesh(self, routers: tuple[RouterAddress, ...]) -> None:
        """Store the mesh as its routers tell it, so that the next start finds those that joined since the enrollment.

        A disk that does not take it costs nothing now: the old addresses are still there.
        """
        stored = self._stored
        if stored is None or frozenset(stored.enrollment.mesh) == frozenset(routers):
            return
        log.info("routers of the mesh", extra={"routers": [each.control_addr for each in routers]})
        self._stored = replace(stored, enrollment=replace(stored.enrollment, mesh=routers))
        try:
            self._store.save(self._stored)
        except CredentialsError as error:
            log.warning("the mesh cannot be stored", extra={"cause": error.message, "remedy": error.remedy})

    async def keep_fresh(self) -> None:
        """Refresh at two thirds of each token's life, for as long as the task lives.

        Credentials that cannot be stored now, on a full disk say, are asked for again: the old token stays good.

        Raises:
            EnrollmentFailed: the router refuses this agent for good.
        """
        delay_s = REFRESH_RETRY_S
        while True:
            await self._until_due()
            try:
                await self.refresh()
                delay_s = REFRESH_RETRY_S
                continue
            except EnrollmentFailed as failure:
                if failure.final:
                    raise
                log.warning("refresh failed", extra={**_facts_of(failure), "retry_s": delay_s})
            except CredentialsError as error:
                facts = {"cause": error.message, "remedy": error.remedy, "retry_s": delay_s}
                log.error("refreshed credentials cannot be stored", extra=facts)
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, REFRESH_RETRY_CAP_S)

    async def _until_due(self) -> None:
        """Wait in steps of a minute: the clock goes on while a machine is suspended, a timer does not."""
        # Nothing but the clock ends the wait.
        while self._stored is not None and (left_s := self._stored.refresh_at - time.time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left_s, 60.0))

    async def _enroll_after(self, refused: EnrollmentFailed, join_key: JoinKey) -> StoredEnrollment:
        try:
            return await self.enroll(join_key)
        except EnrollmentFailed as failure:
            # The key is often the used-up one of the first start: what the router said first is the cause.
            log.warning("enrolling again failed", extra=_facts_of(failure))
            raise refused from failure

    def _keep(self, enroll_url: str, enrollment: Enrollment) -> StoredEnrollment:
        stored = StoredEnrollment(enroll_url=enroll_url, received_at=time.time(), enrollment=enrollment)
        self._store.save(stored)
        self._stored = stored
        return stored

    async def _exchange(self, base_url: str, path: str, body: dict[str, object]) -> Enrollment:
        """Post until there is an answer, at most three times."""
        self._require_https(base_url)
        for delay_s in (*ATTEMPT_DELAYS_S, None):
            try:
                return await _post(base_url.rstrip("/") + path, body)
            except EnrollmentFailed as failure:
                if delay_s is None or not failure.may_be_retried:
                    raise
                log.info("enrollment is tried again", extra={**_facts_of(failure), "retry_s": delay_s})
                await asyncio.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    def _require_https(self, base_url: str) -> None:
        if base_url.startswith("https://"):
            return
        if not self._allow_insecure:
            raise EnrollmentFailed.known(EnrollmentCode.INSECURE_TRANSPORT)
        if not self._warned:
            log.warning("enrollment is not encrypted: the network sees the credentials", extra={"url": base_url})
            self._warned = True


async def _post(url: str, body: dict[str, object]) -> Enrollment:
    """One request. Redirects are not followed: the body is secret and meant for this address alone."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=True) as session,
            session.post(url, json=body, allow_redirects=False) as response,
        ):
            answer = await _read(response)
            if 200 <= response.status < 300:
                return _enrollment(answer)
            raise _refusal(response.status, answer, url)
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError) as error:
        if getattr(error.__cause__, "reason", None) in _NO_TLS:
            raise EnrollmentFailed.known(EnrollmentCode.TLS_NOT_SPOKEN, detail=url) from error
        raise EnrollmentFailed.known(EnrollmentCode.CERTIFICATE_INVALID, detail=str(error)) from error
    except TimeoutError as error:
        detail = f"{url}: no answer within {REQUEST_TIMEOUT_S:g} s"
        raise EnrollmentFailed.known(EnrollmentCode.ENROLL_UNREACHABLE, detail=detail) from error
    except (aiohttp.ClientError, OSError) as error:
        detail = f"{url}: {error or type(error).__name__}"
        raise EnrollmentFailed.known(EnrollmentCode.ENROLL_UNREACHABLE, detail=detail) from error


async def _read(response: aiohttp.ClientResponse) -> object:
    """The parsed body, or None when it is no JSON or too long."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > ANSWER_BYTES:
            return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _enrollment(answer: object) -> Enrollment:
    try:
        return Enrollment.from_json(answer)
    except EnrollmentBodyInvalid as error:
        raise EnrollmentFailed(
            "answer_invalid",
            f"The router's answer cannot be used: {error}.",
            "Check that the address in the join key is an XIM router's and that its version fits this agent's.",
        ) from error


def _refusal(status: int, answer: object, url: str) -> EnrollmentFailed:
    """The router's own code and remedy, or what the status alone tells."""
    error = answer.get("error") if isinstance(answer, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and code in _CODES:
        return EnrollmentFailed.known(EnrollmentCode(code), status=status)
    message = error.get("message") if isinstance(error, dict) else None
    said = f": {message[:300]}" if isinstance(message, str) else ""
    remedy = "Check that the address in the join key is an XIM router's HTTP address."
    if status == 429 or status >= 500:
        remedy = "Try again in a moment; if it lasts, look at the router's log."
    return EnrollmentFailed(f"http_{status}", f"{url} answered {status}{said}.", remedy, status=status)


def _facts_of(failure: EnrollmentFailed) -> dict[str, object]:
    return {"code": str(failure.code), "cause": failure.message, "remedy": failure.remedy}
