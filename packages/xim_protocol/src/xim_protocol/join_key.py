"""The join key: what lets one agent enroll, as text that an operator copies.

`xjk_`, the project's slug, `_`, the facts as base64url JSON, `.`, the secret, `.`, a checksum of all before it. The
checksum has a fixed length and stands last, so a key whose end is missing is told from a damaged one without
asking the router. Pure: whoever makes a key passes the entropy in. The secret appears in no `repr`.
"""

import base64
import hashlib
import hmac
import json
import re
from dataclasses import dataclass, field
from typing import Self

from xim_protocol.enrollment_failures import FAILURES, EnrollmentCode, EnrollmentError

JOIN_KEY_PREFIX = "xjk_"
JOIN_KEY_VERSION = 1
JOIN_KEY_ENTROPY_BYTES = 40
"""32 for the secret, 8 for the key's id."""

_SECRET_BYTES = 32
_CHECKSUM_CHARACTERS = 8
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?")
_KEY_CHARACTERS = re.compile(r"[A-Za-z0-9_.\-]*")
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{1,128}")
_REGION = re.compile(r"[A-Za-z0-9_.-]{1,24}")
_URL = re.compile(
    r"https?://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~%/-]*)?",
)


class JoinKeyError(EnrollmentError):
    """A text that is no whole join key; the text itself is not part of the message."""

    code: EnrollmentCode

    def __init__(self, detail: str) -> None:
        super().__init__(f"{FAILURES[self.code].message} ({detail})")
        self.detail = detail

    @property
    def remedy(self) -> str:
        """What the operator does about it."""
        return FAILURES[self.code].remedy


class JoinKeyMalformed(JoinKeyError):
    """Not a join key, or one whose checksum does not fit."""

    code = EnrollmentCode.JOIN_KEY_MALFORMED


class JoinKeyTruncated(JoinKeyError):
    """The beginning of a join key."""

    code = EnrollmentCode.JOIN_KEY_TRUNCATED


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinKey:
    """What lets one agent enroll: where, and the secret that the router checks."""

    project_slug: str
    key_id: str
    """Names the key in lists and logs; no secret."""
    enroll_url: str
    """The router's base URL, such as `https://router.example:8080`, without `/v1/enroll`."""
    secret: str = field(repr=False)
    region: str | None = None

    def __post_init__(self) -> None:
        if _SLUG.fullmatch(self.project_slug) is None:
            raise JoinKeyMalformed("the project slug is not one")
        if _URL.fullmatch(self.enroll_url) is None:
            raise JoinKeyMalformed("the enroll address is not an http or https URL")
        if _KEY_ID.fullmatch(self.key_id) is None:
            raise JoinKeyMalformed("the key id is not one")
        if _SECRET.fullmatch(self.secret) is None:
            raise JoinKeyMalformed("the secret is not one")
        if self.region is not None and _REGION.fullmatch(self.region) is None:
            raise JoinKeyMalformed("the region is not 1 to 24 letters, digits, '.', '_' or '-'")

    @classmethod
    def from_entropy(cls, entropy: bytes, *, project_slug: str, enroll_url: str, region: str | None = None) -> Self:
        """A new key from `JOIN_KEY_ENTROPY_BYTES` random bytes.

        Raises:
            ValueError: `entropy` has another length.
            JoinKeyMalformed: one of the facts cannot stand in a key.
        """
        if len(entropy) != JOIN_KEY_ENTROPY_BYTES:
            raise ValueError(f"a join key takes {JOIN_KEY_ENTROPY_BYTES} bytes of entropy, got {len(entropy)}")
        secret, key_id = entropy[:_SECRET_BYTES], entropy[_SECRET_BYTES:]
        return cls(
            project_slug=project_slug,
            key_id=key_id.hex(),
            enroll_url=enroll_url,
            secret=_to_base64url(secret),
            region=region,
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The key written as `text`; whitespace and quotes around it are allowed, as copying leaves them.

        Raises:
            JoinKeyTruncated: `text` is the beginning of a key.
            JoinKeyMalformed: `text` is none, or was damaged.
        """
        key = text.strip().strip("'\"").strip()
        if not key.startswith(JOIN_KEY_PREFIX):
            raise JoinKeyMalformed(f"it does not begin with {JOIN_KEY_PREFIX}")
        if _KEY_CHARACTERS.fullmatch(key) is None:
            raise JoinKeyMalformed("it holds characters that no join key has")
        head, dot, checksum = key.rpartition(".")
        parts = head.split(".")
        if len(parts) < 2 or len(checksum) < _CHECKSUM_CHARACTERS:
            raise JoinKeyTruncated(f"{len(key)} characters")
        if len(parts) > 2 or not hmac.compare_digest(checksum, _checksum(head + dot)):
            raise JoinKeyMalformed("its checksum does not fit")
        slug, _, facts = parts[0].removeprefix(JOIN_KEY_PREFIX).partition("_")
        return cls(project_slug=slug, secret=parts[1], **_join_key_facts(facts))

    def encode(self) -> str:
        """The key as the text that an operator copies. Secret."""
        facts = {"v": JOIN_KEY_VERSION, "id": self.key_id, "url": self.enroll_url, "role": "xim"}
        if self.region is not None:
            facts["region"] = self.region
        encoded = _to_base64url(json.dumps(facts, separators=(",", ":")).encode())
        head = f"{JOIN_KEY_PREFIX}{self.project_slug}_{encoded}.{self.secret}."
        return head + _checksum(head)

    def __repr__(self) -> str:
        return f"{JOIN_KEY_PREFIX}{self.key_id[:4]}…"

    __str__ = __repr__


def _join_key_facts(encoded: str) -> dict[str, str]:
    """The facts of a key whose checksum fits, as the arguments of `JoinKey`."""
    try:
        facts = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    except (ValueError, RecursionError) as error:
        raise JoinKeyMalformed("its facts cannot be read") from error
    if not isinstance(facts, dict) or facts.get("v") != JOIN_KEY_VERSION:
        raise JoinKeyMalformed(f"it is not of version {JOIN_KEY_VERSION}; the agent may be older than the router")
    if facts.get("role") != "xim":
        raise JoinKeyMalformed("it is for another kind of agent")
    found: dict[str, str] = {}
    for name, argument in (("id", "key_id"), ("url", "enroll_url"), ("region", "region")):
        if name == "region" and name not in facts:
            continue
        value = facts.get(name)
        if not isinstance(value, str):
            raise JoinKeyMalformed(f"its {name} is not text")
        found[argument] = value
    return found


def _checksum(head: str) -> str:
    """Eight hexadecimal digits: finds a slip of the hand; the secret is what cannot be guessed."""
    return hashlib.sha256(head.encode()).hexdigest()[:_CHECKSUM_CHARACTERS]


def _to_base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
