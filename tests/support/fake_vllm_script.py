"""What one request to the fake engine does: how much it answers, how fast, and how it fails.

A script is the engine's defaults (`--fake-...` flags), overridden by the request itself. A request carries its
script as a JSON object in the body's `user` field, or after the word `fake:` at the start of its last user text
(`messages`, `prompt` or `input`, whichever the route has; /tokenize reads `user` alone):

    {"role": "user", "content": "fake:{\"chunks\": 64, \"interval_ms\": 10, \"seed\": 7}"}

All functions are pure. The text of every answer is a prefix of `expected_text`, so a client can check each byte.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

PREFIX = "fake:"

# Texts are cut from blocks of this many characters; the cache holds a few thousand of them.
_BLOCK_CHARS = 4096
_WORDS = [f"{word:x}" for word in range(_BLOCK_CHARS // 6 + 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """One answer, described. Counts of chunks are counts of writes: one write per step of the engine."""

    chunks: int = 16
    """Content events of a stream (per choice); the length of a whole answer, in the same measure."""
    chunk_bytes: int = 216
    """Size of one content event in bytes, HTTP framing apart; the text is cut to fit (at least one character)."""
    text_chars: int | None = None
    """Characters of text in one content event; overrides `chunk_bytes`."""
    interval_ms: float = 10.0
    """Time between two steps; 0 writes as fast as the client reads."""
    spread_ms: float = 0.0
    """Time within a step over which its streams are written one after the other; 0 writes all at once."""
    first_ms: float = 0.0
    """Time before the first content event, or before the whole of an answer that is no stream."""
    seed: int = 0
    """Chooses the text; choice `i` of `n` uses `seed + i`."""
    body_bytes: int | None = None
    """Exact size of the body of an answer that is no stream (or the least possible, if that is more)."""
    echo: bool = False
    """Answer with the JSON of the request as the engine received it, instead of a generated text."""
    status: int = 200
    """Anything else is answered at once as an error of that status, in vLLM's form."""
    hang: bool = False
    """Accept the request and never answer anything."""
    hang_after: int | None = None
    """Stop writing after so many chunks, and keep the connection open."""
    die_after: int | None = None
    """Exit the whole process, without any clean-up, after so many chunks (0: before the answer starts)."""
    reset_after: int | None = None
    """Reset the connection after so many chunks (0: before the answer starts)."""
    error_event_after: int | None = None
    """End the stream after so many chunks with an error event and `[DONE]`, as vLLM does when its core dies."""
    truncate: bool = False
    """Leave out the finish reason, the usage and the terminal event; the HTTP body still ends in order."""


class ScriptError(ValueError):
    """The request's script cannot be used; the message says what is wrong with it."""


def script_of(body: Mapping[str, Any], defaults: Script) -> Script:
    """The script of a request with this JSON body: `defaults` where the request says nothing.

    `max_tokens` (in any of its spellings) counts as `chunks` for a request without a script of its own.
    Raises: ScriptError on an object that is not JSON, an unknown key or a value of the wrong type.
    """
    limit = token_limit(body)
    written = _written_in(body)
    if written is None:
        return defaults if limit is None else replace(defaults, chunks=limit)
    try:
        overrides = json.loads(written)
    except ValueError as error:
        raise ScriptError(f"the script is not JSON: {error}") from error
    if not isinstance(overrides, dict):
        raise ScriptError("the script is not a JSON object")
    if limit is not None:
        overrides.setdefault("chunks", limit)
    return replace(defaults, **{key: _checked(key, value) for key, value in overrides.items()})


def token_limit(body: Mapping[str, Any]) -> int | None:
    """The most tokens the request asks for, under the name its route gives it."""
    for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
        value = body.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None


def expected_text(seed: int, length: int) -> str:
    """The first `length` characters of the text of `seed`: numbered words, no two alike.

    A lost, repeated or misplaced piece of it shows at once. ASCII only, nothing in it is escaped in JSON.
    """
    blocks = (length + _BLOCK_CHARS - 1) // _BLOCK_CHARS
    return "".join(_block(seed, block) for block in range(blocks))[:length]


@lru_cache(maxsize=2048)
def _block(seed: int, number: int) -> str:
    start = f"{seed:x}.{number:x}."
    return (start + f" {start}".join(_WORDS) + " ")[:_BLOCK_CHARS]


def _written_in(body: Mapping[str, Any]) -> str | None:
    user = body.get("user")
    if isinstance(user, str) and user.lstrip().startswith("{"):
        return user
    text = _last_user_text(body)
    return text.removeprefix(PREFIX) if text.startswith(PREFIX) else None


def _last_user_text(body: Mapping[str, Any]) -> str:
    for name in ("messages", "input", "prompt", "query", "text_1"):
        value = body.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return _text_of_list(value)
    return ""


def _text_of_list(items: list[Any]) -> str:
    """The text of the last user message (or of a plain string) in a list of messages, parts or prompts."""
    for item in reversed(items):
        if isinstance(item, str):
            return item
        if isinstance(item, dict) and item.get("role", "user") == "user":
            content = item.get("content", item.get("text", ""))
            return content if isinstance(content, str) else _text_of_list(content or [])
    return ""


# By the defaults of Script, the one place where keys are declared; what has no default is a count.
_TYPES: dict[str, tuple[type, ...]] = {
    key: {"bool": (bool,), "float": (int, float)}.get(type(value).__name__, (int,))
    for key, value in asdict(Script()).items()
}


def _checked(key: str, value: object) -> Any:
    if key not in _TYPES:
        raise ScriptError(f"unknown key {key!r}; known are {', '.join(_TYPES)}")
    wanted = _TYPES[key]
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise ScriptError(f"{key} must be {' or '.join(kind.__name__ for kind in wanted)}, not {value!r}")
    if not isinstance(value, bool) and isinstance(value, (int, float)) and value < 0:
        raise ScriptError(f"{key} must not be negative")
    return value
