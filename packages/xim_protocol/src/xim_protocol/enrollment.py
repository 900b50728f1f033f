"""Bodies of `/v1/enroll` and `/v1/enroll/refresh`, read from JSON with every type and size checked.

An agent enrolls once with a join key and from then on exchanges its refresh token. Both calls are answered by
an `Enrollment`. CURVE keys are 32 raw bytes inside and hexadecimal in JSON. Fields that this version does not know
are ignored, so that old and new ends talk. Everything here is pure. No secret appears in a `repr`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from xim_protocol.enrollment_failures import FAILURES, EnrollmentCode, EnrollmentError, Failure
from xim_protocol.ids import AgentId, EndpointId, ProjectId
from xim_protocol.join_key import JoinKey, JoinKeyError, JoinKeyMalformed, JoinKeyTruncated

# What enrollment needs comes from this one module, wherever it is defined.
__all__ = [
    "CURVE_KEY_BYTES",
    "ED25519_KEY_BYTES",
    "ED25519_SIGNATURE_BYTES",
    "FAILURES",
    "AssignedEndpoint",
    "EnrollRequest",
    "Enrollment",
    "EnrollmentBodyInvalid",
    "EnrollmentCode",
    "EnrollmentError",
    "Failure",
    "JoinKey",
    "JoinKeyError",
    "JoinKeyMalformed",
    "JoinKeyTruncated",
    "LeaseTerms",
    "RefreshRequest",
    "RouterAddress",
    "refresh_message",
]

CURVE_KEY_BYTES = 32
ED25519_KEY_BYTES = 32
ED25519_SIGNATURE_BYTES = 64

_ACCELERATOR_BYTES = 16 * 1024
_TOKEN_CHARACTERS = 4096
_ADDRESS = re.compile(r"tcp://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")


class EnrollmentBodyInvalid(EnrollmentError):
    """A body has a field of the wrong type, size or form."""

    def __init__(self, field_name: str, rule: str) -> None:
        super().__init__(f"{field_name} {rule}")
        self.field, self.rule = field_name, rule


@dataclass(frozen=True, kw_only=True, slots=True)
class EnrollRequest:
    """Body of `POST /v1/enroll`."""

    join_key: JoinKey
    hostname: str
    agent_version: str
    protocol_version: int
    curve_public_key: bytes
    """32 raw bytes; the private key never leaves the node."""
    signing_public_key: bytes
    """The node's Ed25519 public key, 32 raw bytes, which its refreshes are checked against."""
    name: str | None = None
    """What the operator calls the agent; the router takes the host name when it is None."""
    accelerator: Mapping[str, object] = field(default_factory=dict)
    """Facts of the node's accelerator and CPU, at most 16 KiB as JSON; shown, never trusted."""
    max_concurrent: int = 0
    """Most streams at once; 0 is automatic."""

    def to_json(self) -> dict[str, object]:
        """The body, with the join key in it. Secret."""
        return {
            "join_key": self.join_key.encode(),
            "name": self.name,
            "hostname": self.hostname,
            "agent_version": self.agent_version,
            "protocol_version": self.protocol_version,
            "curve_public_key": self.curve_public_key.hex(),
            "signing_public_key": self.signing_public_key.hex(),
            "accelerator": dict(self.accelerator),
            "max_concurrent": self.max_concurrent,
        }

    @classmethod
    def from_json(cls, body: object) -> Self:
        """Read a parsed JSON body.

        Raises:
            EnrollmentBodyInvalid: a field breaks its rule.
            JoinKeyError: the join key is no whole one.
        """
        fields = _Fields(body)
        return cls(
            join_key=JoinKey.parse(fields.text("join_key", _TOKEN_CHARACTERS)),
            name=fields.optional_text("name", 64),
            hostname=fields.text("hostname", 255),
            agent_version=fields.text("agent_version", 64),
            protocol_version=fields.integer("protocol_version", 1, 65_535),
            curve_public_key=fields.hexadecimal("curve_public_key", CURVE_KEY_BYTES),
            signing_public_key=fields.hexadecimal("signing_public_key", ED25519_KEY_BYTES),
            accelerator=fields.facts("accelerator"),
            max_concurrent=fields.integer("max_concurrent", 0, 65_535),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshRequest:
    """Body of `POST /v1/enroll/refresh`: a new token for the old one.

    `curve_public_key` is the key that the agent uses from now on; it may differ from the enrolled one, since the
    signature shows that the agent itself asks for it.
    """

    agent_id: AgentId
    refresh_token: str = field(repr=False)
    curve_public_key: bytes
    signature: bytes = field(repr=False)
    """Ed25519, over `refresh_message` of the other fields, by the enrolled signing key."""

    def to_json(self) -> dict[str, object]:
        """The body, with the refresh token in it. Secret."""
        return {
            "agent_id": self.agent_id,
            "refresh_token": self.refresh_token,
            "curve_public_key": self.curve_public_key.hex(),
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_json(cls, body: object) -> Self:
        """Read a parsed JSON body.

        Raises:
            EnrollmentBodyInvalid: a field breaks its rule.
        """
        fields = _Fields(body)
        return cls(
            agent_id=AgentId(fields.text("agent_id", 64)),
            refresh_token=fields.text("refresh_token", 256),
            curve_public_key=fields.hexadecimal("curve_public_key", CURVE_KEY_BYTES),
            signature=fields.hexadecimal("signature", ED25519_SIGNATURE_BYTES),
        )

    def signed_message(self) -> bytes:
        """The bytes that `signature` is over."""
        return refresh_message(self.agent_id, self.refresh_token, self.curve_public_key)


def refresh_message(agent_id: AgentId, refresh_token: str, curve_public_key: bytes) -> bytes:
    """The bytes an agent signs to refresh.

    Four lines joined by a newline, as UTF-8: `xim-enroll-refresh-v1`, the agent's id, the refresh token, the CURVE
    public key in lower-case hexadecimal. No time in it: the token, which is good once, makes it fresh.
    """
    return "\n".join(("xim-enroll-refresh-v1", agent_id, refresh_token, curve_public_key.hex())).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterAddress:
    """Where one router of the mesh takes agents, and the CURVE key it proves itself by."""

    control_addr: str
    """`tcp://host:port`."""
    streaming_addr: str
    server_curve_key: bytes
    """32 raw bytes."""

    def to_json(self) -> dict[str, object]:
        """One entry of `mesh`."""
        return {
            "control_addr": self.control_addr,
            "streaming_addr": self.streaming_addr,
            "server_curve_key": self.server_curve_key.hex(),
        }

    @classmethod
    def from_json(cls, body: object, path: str = "mesh") -> Self:
        """Read one entry of `mesh`.

        Raises:
            EnrollmentBodyInvalid: a field breaks its rule.
        """
        fields = _Fields(body, path)
        return cls(
            control_addr=fields.address("control_addr"),
            streaming_addr=fields.address("streaming_addr"),
            server_curve_key=fields.hexadecimal("server_curve_key", CURVE_KEY_BYTES),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseTerms:
    """The lease a router offers; the one in force is granted in `Welcome`."""

    duration_ms: int
    renewal_interval_ms: int

    def to_json(self) -> dict[str, object]:
        """The value of `lease`."""
        return {"duration_ms": self.duration_ms, "renewal_interval_ms": self.renewal_interval_ms}

    @classmethod
    def from_json(cls, body: object) -> Self:
        """Read the value of `lease`.

        Raises:
            EnrollmentBodyInvalid: a field breaks its rule.
        """
        fields = _Fields(body, "lease")
        return cls(
            duration_ms=fields.integer("duration_ms", 1, 86_400_000),
            renewal_interval_ms=fields.integer("renewal_interval_ms", 1, 86_400_000),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AssignedEndpoint:
    """What the agent is to serve, as known when it enrolled; a later one comes over the wire."""

    endpoint_id: EndpointId
    served_name: str
    """The endpoint's slug: the engine's one served model name."""
    model: str
    task_mode: str
    quantization: str | None = None

    def to_json(self) -> dict[str, object]:
        """The value of `assignment`."""
        return {
            "endpoint_id": self.endpoint_id,
            "served_name": self.served_name,
            "model": self.model,
            "task_mode": self.task_mode,
            "quantization": self.quantization,
        }

    @classmethod
    def from_json(cls, body: object) -> Self:
        """Read the value of `assignment`.

        Raises:
            EnrollmentBodyInvalid: a field breaks its rule.
        """
        fields = _Fields(body, "assignment")
        return cls(
            endpoint_id=EndpointId(fields.text("endpoint_id", 64)),
            served_name=fields.text("served_name", 64),
            model=fields.text("model", 255),
            task_mode=fields.text("task_mode", 32),
            quantization=fields.optional_text("quantization", 64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Enrollment:
    """The answer to an enroll and to a refresh: who the agent is, its credentials, and where to dial."""

    agent_id: AgentId
    project_id: ProjectId
    name: str
    xem_token: str = field(repr=False)
    """Signed bearer token for the router's HTTPS API; on the wire the CURVE key is the identity."""
    token_expires_in_s: float
    """A duration, so that the clocks of the two machines need not agree."""
    refresh_token: str = field(repr=False)
    """Good once; its predecessor stays good until this one was used."""
    mesh: tuple[RouterAddress, ...]
    """Every router the agent dials; at least one."""
    lease: LeaseTerms
    region: str | None = None
    assignment: AssignedEndpoint | None = None

    def to_json(self) -> dict[str, object]:
        """The body of the answer. Secret."""
        return {
            "agent_id": self.agent_id,
            "project_id": self.project_id,
            "region": self.region,
            "name": self.name,
            "xem_token": self.xem_token,
            "token_expires_in_s": self.token_expires_in_s,
            "refresh_token": self.refresh_token,
            "mesh": [router.to_json() for router in self.mesh],
            "lease": self.lease.to_json(),
            "assignment": None if self.assignment is None else self.assignment.to_json(),
        }

    @classmethod
    def from_json(cls, body: object) -> Self:
        """Read a parsed JSON body.

        Raises:
            EnrollmentBodyInvalid: a field breaks its rule.
        """
        fields = _Fields(body)
        assignment = fields.optional("assignment")
        return cls(
            agent_id=AgentId(fields.text("agent_id", 64)),
            project_id=ProjectId(fields.text("project_id", 64)),
            region=fields.optional_text("region", 24),
            name=fields.text("name", 64),
            xem_token=fields.text("xem_token", _TOKEN_CHARACTERS),
            token_expires_in_s=fields.seconds("token_expires_in_s"),
            refresh_token=fields.text("refresh_token", 256),
            mesh=tuple([RouterAddress.from_json(each, f"mesh[{n}]") for n, each in enumerate(fields.entries("mesh"))]),
            lease=LeaseTerms.from_json(fields.optional("lease")),
            assignment=None if assignment is None else AssignedEndpoint.from_json(assignment),
        )


class _Fields:
    """Reads the fields of one JSON object and says which of them breaks which rule."""

    __slots__ = ("_path", "_values")

    def __init__(self, body: object, path: str = "") -> None:
        if not isinstance(body, Mapping):
            raise EnrollmentBodyInvalid(path or "the body", "must be a JSON object")
        self._values: Mapping[object, object] = body
        self._path = f"{path}." if path else ""

    def _invalid(self, name: str, rule: str) -> EnrollmentBodyInvalid:
        return EnrollmentBodyInvalid(f"{self._path}{name}", rule)

    def optional(self, name: str) -> object:
        return self._values.get(name)

    def text(self, name: str, most: int) -> str:
        value = self._values.get(name)
        if not isinstance(value, str) or not 1 <= len(value) <= most or not value.isprintable():
            raise self._invalid(name, f"must be 1 to {most} printable characters")
        return value

    def optional_text(self, name: str, most: int) -> str | None:
        return None if self._values.get(name) is None else self.text(name, most)

    def integer(self, name: str, least: int, most: int) -> int:
        value = self._values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._invalid(name, f"must be a whole number from {least} to {most}")
        return value

    def seconds(self, name: str) -> float:
        value = self._values.get(name)
        # A comparison with NaN is false, so NaN is refused here too.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 31_536_000:
            raise self._invalid(name, "must be a number of seconds above 0, at most a year")
        return float(value)

    def hexadecimal(self, name: str, size: int) -> bytes:
        value = self._values.get(name)
        if not isinstance(value, str) or re.fullmatch(r"[0-9A-Fa-f]*", value) is None or len(value) != 2 * size:
            raise self._invalid(name, f"must be {2 * size} hexadecimal digits")
        return bytes.fromhex(value)

    def address(self, name: str) -> str:
        value = self.text(name, 300)
        if _ADDRESS.fullmatch(value) is None or not 1 <= int(value.rpartition(":")[2]) <= 65_535:
            raise self._invalid(name, "must be tcp://host:port")
        return value

    def facts(self, name: str) -> dict[str, object]:
        value = self._values.get(name)
        if not isinstance(value, Mapping) or len(json.dumps(value)) > _ACCELERATOR_BYTES:
            raise self._invalid(name, f"must be a JSON object of at most {_ACCELERATOR_BYTES} bytes")
        return dict(value)

    def entries(self, name: str) -> list[object]:
        value = self._values.get(name)
        if not isinstance(value, list) or not 1 <= len(value) <= 64:
            raise self._invalid(name, "must be a list of 1 to 64 entries")
        return value
