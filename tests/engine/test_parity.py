"""Through the router and asked directly, a real vLLM answers the same: status, exception and body.

Only ids and times differ, and they alone are left out of the comparison. Both sides get the same requests in the same
order, so that both engines have the same in their prefix caches.
"""

import json
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from tests.engine.conftest import DIRECT_KEY, Direct
from tests.support.accounts import ENDPOINT, PROJECTS
from tests.support.topology import Topology

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

CHAT = "/v1/chat/completions"
NAMES = {"id", "created", "created_at", "completed_at", "request_id"}
"""Fields whose value is an id or a time, at whatever depth."""

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "colour",
        "schema": {
            "type": "object",
            "properties": {"name": {"enum": ["red", "green"]}, "warm": {"type": "boolean"}},
            "required": ["name", "warm"],
            "additionalProperties": False,
        },
    },
}


def chat(question: str, **more: Any) -> dict[str, Any]:
    """A request that an engine answers alike every time."""
    asked = {"model": ENDPOINT, "messages": [{"role": "user", "content": question}]}
    return {**asked, "temperature": 0, "max_tokens": 40, "seed": 1, **more}


ANSWERED: dict[str, dict[str, Any]] = {
    "plain": chat("What is XIM?"),
    "two-choices": chat("What is a lease?", n=2, temperature=0.8),
    "logprobs": chat("What is credit?", logprobs=True, top_logprobs=3),
    "tools": chat("What is the weather in Oslo?", tools=[TOOL]),
    "named-tool": chat(
        "Weather in Rome, please.", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}
    ),
    "json-schema": chat("A colour, as JSON.", response_format=SCHEMA),
    "stop": chat("What is the router?", stop=["address"]),
    "developer": chat("What is an agent?", max_completion_tokens=12, user="someone", metadata={"a": "b"}),
    "unknown-field": chat("Who are you?", no_such_field=[1, {"a": None}]),
}

REFUSED: dict[str, tuple[type[openai.APIStatusError], dict[str, Any]]] = {
    "no-messages": (openai.BadRequestError, {"model": ENDPOINT}),
    "messages-of-another-kind": (openai.BadRequestError, {"model": ENDPOINT, "messages": "hello"}),
    "bad-temperature": (openai.BadRequestError, chat("Hello", temperature=-1)),
    "text-as-temperature": (openai.BadRequestError, chat("Hello", temperature="warm")),
    "too-long": (openai.BadRequestError, chat("word " * 6000)),
    "no-choices": (openai.BadRequestError, chat("Hello", n=0)),
    "no-role": (openai.BadRequestError, {"model": ENDPOINT, "messages": [{"content": "x"}]}),
    "bad-schema": (openai.BadRequestError, chat("Hello", response_format={"type": "json_schema", "json_schema": 5})),
    "refused-in-a-stream": (openai.BadRequestError, chat("Hello", temperature=-1, stream=True)),
}
"""What the engine refuses, and as what the client raises it."""


OTHER_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": ENDPOINT, "prompt": "XIM is", "max_tokens": 16, "temperature": 0, "logprobs": 2},
    "/v1/responses": {"model": ENDPOINT, "input": "What is a project?", "max_output_tokens": 24, "temperature": 0},
    "/v1/messages": {
        "model": ENDPOINT,
        "messages": [{"role": "user", "content": "What is an endpoint?"}],
        "max_tokens": 24,
        "temperature": 0,
    },
    "/tokenize": {"model": ENDPOINT, "prompt": "a few words"},
    "/detokenize": {"model": ENDPOINT, "tokens": [100, 200, 300]},
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two ways to the engine."""

    client: AsyncOpenAI
    http: httpx2.AsyncClient
    url: str
    key: str

    async def post(self, sent: dict[str, Any], path: str = CHAT) -> httpx2.Response:
        """Ask as plain HTTP."""
        return await self.send(json.dumps(sent).encode(), path)

    async def send(self, content: bytes, path: str = CHAT) -> httpx2.Response:
        """The same with any body."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        return await self.http.post(self.url + path, headers=headers, content=content, timeout=120.0)


@pytest.fixture
def sides(topology: Topology, direct: Direct) -> tuple[Side, Side]:
    """Through the router, and directly."""
    through, straight = [
        Side(client=topology.client(api_key=key, url=url, timeout_s=120), http=topology.http, url=url, key=key)
        for url, key in ((topology.url, topology.accounts.api_keys[PROJECTS[0]]), (direct.url, DIRECT_KEY))
    ]
    return through, straight


