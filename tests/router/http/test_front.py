"""What is not relayed: small answers, unknown routes, wrong methods, and what nobody expected."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.http.tenants import CHAT
from tests.router.link.rig import Rig
from xim_protocol.routes import ROUTES
from xim_router.http.hints import is_route, meant_path
from xim_router.http.inference import Inference


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *[("GET", route.path, "POST") for route in ROUTES],
        ("DELETE", f"/{CHAT.project}/{CHAT.slug}/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/chat", "GET, HEAD"),
        ("PUT", "/healthz", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_names_the_right_ones(method: str, path: str, allowed: str) -> None:
    async with Rig() as rig:
        call = await rig.ask(b"", method=method, path=path, x_request_id="mine")
        assert (call.status, call.code) == (405, "method_not_allowed")
        assert call.headers["allow"] == allowed
        assert call.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/audio/speech",
        "/proj_acme/chat/v1/nothing",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/v1/modelsx",
        "/%2e%2e/etc/passwd",
        "//v1/chat/completions",
        "/v1/chat/completions/",
    ],
)
async def test_an_unknown_route_is_a_clear_error(path: str) -> None:
    async with Rig() as rig:
        call = await rig.ask({"model": "chat"}, path=path, x_request_id="mine")
        assert (call.status, call.code) == (404, "route_not_found")
        assert call.headers["x-request-id"] == "mine"
        assert call.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1//chat/completions//", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/tokenize", "/tokenize"),
        ("/models", "/v1/models"),
        ("/models/qwen/tiny", "/v1/models/qwen/tiny"),
        ("/healthz/", "/healthz"),
        ("/v1/healthz", "/healthz"),
        ("/enroll", "/v1/enroll"),
        ("/proj_acme/chat/chat/completions", "/proj_acme/chat/v1/chat/completions"),
        ("/proj_acme/chat/v1/embeddings/", "/proj_acme/chat/v1/embeddings"),
        ("/proj_acme/chat/models", "/proj_acme/chat/v1/models"),
    ],
)
async def test_a_path_that_is_nearly_right_is_told_the_right_one(path: str, meant: str) -> None:
    async with Rig() as rig:
        call = await rig.ask({"model": "chat"}, path=path)
        assert (call.status, call.code) == (404, "route_not_found")
        assert call.json()["error"]["message"] == f"There is no such route. Did you mean {meant}?"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/"])
async def test_a_path_without_a_route_is_told_where_clients_begin(path: str) -> None:
    async with Rig() as rig:
        message = (await rig.ask(b"", method="GET", path=path)).json()["error"]["message"]
        assert message.startswith("There is no such route. ")
        assert "/v1/models" in message


@pytest.mark.parametrize(
    "path",
    ["/v1/audio/speech", "/docs", "/proj_acme/chat/v1/nothing", "/a/b/c/d", "/v1/modelsx", "/api/chat/completions"],
)
async def test_a_path_that_is_near_to_nothing_gets_no_hint(path: str) -> None:
    async with Rig() as rig:
        assert (await rig.ask({}, path=path)).json()["error"]["message"] == "There is no such route."


@given(st.text(alphabet=st.sampled_from("/v1ab.%"), max_size=12) | st.text(max_size=20))
def test_a_hint_is_always_a_route_and_never_the_path_itself(path: str) -> None:
    for asked in (f"/{path}", f"/{path}/chat/completions", f"/v1/chat/completions{path}", f"/{path}/models"):
        meant = meant_path(asked)
        assert meant is None or (is_route(meant) and meant != asked)


async def test_models_are_listed_in_both_forms() -> None:
    async with Rig() as rig:
        listed = await rig.ask(b"", method="GET", path="/v1/models")
        assert [model["id"] for model in listed.json()["data"]] == ["chat", "embed"]
        one = await rig.ask(b"", method="GET", path="/proj_acme/chat/v1/models")
        assert [model["id"] for model in one.json()["data"]] == ["chat"]
        named = await rig.ask(b"", method="GET", path="/v1/models/qwen/tiny")
        assert named.json()["id"] == "chat"
        unknown = await rig.ask(b"", method="GET", path="/v1/models/none")
        assert (unknown.status, unknown.code) == (404, "model_not_found")
        keyless = await rig.ask(b"", method="GET", path="/v1/models", key=None)
        assert keyless.status == 401
        assert all("x-request-id" in call.headers for call in (listed, one, named, unknown, keyless))


async def test_readiness_follows_the_agents_and_the_shutdown() -> None:
    async with Rig("a") as rig:
        healthy = await rig.ask(b"", method="GET", path="/healthz", key=None)
        waiting = await rig.ask(b"", method="GET", path="/readyz", key=None)
        async with rig.agent("a"):
            ready = await rig.ask(b"", method="GET", path="/readyz", key=None)
            rig.broker.drain()
            stopping = await rig.ask(b"", method="GET", path="/readyz", key=None)
        assert [call.status for call in (healthy, waiting, ready, stopping)] == [200, 503, 200, 503]


async def test_a_head_request_has_the_headers_and_no_body() -> None:
    async with Rig() as rig, await rig.call(b"", method="HEAD", path="/healthz", key=None) as call:
        await call.head()
        assert call.status == 200
        assert int(call.headers["content-length"]) > 0
        call.writer.write_eof()
        assert await call.reader.read() == b""


async def test_what_nobody_expected_is_a_500_of_the_envelope_and_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret detail")

    async with Rig() as rig:
        monkeypatch.setattr(Inference, "principal", broken)
        call = await rig.ask(x_request_id="mine")
        assert (call.status, call.code) == (500, "internal_error")
        assert call.headers["x-request-id"] == "mine"
        assert b"secret detail" not in call.body
    record = next(r for r in caplog.records if r.getMessage() == "request failed")
    assert record.levelno == logging.ERROR
    assert record.__dict__["client_request"] == "mine"
    assert record.__dict__["request"].startswith("req_")
    assert record.exc_info is not None
