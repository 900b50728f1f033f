"""What a client gets through router and agent, and what the engine gets of it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from tests.support.accounts import ENDPOINT, PROJECTS, Accounts
from tests.support.fake_vllm_script import expected_text
from tests.support.programs import eventually
from tests.support.topology import SALT_SECRET, Node, Topology
from tests.topology.scripts import asking, body
from xim_agent.engine.salt import tenant_salt
from xim_protocol.ids import ProjectId

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALPHA, BETA = PROJECTS
CHAT = "/v1/chat/completions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def topology(accounts: Accounts) -> AsyncIterator[Topology]:
    """One router and one agent of project alpha."""
    async with Topology(accounts) as made:
        await made.start_node()
        yield made


async def streamed_text(topology: Topology, **script: object) -> str:
    """The whole text of a stream, which must end by itself."""
    client = topology.client()
    stream = await client.chat.completions.create(model=ENDPOINT, messages=asking(**script), stream=True)
    pieces, finished = [], None
    async for chunk in stream:
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finished = choice.finish_reason or finished
    assert finished == "stop"
    return "".join(pieces)


async def engine_saw(topology: Topology, project: str = ALPHA, **fields: object) -> dict[str, Any]:
    """The JSON of a request as the engine got it."""
    answer = await topology.client(project).chat.completions.create(
        model=ENDPOINT, messages=asking(echo=True, interval_ms=0), extra_body=fields
    )
    return dict(json.loads(answer.choices[0].message.content or ""))


async def test_a_stream_arrives_whole(topology: Topology) -> None:
    assert await streamed_text(topology, chunks=20, text_chars=17, interval_ms=2, seed=3) == expected_text(3, 340)


async def test_an_answer_without_a_stream_arrives_whole(topology: Topology) -> None:
    answer = await topology.client().chat.completions.create(
        model=ENDPOINT, messages=asking(chunks=5, text_chars=11, interval_ms=0, seed=4)
    )
    assert answer.choices[0].message.content == expected_text(4, 55)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("interval_ms", [0, 1])
async def test_a_stream_of_megabytes_is_right_to_the_last_byte(topology: Topology, interval_ms: int) -> None:
    # Far more than window (64 KiB), pause threshold and response buffer (256 KiB): credit has to flow.
    text = await streamed_text(topology, chunks=600, text_chars=4000, interval_ms=interval_ms, seed=5)
    assert text == expected_text(5, 600 * 4000)


async def test_a_whole_answer_of_megabytes_is_right_to_the_last_byte(topology: Topology) -> None:
    answer = await topology.http.post(CHAT, headers=topology.headers(), json=body(body_bytes=3_000_000, seed=6))
    assert (answer.status_code, len(answer.content)) == (200, 3_000_000)
    text = answer.json()["choices"][0]["message"]["content"]
    assert text == expected_text(6, len(text))


async def test_a_request_of_megabytes_reaches_the_engine_whole(topology: Topology) -> None:
    # Beyond 64 KiB a body takes the streaming socket, in pieces.
    filler = expected_text(7, 2_000_000)
    seen = await engine_saw(topology, filler=filler)
    assert seen["filler"] == filler


async def test_a_stream_says_what_it_used_only_when_asked(topology: Topology) -> None:
    client = topology.client()
    reports: dict[bool, list[int]] = {}
    requests = []
    for asked in (False, True):
        options: Any = {"stream_options": {"include_usage": True}} if asked else {}
        stream = await client.chat.completions.create(
            model=ENDPOINT, messages=asking(chunks=3, interval_ms=0), stream=True, **options
        )
        requests.append(stream.response.headers["x-request-id"])
        reports[asked] = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None]
    assert reports == {False: [], True: [3]}
    # The router knows the figures of both, because the agent asks the engine on its own account.
    lines = [line for each in requests for line in await topology.request_lines(1, request=each)]
    assert [line["usage"][1] for line in lines] == [3, 3]


async def test_two_choices_of_one_stream_stay_apart(topology: Topology) -> None:
    stream = await topology.client().chat.completions.create(
        model=ENDPOINT, messages=asking(chunks=8, text_chars=9, interval_ms=1, seed=20), n=2, stream=True
    )
    texts = {0: "", 1: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: expected_text(20, 72), 1: expected_text(21, 72)}


async def test_both_forms_of_the_url_lead_to_the_endpoint(topology: Topology) -> None:
    # In the long form the URL decides and the body's model is informational.
    asked = body(chunks=1, interval_ms=0) | {"model": "whatever"}
    project = topology.accounts.project_ids[ALPHA]
    answer = await topology.http.post(f"/{project}/{ENDPOINT}{CHAT}", headers=topology.headers(), json=asked)
    assert (answer.status_code, answer.json()["model"]) == (200, ENDPOINT)
    short = await topology.http.post(CHAT, headers=topology.headers(), json=asked)
    assert (short.status_code, short.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_engine_gets_the_slug_as_model_the_tenants_salt_and_nothing_else_changes(topology: Topology) -> None:
    salt = tenant_salt(SALT_SECRET, ProjectId(topology.accounts.project_ids[ALPHA]))
    for model in (ENDPOINT, "XIM-Tiny"):
        sent = body(echo=True) | {"model": model, "temperature": 0.25, "x_unknown": {"kept": [1, None]}}
        answer = await topology.http.post(CHAT, headers=topology.headers(), json=sent)
        seen = json.loads(answer.json()["choices"][0]["message"]["content"])
        assert seen == sent | {"model": ENDPOINT, "cache_salt": salt}


async def test_a_clients_own_salt_is_folded_in_and_never_passed_through(topology: Topology) -> None:
    project = ProjectId(topology.accounts.project_ids[ALPHA])
    plain, own, again, other = [
        (await engine_saw(topology, **fields))["cache_salt"]
        for fields in ({}, {"cache_salt": "mine"}, {"cache_salt": "mine"}, {"cache_salt": "yours"})
    ]
    assert own == again == tenant_salt(SALT_SECRET, project, "mine")
    assert len({plain, own, other, "mine", "yours"}) == 5


async def test_of_a_repeated_key_the_engine_sees_ours_alone(topology: Topology) -> None:
    sent = json.dumps(body(echo=True))[:-1] + ',"cache_salt":"stolen","cache_salt":"stolen too"}'
    headers = topology.headers() | {"Content-Type": "application/json"}
    answer = await topology.http.post(CHAT, headers=headers, content=sent)
    assert "stolen" not in json.loads(answer.json()["choices"][0]["message"]["content"])["cache_salt"]


async def test_the_engine_gets_request_id_and_attempt_and_the_client_its_own_id_back(topology: Topology) -> None:
    sent = body(chunks=1, interval_ms=0)
    plain = await topology.http.post(CHAT, headers=topology.headers(), json=sent)
    named = await topology.http.post(CHAT, headers=topology.headers() | {"X-Request-ID": "mine-1"}, json=sent)
    odd = await topology.http.post(CHAT, headers=topology.headers() | {"X-Request-ID": "no good"}, json=sent)
    # vLLM makes its X-Request-Id the answer's id.
    assert plain.json()["id"] == f"chatcmpl-{plain.headers['x-request-id']}-1"
    assert named.headers["x-request-id"] == "mine-1"
    assert "mine-1" not in named.json()["id"]
    (line,) = await topology.request_lines(1, client_request="mine-1")
    assert named.json()["id"] == f"chatcmpl-{line['request']}-1"
    assert odd.headers["x-request-id"].startswith("req_")


async def test_an_engines_error_passes_through_with_its_body(topology: Topology) -> None:
    for status in (400, 418, 500):
        answer = await topology.http.post(CHAT, headers=topology.headers(), json=body(status=status))
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
        assert "as the request asked" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_engine_and_slot_within_a_second_and_is_noted(
    topology: Topology, stream: bool
) -> None:
    (node,) = topology.nodes
    phase = "answering" if stream else "dispatched"
    noted = await topology.router_metric("xim_router_client_disconnects_total", phase=phase)
    lines = await topology.lines_so_far(outcome="client_closed_request")
    # Asked for 4,000 tokens: forty seconds of them.
    asked = body(stream=stream, chunks=4000, interval_ms=10)
    async with httpx2.AsyncClient(base_url=topology.url, timeout=60.0, trust_env=False) as client:
        leaving = client.build_request("POST", CHAT, headers=topology.headers(), json=asked)
        sending = asyncio.create_task(client.send(leaving, stream=True))
        await eventually(lambda: runs(topology, node, 1), what="the request runs")
        if stream:
            answer = await sending
            pieces = answer.aiter_bytes()  # kept: with it the answer would be closed
            assert await anext(pieces)
            left = topology.stopwatch()
            await answer.aclose()
        else:
            assert not sending.done()
            left = topology.stopwatch()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        await left.within(1.0, lambda: runs(topology, node, 0), what="engine and slot are free")
    await topology.request_lines(lines + 1, outcome="client_closed_request")
    assert await topology.router_metric("xim_router_client_disconnects_total", phase=phase) == noted + 1


async def runs(topology: Topology, node: Node, number: int) -> bool:
    """Engine and router both say that so many requests run."""
    running = await topology.engine_metric(node, "vllm:num_requests_running")
    return running == await topology.router_metric("xim_router_in_flight") == number


async def test_one_message_carries_what_many_streams_produced(topology: Topology) -> None:
    (node,) = topology.nodes
    stream = body(stream=True, chunks=40, interval_ms=10)
    headers = topology.headers()

    async def one() -> bytes:
        return (await topology.http.post(CHAT, headers=headers, json=stream)).content

    before = [await entries(topology, node, end) for end in ("agent", "router")]
    answers = await asyncio.gather(*(one() for _ in range(16)))
    assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
    for end, (messages_before, entries_before) in zip(("agent", "router"), before, strict=True):
        messages_after, entries_after = await entries(topology, node, end)
        produced = entries_after - entries_before
        # A start, 40 chunks and an end for each of 16 streams; the engine may glue a few chunks together.
        assert produced >= 16 * 30
        assert produced / (messages_after - messages_before) > 3


async def entries(topology: Topology, node: Node, end: str) -> tuple[float, float]:
    """Messages and entries of answers that one end has counted."""
    name = f"xim_{end}_entries_per_message"
    if end == "agent":
        return await topology.agent_metric(node, f"{name}_count"), await topology.agent_metric(node, f"{name}_sum")
    return await topology.router_metric(f"{name}_count"), await topology.router_metric(f"{name}_sum")


async def test_models_lists_the_endpoint_and_another_project_sees_nothing_of_it(topology: Topology) -> None:
    models = await topology.client().models.list()
    assert [model.id for model in models.data] == [ENDPOINT]
    project = topology.accounts.project_ids[ALPHA]
    answer = await topology.http.post(
        f"/{project}/{ENDPOINT}{CHAT}", headers=topology.headers(BETA), json=body(chunks=1)
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_project_access")


async def test_nothing_of_the_secrets_is_in_any_log(topology: Topology) -> None:
    (node,) = topology.nodes
    stored = json.loads((node.config_dir / "enrollment.json").read_text(encoding="utf-8"))["enrollment"]
    tokens = [value for name, value in stored.items() if "token" in name and isinstance(value, str)]
    assert len(tokens) >= 2
    secrets = [*topology.accounts.api_keys.values(), SALT_SECRET, *tokens, "xjk_alpha"]
    written = topology.router.written() + node.program.written()
    assert [secret[:12] for secret in secrets if secret in written] == []
