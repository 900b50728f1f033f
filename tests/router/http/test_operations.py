"""Health, readiness and the metrics listener."""

import json

import pytest
from prometheus_client import CollectorRegistry, Counter
from starlette.types import Message, Scope

from xim_router.http.answer import Answer
from xim_router.http.operations import MetricsApp, Readiness, healthz, readyz


def readiness(*, control_stale_s: float | None = 0.0, agents_ready: int = 1, shutting_down: bool = False) -> Readiness:
    return Readiness(
        control_stale_s=control_stale_s,
        agents_ready=agents_ready,
        endpoints_ready=agents_ready,
        shutting_down=shutting_down,
    )


def told(answer: Answer) -> dict[str, object]:
    payload = json.loads(answer.body)
    assert isinstance(payload, dict)
    return payload


def test_a_router_that_runs_is_healthy() -> None:
    answer = healthz("req_1")
    assert (answer.status, told(answer)) == (200, {"status": "ok"})


def test_a_router_with_an_agent_that_serves_is_ready() -> None:
    answer = readyz(readiness(agents_ready=3), "req_1")
    assert (answer.status, told(answer)) == (
        200,
        {"status": "ready", "control": "fresh", "agents_ready": 3, "endpoints_ready": 3},
    )


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (readiness(agents_ready=0), "waiting"),
        (readiness(control_stale_s=None), "starting"),
        (readiness(control_stale_s=None, agents_ready=0), "starting"),
        (readiness(shutting_down=True), "shutting_down"),
    ],
)
def test_a_router_that_nobody_can_be_served_by_is_not_ready_and_says_why(state: Readiness, status: str) -> None:
    answer = readyz(state, "req_1")
    assert answer.status == 503
    assert told(answer)["status"] == status
    assert told(answer)["reason"]


@pytest.mark.parametrize(
    ("age_s", "control"), [(None, "unread"), (0.0, "fresh"), (5.0, "fresh"), (5.6, "stale 6 s"), (42.4, "stale 42 s")]
)
def test_the_age_of_the_catalog_is_told(age_s: float | None, control: str) -> None:
    assert told(readyz(readiness(control_stale_s=age_s), "req_1"))["control"] == control


def test_a_stale_catalog_leaves_the_router_ready() -> None:
    assert readyz(readiness(control_stale_s=3_600.0), "req_1").status == 200


# The metrics listener


async def ask(path: str, *, method: str = "GET", accept: bytes | None = None) -> tuple[int, dict[bytes, bytes], bytes]:
    registry = CollectorRegistry()
    Counter("things_total", "Things.", registry=registry).inc(3)
    scope: Scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [] if accept is None else [(b"accept", accept)],
    }
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("a scrape has no body")

    async def send(message: Message) -> None:
        sent.append(message)

    await MetricsApp(registry)(scope, receive, send)
    start, body = sent
    return start["status"], dict(start["headers"]), body["body"]


async def test_a_scrape_is_answered_in_the_text_format() -> None:
    status, headers, body = await ask("/metrics")
    assert status == 200
    assert headers[b"content-type"].startswith(b"text/plain")
    assert b"things_total 3.0" in body
    assert int(headers[b"content-length"]) == len(body)


async def test_a_scraper_may_ask_for_openmetrics() -> None:
    _, headers, body = await ask("/metrics", accept=b"application/openmetrics-text; version=1.0.0")
    assert headers[b"content-type"].startswith(b"application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


async def test_a_head_request_has_no_body() -> None:
    status, headers, body = await ask("/metrics", method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers[b"content-length"]) > 0


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [("/", "GET", 404, "route_not_found"), ("/metrics", "POST", 405, "method_not_allowed")],
)
async def test_anything_else_is_refused_in_the_envelope(path: str, method: str, status: int, code: str) -> None:
    answered, headers, body = await ask(path, method=method)
    assert answered == status
    assert json.loads(body)["error"]["code"] == code
    assert headers[b"x-request-id"].startswith(b"req_")


async def test_the_listener_speaks_http_only() -> None:
    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    with pytest.raises(RuntimeError, match="lifespan"):
        await MetricsApp(CollectorRegistry())({"type": "lifespan"}, receive, send)
