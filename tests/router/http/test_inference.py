"""The relayed routes as clients meet them: real HTTP, a real agent's session, the `openai` client for a stream."""

import asyncio
import json
import logging
from typing import Any

import openai
import pytest

from tests.router.http.tenants import CHAT
from tests.router.link.rig import KEY, Rig
from tests.support.agent_stub import SSE, Work, hold
from tests.support.http_client import open_call, request_bytes
from tests.support.programs import PATIENCE_S
from xim_protocol.routes import ROUTES
from xim_router.http.task_mode import TASK_MODES

EMPTY = {"model": "chat"}


async def answer_stream(work: Work) -> None:
    """Three chunks of a chat completion, as an engine writes them."""
    work.start(200, SSE)
    for number, text in enumerate(("To", " be", "!")):
        delta = {"index": 0, "delta": {"content": text}, "finish_reason": "stop" if number == 2 else None}
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "chat", "choices": [delta]}
        await work.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    await work.write(b"data: [DONE]\n\n")
    work.end()


# --- Relayed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", f"/{CHAT.project}/{CHAT.slug}"])
@pytest.mark.parametrize("path", [route.path for route in ROUTES])
async def test_every_relayed_route_reaches_the_engine_in_both_forms(prefix: str, path: str) -> None:
    body = {"model": "chat", "input": ["a", "b"]}
    async with Rig("a") as rig:
        rig.set_task_mode(min(TASK_MODES[path]))
        async with rig.agent("a") as agent:
            call = await rig.ask(body, path=prefix + path)
        assert (call.status, call.json()) == (200, body)
        submit = agent.works[0].submit
        assert (submit.path, submit.method, submit.project) == (path, "POST", CHAT.project)


async def test_the_openai_client_streams_an_answer() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=answer_stream) as agent:
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{rig.http_port}/v1", api_key=KEY, max_retries=0)
        async with client:
            stream = await client.chat.completions.create(
                model="chat", messages=[{"role": "user", "content": "?"}], stream=True
            )
            said = [chunk.choices[0].delta.content async for chunk in stream]
            assert said == ["To", " be", "!"]
            assert stream.response.headers["x-request-id"].startswith("req_")
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.chat.completions.create(model="none", messages=[])
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="xero_acme_wrong").models.list()
        assert len(agent.works) == 1


async def test_the_endpoint_of_the_url_decides_and_the_model_may_be_missing() -> None:
    async with Rig("a") as rig, rig.agent("a"):
        path = f"/{CHAT.project}/{CHAT.slug}/v1/chat/completions"
        assert (await rig.ask({"messages": []}, path=path)).status == 200
        assert (await rig.ask({"model": "whatever"}, path=path)).status == 200


async def test_a_models_own_name_stands_for_its_endpoint() -> None:
    async with Rig("a") as rig, rig.agent("a"):
        assert (await rig.ask({"model": CHAT.model})).status == 200


async def test_an_engine_sees_few_of_a_clients_headers_and_no_secret() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        await rig.ask(
            accept="text/event-stream",
            anthropic_version="2023-06-01",
            cookie="session=1",
            x_api_key="secret",
            x_slo_ttft_ms="200",
        )
        assert dict(agent.works[0].submit.headers) == {
            "accept": "text/event-stream",
            "anthropic-version": "2023-06-01",
            "x-slo-ttft-ms": "200",
        }


async def test_one_connection_serves_one_request_after_the_other() -> None:
    async with Rig("a") as rig, rig.agent("a"):
        body = json.dumps(EMPTY).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        request = request_bytes("POST", "/v1/completions", headers, body)
        async with await open_call(rig.http_port, request) as call:
            for _ in range(2):
                await call.rest()
                assert (call.status, bytes(call.body)) == (200, body)
                call.status, call.body = 0, bytearray()
                call.writer.write(request)
            await call.rest()
            assert (call.status, bytes(call.body)) == (200, body)


# --- Refused -------------------------------------------------------------------------------------------------------


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes() -> None:
    async with Rig("a", max_body_bytes=1_000_000) as rig:
        # 100 MB are announced and not one byte is sent.
        call = await rig.call(b"", content_length=str(100 * 1024 * 1024), expect="100-continue")
        async with call:
            await call.rest()
            assert (call.status, call.code) == (413, "body_too_large")
            assert "1000000 bytes" in call.json()["error"]["message"]


async def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large() -> None:
    async with Rig("a", max_body_bytes=1_000_000) as rig:
        call = await rig.call(b"", transfer_encoding="chunked", content_type="application/json")
        async with call, asyncio.timeout(PATIENCE_S):
            answered = asyncio.create_task(call.rest())
            sent = 0
            while not answered.done():
                call.writer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
                await call.writer.drain()
                await asyncio.sleep(0)
                sent += 65_536
            assert (call.status, call.code) == (413, "body_too_large")
            # Never ended by this end: refused early, long before 100 MB.
            assert sent < 50_000_000


