"""Per-tenant cache salt: two projects never share a block of the KV cache, whatever they send.

vLLM hashes `cache_salt` into the first block of a prompt, so a prefix is found again only under the same salt.
"""

import base64
import hashlib
import hmac
from functools import lru_cache

from xim_protocol.ids import ProjectId

BUILT_IN_SECRET = "xim built-in cache salt, known to everyone who reads the source"
"""Used when the operator sets none; it separates projects, but whoever knows a project's id can compute its salt."""


def tenant_salt(secret: str, project: ProjectId, client_salt: str | None = None) -> str:
    """The `cache_salt` of one request: 43 characters of base64url.

    HMAC-SHA256 under `secret` over the project's id and the salt that the client sent, if any: a client may divide
    its own cache further, and can reach nobody else's.
    """
    if client_salt is None:
        return _project_salt(secret, project)
    # The NUL keeps project "a" with salt "b" apart from project "ab"; no id contains one.
    return _digest(secret, f"kv:{project}\0{client_salt}")


@lru_cache(maxsize=1024)
def _project_salt(secret: str, project: ProjectId) -> str:
    """Kept: nearly every request needs its project's, and few clients send a salt of their own."""
    return _digest(secret, f"kv:{project}")


def _digest(secret: str, message: str) -> str:
    # A secret of random bytes is one that a variable may hold.
    digest = hmac.digest(
        secret.encode("utf-8", "surrogateescape"), message.encode("utf-8", "surrogatepass"), hashlib.sha256
    )
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
