"""Every way an enrollment or a refresh can fail, with its HTTP status and its remedy: one table for both ends.

The router answers with it, the agent explains with it, the reference page is made from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class EnrollmentCode(StrEnum):
    """Why an agent is not enrolled: answered by the router, or found by the agent itself."""

    JOIN_KEY_MALFORMED = "join_key_malformed"
    JOIN_KEY_TRUNCATED = "join_key_truncated"
    JOIN_KEY_UNKNOWN = "join_key_unknown"
    JOIN_KEY_EXPIRED = "join_key_expired"
    JOIN_KEY_REVOKED = "join_key_revoked"
    JOIN_KEY_USED_UP = "join_key_used_up"
    REFRESH_TOKEN_UNKNOWN = "refresh_token_unknown"
    REFRESH_TOKEN_REUSED = "refresh_token_reused"
    SIGNATURE_INVALID = "signature_invalid"
    AGENT_REVOKED = "agent_revoked"
    AGENT_SUSPENDED = "agent_suspended"
    CURVE_KEY_CONFLICT = "curve_key_conflict"
    CONTROL_UNAVAILABLE = "control_unavailable"
    INSECURE_TRANSPORT = "insecure_transport"
    CERTIFICATE_INVALID = "certificate_invalid"
    TLS_NOT_SPOKEN = "tls_not_spoken"
    ENROLL_UNREACHABLE = "enroll_unreachable"
    CONTROL_PORT_UNREACHABLE = "control_port_unreachable"
    STREAMING_PORT_UNREACHABLE = "streaming_port_unreachable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What one `EnrollmentCode` means and what the operator does about it."""

    status: int | None
    """The router's HTTP status, or None where the agent finds the failure by itself."""
    message: str
    remedy: str


_NEW_KEY = "Make a new one: xerotier-router join-key create --project P --endpoint E"
_ENROLL_AGAIN = "Enroll it again with a new join key: xerotier-router join-key create --project P --endpoint E"

FAILURES: Mapping[EnrollmentCode, Failure] = MappingProxyType(
    {
        EnrollmentCode.JOIN_KEY_MALFORMED: Failure(
            status=400,
            message="This is not a join key, or it was damaged on the way.",
            remedy=f"Copy the whole key again, from xjk_ to its end. {_NEW_KEY}",
        ),
        EnrollmentCode.JOIN_KEY_TRUNCATED: Failure(
            status=400,
            message="The join key is not whole: its end is missing.",
            remedy=f"Copy the whole key again, from xjk_ to its end. {_NEW_KEY}",
        ),
        EnrollmentCode.JOIN_KEY_UNKNOWN: Failure(
            status=401,
            message="This router does not know the join key.",
            remedy=f"Check that the key was made by this router. {_NEW_KEY}",
        ),
        EnrollmentCode.JOIN_KEY_EXPIRED: Failure(status=401, message="The join key has expired.", remedy=_NEW_KEY),
        EnrollmentCode.JOIN_KEY_REVOKED: Failure(status=401, message="The join key was revoked.", remedy=_NEW_KEY),
        EnrollmentCode.JOIN_KEY_USED_UP: Failure(
            status=409,
            message="The join key has been used as often as it may be.",
            remedy=f"{_NEW_KEY} (--max-uses N for a key that enrolls several agents)",
        ),
        EnrollmentCode.REFRESH_TOKEN_UNKNOWN: Failure(
            status=401,
            message="This router does not know the agent's refresh token.",
            remedy=_ENROLL_AGAIN,
        ),
        EnrollmentCode.REFRESH_TOKEN_REUSED: Failure(
            status=401,
            message="A refresh token was used after its successor, so two copies of it exist; the agent's "
            "credentials are cut off.",
            remedy=f"Make sure that one agent alone uses this config directory. {_ENROLL_AGAIN}",
        ),
        EnrollmentCode.SIGNATURE_INVALID: Failure(
            status=401,
            message="The refresh is not signed by the agent's enrolled signing key.",
            remedy=f"Restore the agent's config directory as it was when it enrolled. {_ENROLL_AGAIN}",
        ),
        EnrollmentCode.AGENT_REVOKED: Failure(
            status=403, message="The agent's credentials were revoked.", remedy=_ENROLL_AGAIN
        ),
        EnrollmentCode.AGENT_SUSPENDED: Failure(
            status=403,
            message="The agent is suspended.",
            remedy="Let it work again: xerotier-router agent resume AGENT_ID",
        ),
        EnrollmentCode.CURVE_KEY_CONFLICT: Failure(
            status=409,
            message="Another agent is enrolled with this CURVE key.",
            remedy="Give every agent a config directory of its own, or revoke the other one: "
            "xerotier-router agent revoke AGENT_ID",
        ),
        EnrollmentCode.CONTROL_UNAVAILABLE: Failure(
            status=503,
            message="The router cannot reach its database.",
            remedy="Try again in a few seconds; if it lasts, look at the database: xerotier-router db check",
        ),
        EnrollmentCode.INSECURE_TRANSPORT: Failure(
            status=None,
            message="The join key names a plain http:// address, which would show the agent's credentials to the "
            "network.",
            remedy="Give the router a certificate (XEROTIER_ROUTER_TLS_CERT and XEROTIER_ROUTER_TLS_KEY) and make a "
            "new join key, or accept the risk: --insecure or XEROTIER_AGENT_ALLOW_INSECURE=1",
        ),
        EnrollmentCode.CERTIFICATE_INVALID: Failure(
            status=None,
            message="The router's TLS certificate cannot be trusted.",
            remedy="Check its name and expiry; for a private authority point SSL_CERT_FILE at its certificate.",
        ),
        EnrollmentCode.TLS_NOT_SPOKEN: Failure(
            status=None,
            message="The enrollment address begins with https://, and the port speaks plain HTTP.",
            remedy="Give the router a certificate (XEROTIER_ROUTER_TLS_CERT and XEROTIER_ROUTER_TLS_KEY), or check the "
            "port; where http:// is meant, correct XEROTIER_ROUTER_ENROLL_URL and make a new join key.",
        ),
        EnrollmentCode.ENROLL_UNREACHABLE: Failure(
            status=None,
            message="The router's enrollment address does not answer.",
            remedy="Check that the router runs and that this machine reaches its HTTP port (XEROTIER_ROUTER_HTTP_HOST "
            "and _HTTP_PORT); where the address is wrong, set XEROTIER_ROUTER_ADVERTISE_HOST and make a new join key.",
        ),
        EnrollmentCode.CONTROL_PORT_UNREACHABLE: Failure(
            status=None,
            message="The router's control port does not answer.",
            remedy="Check that the router runs, and open the port from this machine to the router "
            "(XEROTIER_ROUTER_CONTROL_PORT, 5555 by default).",
        ),
        EnrollmentCode.STREAMING_PORT_UNREACHABLE: Failure(
            status=None,
            message="The router's streaming port does not answer.",
            remedy="Check that the router runs, and open the port from this machine to the router "
            "(XEROTIER_ROUTER_STREAMING_PORT, 5556 by default), or run without it: "
            "XEROTIER_AGENT_STREAMING_SOCKET_ENABLED=0",
        ),
    }
)
"""The one table of failures, for the router's answers, the agent's messages and the reference page."""


class EnrollmentError(ValueError):
    """Root of what can be wrong with a join key or a body."""