async def test_a_body_of_the_largest_size_is_taken() -> None:
    async with Rig("a", max_body_bytes=100_000) as rig, rig.agent("a"):
        body = b'{"model": "chat", "p": "' + b"x" * (100_000 - 26) + b'"}'
        assert len(body) == 100_000
        assert (await rig.ask(body)).status == 200
        assert (await rig.ask(body + b" ")).status == 413


REFUSALS: dict[str, tuple[int, str, dict[str, object]]] = {
    "not JSON": (400, "invalid_body", {"body": b'{"model": chat}'}),
    "not an object": (400, "invalid_body", {"body": b"[1]"}),
    "not UTF-8": (400, "invalid_body", {"body": b'{"model": "\xff"}'}),
    "nothing": (400, "invalid_body", {"body": b" "}),
    "a model that is no string": (400, "invalid_request", {"body": b'{"model": 1}'}),
    "no model": (400, "invalid_request", {"body": b"{}"}),
    "a form": (415, "unsupported_media_type", {"content_type": "application/x-www-form-urlencoded"}),
    "an unknown model": (404, "model_not_found", {"body": {"model": "none"}}),
    "another project's model": (404, "model_not_found", {"body": {"model": "secret"}}),
    "no key": (401, "invalid_api_key", {"key": None}),
    "a wrong key": (401, "invalid_api_key", {"key": "xero_acme_wrong"}),
    "an expired key": (401, "invalid_api_key", {"key": "xero_acme_old"}),
    "a key without the scope": (403, "scope_insufficient", {"key": "xero_acme_manager"}),
    "another project": (403, "cross_project_access", {"path": "/proj_other/secret/v1/chat/completions"}),
    "another endpoint": (403, "endpoint_mismatch", {"key": "xero_acme_chat", "body": {"model": "embed"}}),
    "an unknown endpoint": (404, "endpoint_not_found", {"path": "/proj_acme/none/v1/chat/completions"}),
}


@pytest.mark.parametrize("case", list(REFUSALS))
async def test_what_cannot_be_admitted_is_refused_with_its_code(case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    status, code, options = REFUSALS[case]
    async with Rig("a") as rig, rig.agent("a") as agent:
        asked: dict[str, Any] = {"body": EMPTY, "x_request_id": "my-own-1", **options}
        call = await rig.ask(**asked)
        assert (call.status, call.code) == (status, code)
        assert call.headers["x-request-id"] == "my-own-1"
        assert call.headers["content-type"] == "application/json"
        assert set(call.json()["error"]) == {"message", "type", "code", "param"}
        assert ("www-authenticate" in call.headers) == (status == 401)
        assert not agent.works
    line = next(r for r in caplog.records if r.getMessage() == "request refused").__dict__
    assert (line["client_request"], line["code"]) == ("my-own-1", code)
    assert not any("xero_acme" in str(record.__dict__) for record in caplog.records)


async def test_a_stored_response_cannot_be_continued_where_several_agents_serve() -> None:
    body = {"model": "chat", "input": "?", "previous_response_id": "resp_1"}
    async with Rig("a", "b") as rig:
        call = await rig.ask(body, path="/v1/responses")
        assert (call.status, call.json()["error"]["param"]) == (400, "previous_response_id")
    async with Rig("a") as rig, rig.agent("a"):
        assert (await rig.ask(body, path="/v1/responses")).status == 200


async def test_a_body_that_does_not_come_is_not_waited_for_for_ever() -> None:
    async with Rig("a", request_timeout_s=0.4) as rig, rig.agent("a") as agent:
        async with await rig.call(b'{"model": ', content_length="5000") as call:
            await call.rest()
            assert (call.status, call.code) == (504, "request_timeout")
        assert not agent.works


# --- Ids -----------------------------------------------------------------------------------------------------------


async def test_a_request_has_an_id_of_its_own_when_the_client_sends_none_or_a_bad_one() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        ids = []
        for sent in ("", "no spaces please", "x" * 129):
            call = await rig.ask(x_request_id=sent)
            ids.append(call.headers["x-request-id"])
        assert all(each.startswith("req_") for each in ids)
        assert ids == [work.submit.request for work in agent.works]
        assert len(set(ids)) == 3


async def test_two_requests_of_one_client_id_are_two_requests() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold, capacity=2) as agent:
        async with await rig.call(x_request_id="same") as one, await rig.call(x_request_id="same") as two:
            await agent.work(1)
            for work in agent.works:
                await work.answer(work.body)
            assert (await one.rest()).headers["x-request-id"] == "same"
            assert (await two.rest()).headers["x-request-id"] == "same"
        assert len({work.submit.request for work in agent.works}) == 2
