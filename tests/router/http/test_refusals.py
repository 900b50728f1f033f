"""A request that never became an exchange is counted by its error's code, and by nothing that a client chose."""

import logging
from types import SimpleNamespace
from typing import cast

import pytest
from fastapi import FastAPI

from tests.router.http.test_protocol import ENROLL_HALF, HEAD, POST_HALF, say
from tests.router.link.rig import CHAT, Rig, until
from tests.support.http_client import open_call
from xim_protocol.enrollment import EnrollmentCode, EnrollRequest
from xim_router.control.enrollment import Enroller
from xim_router.control.routes.enroll import enroll_routes
from xim_router.http import protocol
from xim_router.http.errors import ERRORS
from xim_router.http.front import Front
from xim_router.http.inference import Inference

REFUSED = "xim_router_requests_refused_total"


def refused(rig: Rig) -> dict[str, float]:
    """What was counted, by code."""
    found: dict[str, float] = {}
    for family in rig.metrics.registry.collect():
        for sample in family.samples:
            if sample.name == REFUSED:
                assert list(sample.labels) == ["code"]
                assert sample.labels["code"] in ERRORS
                found[sample.labels["code"]] = sample.value
    return found


async def counted(rig: Rig, expected: dict[str, float]) -> None:
    """Return when just this was counted; that may be a moment after the client has its answer."""
    await until(lambda: refused(rig) == expected)


@pytest.mark.parametrize(
    ("status", "code", "asked"),
    [
        (400, "invalid_body", {"body": b"{"}),
        (400, "task_mode_mismatch", {"path": "/v1/embeddings"}),
        (401, "invalid_api_key", {"key": None}),
        (401, "invalid_api_key", {"key": None, "method": "GET", "path": "/v1/models", "body": b""}),
        (403, "cross_project_access", {"path": f"/proj_other/{CHAT.slug}/v1/chat/completions"}),
        (404, "model_not_found", {"body": {"model": "a-name-of-the-clients"}}),
        (404, "route_not_found", {"path": "/a-path-of-the-clients"}),
        (405, "method_not_allowed", {"method": "GET", "body": b""}),
        (405, "method_not_allowed", {"method": "PUT", "path": "/healthz", "body": b""}),
        (413, "body_too_large", {"body": b"{" + b" " * 2000}),
        (415, "unsupported_media_type", {"content_type": "text/plain"}),
    ],
)
async def test_a_refused_request_is_counted_by_the_code_of_its_error_and_logged(
    status: int, code: str, asked: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(max_body_bytes=1024) as rig:
        for times in (1.0, 2.0):
            call = await rig.ask(**asked, x_request_id="mine")  # type: ignore[arg-type]
            assert (call.status, call.code) == (status, code)
            await counted(rig, {code: times})
    lines = [vars(record) for record in caplog.records if record.getMessage() == "request refused"]
    assert [(line["code"], line["client_request"]) for line in lines] == [(code, "mine")] * 2


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"GARBAGE\r\n\r\n", "invalid_request"),
        (b"GET /" + b"a" * protocol.MAX_URL_BYTES + b" HTTP/1.1\r\n\r\n", "url_too_long"),
        (HEAD + b"x: " + b"a" * protocol.MAX_HEAD_BYTES + b"\r\n\r\n", "headers_too_large"),
    ],
)
async def test_what_is_no_request_is_counted_too(raw: bytes, code: str) -> None:
    async with Rig() as rig:
        (told,) = await say(rig, raw)
        assert told.code == code
        await counted(rig, {code: 1.0})


@pytest.mark.parametrize("sent", [HEAD, POST_HALF, ENROLL_HALF], ids=["head", "body", "enrollment"])
async def test_half_a_request_is_counted_once(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(protocol, "ARRIVAL_S", 0.3)
    async with enrolling(EnrollmentCode.JOIN_KEY_EXPIRED, monkeypatch) as rig:
        (told,) = await say(rig, sent)
        assert told.code == "request_incomplete"
        await until(lambda: not rig._server.server_state.tasks)
        assert refused(rig) == {"request_incomplete": 1.0}


def enrolling(outcome: EnrollmentCode, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A rig whose enrollments all end with `outcome`."""

    async def enroll(_request: EnrollRequest) -> EnrollmentCode:
        return outcome

    real = Front.__init__

    def with_routes(self: Front, inference: object, broker: object, control: FastAPI, *rest: object) -> None:
        control.include_router(enroll_routes(cast(Enroller, SimpleNamespace(enroll=enroll))))
        real(self, inference, broker, control, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Front, "__init__", with_routes)
    monkeypatch.setattr(EnrollRequest, "from_json", lambda raw: raw)
    return Rig()


async def test_a_refused_enrollment_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with enrolling(EnrollmentCode.JOIN_KEY_EXPIRED, monkeypatch) as rig:
        call = await rig.ask({}, path="/v1/enroll", key=None)
        assert call.code == "join_key_expired"
        garbage = await rig.ask(b"{", path="/v1/enroll", key=None)
        assert garbage.code == "invalid_body"
        await counted(rig, {"join_key_expired": 1.0, "invalid_body": 1.0})


@pytest.mark.parametrize("sent", [POST_HALF, ENROLL_HALF], ids=["body", "enrollment"])
async def test_a_client_that_leaves_while_it_sends_was_refused_nothing(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    async with enrolling(EnrollmentCode.JOIN_KEY_EXPIRED, monkeypatch) as rig:
        async with await open_call(rig.http_port, sent):
            await until(lambda: rig._server.server_state.tasks)
        await until(lambda: not rig._server.server_state.tasks)
        assert refused(rig) == {}


async def test_a_fault_of_the_control_plane_is_counted_and_not_called_a_refusal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rig = enrolling(EnrollmentCode.JOIN_KEY_EXPIRED, monkeypatch)
    monkeypatch.setattr(EnrollRequest, "from_json", lambda raw: raw["not there"])
    async with rig:
        assert (await rig.ask({}, path="/v1/enroll", key=None)).code == "internal_error"
        await counted(rig, {"internal_error": 1.0})
    assert [r.levelname for r in caplog.records if r.getMessage() in ("request refused", "request failed")] == ["ERROR"]


async def test_a_fault_of_ours_is_counted_as_what_the_client_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Inference, "principal", broken)
    async with Rig() as rig:
        assert (await rig.ask()).status == 500
        await counted(rig, {"internal_error": 1.0})


async def test_what_is_answered_or_turned_away_by_an_endpoint_is_not_counted_here() -> None:
    async with Rig("a") as rig:
        async with rig.agent("a"):
            assert (await rig.ask()).status == 200
            assert (await rig.ask(b"", method="GET", path="/v1/models")).status == 200
        for path in ("/healthz", "/readyz"):
            await rig.ask(b"", method="GET", path=path, key=None)
        rig.broker.drain()
        assert (await rig.ask()).code == "shutting_down"
        assert rig.count("xim_router_requests_total", project=CHAT.project, endpoint=CHAT.slug, code="200") == 1.0
        assert refused(rig) == {}
