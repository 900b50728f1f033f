"""What the tokens of a request are counted from when its stream ended without the engine's report: its body, and what
its client was given. Everything here is pure, and too slow for the loop: it belongs in a thread.

vLLM's own `/tokenize` counts. What it cannot be asked the way the request was is not counted at all.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_CHAT_FIELDS = (
    *("messages", "tools", "add_generation_prompt", "continue_final_message", "add_special_tokens"),
    *("chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs"),
)
"""What `/tokenize` of vLLM 0.32 takes of a chat request, under the same names."""
_SPOKEN = ("content", "reasoning", "reasoning_content", "refusal")
_SPOKEN_IN_BLOCKS = ("text", "thinking", "partial_json")
_EVENT_END = b"\n\n"
# Tuples are made of lists below: of a generator they begin longer than they end (the codec of xim_protocol says more).

Question = Mapping[str, object]
"""The body of one `/tokenize`, without the model's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """What is to be asked for one request."""

    known_prompt_tokens: int
    """The client sent so many token ids itself."""
    prompt: tuple[Question, ...]
    answer: tuple[Question, ...]


def unknown_of(path: str, body: bytes, delivered: Sequence[bytes]) -> Unknown | None:
    """What to ask about a request of `path`; None where `/tokenize` cannot be asked for the same prompt.

    `delivered` are the pieces of its event stream, in order, cut anywhere.
    """
    try:
        fields = json.loads(body)
        found = _PROMPTS[path](fields) if path in _PROMPTS and isinstance(fields, dict) else None
    except (ValueError, TypeError, RecursionError):
        return None
    if found is None:
        return None
    tokens, questions = found
    texts = texts_of(b"".join(delivered))
    return Unknown(
        known_prompt_tokens=tokens,
        prompt=questions,
        answer=tuple([{"prompt": text, "add_special_tokens": False} for text in texts]),
    )


# --- The prompt ----------------------------------------------------------------------------------------------------

_Asked = tuple[int, tuple[Question, ...]]


def _chat(fields: Mapping[str, object]) -> _Asked | None:
    question = {name: fields[name] for name in _CHAT_FIELDS if fields.get(name) is not None}
    return (0, (question,)) if "messages" in question else None


def _completion(fields: Mapping[str, object]) -> _Asked | None:
    prompt = fields.get("prompt")
    if fields.get("echo") or isinstance(prompt, Mapping) or not prompt:
        return None  # with echo the answer repeats the prompt
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    special = fields.get("add_special_tokens", True)
    tokens = sum(len(each) for each in prompts if isinstance(each, list))
    texts = [each for each in prompts if isinstance(each, str)]
    return tokens, tuple([{"prompt": text, "add_special_tokens": special} for text in texts])


def _response(fields: Mapping[str, object]) -> _Asked | None:
    if fields.get("tools") or fields.get("previous_response_id"):
        return None
    sent = fields.get("input")
    messages = [{"role": "user", "content": sent}] if isinstance(sent, str) else sent
    return _conversation(fields.get("instructions"), messages)


def _message(fields: Mapping[str, object]) -> _Asked | None:
    return None if fields.get("tools") else _conversation(fields.get("system"), fields.get("messages"))


def _conversation(system: object, messages: object) -> _Asked | None:
    """Messages whose contents are text, as those of a chat."""
    if not isinstance(messages, list):
        return None
    first = [] if system is None else [{"role": "system", "content": system}]
    said = []
    for message in [*first, *messages]:
        text = _text(message.get("content")) if isinstance(message, Mapping) else None
        if text is None:
            return None
        said.append({"role": message.get("role"), "content": text})
    return 0, ({"messages": said},)


def _text(content: object) -> str | None:
    """The text of a content, None where it is anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    return None if None in texts else "".join(str(text) for text in texts)


_PROMPTS = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _response,
    "/v1/messages": _message,
}

COUNTED_PATHS = frozenset(_PROMPTS)
"""The routes whose answers may end without a report."""


# --- The answer ----------------------------------------------------------------------------------------------------


def texts_of(events: bytes) -> list[str]:
    """What a stream's events say, one text for each choice; an event that was cut off says nothing."""
    said: dict[object, list[str]] = {}
    for event in events.split(_EVENT_END):
        for choice, text in _pieces(_fields(event)):
            said.setdefault(choice, []).append(text)
    return ["".join(pieces) for pieces in said.values()]


def _fields(event: bytes) -> Mapping[str, object]:
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            try:
                fields = json.loads(line[5:])
            except (ValueError, RecursionError):
                break
            return fields if isinstance(fields, dict) else {}
    return {}


def _pieces(fields: Mapping[str, object]) -> Iterator[tuple[object, str]]:
    choices = fields.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        delta = choice.get("delta") or {"content": choice.get("text")}
        for text in (*(delta.get(name) for name in _SPOKEN), *_called(delta)):
            if isinstance(text, str) and text:
                yield choice.get("index"), text
    delta = fields.get("delta")
    if isinstance(delta, str) and str(fields.get("type")).endswith(".delta"):
        yield 0, delta
    elif isinstance(delta, Mapping) and fields.get("type") == "content_block_delta":
        yield from ((0, text) for name in _SPOKEN_IN_BLOCKS if isinstance(text := delta.get(name), str))


def _called(delta: Mapping[str, object]) -> Iterator[object]:
    """What a chat's delta says of calls of tools."""
    calls = delta.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") or {}
        yield from (function.get("name"), function.get("arguments"))
