"""Who a request comes from and which endpoint it is for: a hash and a few dictionary lookups, no waiting.

No error repeats a key, and an error about a project or an endpoint tells a caller nothing of another tenant's.
"""

import re
from collections.abc import Callable

from xim_router.dispatch.catalog import Catalog, Endpoint, Principal, Scope
from xim_router.http.errors import ApiError

# RFC 6750's b64token is what a bearer key may consist of; no key of ours is nearly as long as the bound.
_KEY = re.compile(rb"[A-Za-z0-9._~+/=-]{1,512}")

_SHOWN_CHARACTERS = 200
"""How much of a name that a client sent is repeated in a message."""


def principal_of(
    authorization: bytes | None,
    x_api_key: bytes | None,
    catalog: Catalog,
    hash_key: Callable[[str], bytes],
    unix_now: float,
    *,
    scope: Scope = Scope.INFERENCE,
) -> Principal:
    """The principal of the API key in `Authorization: Bearer`, or in `x-api-key`, where Anthropic's clients put it.

    Raises:
        ApiError: `invalid_api_key` when there is none, or it is malformed, unknown, revoked or expired;
            `scope_insufficient` when it may not do what `scope` names.
    """
    principal = catalog.principals.get(hash_key(_key_of(authorization, x_api_key)))
    if principal is None:
        raise ApiError("invalid_api_key", "The API key is wrong or was revoked. Use a key of this router.")
    if principal.expires_at is not None and principal.expires_at <= unix_now:
        raise ApiError("invalid_api_key", "The API key has expired. Create a new one.")
    if scope not in principal.scopes:
        raise ApiError("scope_insufficient", f"The API key lacks the scope `{scope}`. Use a key that has it.")
    return principal


def resolve_endpoint(
    catalog: Catalog, principal: Principal, project_segment: str | None, slug: str | None, model: str | None
) -> Endpoint:
    """The endpoint that a request is for.

    In `/{project}/{endpoint}/v1/...` the URL decides and `model` is informational; in `/v1/...` (and
    `/{project}/v1/...`) the key decides the project, and `model` names one of its endpoints by slug or model name.

    Raises:
        ApiError: `cross_project_access`, `endpoint_not_found`, `model_not_found`, `endpoint_mismatch`; without a
            model where one is needed `invalid_request`.
    """
    check_project(principal, project_segment)
    endpoint = _named_by_body(catalog, principal, model) if slug is None else _named_by_url(catalog, principal, slug)
    if principal.endpoint is not None and principal.endpoint != endpoint.endpoint:
        raise ApiError("endpoint_mismatch", "The API key is for another endpoint of its project.")
    return endpoint


def check_project(principal: Principal, project_segment: str | None) -> None:
    """Refuse a URL of another project than the key's, whether or not that project exists.

    Raises:
        ApiError: `cross_project_access`.
    """
    if project_segment is not None and project_segment != principal.project:
        raise ApiError("cross_project_access", "The API key belongs to another project than the URL names.")


def no_such_model(model: str) -> ApiError:
    """`model_not_found`, in the engine's own words."""
    return ApiError("model_not_found", f"The model `{model[:_SHOWN_CHARACTERS]}` does not exist.", param="model")


def _key_of(authorization: bytes | None, x_api_key: bytes | None) -> str:
    scheme, _, bearer = (authorization or b"").strip().partition(b" ")
    key = bearer.strip() if scheme.lower() == b"bearer" else (x_api_key or b"").strip()
    if not key and authorization:
        raise ApiError("invalid_api_key", "The Authorization header must read `Bearer <API key>`.")
    if not key:
        raise ApiError("invalid_api_key", "The API key is missing. Send it as `Authorization: Bearer <API key>`.")
    if not _KEY.fullmatch(key):
        raise ApiError("invalid_api_key", "The API key is malformed. Check that it was copied whole and alone.")
    return key.decode("ascii")


def _named_by_body(catalog: Catalog, principal: Principal, model: str | None) -> Endpoint:
    if not model:
        raise ApiError("invalid_request", "`model` is missing. Name an endpoint of the project.", param="model")
    endpoint = catalog.endpoint_named(principal.project, model)
    if endpoint is None:
        raise no_such_model(model)
    return endpoint


def _named_by_url(catalog: Catalog, principal: Principal, slug: str) -> Endpoint:
    endpoint = catalog.endpoint_named(principal.project, slug)
    # A model's name is no address: it may come to name another endpoint.
    if endpoint is None or endpoint.slug != slug:
        raise ApiError("endpoint_not_found", f"The project has no endpoint `{slug[:_SHOWN_CHARACTERS]}`.")
    return endpoint
