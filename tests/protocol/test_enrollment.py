"""Join keys and the bodies of enrollment: what is read back, what is refused, and how it is said."""

import base64
import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_protocol.enrollment import (
    FAILURES,
    AssignedEndpoint,
    Enrollment,
    EnrollmentBodyInvalid,
    EnrollmentCode,
    EnrollRequest,
    JoinKey,
    JoinKeyMalformed,
    JoinKeyTruncated,
    LeaseTerms,
    RefreshRequest,
    RouterAddress,
    refresh_message,
)
from xim_protocol.ids import AgentId, EndpointId, ProjectId
from xim_protocol.join_key import JOIN_KEY_ENTROPY_BYTES

ENTROPY = bytes(range(JOIN_KEY_ENTROPY_BYTES))
KEY = JoinKey.from_entropy(ENTROPY, project_slug="demo", enroll_url="https://router.example:8443", region="eu-1")
REQUEST = EnrollRequest(
    join_key=KEY,
    hostname="node-1",
    agent_version="0.1.0",
    protocol_version=1,
    curve_public_key=b"c" * 32,
    signing_public_key=b"s" * 32,
    accelerator={"type": "cpu", "devices": [{"name": "x", "vram_bytes": None}]},
    max_concurrent=4,
)
REFRESH = RefreshRequest(
    agent_id=AgentId("agent"), refresh_token="token", curve_public_key=b"c" * 32, signature=b"i" * 64
)
ROUTER = RouterAddress(
    control_addr="tcp://10.0.0.1:5555", streaming_addr="tcp://[fd00::1]:5556", server_curve_key=b"r" * 32
)
ENROLLMENT = Enrollment(
    agent_id=AgentId("agent"),
    project_id=ProjectId("proj_1"),
    region="eu-1",
    name="node-1",
    xem_token="xem",
    token_expires_in_s=3600.0,
    refresh_token="refresh",
    mesh=(ROUTER,),
    lease=LeaseTerms(duration_ms=30_000, renewal_interval_ms=10_000),
    assignment=AssignedEndpoint(
        endpoint_id=EndpointId("e"), served_name="tiny", model="Tiny 1B", task_mode="generate", quantization="fp8"
    ),
)


def key_of(facts: object, secret: str = "c2VjcmV0") -> str:
    """A key with these facts and a checksum that fits."""
    encoded = base64.urlsafe_b64encode(json.dumps(facts).encode()).rstrip(b"=").decode()
    return sealed(f"xjk_demo_{encoded}.{secret}.")


def sealed(head: str) -> str:
    return head + hashlib.sha256(head.encode()).hexdigest()[:8]


def test_a_join_key_reads_back_as_written() -> None:
    assert JoinKey.parse(KEY.encode()) == KEY
    without_region = JoinKey.from_entropy(ENTROPY, project_slug="a", enroll_url="http://[::1]:8080/xim")
    assert JoinKey.parse(without_region.encode()) == without_region


@pytest.mark.parametrize("around", ["{} ", "\n\t{}\r\n", "'{}'", '"{}"', ' "{}" \n'])
def test_whitespace_and_quotes_around_a_key_are_what_copying_leaves(around: str) -> None:
    assert JoinKey.parse(around.format(KEY.encode())) == KEY


@given(st.integers(min_value=len("xjk_"), max_value=len(KEY.encode()) - 1))
def test_every_beginning_of_a_key_is_called_truncated(length: int) -> None:
    with pytest.raises(JoinKeyTruncated) as caught:
        JoinKey.parse(KEY.encode()[:length])
    assert caught.value.code is EnrollmentCode.JOIN_KEY_TRUNCATED
    assert "join-key create" in caught.value.remedy


@given(st.integers(min_value=0, max_value=len(KEY.encode()) - 1), st.sampled_from("Aa0-_"))
def test_every_changed_character_is_noticed(position: int, character: str) -> None:
    text = KEY.encode()
    if text[position] == character:
        assert JoinKey.parse(text) == KEY
        return
    with pytest.raises((JoinKeyMalformed, JoinKeyTruncated)):
        JoinKey.parse(text[:position] + character + text[position + 1 :])


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "begin with xjk_"),
        ("xero_demo_abc", "begin with xjk_"),
        ("xjk_demo_a b.c.00000000", "characters that no join key has"),
        (KEY.encode() + "0", "checksum"),
        (sealed("xjk_demo_e30.a.b."), "checksum"),
        (sealed("xjk_demo_!!!!.c.").replace("!", "-"), "checksum"),
        (sealed("xjk_demo_-.c."), "cannot be read"),
        (sealed("xjk_demo_gICA.c."), "cannot be read"),
        (key_of([]), "version 1"),
        (key_of({"v": 2}), "version 1"),
        (key_of({"v": 1, "role": "xem"}), "another kind"),
        (key_of({"v": 1, "role": "xim", "id": 7, "url": "http://a"}), "id is not text"),
        (key_of({"v": 1, "role": "xim", "id": "a"}), "url is not text"),
        (key_of({"v": 1, "role": "xim", "id": "a", "url": "http://a", "region": None}), "region is not text"),
        (key_of({"v": 1, "role": "xim", "id": "a", "url": "http://a", "region": "a b"}), "region"),
        (key_of({"v": 1, "role": "xim", "id": "", "url": "http://a"}), "key id"),
        (key_of({"v": 1, "role": "xim", "id": "a", "url": "ftp://a"}), "enroll address"),
        (key_of({"v": 1, "role": "xim", "id": "a", "url": "http://user@a"}), "enroll address"),
        (key_of({"v": 1, "role": "xim", "id": "a", "url": "http://a"}, secret=""), "secret"),
        (key_of({"v": 1, "role": "xim", "id": "a", "url": "http://a"}).replace("demo", "De"), "checksum"),
        (sealed(key_of({"v": 1, "role": "xim", "id": "a", "url": "http://a"})[:-8].replace("demo", "De")), "slug"),
    ],
)
def test_what_is_no_key_is_malformed_and_says_why(text: str, detail: str) -> None:
    with pytest.raises(JoinKeyMalformed, match=detail) as caught:
        JoinKey.parse(text)
    assert caught.value.code is EnrollmentCode.JOIN_KEY_MALFORMED
    assert caught.value.detail in str(caught.value)


