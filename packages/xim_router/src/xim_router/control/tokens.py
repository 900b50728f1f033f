"""Mint, hash and verify: API keys, refresh tokens, XEM tokens. Pure: entropy and time are arguments."""

import base64
from dataclasses import dataclass

import jwt

from xim_protocol.ids import AgentId, ProjectId
from xim_router.control.keys import keyed_hash

TOKEN_ENTROPY_BYTES = 32
XEM_TOKEN_LIFETIME_S = 3600.0
"""Refreshed by the agent at two thirds of it."""

_ISSUER = "xerotier-router"
_AUDIENCE = "xerotier-router/agents"


@dataclass(frozen=True, kw_only=True, slots=True)
class XemClaims:
    """Whom a verified XEM token stands for."""

    agent: AgentId
    project: ProjectId
    expires_at: float


def mint_api_key(project_slug: str, entropy: bytes) -> str:
    """`xero_`, the project's slug, `_`, 256 random bits as base64url. Secret."""
    return f"xero_{project_slug}_{_random_text(entropy)}"


def mint_refresh_token(entropy: bytes) -> str:
    """`xrt_` and 256 random bits as base64url. Secret."""
    return f"xrt_{_random_text(entropy)}"


def mint_xem_token(key: bytes, agent: AgentId, project: ProjectId, now: float) -> str:
    """A signed token (JWT, HS256) that names the agent for `XEM_TOKEN_LIFETIME_S`. Secret."""
    claims = {
        "iss": _ISSUER,
        "aud": _AUDIENCE,
        "sub": agent,
        "project": project,
        "iat": int(now),
        "exp": int(now + XEM_TOKEN_LIFETIME_S),
    }
    return jwt.encode(claims, key, algorithm="HS256")


def verify_xem_token(key: bytes, token: str, now: float) -> XemClaims | None:
    """Whom `token` stands for, or None when it is not ours or has expired."""
    try:
        claims = jwt.decode(
            token,
            key,
            algorithms=["HS256"],
            issuer=_ISSUER,
            audience=_AUDIENCE,
            # Checked below against the caller's clock.
            options={"verify_exp": False, "verify_iat": False, "require": ["sub", "project", "exp"]},
        )
    except jwt.InvalidTokenError:
        return None
    if now >= claims["exp"]:
        return None
    return XemClaims(agent=AgentId(claims["sub"]), project=ProjectId(claims["project"]), expires_at=claims["exp"])


def join_key_hash(key: bytes, key_id: str, secret: str) -> bytes:
    """What the database keeps of a join key; bound to its id, so that two rows cannot be exchanged."""
    return keyed_hash(key, f"{key_id}.{secret}")


def _random_text(entropy: bytes) -> str:
    if len(entropy) != TOKEN_ENTROPY_BYTES:
        raise ValueError(f"a token takes {TOKEN_ENTROPY_BYTES} bytes of entropy, got {len(entropy)}")
    return base64.urlsafe_b64encode(entropy).rstrip(b"=").decode()
