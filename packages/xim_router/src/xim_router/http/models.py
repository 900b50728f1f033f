"""`GET /v1/models` and `GET /v1/models/{id}`, in both URL forms: the endpoints that a key may call, as models."""

from xim_router.dispatch.catalog import Catalog, Endpoint, Principal
from xim_router.http.answer import Answer, json_answer
from xim_router.http.auth import check_project, no_such_model, resolve_endpoint


def list_models(
    catalog: Catalog, principal: Principal, project_segment: str | None, slug: str | None, request_id: str
) -> Answer:
    """Every endpoint of the key's project that the key may call; in the endpoint's URL form that one alone.

    Raises:
        ApiError: as `auth.resolve_endpoint`.
    """
    models = [_model(endpoint) for endpoint in _callable(catalog, principal, project_segment, slug)]
    return json_answer(200, {"object": "list", "data": models}, request_id)


def get_model(
    catalog: Catalog,
    principal: Principal,
    project_segment: str | None,
    slug: str | None,
    model: str,
    request_id: str,
) -> Answer:
    """The one endpoint that `model`, a slug or a model's own name (which may contain slashes), stands for.

    Raises:
        ApiError: `model_not_found`, or as `auth.resolve_endpoint`.
    """
    found = catalog.endpoint_named(principal.project, model)
    if found is None or found not in _callable(catalog, principal, project_segment, slug):
        raise no_such_model(model)
    return json_answer(200, _model(found), request_id)


def _callable(catalog: Catalog, principal: Principal, project_segment: str | None, slug: str | None) -> list[Endpoint]:
    if slug is not None:
        return [resolve_endpoint(catalog, principal, project_segment, slug, None)]
    check_project(principal, project_segment)
    allowed = [
        endpoint
        for endpoint in catalog.endpoints.values()
        if endpoint.project == principal.project and principal.endpoint in (None, endpoint.endpoint)
    ]
    return sorted(allowed, key=lambda endpoint: endpoint.slug)


def _model(endpoint: Endpoint) -> dict[str, object]:
    """OpenAI's model object; `id` is what to send as `model`."""
    return {
        "id": endpoint.slug,
        "object": "model",
        "created": endpoint.created_at,
        "owned_by": endpoint.project,
    }
