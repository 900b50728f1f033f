"""What a router says to requests that are no good: one clear error each, in the envelope that clients know."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import openai
import pytest
import pytest_asyncio

from tests.support.accounts import ENDPOINT, Accounts
from tests.support.ports import HOST
from tests.support.programs import PATIENCE_S
from tests.support.topology import Topology
from tests.topology.scripts import body

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def topology(accounts: Accounts) -> AsyncIterator[Topology]:
    """A router alone: nothing here gets as far as an agent."""
    async with Topology(accounts) as made:
        yield made


def assert_error(answer: httpx2.Response, status: int, code: str, kind: str = "invalid_request_error") -> None:
    """The envelope, whole, with the request's id in the header."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, kind)
    assert set(error) == {"message", "type", "code", "param"}
    assert error["message"].endswith(".")
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_body"),
        (b"hello", "invalid_body"),
        (b"[1, 2]", "invalid_body"),
        (b'"text"', "invalid_body"),
        (b'{"model": "tiny"', "invalid_body"),
        (b'{"model": "\xff\xfe"}', "invalid_body"),
        (b"[" * 100_000, "invalid_body"),
        (b'{"model": 5}', "invalid_request"),
        (b'{"messages": []}', "invalid_request"),
    ],
    ids=["empty", "text", "list", "string", "cut", "no-utf8", "deep", "model-number", "no-model"],
)
async def test_a_body_that_is_no_request(topology: Topology, content: bytes, code: str) -> None:
    answer = await topology.http.post(CHAT, headers=topology.headers() | JSON, content=content)
    assert_error(answer, 400, code)


async def test_a_body_of_100_mb_is_refused_by_its_announced_size_before_it_is_read(topology: Topology) -> None:
    reader, writer = await asyncio.open_connection(HOST, topology.http_port)
    key = topology.headers()["Authorization"]
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {100 * 1024 * 1024}\r\n\r\n".encode())
    status = await asyncio.wait_for(reader.readline(), PATIENCE_S)
    assert status.split()[1] == b"413"
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_of_100_mb_is_answered_413(topology: Topology, announced: bool) -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1600):
            yield b" " * 65_536
            sent += 65_536

    size = {"Content-Length": str(1600 * 65_536)} if announced else {}
    try:
        answer = await topology.http.post(CHAT, headers=topology.headers() | JSON | size, content=pieces())
    except httpx2.NetworkError:
        # The router may close before the client has looked at its answer; it read no more than its limit.
        assert sent < 64 * 1024 * 1024
    else:
        assert_error(answer, 413, "body_too_large")
    assert (await topology.http.get("/healthz")).status_code == 200


async def test_a_wrong_content_type(topology: Topology) -> None:
    headers = topology.headers() | {"Content-Type": "text/plain"}
    assert_error(await topology.http.post(CHAT, headers=headers, content=b"{}"), 415, "unsupported_media_type")


async def test_an_unknown_route_and_a_wrong_method(topology: Topology) -> None:
    unknown = await topology.http.post("/v1/no/such/route", headers=topology.headers(), json={})
    assert_error(unknown, 404, "route_not_found", "not_found_error")
    # What an engine has, and what is none of a client's business.
    for path in ("/metrics", "/health", "/v1/load_lora_adapter", "/sleep"):
        assert (await topology.http.get(path, headers=topology.headers())).status_code == 404
    wrong = await topology.http.get(CHAT, headers=topology.headers())
    assert_error(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_a_wrong_key_and_none(topology: Topology) -> None:
    for headers in ({}, {"Authorization": "Bearer xero_alpha_wrong"}, {"Authorization": "Basic abc"}):
        answer = await topology.http.post(CHAT, headers=headers, json=body())
        assert_error(answer, 401, "invalid_api_key", "authentication_error")
    with pytest.raises(openai.AuthenticationError):
        await topology.client(api_key="xero_alpha_wrong").models.list()


async def test_a_model_that_is_not_there_and_an_endpoint_that_nobody_serves(topology: Topology) -> None:
    unknown = await topology.http.post(CHAT, headers=topology.headers(), json=body() | {"model": "other"})
    assert_error(unknown, 404, "model_not_found", "not_found_error")
    assert (await topology.http.get(f"/v1/models/{ENDPOINT}", headers=topology.headers())).status_code == 200
    # No agent has ever connected: nobody will come, so nobody waits.
    unserved = await topology.http.post(CHAT, headers=topology.headers(), json=body())
    assert_error(unserved, 503, "no_agent_available", "server_error")
    assert int(unserved.headers["retry-after"]) >= 1


async def test_garbage_on_the_http_port_harms_nobody(topology: Topology) -> None:
    reader, writer = await asyncio.open_connection(HOST, topology.http_port)
    writer.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    assert b"400" in await asyncio.wait_for(reader.readline(), PATIENCE_S)
    writer.close()
    await writer.wait_closed()
    assert (await topology.http.get("/healthz")).json() == {"status": "ok"}
