"""A client for many streams at once that checks every byte of every one of them.

The engine's stand-in answers with the text of a seed (`expected_text`); each event is compared as it comes, so that
four thousand streams need no memory for what they read. What a client may see in the end is one of `Ending`.
"""

import asyncio
import json
import resource
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, cast

import httptools

from tests.support.fake_vllm_script import expected_text
from tests.support.http_client import request_bytes

HOST = "127.0.0.1"


class Ending(StrEnum):
    """How one request ended, as its client sees it."""

    WHOLE = "whole"
    """Every byte and the terminal event came, and nothing after it."""
    HTTP_ERROR = "http_error"
    ERROR_EVENT = "error_event"
    """What came was right as far as it went; then an error event, and no terminal event."""
    CUT = "cut"
    """The connection closed before the body's end."""
    TRUNCATED = "truncated"
    """The body ended in order without its terminal event. Never right."""
    WRONG = "wrong"
    """A byte was not the expected one, or there were too many or too few. Never right."""


@dataclass(kw_only=True, eq=False)
class Reading:
    """What one client saw."""

    ending: Ending | None = None
    status: int = 0
    code: str = ""
    """Of an error answer or an error event."""
    ids: set[str] = field(default_factory=set)
    """The ids that the engine put into the events; one, unless streams were mixed."""
    received: int = 0
    """Characters of text, over all choices."""
    pings: int = 0
    wrong: str = ""
    """The first thing that was not right."""
    first_at: float = 0.0
    """When the first text came, by the loop's clock."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between one read with text and the next, where asked for."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """How a request of a route is made, and how its answers carry text."""

    path: str
    body: Callable[[str], dict[str, Any]]
    """From the script's text."""
    pieces: Callable[[Any], Iterable[tuple[int, str]]]
    """Choice and text of an event's data."""
    whole: Callable[[Any], Sequence[str]]
    """The texts of an answer that is no stream."""
    ends: Callable[[Any], bool] = lambda data: False
    """Whether an event's data is the terminal one; `[DONE]` always is."""


def _choices(data: Any, of: Callable[[Any], str | None]) -> Iterable[tuple[int, str]]:
    return [(choice["index"], of(choice) or "") for choice in data.get("choices", ())]


CHAT = Route(
    path="/v1/chat/completions",
    body=lambda text: {"messages": [{"role": "user", "content": text}]},
    pieces=lambda data: _choices(data, lambda choice: choice["delta"].get("content")),
    whole=lambda data: [choice["message"]["content"] for choice in data["choices"]],
)
COMPLETIONS = Route(
    path="/v1/completions",
    body=lambda text: {"prompt": text},
    pieces=lambda data: _choices(data, lambda choice: choice["text"]),
    whole=lambda data: [choice["text"] for choice in data["choices"]],
)
RESPONSES = Route(
    path="/v1/responses",
    body=lambda text: {"input": text},
    pieces=lambda data: [(0, data["delta"])] if data.get("type") == "response.output_text.delta" else [],
    whole=lambda data: [part["text"] for item in data["output"] for part in item.get("content", ())],
    ends=lambda data: data.get("type") == "response.completed",
)
MESSAGES = Route(
    path="/v1/messages",
    body=lambda text: {"max_tokens": 100_000, "messages": [{"role": "user", "content": text}]},
    pieces=lambda data: [(0, data["delta"].get("text", ""))] if data.get("type") == "content_block_delta" else [],
    whole=lambda data: [part["text"] for part in data["content"]],
    ends=lambda data: data.get("type") == "message_stop",
)
GENERATING = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)


@lru_cache(maxsize=256)
def _text(seed: int, length: int) -> str:
    return expected_text(seed, length)