def test_a_key_takes_its_entropy_whole() -> None:
    with pytest.raises(ValueError, match="40 bytes of entropy, got 3"):
        JoinKey.from_entropy(b"abc", project_slug="demo", enroll_url="http://a")


@given(st.text())
def test_no_text_does_anything_but_read_or_be_refused(text: str) -> None:
    for each in (text, "xjk_" + text):
        with pytest.raises((JoinKeyMalformed, JoinKeyTruncated)):
            JoinKey.parse(each)


def test_every_code_has_a_message_and_a_remedy() -> None:
    assert set(FAILURES) == set(EnrollmentCode)
    assert all(failure.message and failure.remedy for failure in FAILURES.values())


def test_secrets_are_in_no_repr() -> None:
    shown = repr((KEY, REQUEST, REFRESH, ENROLLMENT)) + str(KEY)
    assert KEY.secret not in shown
    assert "'token'" not in shown
    assert "'xem'" not in shown
    assert "'refresh'" not in shown
    assert "xjk_2021…" in shown


def test_bodies_read_back_as_written() -> None:
    assert EnrollRequest.from_json(json.loads(json.dumps(REQUEST.to_json()))) == REQUEST
    assert RefreshRequest.from_json(json.loads(json.dumps(REFRESH.to_json()))) == REFRESH
    assert Enrollment.from_json(json.loads(json.dumps(ENROLLMENT.to_json()))) == ENROLLMENT


def test_an_agent_without_assignment_or_region_is_told_so() -> None:
    body = ENROLLMENT.to_json() | {"assignment": None, "region": None}
    read = Enrollment.from_json(body)
    assert read.assignment is None
    assert read.region is None
    assert read.to_json()["assignment"] is None


def test_fields_of_a_later_version_are_ignored() -> None:
    assert EnrollRequest.from_json(REQUEST.to_json() | {"later": 1}) == REQUEST


def test_what_is_signed_names_agent_token_and_key() -> None:
    message = b"xim-enroll-refresh-v1\nagent\ntoken\n" + b"63" * 32
    assert REFRESH.signed_message() == message
    assert refresh_message(AgentId("agent"), "token", b"d" * 32) != message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("join_key", None),
        ("join_key", "x" * 5000),
        ("name", ""),
        ("name", "a\nb"),
        ("name", 7),
        ("hostname", None),
        ("hostname", "h" * 256),
        ("agent_version", []),
        ("protocol_version", True),
        ("protocol_version", 0),
        ("protocol_version", "1"),
        ("curve_public_key", "ab"),
        ("curve_public_key", "zz" * 32),
        ("curve_public_key", 5),
        ("signing_public_key", None),
        ("accelerator", []),
        ("accelerator", {"x": "y" * 20_000}),
        ("max_concurrent", -1),
        ("max_concurrent", 65_536),
        ("max_concurrent", 1.5),
    ],
)
def test_a_field_of_an_enroll_request_that_breaks_its_rule_is_named(name: str, value: object) -> None:
    with pytest.raises(EnrollmentBodyInvalid) as caught:
        EnrollRequest.from_json(REQUEST.to_json() | {name: value})
    assert caught.value.field == name
    assert caught.value.rule.startswith("must be")


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("token_expires_in_s", True, "token_expires_in_s"),
        ("token_expires_in_s", "1", "token_expires_in_s"),
        ("token_expires_in_s", math.nan, "token_expires_in_s"),
        ("token_expires_in_s", 0, "token_expires_in_s"),
        ("mesh", [], "mesh"),
        ("mesh", "tcp://a:1", "mesh"),
        ("mesh", [7], "mesh[0]"),
        ("mesh", [ROUTER.to_json(), ROUTER.to_json() | {"control_addr": "tcp://a"}], "mesh[1].control_addr"),
        ("mesh", [ROUTER.to_json() | {"streaming_addr": "tcp://a:70000"}], "mesh[0].streaming_addr"),
        ("lease", None, "lease"),
        ("lease", {"duration_ms": 0}, "lease.duration_ms"),
        ("assignment", [], "assignment"),
        ("assignment", {}, "assignment.endpoint_id"),
    ],
)
def test_a_field_of_an_answer_that_breaks_its_rule_is_named(name: str, value: object, field: str) -> None:
    with pytest.raises(EnrollmentBodyInvalid) as caught:
        Enrollment.from_json(ENROLLMENT.to_json() | {name: value})
    assert caught.value.field == field


@pytest.mark.parametrize("body", [None, [], "text", 7])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(EnrollmentBodyInvalid, match="the body must be a JSON object"):
        RefreshRequest.from_json(body)
