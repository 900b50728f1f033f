"""The load: many HTTP requests at once from one cheap event loop, every byte of every answer checked.

While a measurement runs, the client only counts events and keeps the bytes; what they say is checked afterwards,
so that the check takes no CPU from the program under test.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import httptools

from tests.support.fake_vllm_script import expected_text

_TEXT = re.compile(rb'"content":\s*"([^"]*)"')
_EVENT_END = b"\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where requests go: an address, the path's prefix, the model's name and the bearer key, if one is needed."""

    host: str
    port: int
    model: str
    prefix: str = ""
    api_key: str | None = field(default=None, repr=False)

    def request(self, script: dict[str, Any], *, stream: bool) -> bytes:
        """A chat completion that makes the fake engine follow `script`, as the bytes of an HTTP request."""
        message = {"role": "user", "content": "fake:" + json.dumps(script)}
        body = json.dumps({"model": self.model, "messages": [message], "stream": stream}).encode()
        key = f"authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"POST {self.prefix}/v1/chat/completions HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n"
            f"content-type: application/json\r\naccept: */*\r\n{key}content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Tally:
    """Events received so far by all connections of a run; read at the two ends of a measured window."""

    __slots__ = ("events",)

    def __init__(self) -> None:
        self.events = 0


class Answer:
    """One request's answer. Times are of the monotonic clock, in seconds."""

    __slots__ = ("complete", "done", "first_at", "pieces", "read_at", "seed", "sent_at", "status")

    def __init__(self, seed: int, done: "asyncio.Future[None]") -> None:
        self.seed, self.done = seed, done
        self.sent_at = time.monotonic()
        self.first_at: float | None = None
        self.read_at: list[float] = []
        """When the socket was read, for each read that brought the end of an event."""
        self.pieces: list[bytes] = []
        self.status = 0
        self.complete = False

    @property
    def ttft_s(self) -> float | None:
        """From the request's last byte written to the answer's first body byte read."""
        return None if self.first_at is None else self.first_at - self.sent_at

    def gaps_s(self, start: float, end: float) -> list[float]:
        """Times between two reads one after the other, both of them from `start` to `end`."""
        times = [at for at in self.read_at if start <= at <= end]
        return [after - before for before, after in pairwise(times)]

    def fault(self, *, stream: bool, whole: bool = True) -> str | None:
        """What is wrong with the answer, or None if every byte of its text is as it must be.

        An answer that the client left on purpose (`whole` is false) may end anywhere.
        """
        body = b"".join(self.pieces)
        if self.status != 200:
            return f"status {self.status}: {body[:200].decode(errors='replace')}"
        if whole and not self.complete:
            return "cut off before its end"
        if whole and stream and b"data: [DONE]" not in body[-200:]:
            return "no terminal event"
        text = b"".join(_TEXT.findall(body)).decode()
        if not text:
            return "no text" if whole else None
        return None if text == expected_text(self.seed, len(text)) else "the text is not the one that was sent"


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._read_at = 0.0

    def ask(self, request: bytes, seed: int) -> Answer:
        """Send `request`; the answer's `done` is set when it has ended, in whatever way."""
        answer = self._answer = Answer(seed, asyncio.get_running_loop().create_future())
        if self._transport is None:
            answer.done.set_result(None)
        else:
            self._transport.write(request)
        return answer

    def close(self) -> None:
        """Leave, also in the middle of an answer."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end(complete=False)

    def data_received(self, data: bytes) -> None:
        self._read_at = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        read_at = self._read_at
        if answer.first_at is None:
            answer.first_at = read_at
        answer.pieces.append(body)
        events = body.count(_EVENT_END)
        if events:
            self._tally.events += events
            # One read may hold several chunks of the body: it is one time all the same.
            if not answer.read_at or answer.read_at[-1] != read_at:
                answer.read_at.append(read_at)

    def on_message_complete(self) -> None:
        self._end(complete=True)

    def _end(self, *, complete: bool) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done.done():
            answer.complete = complete
            answer.done.set_result(None)


@asynccontextmanager
async def connections(target: Target, count: int, tally: Tally) -> AsyncIterator[list[Connection]]:
    """`count` open connections to `target`; they are closed when the block ends."""
    loop = asyncio.get_running_loop()
    opened: list[Connection] = []
    try:
        for _ in range(count):
            async with asyncio.timeout(10.0):
                _, connection = await loop.create_connection(lambda: Connection(tally), target.host, target.port)
            opened.append(connection)
        yield opened
    finally:
        for connection in opened:
            connection.close()