class Client(asyncio.Protocol):
    """One request on a connection of its own; `done` is set when its end is known."""

    def __init__(self, request: bytes, route: Route, *, stream: bool, seed: int, chars: int, timed: bool) -> None:
        self.reading = Reading()
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Reading] = loop.create_future()
        self.begun: asyncio.Future[None] = loop.create_future()
        """Set with the first text."""
        self._now = loop.time
        self._request, self._route, self._stream = request, route, stream
        self._seed, self._chars, self._timed = seed, chars, timed
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._offsets: dict[int, int] = {}
        self._rest = b""
        self._complete = self._terminal = False
        self._last = 0.0

    def leave(self) -> None:
        """Close the connection now, as a client that lost interest."""
        if self._transport is not None:
            self._transport.abort()

    def half_close(self) -> None:
        """Say that nothing more will be sent, and go on reading."""
        assert self._transport is not None
        self._transport.write_eof()

    # -- asyncio ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._is_wrong(f"no HTTP: {error!r}")

    def eof_received(self) -> None:
        self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.done.done():
            self._finish()

    # -- httptools ----------------------------------------------------------------------------------------------

    def on_status(self, status: bytes) -> None:
        self.reading.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._rest += body
        if not self._stream or self._parser.get_status_code() != 200:
            return
        before = self.reading.received
        *events, self._rest = self._rest.split(b"\n\n")
        for event in events:
            self._event(event)
        if self.reading.received > before:
            self._arrived()

    def on_message_complete(self) -> None:
        self.reading.status = self._parser.get_status_code()
        if self.reading.status == 100:
            return
        self._complete = True
        self._finish()
        self._close()

    # -- checks -------------------------------------------------------------------------------------------------

    def _arrived(self) -> None:
        now = self._now()
        if not self.reading.first_at:
            self.reading.first_at = now
            self.begun.set_result(None)
        elif self._timed:
            self.reading.gaps.append(now - self._last)
        self._last = now

    def _event(self, event: bytes) -> None:
        if event.startswith(b":"):
            self.reading.pings += 1
            return
        if self._terminal:
            self._is_wrong("an event after the terminal one")
        data = event.rpartition(b"data: ")[2]
        if data == b"[DONE]":
            self._terminal = True
            return
        try:
            fields = json.loads(data)
        except ValueError:
            # The engine, or the agent, ended in the middle of an event, which the router then closed.
            self._is_wrong(f"no JSON: {event[:80]!r}")
            return
        self._fields(fields)

    def _fields(self, fields: Any) -> None:
        if fields.get("error") or fields.get("type") == "error":
            error = fields.get("error") or fields
            self.reading.code = str(error.get("code") or error.get("type"))
            return
        if self.reading.code:
            self._is_wrong("an event after the error event")
        if "id" in fields:
            self.reading.ids.add(fields["id"])
        for choice, text in self._route.pieces(fields):
            self._compare(choice, text)
        if self._route.ends(fields):
            self._terminal = True

    def _compare(self, choice: int, text: str) -> None:
        offset = self._offsets.get(choice, 0)
        end = offset + len(text)
        if _text(self._seed + choice, self._chars)[offset:end] != text:
            self._is_wrong(f"choice {choice}, character {offset}")
        self._offsets[choice] = end
        self.reading.received += len(text)

    def _is_wrong(self, what: str) -> None:
        self.reading.wrong = self.reading.wrong or what

    def _finish(self) -> None:
        if not self.done.done():
            self.reading.ending = self._ending()
            self.done.set_result(self.reading)
        if not self.begun.done():
            self.begun.cancel()

    def _ending(self) -> Ending:
        reading = self.reading
        if not self._complete:
            return Ending.WRONG if reading.wrong else Ending.CUT
        if reading.status != 200:
            reading.code = str(_error_code(self._rest))
            return Ending.HTTP_ERROR
        if not self._stream:
            self._whole_body()
        if reading.code and not self._terminal and not reading.wrong:
            return Ending.ERROR_EVENT
        if not reading.wrong and self._stream and not self._terminal:
            return Ending.TRUNCATED
        if any(offset != self._chars for offset in self._offsets.values()) or not self._offsets:
            self._is_wrong(f"{self._offsets} of {self._chars} characters")
        return Ending.WRONG if reading.wrong else Ending.WHOLE

    def _whole_body(self) -> None:
        fields = json.loads(self._rest)
        self.reading.ids.add(fields.get("id", ""))
        for choice, text in enumerate(self._route.whole(fields)):
            self._compare(choice, text)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _error_code(body: bytes) -> Any:
    try:
        return json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return "no envelope"


class Load:
    """Requests of one tenant to one router."""

    def __init__(self, port: int, headers: Mapping[str, str], *, model: str) -> None:
        self._port, self._model = port, model
        self._headers = {"content-type": "application/json", **headers}

    async def open(
        self,
        route: Route = CHAT,
        *,
        stream: bool = True,
        n: int = 1,
        timed: bool = False,
        receive_buffer_bytes: int | None = None,
        **script: Any,
    ) -> Client:
        """Send one request; `script` is the stand-in's (tests/support/fake_vllm_script.py), with `text_chars` set."""
        body = route.body("fake:" + json.dumps(script)) | {"model": self._model, "stream": stream}
        if n > 1:
            body["n"] = n
        request = request_bytes("POST", route.path, self._headers, json.dumps(body).encode())
        chars = script.get("chunks", 16) * script["text_chars"]
        connection = socket.socket()
        connection.setblocking(False)
        if receive_buffer_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (HOST, self._port))
        _, client = await loop.create_connection(
            lambda: Client(request, route, stream=stream, seed=script.get("seed", 0), chars=chars, timed=timed),
            sock=connection,
        )
        return client

    async def open_many(self, number: int, *, seeds: int = 64, at_once: int = 200, **options: Any) -> list[Client]:
        """So many requests, `at_once` of them sent together; their seeds go round."""
        clients: list[Client] = []
        while len(clients) < number:
            first = len(clients)
            batch = range(first, min(number, first + at_once))
            clients += await asyncio.gather(*(self.open(seed=number % seeds, **options) for number in batch))
        return clients


async def readings(clients: Iterable[Client]) -> list[Reading]:
    """What all of them saw, once all have ended. The caller sets the deadline."""
    return list(await asyncio.gather(*(client.done for client in clients)))


def assert_whole(seen: Sequence[Reading]) -> None:
    """Every client has its exact bytes, and no two have the same answer."""
    bad = [(at, each.ending, each.code, each.wrong) for at, each in enumerate(seen) if each.ending is not Ending.WHOLE]
    assert not bad, f"{len(bad)} of {len(seen)} answers are not whole: {bad[:5]}"
    ids = [one for each in seen for one in each.ids]
    assert len(ids) == len(set(ids)) == len(seen), "answers were mixed"


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` of `values` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def raise_descriptor_limit() -> None:
    """As many connections as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
