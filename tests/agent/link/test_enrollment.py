"""Enrolling and refreshing against a real HTTP server, and every way it fails."""

import asyncio
import datetime
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from tests.agent.link.enrollments import FakeRouter, refusal, router
from tests.support.programs import PATIENCE_S
from xim_agent.link import enrollment
from xim_agent.link.credentials import CredentialsError, CredentialStore
from xim_agent.link.enrollment import Enroller, EnrollmentFailed, NodeFacts, NotEnrolled
from xim_protocol.enrollment import FAILURES, EnrollmentCode, JoinKey, RefreshRequest

FACTS = NodeFacts(hostname="host", agent_version="1", protocol_version=1, name="node", max_concurrent=3)
Open = Callable[..., Enroller]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens the one config directory again and again, as restarts do; retries follow at once."""
    monkeypatch.setattr(enrollment, "ATTEMPT_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(enrollment, "REFRESH_RETRY_S", 0.0)
    stores: list[CredentialStore] = []

    def open_it(*, allow_insecure: bool = True) -> Enroller:
        for store in stores:
            store.__exit__(None, None, None)
        stores.append(CredentialStore(tmp_path / "config"))
        return Enroller(stores[-1].__enter__(), FACTS, allow_insecure=allow_insecure)

    yield open_it
    for store in stores:
        store.__exit__(None, None, None)


async def enrolled(opened: Open, fake: FakeRouter) -> Enroller:
    enroller = opened()
    await enroller.start(fake.key())
    return opened()


async def test_a_join_key_enrolls_and_a_restart_refreshes_without_one(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with router() as fake:
        first = await opened().start(fake.key())
        second = await opened().start(None)
    assert fake.paths() == ["/v1/enroll", "/v1/enroll/refresh"]
    assert first.enrollment.refresh_token == fake.requests[1][1]["refresh_token"]
    assert second.enrollment.refresh_token == "refresh-secret-2"
    line = next(record for record in caplog.records if record.message == "enrollment successful")
    assert vars(line)["agent_id"] == "agent-1"
    assert "secret" not in caplog.text


async def test_the_refresh_is_signed_by_the_enrolled_key(opened: Open) -> None:
    async with router() as fake:
        await (await enrolled(opened, fake)).start(None)
    sent = RefreshRequest.from_json(fake.requests[1][1])
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(str(fake.requests[0][1]["signing_public_key"])))
    key.verify(sent.signature, sent.signed_message())
    assert fake.requests[0][1]["curve_public_key"] == fake.requests[1][1]["curve_public_key"]


async def test_without_credentials_and_key_the_remedy_is_a_join_key(opened: Open) -> None:
    with pytest.raises(NotEnrolled, match="XEROTIER_AGENT_JOIN_KEY"):
        await opened().start(None)


@pytest.mark.parametrize("code", [code for code in EnrollmentCode if FAILURES[code].status is not None])
async def test_each_refusal_comes_with_its_code_and_remedy(opened: Open, code: EnrollmentCode) -> None:
    failure = FAILURES[code]
    assert failure.status is not None
    async with router() as fake:
        fake.answers = [refusal(failure.status, code) for _ in range(enrollment.ATTEMPTS)]
        with pytest.raises(EnrollmentFailed) as failed:
            await opened().start(fake.key())
    assert (failed.value.code, failed.value.remedy) == (code, failure.remedy)
    assert failed.value.final is (failure.status in (401, 403))


async def test_plain_http_is_refused_before_anything_is_sent(opened: Open) -> None:
    async with router() as fake:
        with pytest.raises(EnrollmentFailed, match="--insecure") as failed:
            await opened(allow_insecure=False).start(fake.key())
        assert fake.requests == []
    assert failed.value.code == EnrollmentCode.INSECURE_TRANSPORT


async def test_plain_http_is_warned_of_where_it_is_allowed(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    async with router() as fake:
        await opened().start(fake.key())
    assert "enrollment is not encrypted" in caplog.text


async def test_an_address_that_does_not_answer_has_its_own_code(opened: Open) -> None:
    async with router() as fake:
        key = fake.key()
    with pytest.raises(EnrollmentFailed) as failed:
        await opened().start(key)
    assert failed.value.code == EnrollmentCode.ENROLL_UNREACHABLE
    assert fake.url in failed.value.message
    assert key.encode() not in str(failed.value)


async def test_a_certificate_nobody_vouches_for_has_its_own_code(opened: Open, tmp_path: Path) -> None:
    async with router(self_signed(tmp_path)) as fake:
        with pytest.raises(EnrollmentFailed) as failed:
            await opened().start(fake.key())
        assert fake.requests == []
    assert failed.value.code == EnrollmentCode.CERTIFICATE_INVALID


async def test_https_to_a_port_that_speaks_plain_http_has_its_own_code(opened: Open) -> None:
    async with router() as fake:
        fake.url = fake.url.replace("http://", "https://")
        with pytest.raises(EnrollmentFailed, match="plain HTTP") as failed:
            await opened().start(fake.key())
    assert failed.value.code == EnrollmentCode.TLS_NOT_SPOKEN
    assert fake.url in failed.value.message
    assert "certificate cannot be trusted" not in failed.value.message


async def test_a_redirect_is_not_followed(opened: Open) -> None:
    async with router() as fake, router() as elsewhere:
        fake.answers = [web.Response(status=307, headers={"Location": f"{elsewhere.url}/v1/enroll"})]
        with pytest.raises(EnrollmentFailed) as failed:
            await opened().start(fake.key())
        assert elsewhere.requests == []
    assert failed.value.code == "http_307"


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b'{"agent_id": 5}', b"[" * 100_000, b"x" * 2_000_000])
async def test_an_answer_that_is_no_enrollment_is_told_so(opened: Open, answer: bytes) -> None:
    async with router() as fake:
        fake.answers = [web.Response(body=answer)]
        enroller = opened()
        with pytest.raises(EnrollmentFailed) as failed:
            await enroller.start(fake.key())
    assert failed.value.code == "answer_invalid"
    assert enroller.stored is None


async def test_an_unknown_refusal_repeats_what_the_router_said(opened: Open) -> None:
    async with router() as fake:
        fake.answers = [refusal(418, "teapot", "short and stout")]
        with pytest.raises(EnrollmentFailed, match="short and stout"):
            await opened().start(fake.key())


async def test_a_lost_refresh_answer_is_asked_for_again_with_the_same_token(opened: Open) -> None:
    async with router() as fake:
        enroller = await enrolled(opened, fake)
        fake.answers = [None]
        await enroller.start(None)
    tokens = [body["refresh_token"] for path, body in fake.requests if path.endswith("refresh")]
    assert tokens == ["refresh-secret-1", "refresh-secret-1"]


@pytest.mark.parametrize("answer", [None, web.Response(status=502), web.Response(status=429), web.Response(status=404)])
async def test_a_restart_goes_on_with_stored_addresses_when_the_refresh_fails(
    opened: Open, answer: web.Response | None
) -> None:
    async with router() as fake:
        enroller = await enrolled(opened, fake)
        before = enroller.stored
        if answer is not None:
            status = answer.status
            fake.answers = [web.Response(status=status) for _ in range(enrollment.ATTEMPTS)]
        else:
            fake.answers = [None] * enrollment.ATTEMPTS
        assert await enroller.start(None) == before


@pytest.mark.parametrize(
    ("status", "code"), [(401, "refresh_token_unknown"), (403, "agent_revoked"), (403, "new_code")]
)
async def test_a_restart_stops_on_401_and_403_alone(opened: Open, status: int, code: str) -> None:
    async with router() as fake:
        enroller = await enrolled(opened, fake)
        fake.answers = [refusal(status, code)]
        with pytest.raises(EnrollmentFailed) as failed:
            await enroller.start(None)
    assert failed.value.status == status


async def test_a_revoked_node_with_a_new_join_key_enrolls_again_with_new_keys(opened: Open) -> None:
    async with router() as fake:
        enroller = await enrolled(opened, fake)
        fake.answers = [refusal(403, "agent_revoked")]
        await enroller.start(fake.key())
        again = opened()
    curve_keys = [body["curve_public_key"] for path, body in fake.requests if path == "/v1/enroll"]
    assert len(set(curve_keys)) == 2
    assert again.keys.curve_public.hex() == curve_keys[1]


async def test_a_revoked_node_with_its_old_join_key_hears_of_the_revocation(opened: Open) -> None:
    async with router() as fake:
        enroller = await enrolled(opened, fake)
        keys = enroller.keys
        fake.answers = [refusal(403, "agent_revoked"), refusal(409, "join_key_used_up")]
        with pytest.raises(EnrollmentFailed) as failed:
            await enroller.start(fake.key())
        assert opened().keys == keys
    assert failed.value.code == EnrollmentCode.AGENT_REVOKED


async def test_a_token_that_cannot_be_stored_is_not_used(opened: Open, tmp_path: Path) -> None:
    async with router() as fake:
        enroller = await enrolled(opened, fake)
        block_writing(tmp_path / "config")
        for _ in range(2):
            with pytest.raises(CredentialsError):
                await enroller.refresh()
    tokens = {body["refresh_token"] for path, body in fake.requests if path.endswith("refresh")}
    assert tokens == {"refresh-secret-1"}


async def test_the_token_is_kept_fresh_through_failures_until_it_is_refused(opened: Open) -> None:
    async with router() as fake:
        fake.life_s, fake.refuse_after = 0.03, 4
        enroller = await enrolled(opened, fake)
        fake.answers = [None, None, None, web.Response(status=500)]
        with pytest.raises(EnrollmentFailed) as failed:
            await asyncio.wait_for(enroller.keep_fresh(), PATIENCE_S)
    assert failed.value.code == EnrollmentCode.REFRESH_TOKEN_REUSED
    used = [body["refresh_token"] for path, body in fake.requests if path.endswith("refresh")]
    assert used == ["refresh-secret-1"] * 5 + [f"refresh-secret-{n}" for n in (2, 3, 4)]


async def test_credentials_that_cannot_be_stored_now_do_not_end_the_agent(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with router() as fake:
        fake.life_s, fake.refuse_after = 0.03, 4
        enroller = await enrolled(opened, fake)
        block_writing(tmp_path / "config")
        with pytest.raises(EnrollmentFailed):
            await asyncio.wait_for(enroller.keep_fresh(), PATIENCE_S)
    assert caplog.text.count("refreshed credentials cannot be stored") == 3
    assert enroller.stored is not None
    assert enroller.stored.enrollment.refresh_token == "refresh-secret-1"


async def test_a_router_that_never_answers_has_its_own_code(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrollment, "REQUEST_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its backlog for ever
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EnrollmentFailed, match=r"no answer within 0\.05 s") as failed:
            await opened().start(JoinKey.from_entropy(bytes(40), project_slug="p", enroll_url=url))
    assert failed.value.code == EnrollmentCode.ENROLL_UNREACHABLE


def block_writing(directory: Path) -> None:
    """A directory where the new file would be: nobody, root included, can write it."""
    (directory / "enrollment.json.tmp").mkdir()


def test_a_key_of_another_agents_router_is_no_part_of_an_error() -> None:
    key = JoinKey.from_entropy(bytes(range(40)), project_slug="p", enroll_url="http://x")
    assert key.secret not in str(EnrollmentFailed.known(EnrollmentCode.INSECURE_TRANSPORT))


def self_signed(tmp_path: Path) -> ssl.SSLContext:
    """A server's TLS context with a certificate of its own making."""
    key = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    file = tmp_path / "certificate.pem"
    file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context
