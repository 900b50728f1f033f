"""The models a key is shown."""

import json

import pytest

from tests.router.http.tenants import ACME, ANY, CATALOG, CHAT_ONLY, OTHER
from xim_router.dispatch.catalog import Principal
from xim_router.http.answer import Answer
from xim_router.http.errors import ApiError
from xim_router.http.models import get_model, list_models

CHAT_MODEL = {"id": "chat", "object": "model", "created": 7, "owned_by": "proj_acme"}
EMBED_MODEL = {"id": "embed", "object": "model", "created": 8, "owned_by": "proj_acme"}


def listed(principal: Principal, project: str | None = None, slug: str | None = None) -> object:
    answer = list_models(CATALOG, principal, project, slug, "req_1")
    assert answer.status == 200
    return read(answer)


def read(answer: Answer) -> object:
    headers = dict(answer.headers)
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"x-request-id"] == b"req_1"
    assert int(headers[b"content-length"]) == len(answer.body)
    return json.loads(answer.body)


@pytest.mark.parametrize("project", [None, ACME])
def test_a_key_is_shown_the_endpoints_of_its_project(project: str | None) -> None:
    assert listed(ANY, project) == {"object": "list", "data": [CHAT_MODEL, EMBED_MODEL]}


def test_a_key_of_one_endpoint_is_shown_that_one() -> None:
    assert listed(CHAT_ONLY) == {"object": "list", "data": [CHAT_MODEL]}


def test_the_url_of_an_endpoint_shows_that_one() -> None:
    assert listed(ANY, ACME, "embed") == {"object": "list", "data": [EMBED_MODEL]}


@pytest.mark.parametrize("name", ["chat", "qwen/tiny"])
def test_one_model_is_found_by_either_name(name: str) -> None:
    assert read(get_model(CATALOG, ANY, None, None, name, "req_1")) == CHAT_MODEL
    assert read(get_model(CATALOG, CHAT_ONLY, ACME, "chat", name, "req_1")) == CHAT_MODEL


@pytest.mark.parametrize(
    ("principal", "slug", "name"),
    [(ANY, None, "nothing"), (ANY, None, "secret"), (CHAT_ONLY, None, "embed"), (ANY, "chat", "embed")],
)
def test_a_model_that_the_key_or_the_url_does_not_reach_does_not_exist(
    principal: Principal, slug: str | None, name: str
) -> None:
    with pytest.raises(ApiError) as caught:
        get_model(CATALOG, principal, ACME, slug, name, "req_1")
    assert (caught.value.code, caught.value.rule.status) == ("model_not_found", 404)


@pytest.mark.parametrize(
    ("principal", "project", "slug", "code"),
    [
        (ANY, OTHER, None, "cross_project_access"),
        (ANY, ACME, "nothing", "endpoint_not_found"),
        (CHAT_ONLY, ACME, "embed", "endpoint_mismatch"),
    ],
)
def test_a_url_that_the_key_does_not_open_shows_nothing(
    principal: Principal, project: str, slug: str | None, code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        list_models(CATALOG, principal, project, slug, "req_1")
    assert caught.value.code == code
