"""The four generating routes, as vLLM writes them: each a way to say the same reply.

A `Dialect` turns a `Reply` into server-sent events (an opening, pieces of text, a closing) or into one JSON body.
All functions are pure.
"""

import json
from dataclasses import dataclass
from typing import Any, Protocol

JSON = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What is said, whatever the form: `texts` holds one text per choice, `pieces` the number of events for each."""

    id: str
    model: str
    created: int
    texts: tuple[str, ...]
    pieces: int
    prompt_tokens: int
    finish_reason: str
    include_usage: bool

    @property
    def completion_tokens(self) -> int:
        """A token is a piece here; a real engine may put none or several into one event."""
        return self.pieces * len(self.texts)

    @property
    def usage(self) -> JSON:
        """Usage in the form of chat completions and completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": None,
        }

    @property
    def usage_in_out(self) -> JSON:
        """Usage in the form of responses and messages."""
        return {"input_tokens": self.prompt_tokens, "output_tokens": self.completion_tokens}


class Dialect(Protocol):
    """One generating route."""

    id_prefix: str

    def opening(self, reply: Reply) -> list[bytes]:
        """Events before the first text."""
        ...

    def frame(self, reply: Reply, choice: int) -> tuple[bytes, bytes]:
        """What stands before and after the JSON string of a piece of text in the event that carries it."""
        ...

    def closing(self, reply: Reply) -> list[bytes]:
        """Events after the last text; the last one is the terminal event of the route."""
        ...

    def whole(self, reply: Reply) -> JSON:
        """The body of an answer that is no stream."""
        ...


