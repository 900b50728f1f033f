"""A catalog with two projects, and keys of every kind."""

import hashlib
from types import MappingProxyType

from xim_protocol.ids import EndpointId, ProjectId
from xim_router.dispatch.catalog import Catalog, Endpoint, Principal, Scope

ACME, OTHER = ProjectId("proj_acme"), ProjectId("proj_other")
NOW = 1_000.0

CHAT = Endpoint(endpoint=EndpointId("ep-chat"), project=ACME, slug="chat", model="qwen/tiny", created_at=7)
EMBED = Endpoint(endpoint=EndpointId("ep-embed"), project=ACME, slug="embed", model="bge", created_at=8)
FOREIGN = Endpoint(endpoint=EndpointId("ep-foreign"), project=OTHER, slug="secret", model="secret-model")

INFERENCE = frozenset({Scope.INFERENCE})


def hash_key(key: str) -> bytes:
    """Stands for the router's keyed hash."""
    return hashlib.sha256(b"test" + key.encode()).digest()


def principal(
    key_id: str,
    *,
    scopes: frozenset[Scope] = INFERENCE,
    endpoint: EndpointId | None = None,
    expires_at: float | None = None,
) -> Principal:
    return Principal(key_id=key_id, project=ACME, scopes=scopes, endpoint=endpoint, expires_at=expires_at)


ANY = principal("key-any")
CHAT_ONLY = principal("key-chat", endpoint=CHAT.endpoint)

PRINCIPALS = {
    "xero_acme_any": ANY,
    "xero_acme_chat": CHAT_ONLY,
    "xero_acme_manager": principal("key-manager", scopes=frozenset({Scope.MANAGEMENT})),
    "xero_acme_old": principal("key-old", expires_at=NOW),
    "xero_acme_young": principal("key-young", expires_at=NOW + 0.001),
}

ENDPOINTS = (CHAT, EMBED, FOREIGN)

CATALOG = Catalog(
    version=1,
    principals=MappingProxyType({hash_key(key): value for key, value in PRINCIPALS.items()}),
    endpoints=MappingProxyType({endpoint.endpoint: endpoint for endpoint in ENDPOINTS}),
    endpoints_by_name=MappingProxyType(
        {(e.project, name): e.endpoint for e in ENDPOINTS for name in (e.slug, e.model)}
    ),
)
