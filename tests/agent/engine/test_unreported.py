"""What is asked of /tokenize about a request without a report: its prompt as it was sent, and what its client read."""

import json

import pytest

from xim_agent.engine.unreported import COUNTED_PATHS, unknown_of
from xim_protocol.routes import ROUTES, TerminalEvent

CHAT, COMPLETION, RESPONSE, MESSAGE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
SAID = [{"role": "user", "content": "hello"}]


def asked(path: str, **fields: object) -> object:
    """The questions about the prompt, and how many tokens are known without; None where nothing can be asked."""
    unknown = unknown_of(path, json.dumps(fields).encode(), [])
    return None if unknown is None else (unknown.known_prompt_tokens, [dict(each) for each in unknown.prompt])


def read(*events: object, cut: int = 0, path: str = CHAT) -> list[object]:
    """The texts that are asked about, after a client read these events, the last `cut` bytes left out."""
    stream = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    stream = stream[: len(stream) - cut]
    body = {"messages": SAID, "prompt": "hello"}
    unknown = unknown_of(path, json.dumps(body).encode(), [stream[at : at + 7] for at in range(0, len(stream), 7)])
    assert unknown is not None
    assert all(each["add_special_tokens"] is False for each in unknown.answer)
    return [each["prompt"] for each in unknown.answer]


def delta(index: int = 0, **said: object) -> dict[str, object]:
    return {"choices": [{"index": index, "delta": said}]}


def test_the_routes_that_stream_are_the_ones_that_can_be_counted() -> None:
    assert {route.path for route in ROUTES if route.terminal is not TerminalEvent.NONE} == COUNTED_PATHS


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (
            CHAT,
            {"messages": SAID, "tools": [{"type": "function"}], "temperature": 1, "chat_template": None},
            (0, [{"messages": SAID, "tools": [{"type": "function"}]}]),
        ),
        (COMPLETION, {"prompt": "hello"}, (0, [{"prompt": "hello", "add_special_tokens": True}])),
        (
            COMPLETION,
            {"prompt": ["a", "b"], "add_special_tokens": False},
            (0, [{"prompt": text, "add_special_tokens": False} for text in "ab"]),
        ),
        (COMPLETION, {"prompt": [1, 2, 3]}, (3, [])),
        (COMPLETION, {"prompt": [[1, 2, 3], [4]]}, (4, [])),
        (RESPONSE, {"input": "hello"}, (0, [{"messages": SAID}])),
        (
            RESPONSE,
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}], "instructions": "be"},
            (0, [{"messages": [{"role": "system", "content": "be"}, *SAID]}]),
        ),
        (
            MESSAGE,
            {"messages": SAID, "system": [{"type": "text", "text": "be"}], "max_tokens": 5},
            (0, [{"messages": [{"role": "system", "content": "be"}, *SAID]}]),
        ),
    ],
)
def test_the_prompt_is_asked_about_as_it_was_sent(path: str, fields: dict[str, object], expected: object) -> None:
    assert asked(path, **fields) == expected


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"prompt": "no messages"}),
        (COMPLETION, {"prompt": "hello", "echo": True}),
        (COMPLETION, {"prompt": ""}),
        (COMPLETION, {"prompt": {"a": 1}}),
        (RESPONSE, {"input": "hello", "previous_response_id": "resp_1"}),
        (RESPONSE, {"input": "hello", "tools": [{}]}),
        (RESPONSE, {"input": [{"type": "function_call_output", "output": "x"}]}),
        (MESSAGE, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
        (MESSAGE, {"messages": "hello"}),
        ("/v1/embeddings", {"input": "hello"}),
    ],
)
def test_a_prompt_that_cannot_be_asked_about_the_same_way_is_not_counted(path: str, fields: dict[str, object]) -> None:
    assert asked(path, **fields) is None


def test_a_body_that_is_no_object_is_not_counted() -> None:
    assert [unknown_of(CHAT, body, []) for body in (b"", b"[1]", b"[" * 100_000)] == [None] * 3


def test_what_the_client_read_is_put_together_by_choice() -> None:
    events = [delta(0, role="assistant", content=""), delta(0, content="To "), delta(1, content="Not "), delta(0)]
    assert read(*events, delta(0, content="be"), delta(1, content="to be")) == ["To be", "Not to be"]


def test_of_an_event_that_was_cut_off_nothing_counts() -> None:
    assert read(delta(content="whole"), delta(content="cut off"), cut=9) == ["whole"]
    assert read() == []


def test_thoughts_refusals_and_calls_of_tools_are_tokens_too() -> None:
    called = {"index": 0, "function": {"name": "look", "arguments": "{}"}}
    events = [delta(reasoning="hm "), delta(reasoning_content="so "), delta(refusal="no "), delta(tool_calls=[called])]
    assert read(*events) == ["hm so no look{}"]


def test_the_other_routes_say_theirs_in_events_of_their_own() -> None:
    completion = [{"choices": [{"index": 0, "text": text}]} for text in ("To ", "be")]
    assert read(*completion, path=COMPLETION) == ["To be"]
    response = [{"type": "response.output_text.delta", "delta": "To "}, {"type": "response.output_text.done"}]
    assert read(*response, {"type": "response.reasoning_text.delta", "delta": "be"}) == ["To be"]
    blocks = [{"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}} for text in ("To ", "be")]
    assert read(
        {"type": "message_start"}, *blocks, {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
    ) == ["To be"]