def without_names(value: Any) -> Any:
    """`value` with every id and time replaced."""
    if isinstance(value, dict):
        return {name: "*" if name in NAMES and part else without_names(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_names(part) for part in value]
    return value


def events(body: str) -> list[dict[str, Any]]:
    """The events of a whole stream, without its terminal event, which must be there."""
    *lines, last = [line for line in body.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def folded(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream with what each choice was given put together.

    How many tokens share an event is a matter of timing and differs from run to run of one and the same engine.
    """
    whole: dict[str, Any] = {"heads": [], "choices": {}}
    for chunk in without_names(chunks):
        choices = chunk.pop("choices")
        if chunk not in whole["heads"]:
            whole["heads"].append(chunk)
        for choice in choices:
            fold(choice, whole["choices"].setdefault(choice["index"], {"text": "", "logprobs": [], "tools": {}}))
    return whole


def fold(choice: dict[str, Any], into: dict[str, Any]) -> None:
    """Add one event's part of a choice: texts and lists grow, of everything else the last word counts."""
    delta = choice.pop("delta")
    into["text"] += delta.pop("content", None) or ""
    into["logprobs"] += (choice.pop("logprobs") or {}).get("content") or []
    for call in delta.pop("tool_calls", None) or []:
        tool = into["tools"].setdefault(call["index"], {"arguments": ""})
        tool["arguments"] += call["function"].pop("arguments", None) or ""
        tool |= call.pop("function") | call
    for name, value in (choice | delta).items():
        if value is not None or name not in into:
            into[name] = value


@pytest.mark.parametrize("name", ANSWERED)
async def test_a_whole_answer_is_the_engines_own(sides: tuple[Side, Side], name: str) -> None:
    through, straight = [await side.post(ANSWERED[name]) for side in sides]
    assert (through.status_code, straight.status_code) == (200, 200), (through.text, straight.text)
    assert without_names(through.json()) == without_names(straight.json())
    assert through.headers["content-type"] == straight.headers["content-type"]
    if name == "json-schema":
        assert set(json.loads(through.json()["choices"][0]["message"]["content"])) == {"name", "warm"}
    if name == "logprobs":
        assert len(through.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3


@pytest.mark.parametrize("usage", [None, {"include_usage": True}, {"include_usage": False}], ids=["", "usage", "none"])
@pytest.mark.parametrize("name", ANSWERED)
async def test_a_stream_is_the_engines_own(sides: tuple[Side, Side], name: str, usage: dict[str, Any] | None) -> None:
    asked = {**ANSWERED[name], "stream": True, **({} if usage is None else {"stream_options": usage})}
    through, straight = [await side.post(asked) for side in sides]
    assert (through.status_code, straight.status_code) == (200, 200), (through.text, straight.text)
    assert folded(events(through.text)) == folded(events(straight.text))
    reported = [chunk for chunk in events(through.text) if chunk.get("usage")]
    assert bool(reported) is bool(usage and usage["include_usage"])
    assert through.headers["content-type"] == straight.headers["content-type"]


@pytest.mark.parametrize("path", OTHER_ROUTES)
async def test_the_other_routes_answer_with_the_engines_body(sides: tuple[Side, Side], path: str) -> None:
    for asked in (OTHER_ROUTES[path], {"model": ENDPOINT}):
        through, straight = [await side.post(asked, path) for side in sides]
        assert (through.status_code, without_names(through.json())) == (
            straight.status_code,
            without_names(straight.json()),
        )
    assert (await sides[0].post(OTHER_ROUTES[path], path)).status_code == 200


@pytest.mark.parametrize("name", REFUSED)
async def test_what_the_engine_refuses_is_refused_with_its_words(sides: tuple[Side, Side], name: str) -> None:
    kind, asked = REFUSED[name]
    raised = []
    for side in sides:
        with pytest.raises(openai.APIStatusError) as error:
            await side.client.post("/chat/completions", body=asked, cast_to=object)
        raised.append(error.value)
    through, straight = raised
    assert type(through) is type(straight) is kind
    assert through.status_code == straight.status_code
    assert without_names(through.response.json()) == without_names(straight.response.json())


async def test_an_unknown_model_and_a_wrong_key_raise_the_same(sides: tuple[Side, Side]) -> None:
    """The router answers these by itself: status and exception are the engine's, the words are the router's."""
    for side in sides:
        with pytest.raises(openai.NotFoundError) as unknown:
            await side.client.chat.completions.create(**{**chat("Hello"), "model": "no-such-model"})
        assert unknown.value.status_code == 404
        with pytest.raises(openai.AuthenticationError) as wrong:
            await side.client.with_options(api_key="wrong").chat.completions.create(**chat("Hello"))
        assert wrong.value.status_code == 401
        for content in (b"{", b"", b"[]", b'{"model": "tiny"'):
            answer = await side.send(content)
            assert answer.status_code == 400, content
            assert "error" in answer.json()


async def test_the_client_reads_both_alike(sides: tuple[Side, Side]) -> None:
    """By the `openai` client's own classes, streaming and not."""
    texts = []
    for side in sides:
        asked = chat("Which engine does XIM use?", max_tokens=64)
        answer = await side.client.chat.completions.create(**asked)
        stream = await side.client.chat.completions.create(**asked, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(pieces) == answer.choices[0].message.content
        texts.append(answer.choices[0].message.content)
    assert texts[0] == texts[1]
