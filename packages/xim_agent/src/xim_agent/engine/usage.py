"""Reads the usage that the engine reports, and takes the report out where the client did not ask for it.

vLLM's report is one event of its own before `[DONE]`, with `"choices":[]`. Asking for it changes one thing more (vLLM
0.32, `serving.py` of chat completions and completions): `system_fingerprint`, a constant of the engine, then stands in
the report and no longer in each choice's last event. So it is put back there, and the stream is byte for byte what the
client would get from vLLM itself. Ordinary events are never parsed: three searches of a chunk's bytes decide.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from xim_protocol.messages import Usage

MARK = b'"usage":{'
"""In text that a model wrote the quotes are escaped, so it does not occur there."""
LAST = b'"finish_reason":"'
"""In a choice's last event; in all others it is null."""
EVENT_END = b"\n\n"
REPORT_BYTES = 64 * 1024
"""A report is a few hundred bytes, a last event with many logprobs some thousand; what is longer is not held back."""
KEPT_BYTES = 1024 * 1024
"""An event or a body longer than this is not read for its usage; usage is then unknown."""
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenUsage:
    """Tokens of one request as the engine counted them."""

    prompt: int
    completion: int
    cached: int | None
    """Prompt tokens found in the prefix cache; None when the engine does not say."""

    def for_wire(self) -> Usage:
        """As `End` carries it."""
        return (self.prompt, self.completion, self.cached or 0, "engine")


class UsageReader(Protocol):
    """Sees every byte of one answer."""

    def feed(self, data: bytes) -> bytes:
        """What of `data`, and of what was held back before, goes to the client now; may be empty."""
        ...

    def finish(self) -> bytes:
        """What was still held back when the answer ended."""
        ...

    def usage(self) -> TokenUsage | None:
        """The report, once the answer has ended; None when there was none."""
        ...


def usage_reader(content_type: str, *, take_out: bool, fingerprint: str | None = None) -> UsageReader:
    """The reader for an answer of this content type; `take_out` removes the report from an event stream.

    `fingerprint` is the engine's `system_fingerprint`, None where it gives none.
    """
    if content_type.startswith("text/event-stream"):
        return _ReportTaker(fingerprint) if take_out else _StreamReader()
    return _BodyReader()


class _ReportTaker:
    """Takes the report out. Holds back an unfinished event only while it may still become the report."""

    __slots__ = ("_held", "_passing", "_stamp", "_usage")

    def __init__(self, fingerprint: str | None) -> None:
        self._stamp = b"" if fingerprint is None else _stamp(fingerprint)
        self._held = b""
        self._passing = False
        self._usage: TokenUsage | None = None

    def feed(self, data: bytes) -> bytes:
        if not self._held and not self._passing and data.endswith(EVENT_END) and MARK not in data and LAST not in data:
            return data  # whole events, none of them special: nearly every chunk
        return self._sort_out(data)

    def finish(self) -> bytes:
        held, self._held = self._held, b""
        return held

    def usage(self) -> TokenUsage | None:
        return self._usage

    def _sort_out(self, data: bytes) -> bytes:
        buffer = self._held + data
        self._held = b""
        out = bytearray()
        if self._passing:
            buffer = self._pass(buffer, out)
        *events, rest = buffer.split(EVENT_END)
        for event in events:
            if not self._is_report(event):
                out += self._stamped(event) + EVENT_END
        if self._passing or len(rest) > REPORT_BYTES:
            self._passing = True
            rest = self._pass(rest, out)
        self._held = rest
        return bytes(out)

    def _pass(self, buffer: bytes, out: bytearray) -> bytes:
        """Pass on an event too long to be the report, as far as it has come; what follows it."""
        end = buffer.find(EVENT_END)
        self._passing = end < 0
        # Of an event without its end, a last line feed may be half of that end: it alone is held.
        cut = end + len(EVENT_END) if end >= 0 else len(buffer) - buffer.endswith(b"\n")
        out += buffer[:cut]
        return buffer[cut:]

    def _stamped(self, event: bytes) -> bytes:
        if self._stamp and LAST in event and event.endswith(b"}") and b'"system_fingerprint"' not in event:
            return event[:-1] + self._stamp
        return event

    def _is_report(self, event: bytes) -> bool:
        if MARK not in event:
            return False
        fields = _event_fields(event)
        if fields is None or fields.get("choices") != []:
            return False
        usage = usage_of(fields)
        if usage is None:
            return False
        self._usage = usage
        return True


@functools.lru_cache(maxsize=16)
def _stamp(fingerprint: str) -> bytes:
    """What ends a choice's last event in the place of its `}`; one engine has one."""
    return b',"system_fingerprint":' + json.dumps(fingerprint).encode() + b"}"


class _StreamReader:
    """Passes everything on at once and keeps the last event with usage in it, to be parsed at the end."""

    __slots__ = ("_last", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._last = b""

    def feed(self, data: bytes) -> bytes:
        if not self._rest and data.endswith(EVENT_END) and MARK not in data:
            return data
        *events, rest = (self._rest + data).split(EVENT_END)
        for event in events:
            if MARK in event:
                self._last = event
        self._rest = rest if len(rest) <= KEPT_BYTES else b""
        return data

    def finish(self) -> bytes:
        return b""

    def usage(self) -> TokenUsage | None:
        fields = _event_fields(self._last)
        return None if fields is None else usage_of(fields)


class _BodyReader:
    """An answer that is one JSON object."""

    __slots__ = ("_body", "_too_long")

    def __init__(self) -> None:
        self._body = bytearray()
        self._too_long = False

    def feed(self, data: bytes) -> bytes:
        if len(self._body) + len(data) > KEPT_BYTES:
            self._too_long = True
            self._body.clear()
        elif not self._too_long:
            self._body += data
        return data

    def finish(self) -> bytes:
        return b""

    def usage(self) -> TokenUsage | None:
        if MARK not in self._body:
            return None
        fields = _object(self._body)
        return None if fields is None else usage_of(fields)


def usage_of(fields: Mapping[str, object]) -> TokenUsage | None:
    """The usage of a parsed body or event, in whichever of the engine's forms; None when there is none."""
    for holder in (fields, fields.get("response"), fields.get("message")):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if isinstance(usage, dict):
            return _counts(usage)
    return None


def _counts(usage: Mapping[str, object]) -> TokenUsage | None:
    """Chat and completions say prompt_tokens, the Responses and Messages APIs input_tokens."""
    prompt = _count(usage, "prompt_tokens", "input_tokens")
    if prompt is None:
        return None
    details = usage.get("prompt_tokens_details", usage.get("input_tokens_details"))
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else None
    if cached is None:
        cached = _count(usage, "cache_read_input_tokens")
    completion = _count(usage, "completion_tokens", "output_tokens")
    return TokenUsage(prompt=prompt, completion=completion or 0, cached=cached)


def _count(fields: Mapping[str, object], *names: str) -> int | None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def _event_fields(event: bytes) -> Mapping[str, object] | None:
    """The JSON object of an event's data line."""
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            return _object(line[5:])
    return None


def _object(data: bytes | bytearray) -> Mapping[str, object] | None:
    try:
        fields = _decode(data)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
