"""What the store takes and gives: one frozen record per table row, secrets only as hashes."""

from dataclasses import dataclass

from xim_protocol.ids import AgentId, EndpointId, ProjectId
from xim_router.dispatch.catalog import Scope, TaskMode


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectRecord:
    """A tenant."""

    id: ProjectId
    slug: str
    name: str
    created_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointRecord:
    """A named inference URL bound to one model."""

    id: EndpointId
    project_id: ProjectId
    slug: str
    model: str
    task_mode: TaskMode
    quantization: str | None
    created_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKeyRecord:
    """An API key, known by the hash of its secret."""

    id: str
    project_id: ProjectId
    name: str
    key_hash: bytes
    scopes: frozenset[Scope]
    endpoint_id: EndpointId | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinKeyRecord:
    """A join key, known by the hash of its secret."""

    id: str
    project_id: ProjectId
    endpoint_id: EndpointId | None
    name: str
    secret_hash: bytes
    region: str | None
    max_uses: int
    uses: int
    created_at: float
    expires_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentRecord:
    """An enrolled agent."""

    id: AgentId
    project_id: ProjectId
    endpoint_id: EndpointId | None
    join_key_id: str | None
    name: str
    region: str | None
    hostname: str
    agent_version: str
    protocol_version: int
    curve_public_key: bytes
    signing_public_key: bytes
    accelerator: str
    """JSON, as the agent told it."""
    max_concurrent: int
    enrolled_at: float
    last_seen_at: float | None = None
    state: str | None = None
    suspended_at: float | None = None
    revoked_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshTokenRecord:
    """One refresh token of an agent's family."""

    token_hash: bytes
    agent_id: AgentId
    parent_hash: bytes | None
    """The token it was issued for; None for an enrollment's."""
    generation: int
    issued_at: float
    used_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberRecord:
    """A router of the mesh."""

    id: str
    control_address: str
    streaming_address: str
    curve_public_key: bytes
    started_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Everything the catalog is built from, as of one moment."""

    version: int
    endpoints: tuple[EndpointRecord, ...]
    api_keys: tuple[ApiKeyRecord, ...]
    """Without the revoked ones."""
    agents: tuple[AgentRecord, ...]
    """With the revoked ones."""
    members: tuple[MemberRecord, ...] = ()
    """Routers whose lease runs."""
