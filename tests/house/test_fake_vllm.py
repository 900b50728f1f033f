"""The fake engine is what other tests and the bench stand on, so it has tests of its own, against the program."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.support.fake_vllm_script import Script, ScriptError, expected_text, script_of

PROGRAM = Path(__file__).parent.parent / "support" / "bin" / "fake-vllm"
LIMIT_S = 60.0


class Engine:
    """One running fake engine and a client session that reaches it over its Unix socket."""

    def __init__(self, process: asyncio.subprocess.Process, session: aiohttp.ClientSession) -> None:
        self.process, self.session = process, session

    def ask(self, script: dict[str, Any], path: str = "/v1/chat/completions", **body: Any) -> Any:
        """POST `body` with this script; an aiohttp request context."""
        question = "fake:" + json.dumps(script)
        said: dict[str, Any] = {"messages": [{"role": "user", "content": question}]}
        if path in ("/v1/completions", "/v1/responses"):
            said = {"prompt" if path == "/v1/completions" else "input": question}
        return self.session.post(f"http://engine{path}", json={"model": "fake", **said, **body})

    async def stream(self, script: dict[str, Any], path: str = "/v1/chat/completions", **body: Any) -> str:
        """The whole body of a streamed answer."""
        async with self.ask(script, path, stream=True, **body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            return str(await response.text())

    async def gauge(self, name: str) -> float:
        """One value of /metrics."""
        async with self.session.get("http://engine/metrics") as response:
            lines = (await response.text()).splitlines()
        return float(next(line for line in lines if line.startswith(name + "{")).split()[-1])

    async def until_gauge(self, name: str, value: float) -> None:
        """Return when the value is as wanted; the test's own time limit ends a wait in vain."""
        async with asyncio.timeout(LIMIT_S):
            while await self.gauge(name) != value:
                continue


@contextlib.asynccontextmanager
async def started(tmp_path: Path, *flags: str) -> AsyncIterator[Engine]:
    uds = str(tmp_path / "vllm.sock")
    command = [str(PROGRAM), "serve", "/models/tiny", "--served-model-name", "fake", "--uds", uds, *flags]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, start_new_session=True)
    try:
        await line_with(process, "Application startup complete.")
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(uds)) as session:
            yield Engine(process, session)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def line_with(process: asyncio.subprocess.Process, text: str) -> None:
    assert process.stderr is not None
    async with asyncio.timeout(LIMIT_S):
        async for line in process.stderr:
            if text in line.decode():
                return
    pytest.fail(f"the engine ended without printing {text!r}")


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with started(tmp_path, "--enable-prefix-caching", "--tensor-parallel-size", "1") as running:
        yield running


def events_of(body: str) -> list[Any]:
    """The JSON of each event, `[DONE]` apart."""
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def chat_text(events: list[Any], choice: int = 0) -> str:
    return "".join(
        part["delta"].get("content", "") for event in events for part in event["choices"] if part["index"] == choice
    )


def test_the_text_of_a_seed_has_no_two_like_places() -> None:
    text = expected_text(3, 50_000)
    words = text.split()[:-1]
    assert len(set(words)) == len(words)
    assert expected_text(3, 100) == text[:100]
    assert expected_text(4, 100) != text[:100]


def test_a_script_stands_in_the_user_field_or_in_the_last_user_text() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": 'fake:{"chunks": 3}'}]}]
    assert script_of({"messages": messages}, Script()).chunks == 3
    assert script_of({"user": '{"chunks": 5}', "messages": messages}, Script()).chunks == 5
    assert script_of({"prompt": ["one", 'fake:{"seed": 9}']}, Script()).seed == 9


def test_max_tokens_is_the_length_unless_the_script_says_more() -> None:
    assert script_of({"max_tokens": 4000, "prompt": "x"}, Script()).chunks == 4000
    assert script_of({"max_tokens": 4000, "prompt": 'fake:{"seed": 1}'}, Script()).chunks == 4000
    assert script_of({"max_tokens": 4000, "prompt": 'fake:{"chunks": 2}'}, Script()).chunks == 2


@pytest.mark.parametrize("written", ['{"chnks": 1}', '{"chunks": "1"}', '{"chunks": -1}', '{"hang": 1}', "[1]", "{"])
def test_a_script_with_a_mistake_is_refused(written: str) -> None:
    with pytest.raises(ScriptError):
        script_of({"prompt": "fake:" + written}, Script())


async def test_a_chat_stream_has_the_text_the_usage_and_the_end(engine: Engine) -> None:
    body = await engine.stream({"chunks": 5, "seed": 7, "interval_ms": 1}, stream_options={"include_usage": True})
    events = events_of(body)
    text = chat_text(events)
    assert text == expected_text(7, len(text))
    assert len(text) > 0
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5
    assert body.endswith("data: [DONE]\n\n")


