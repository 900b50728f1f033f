"""What the data plane knows of the database: one immutable snapshot, replaced whole.

The control plane's publisher builds a `Catalog` from the database and hands it over; inference reads it and never
waits for SQL. Lookups are dictionary lookups. Secrets are absent: keys appear as keyed hashes only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from xim_protocol.ids import AgentId, EndpointId, ProjectId
from xim_protocol.messages import Assignment, RouterMember


class TaskMode(StrEnum):
    """What an endpoint's engine does with a prompt."""

    GENERATE = "generate"
    EMBED = "embed"
    SCORE = "score"


class Scope(StrEnum):
    """What an API key may do."""

    INFERENCE = "inference"
    MANAGEMENT = "management"


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """Who a request comes from: what one API key stands for."""

    key_id: str
    project: ProjectId
    scopes: frozenset[Scope]
    endpoint: EndpointId | None = None
    """The only endpoint this key may call, or None for every endpoint of its project."""
    expires_at: float | None = None
    """Unix time in seconds after which the key is refused, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """A named inference URL bound to one model."""

    endpoint: EndpointId
    project: ProjectId
    slug: str
    """The engine's one served model name too."""
    model: str
    """The model's own name, which a client may use as `model` beside the slug."""
    task_mode: TaskMode = TaskMode.GENERATE
    quantization: str | None = None
    created_at: int = 0
    """Unix time in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredAgent:
    """An enrolled agent, as far as the data plane needs it."""

    agent: AgentId
    name: str
    project: ProjectId
    curve_public_key: bytes
    """The node's CURVE public key, 32 raw bytes."""
    endpoint: EndpointId | None
    """The endpoint this agent is assigned to, or None when it has no assignment yet."""
    suspended: bool = False
    dead: bool = False
    """Not seen for longer than the grace of 24 h; computed when the snapshot is built."""
    pending: bool = False
    """Never seen, as of the snapshot: enrolled only, which an identity that was given up at once stays for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """One snapshot. All mappings are read-only; `version` rises with every published snapshot."""

    version: int = 0
    principals: Mapping[bytes, Principal] = field(default_factory=lambda: MappingProxyType({}))
    """By keyed hash of the API key; revoked keys are absent."""
    endpoints: Mapping[EndpointId, Endpoint] = field(default_factory=lambda: MappingProxyType({}))
    endpoints_by_name: Mapping[tuple[ProjectId, str], EndpointId] = field(default_factory=lambda: MappingProxyType({}))
    """By project and by slug or model name; where a model name is ambiguous or equals a slug, the slug wins."""
    agents: Mapping[AgentId, RegisteredAgent] = field(default_factory=lambda: MappingProxyType({}))
    agents_by_curve_key: Mapping[bytes, AgentId] = field(default_factory=lambda: MappingProxyType({}))
    revoked_curve_keys: frozenset[bytes] = frozenset()
    """Keys of revoked agents: refused for good, where an unknown key is asked to come again."""
    routers: tuple[RouterMember, ...] = ()
    """The mesh, this router among it; what agents are told to connect to."""

    def endpoint_named(self, project: ProjectId, name: str) -> Endpoint | None:
        """The endpoint that `project` calls by slug or by model name."""
        found = self.endpoints_by_name.get((project, name))
        return None if found is None else self.endpoints[found]

    def assignment_of(self, registered: RegisteredAgent) -> Assignment | None:
        """What an agent is to serve; None where that is nothing, or is gone."""
        endpoint = None if registered.endpoint is None else self.endpoints.get(registered.endpoint)
        if endpoint is None:
            return None
        return Assignment(
            endpoint=endpoint.endpoint,
            served_name=endpoint.slug,
            model=endpoint.model,
            task_mode=endpoint.task_mode.value,
            quantization=endpoint.quantization,
        )
