"""Cache salts: one per tenant, nobody reaches another's."""

from xim_agent.engine.salt import BUILT_IN_SECRET, tenant_salt
from xim_protocol.ids import ProjectId

A, B = ProjectId("proj_a"), ProjectId("proj_b")


def test_a_salt_is_43_characters_and_stays_the_same() -> None:
    salt = tenant_salt("secret", A)
    assert len(salt) == 43
    assert salt == tenant_salt("secret", A)


def test_projects_secrets_and_client_salts_all_separate() -> None:
    salts = {tenant_salt(s, p, c) for s in ("x", BUILT_IN_SECRET) for p in (A, B) for c in (None, "", "c", "d")}
    assert len(salts) == 16


def test_a_client_cannot_send_another_projects_salt() -> None:
    assert tenant_salt("secret", A, tenant_salt("secret", B)) != tenant_salt("secret", B)


def test_a_project_and_a_client_salt_do_not_run_together() -> None:
    assert tenant_salt("secret", ProjectId("ab"), "c") != tenant_salt("secret", ProjectId("a"), "bc")


def test_a_lone_surrogate_is_a_salt_like_any_other() -> None:
    assert len(tenant_salt("secret", A, "\ud800")) == 43


def test_a_secret_of_random_bytes_is_one_like_any_other() -> None:
    """As a variable brings it: bytes that are no text as lone surrogates."""
    assert len(tenant_salt(b"\xff\x80\xe9".decode("utf-8", "surrogateescape"), A)) == 43