async def test_content_events_have_the_size_that_was_asked_for(engine: Engine) -> None:
    body = await engine.stream({"chunks": 4, "chunk_bytes": 216, "interval_ms": 0})
    sizes = [len(event) + 2 for event in body.split("\n\n")]
    assert sizes[1:5] == [216] * 4


async def test_several_choices_have_texts_of_their_own(engine: Engine) -> None:
    events = events_of(await engine.stream({"chunks": 3, "seed": 1, "interval_ms": 0}, n=2))
    first, second = chat_text(events, 0), chat_text(events, 1)
    assert first == expected_text(1, len(first))
    assert second == expected_text(2, len(second))


@pytest.mark.parametrize(
    ("path", "terminal"),
    [
        ("/v1/chat/completions", "data: [DONE]\n\n"),
        ("/v1/completions", "data: [DONE]\n\n"),
        ("/v1/responses", "event: response.completed"),
        ("/v1/messages", 'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
    ],
)
async def test_each_route_ends_with_its_own_terminal_event_unless_truncated(
    engine: Engine, path: str, terminal: str
) -> None:
    script = {"chunks": 2, "interval_ms": 0}
    assert terminal in (await engine.stream(script, path))[-2000:]
    assert terminal not in await engine.stream({**script, "truncate": True}, path)


@pytest.mark.parametrize(
    ("path", "text_in"),
    [
        ("/v1/chat/completions", lambda answer: answer["choices"][0]["message"]["content"]),
        ("/v1/completions", lambda answer: answer["choices"][0]["text"]),
        ("/v1/responses", lambda answer: answer["output"][0]["content"][0]["text"]),
        ("/v1/messages", lambda answer: answer["content"][0]["text"]),
    ],
)
async def test_each_route_answers_whole_with_a_body_of_exact_size(
    engine: Engine, path: str, text_in: Callable[[Any], str]
) -> None:
    async with engine.ask({"body_bytes": 5000, "seed": 2, "interval_ms": 0}, path) as response:
        body = await response.read()
    text = text_in(json.loads(body))
    assert len(body) == 5000
    assert text == expected_text(2, len(text))


async def test_echo_shows_the_request_as_the_engine_got_it(engine: Engine) -> None:
    async with engine.ask({"echo": True, "interval_ms": 0}, cache_salt="salt of a tenant") as response:
        answer = await response.json()
    assert json.loads(answer["choices"][0]["message"]["content"])["cache_salt"] == "salt of a tenant"
    streamed = chat_text(events_of(await engine.stream({"echo": True, "interval_ms": 0}, cache_salt="salt")))
    assert json.loads(streamed)["cache_salt"] == "salt"


async def test_the_request_id_becomes_the_id_of_the_answer(engine: Engine) -> None:
    body = {"model": "fake", "prompt": "hello", "user": '{"chunks": 1, "interval_ms": 0}'}
    headers = {"X-Request-Id": "req-1"}
    async with engine.session.post("http://engine/v1/completions", json=body, headers=headers) as response:
        assert (await response.json())["id"] == "cmpl-req-1"


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "other", "messages": [{"role": "user", "content": "x"}]}, 404, "NotFoundError"),
        ({"model": "fake"}, 400, "Bad Request"),
        ({"model": "fake", "messages": [{"role": "user", "content": "x"}], "temperature": -1}, 400, "BadRequestError"),
        ({"model": "fake", "messages": [{"role": "user", "content": 'fake:{"status": 503}'}]}, 503, None),
        (["not", "an", "object"], 400, "Bad Request"),
    ],
)
async def test_bad_requests_are_refused_in_vllms_form(engine: Engine, body: Any, status: int, kind: str | None) -> None:
    async with engine.session.post("http://engine/v1/chat/completions", json=body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (status, status)
        assert kind is None or error["type"] == kind


async def test_a_body_that_is_not_json_is_a_validation_error(engine: Engine) -> None:
    for headers in ({"content-type": "application/json"}, {"content-type": "text/plain"}):
        async with engine.session.post("http://engine/v1/completions", data=b"{no", headers=headers) as response:
            assert response.status == 400
            assert (await response.json())["error"]["type"] == "Bad Request"


async def test_unknown_routes_and_methods_are_named(engine: Engine) -> None:
    async with engine.session.post("http://engine/nowhere", json={}) as response:
        assert response.status == 404
    async with engine.session.get("http://engine/v1/completions") as response:
        assert response.status == 405


async def test_the_routes_that_generate_nothing_answer(engine: Engine) -> None:
    async def post(path: str, **body: Any) -> Any:
        async with engine.session.post(f"http://engine{path}", json={"model": "fake", **body}) as response:
            assert response.status == 200
            return await response.json()

    tokens = (await post("/tokenize", prompt="héllo"))["tokens"]
    assert (await post("/tokenize", prompt='fake:{"hang": true}'))["count"] == 19
    assert (await post("/detokenize", tokens=tokens))["prompt"] == "héllo"
    assert len((await post("/v1/embeddings", input=["a", "b"]))["data"]) == 2
    assert (await post("/rerank", query="a b", documents=["c", "a"]))["results"][0]["index"] == 1
    assert (await post("/score", text_1="a", text_2=["a", "b"]))["data"][0]["score"] == 1.0
    async with engine.session.get("http://engine/v1/models") as response:
        assert (await response.json())["data"][0]["id"] == "fake"


async def test_a_client_that_leaves_ends_its_request(engine: Engine) -> None:
    async with engine.ask({"chunks": 4000}, stream=True) as response:
        await response.content.readany()
        assert await engine.gauge("vllm:num_requests_running") == 1
        response.close()
    await engine.until_gauge("vllm:num_requests_running", 0)
    waiting = asyncio.ensure_future(engine.ask({"hang": True}).__aenter__())
    await engine.until_gauge("vllm:num_requests_running", 1)
    waiting.cancel()
    await engine.until_gauge("vllm:num_requests_running", 0)


async def test_requests_beyond_the_slots_wait_in_order(tmp_path: Path) -> None:
    async with started(tmp_path, "--max-num-seqs", "1") as engine:
        async with engine.ask({"chunks": 4000}, stream=True) as first:
            await first.content.readany()
            second = asyncio.create_task(engine.stream({"chunks": 1}))
            await engine.until_gauge("vllm:num_requests_waiting", 1)
            first.close()
        async with asyncio.timeout(LIMIT_S):
            assert "[DONE]" in await second


@pytest.mark.parametrize("fault", [{"reset_after": 2}, {"reset_after": 0}])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_reset_breaks_the_connection_and_not_the_engine(
    engine: Engine, fault: dict[str, int], stream: bool
) -> None:
    with pytest.raises(aiohttp.ClientError):
        async with engine.ask({"chunks": 9, "interval_ms": 1, **fault}, stream=stream) as response:
            await response.read()
    await engine.until_gauge("vllm:num_requests_running", 0)


async def test_an_error_event_ends_the_stream_with_done(engine: Engine) -> None:
    body = await engine.stream({"chunks": 9, "interval_ms": 1, "error_event_after": 2})
    *content, error = events_of(body)
    assert "error" in error
    assert sum(bool(event["choices"][0]["delta"].get("content")) for event in content) == 2
    assert body.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("after", [0, 3])
async def test_the_engine_dies_where_the_script_says(engine: Engine, after: int) -> None:
    received: list[bytes] = []

    async def read() -> None:
        async with engine.ask({"chunks": 9, "interval_ms": 1, "die_after": after}, stream=True) as response:
            async for piece in response.content.iter_any():
                received.append(piece)  # noqa: PERF401 - what came before the error is what counts

    with pytest.raises(aiohttp.ClientError):
        await read()
    # The role comes with the first chunk, as an event of its own.
    assert b"".join(received).count(b"data: ") == (after + 1 if after else 0)
    async with asyncio.timeout(LIMIT_S):
        assert await engine.process.wait() != 0


async def test_a_slow_reader_stops_its_own_stream_only(engine: Engine) -> None:
    script = {"chunks": 4000, "chunk_bytes": 4000, "interval_ms": 0}
    async with engine.ask(script, stream=True) as slow:
        await slow.content.readany()
        quick = await engine.stream({"chunks": 50, "interval_ms": 0})
        await engine.until_gauge("vllm:num_requests_running", 1)
        rest = await slow.read()
    assert quick.endswith("data: [DONE]\n\n")
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_sigterm_ends_it_in_order(engine: Engine) -> None:
    engine.process.terminate()
    async with asyncio.timeout(LIMIT_S):
        assert await engine.process.wait() == 0


async def test_a_stubborn_engine_and_its_child_need_a_kill_of_the_group(tmp_path: Path) -> None:
    async with started(tmp_path, "--fake-ignore-sigterm", "--fake-spawn-child") as engine:
        (child,) = psutil.Process(engine.process.pid).children()
        engine.process.terminate()
        async with engine.session.get("http://engine/health") as response:
            assert response.status == 200
        assert os.getpgid(child.pid) == engine.process.pid
        os.killpg(engine.process.pid, signal.SIGKILL)
        async with asyncio.timeout(LIMIT_S):
            await engine.process.wait()
        assert psutil.wait_procs([child], timeout=LIMIT_S)[1] == []


async def test_a_failing_start_has_its_exit_code_and_a_left_over_socket_is_in_the_way(tmp_path: Path) -> None:
    uds = tmp_path / "vllm.sock"
    command = [str(PROGRAM), "serve", "m", "--uds", str(uds)]
    failing = await asyncio.create_subprocess_exec(*command, "--fake-start-fail", "3", stderr=asyncio.subprocess.PIPE)
    assert await failing.wait() == 3
    assert uds.exists()
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(str(uds))
    blocked = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, errors = await blocked.communicate()
    assert blocked.returncode == 1
    assert b"Address already in use" in errors


async def test_it_says_its_version() -> None:
    process = await asyncio.create_subprocess_exec(str(PROGRAM), "--version", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.decode().strip() == "0.32.0"
