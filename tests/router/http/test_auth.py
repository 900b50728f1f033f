"""Who calls, and which endpoint is meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.http.tenants import (
    ACME,
    ANY,
    CATALOG,
    CHAT,
    CHAT_ONLY,
    EMBED,
    NOW,
    OTHER,
    PRINCIPALS,
    hash_key,
)
from xim_router.dispatch.catalog import Principal, Scope
from xim_router.http.auth import principal_of, resolve_endpoint
from xim_router.http.errors import ApiError


def caller(authorization: bytes | None, x_api_key: bytes | None = None, *, scope: Scope = Scope.INFERENCE) -> Principal:
    return principal_of(authorization, x_api_key, CATALOG, hash_key, NOW, scope=scope)


def refusal(authorization: bytes | None, x_api_key: bytes | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        caller(authorization, x_api_key)
    return caught.value


def test_a_bearer_key_names_its_principal() -> None:
    assert caller(b"Bearer xero_acme_any") is ANY
    assert caller(b"bearer   xero_acme_any ") is ANY


def test_anthropic_clients_send_the_key_in_a_header_of_its_own() -> None:
    assert caller(None, b"xero_acme_any") is ANY
    assert caller(b"Basic dXNlcjpwYXNz", b"xero_acme_any") is ANY


def test_of_two_keys_the_bearer_key_counts() -> None:
    assert caller(b"Bearer xero_acme_chat", b"xero_acme_any") is CHAT_ONLY


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "word"),
    [
        (None, None, "missing"),
        (b"", b" ", "missing"),
        (b"Bearer", None, "Bearer"),
        (b"Bearer  ", None, "Bearer"),
        (b"xero_acme_any", None, "Bearer"),
        (b"Basic dXNlcjpwYXNz", None, "Bearer"),
        (b"Bearer xero_acme any", None, "malformed"),
        (b"Bearer xero_acme_\xc3\xbc", None, "malformed"),
        (b"Bearer " + b"x" * 513, None, "malformed"),
        (b"Bearer xero_acme_unknown", None, "wrong"),
        (b"Bearer xero_acme_old", None, "expired"),
    ],
)
def test_a_key_that_does_not_hold_says_why(authorization: bytes | None, x_api_key: bytes | None, word: str) -> None:
    error = refusal(authorization, x_api_key)
    assert (error.code, error.rule.status) == ("invalid_api_key", 401)
    assert word in error.message


def test_a_key_holds_until_it_expires() -> None:
    assert caller(b"Bearer xero_acme_young") is PRINCIPALS["xero_acme_young"]


def test_a_key_without_the_scope_is_refused() -> None:
    error = refusal(b"Bearer xero_acme_manager")
    assert (error.code, error.rule.status) == ("scope_insufficient", 403)
    assert "inference" in error.message
    assert caller(b"Bearer xero_acme_manager", scope=Scope.MANAGEMENT).key_id == "key-manager"


@given(st.binary(min_size=4, max_size=100))
def test_no_error_repeats_what_was_sent_as_a_key(sent: bytes) -> None:
    key = b"xero_acme_" + sent.hex().encode() + sent
    for headers in ((b"Bearer " + key, None), (key, None), (None, key)):
        assert sent.hex() not in str(refusal(*headers))


# Endpoints


def denial(
    principal: Principal, project: str | None = None, slug: str | None = None, model: str | None = None
) -> ApiError:
    with pytest.raises(ApiError) as caught:
        resolve_endpoint(CATALOG, principal, project, slug, model)
    return caught.value


def test_the_url_decides_and_the_model_is_informational() -> None:
    assert resolve_endpoint(CATALOG, ANY, ACME, "chat", "bge") is CHAT
    assert resolve_endpoint(CATALOG, ANY, ACME, "chat", None) is CHAT


def test_without_an_endpoint_in_the_url_the_model_names_it() -> None:
    assert resolve_endpoint(CATALOG, ANY, None, None, "chat") is CHAT
    assert resolve_endpoint(CATALOG, ANY, None, None, "qwen/tiny") is CHAT
    assert resolve_endpoint(CATALOG, ANY, ACME, None, "bge") is EMBED


@pytest.mark.parametrize("model", [None, ""])
def test_a_model_that_is_needed_and_missing_is_asked_for(model: str | None) -> None:
    error = denial(ANY, model=model)
    assert (error.code, error.param, error.rule.status) == ("invalid_request", "model", 400)


@pytest.mark.parametrize("model", ["nothing", "secret", "secret-model"])
def test_a_model_of_no_endpoint_or_of_another_project_does_not_exist(model: str) -> None:
    error = denial(ANY, model=model)
    assert (error.code, error.param, error.rule.status) == ("model_not_found", "model", 404)
    assert error.message == f"The model `{model}` does not exist."


def test_a_long_name_is_repeated_in_part_only() -> None:
    assert len(denial(ANY, model="m" * 10_000).message) < 300
    assert len(denial(ANY, ACME, "s" * 10_000).message) < 300


@pytest.mark.parametrize("slug", ["nothing", "secret", "qwen/tiny"])
def test_an_endpoint_is_addressed_by_its_slug_alone(slug: str) -> None:
    error = denial(ANY, ACME, slug, "chat")
    assert (error.code, error.rule.status) == ("endpoint_not_found", 404)


@pytest.mark.parametrize("project", [OTHER, "proj_nowhere"])
@pytest.mark.parametrize("slug", ["chat", "secret", None])
def test_another_project_is_closed_whether_or_not_it_exists(project: str, slug: str | None) -> None:
    error = denial(ANY, project, slug, "chat")
    assert (error.code, error.rule.status) == ("cross_project_access", 403)
    assert error.message == denial(ANY, "proj_third").message


def test_a_key_of_one_endpoint_opens_that_one_only() -> None:
    assert resolve_endpoint(CATALOG, CHAT_ONLY, ACME, "chat", None) is CHAT
    assert resolve_endpoint(CATALOG, CHAT_ONLY, None, None, "chat") is CHAT
    for error in (denial(CHAT_ONLY, ACME, "embed"), denial(CHAT_ONLY, model="bge")):
        assert (error.code, error.rule.status) == ("endpoint_mismatch", 403)