def encoded(value: object) -> bytes:
    """JSON as compact as vLLM writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def event(value: object, name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encoded(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
_HOLE = "\x00"


def _split(body: bytes) -> tuple[bytes, bytes]:
    """The two sides of the text `_HOLE` in an encoded event."""
    before, _, after = body.partition(encoded(_HOLE))
    return before, after


class Chat:
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl-"

    def _chunk(self, reply: Reply, choices: list[JSON], **more: object) -> bytes:
        head = {"id": reply.id, "object": "chat.completion.chunk", "created": reply.created, "model": reply.model}
        return event({**head, "choices": choices, **more})

    def _choice(self, index: int, delta: JSON, finish: str | None = None) -> JSON:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def opening(self, reply: Reply) -> list[bytes]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(reply, [self._choice(index, delta)]) for index in range(len(reply.texts))]

    def frame(self, reply: Reply, choice: int) -> tuple[bytes, bytes]:
        return _split(self._chunk(reply, [self._choice(choice, {"content": _HOLE})]))

    def closing(self, reply: Reply) -> list[bytes]:
        ends = [
            self._chunk(reply, [self._choice(index, {"content": ""}, reply.finish_reason)])
            for index in range(len(reply.texts))
        ]
        usage = [self._chunk(reply, [], usage=reply.usage)] if reply.include_usage else []
        return [*ends, *usage, DONE]

    def whole(self, reply: Reply) -> JSON:
        choices: list[JSON] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None, "tool_calls": []},
                "logprobs": None,
                "finish_reason": reply.finish_reason,
                "stop_reason": None,
            }
            for index, text in enumerate(reply.texts)
        ]
        head = {"id": reply.id, "object": "chat.completion", "created": reply.created, "model": reply.model}
        return {**head, "choices": choices, "usage": reply.usage, "prompt_logprobs": None}


class Completion:
    """POST /v1/completions."""

    id_prefix = "cmpl-"

    def _body(self, reply: Reply, choices: list[JSON], **more: object) -> JSON:
        head = {"id": reply.id, "object": "text_completion", "created": reply.created, "model": reply.model}
        return {**head, "choices": choices, **more}

    def _choice(self, index: int, text: str, finish: str | None = None) -> JSON:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}

    def opening(self, reply: Reply) -> list[bytes]:
        return []

    def frame(self, reply: Reply, choice: int) -> tuple[bytes, bytes]:
        return _split(event(self._body(reply, [self._choice(choice, _HOLE)])))

    def closing(self, reply: Reply) -> list[bytes]:
        ends = [
            event(self._body(reply, [self._choice(index, "", reply.finish_reason)]))
            for index in range(len(reply.texts))
        ]
        usage = [event(self._body(reply, [], usage=reply.usage))] if reply.include_usage else []
        return [*ends, *usage, DONE]

    def whole(self, reply: Reply) -> JSON:
        choices = [self._choice(index, text, reply.finish_reason) for index, text in enumerate(reply.texts)]
        return self._body(reply, choices, usage=reply.usage)


class Responses:
    """POST /v1/responses. One choice only; the stream ends with `response.completed`."""

    id_prefix = "resp_"

    def _response(self, reply: Reply, status: str, output: list[JSON], usage: JSON | None) -> JSON:
        return {
            "id": reply.id,
            "created_at": reply.created,
            "model": reply.model,
            "object": "response",
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "status": status,
            "usage": usage,
        }

    def _item(self, reply: Reply, status: str, content: list[JSON]) -> JSON:
        return {"id": f"msg_{reply.id}", "content": content, "role": "assistant", "status": status, "type": "message"}

    def _part(self, text: str) -> JSON:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}

    def _usage(self, reply: Reply) -> JSON:
        details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        return {
            **reply.usage_in_out,
            **details,
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        }

    def _event(self, kind: str, number: int, **more: object) -> bytes:
        return event({"type": kind, "sequence_number": number, **more}, kind)

    def opening(self, reply: Reply) -> list[bytes]:
        begun = self._response(reply, "in_progress", [], None)
        item, where = self._item(reply, "in_progress", []), {"item_id": f"msg_{reply.id}", "output_index": 0}
        return [
            self._event("response.created", 0, response=begun),
            self._event("response.in_progress", 1, response=begun),
            self._event("response.output_item.added", 2, item=item, output_index=0),
            self._event("response.content_part.added", 3, **where, content_index=0, part=self._part("")),
        ]

    def frame(self, reply: Reply, choice: int) -> tuple[bytes, bytes]:
        # The sequence number stays 4: a number per event would cost an encoding per event.
        where = {"item_id": f"msg_{reply.id}", "output_index": choice, "content_index": 0}
        return _split(self._event("response.output_text.delta", 4, **where, delta=_HOLE, logprobs=[]))

    def closing(self, reply: Reply) -> list[bytes]:
        text = reply.texts[0]
        where = {"item_id": f"msg_{reply.id}", "output_index": 0, "content_index": 0}
        item = self._item(reply, "completed", [self._part(text)])
        done = self._response(reply, "completed", [item], self._usage(reply))
        return [
            self._event("response.output_text.done", 5, **where, text=text, logprobs=[]),
            self._event("response.content_part.done", 6, **where, part=self._part(text)),
            self._event("response.output_item.done", 7, item=item, output_index=0),
            self._event("response.completed", 8, response=done),
        ]

    def whole(self, reply: Reply) -> JSON:
        item = self._item(reply, "completed", [self._part(reply.texts[0])])
        return self._response(reply, "completed", [item], self._usage(reply))


class Messages:
    """POST /v1/messages, in Anthropic's form. One choice only; the stream ends with `message_stop`."""

    id_prefix = "msg_"

    def _message(self, reply: Reply, content: list[JSON], stop: str | None, usage: JSON) -> JSON:
        return {
            "id": reply.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": reply.model,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": usage,
        }

    def _stop_reason(self, reply: Reply) -> str:
        return "max_tokens" if reply.finish_reason == "length" else "end_turn"

    def opening(self, reply: Reply) -> list[bytes]:
        usage = {"input_tokens": reply.prompt_tokens, "output_tokens": 0}
        block = {"type": "text", "text": ""}
        begun = {"type": "message_start", "message": self._message(reply, [], None, usage)}
        return [
            event(begun, "message_start"),
            event({"type": "content_block_start", "index": 0, "content_block": block}, "content_block_start"),
        ]

    def frame(self, reply: Reply, choice: int) -> tuple[bytes, bytes]:
        delta = {"type": "text_delta", "text": _HOLE}
        return _split(event({"type": "content_block_delta", "index": choice, "delta": delta}, "content_block_delta"))

    def closing(self, reply: Reply) -> list[bytes]:
        delta = {"stop_reason": self._stop_reason(reply), "stop_sequence": None}
        end = {"type": "message_delta", "delta": delta, "usage": reply.usage_in_out}
        return [
            event({"type": "content_block_stop", "index": 0}, "content_block_stop"),
            event(end, "message_delta"),
            event({"type": "message_stop"}, "message_stop"),
        ]

    def whole(self, reply: Reply) -> JSON:
        content = [{"type": "text", "text": reply.texts[0]}]
        return self._message(reply, content, self._stop_reason(reply), reply.usage_in_out)
