"""Errors on the wire: one envelope, one table, the exception that the OpenAI client raises."""

import json
import logging

import httpx2
import openai
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from xim_protocol.enrollment import FAILURES
from xim_router.http.errors import (
    ERRORS,
    ApiError,
    answer,
    client_request_id,
    envelope,
    install_error_handlers,
    new_request_id,
)


class Body(BaseModel):
    """What the route below takes."""

    count: int


def failing_app() -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/fail/{code}")
    async def fail(code: str) -> None:
        raise ApiError(code)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("the-inside-of-the-router")

    @app.post("/count")
    async def count(body: Body) -> dict[str, int]:
        return {"count": body.count}

    return app


async def ask(method: str, path: str, **more: object) -> httpx2.Response:
    transport = httpx2.ASGITransport(app=failing_app())
    async with httpx2.AsyncClient(transport=transport, base_url="http://router") as client:
        return await client.request(method, path, **more)  # type: ignore[arg-type]


def test_the_table_holds_every_answerable_code_of_enrollment() -> None:
    assert {code for code, failure in FAILURES.items() if failure.status is not None} <= ERRORS.keys()


def test_every_503_says_when_to_come_again_and_nothing_else_does() -> None:
    for code, rule in ERRORS.items():
        headers = dict(answer(ApiError(code), "req_1").headers)
        assert (b"retry-after" in headers) == (rule.status == 503), code
        assert headers[b"x-request-id"] == b"req_1"


def test_the_envelope_has_four_fields() -> None:
    made = json.loads(envelope("model_not_found", "No model x.", param="model"))
    assert made == {
        "error": {"message": "No model x.", "type": "not_found_error", "code": "model_not_found", "param": "model"}
    }
    assert json.loads(envelope("stalled"))["error"]["message"] == ERRORS["stalled"].message


def test_an_error_may_say_more_than_the_table() -> None:
    made = answer(ApiError("queue_full", "Eleven wait.", retry_after_s=1.2), "req_1")
    assert made.status == 503
    assert dict(made.headers)[b"retry-after"] == b"2"
    assert json.loads(made.body)["error"]["message"] == "Eleven wait."
    assert dict(made.headers)[b"content-length"] == str(len(made.body)).encode()


def test_a_code_outside_the_table_is_a_fault_of_ours() -> None:
    with pytest.raises(KeyError):
        ApiError("no_such_code")


@pytest.mark.parametrize(
    ("code", "exception"),
    [
        ("invalid_body", openai.BadRequestError),
        ("invalid_api_key", openai.AuthenticationError),
        ("endpoint_mismatch", openai.PermissionDeniedError),
        ("model_not_found", openai.NotFoundError),
        ("validation_error", openai.UnprocessableEntityError),
        ("queue_full", openai.InternalServerError),
        ("agent_lost", openai.InternalServerError),
    ],
)
def test_the_openai_client_raises_the_natural_exception(code: str, exception: type[openai.APIStatusError]) -> None:
    made = answer(ApiError(code), "req_1")

    def respond(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(made.status, headers=made.headers, content=made.body)

    client = openai.OpenAI(
        api_key="x",
        base_url="http://router/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=httpx2.MockTransport(respond)),
    )
    with client, pytest.raises(exception) as caught:
        client.models.list()
    assert caught.value.code == code
    assert caught.value.request_id == "req_1"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("DELETE", "/count", 405, "method_not_allowed"),
        ("POST", "/count", 422, "validation_error"),
        ("GET", "/fail/queue_full", 503, "queue_full"),
        ("GET", "/broken", 500, "internal_error"),
    ],
)
async def test_every_error_of_an_application_answers_the_envelope(
    method: str, path: str, status: int, code: str
) -> None:
    answered = await ask(method, path, json={"count": "many"} if method == "POST" else None)
    assert answered.status_code == status
    assert answered.json()["error"]["code"] == code
    assert answered.headers["x-request-id"].startswith("req_")
    assert answered.headers["content-type"] == "application/json"
    assert "inside" not in answered.text


async def test_a_wrong_field_is_named_and_bad_json_is_called_so() -> None:
    wrong = await ask("POST", "/count", json={"count": "many"})
    assert wrong.json()["error"]["param"] == "count"
    garbage = await ask("POST", "/count", content=b"{", headers={"content-type": "application/json"})
    assert (garbage.status_code, garbage.json()["error"]["code"]) == (400, "invalid_body")


async def test_405_names_the_allowed_methods() -> None:
    assert (await ask("DELETE", "/count")).headers["allow"] == "POST"


async def test_a_fault_is_logged_with_the_id_that_the_client_was_given(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    answered = await ask("GET", "/broken")
    (record,) = [record for record in caplog.records if record.message == "request failed"]
    assert vars(record)["request"] == answered.headers["x-request-id"]
    assert record.exc_info is not None


@pytest.mark.parametrize(("sent", "echoed"), [("my-id.1:2", True), ("a b", False), ("x" * 129, False)])
async def test_a_well_formed_id_of_the_client_is_echoed(sent: str, echoed: bool) -> None:
    answered = await ask("POST", "/count", json={"count": 1}, headers={"x-request-id": sent})
    assert answered.status_code == 200
    assert (answered.headers["x-request-id"] == sent) is echoed
    assert (client_request_id(sent.encode()) == sent) is echoed


def test_request_ids_are_the_routers_own_and_differ() -> None:
    assert client_request_id(None) is None
    assert len({new_request_id() for _ in range(100)}) == 100
    assert len(new_request_id()) == len("req_") + 24
