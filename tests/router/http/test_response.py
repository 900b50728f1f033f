"""One response and its client: order, bounds, credit and ends, with a `send` that suspends when a test says so."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from starlette.types import Message, Send

from tests.support.programs import PATIENCE_S
from xim_protocol.messages import FailCode
from xim_protocol.routes import ROUTES_BY_PATH
from xim_router.dispatch.effects import Rejection
from xim_router.http.direct import NoDirectWay
from xim_router.http.response import FAILURES, HttpResponse, ResponseBuffers
from xim_router.telemetry.metrics import HotCounters

SSE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"


class Client:
    """A client that takes everything at once, until it is told to be slow."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._writable = asyncio.Event()
        self._writable.set()
        self.suspended = 0

    async def send(self, message: Message) -> None:
        while not self._writable.is_set():
            self.suspended += 1
            await self._writable.wait()
        self.messages.append(message)

    def stop(self) -> None:
        self._writable.clear()

    def read(self) -> None:
        self._writable.set()

    async def took(self) -> None:
        """Return when something was taken, or a turn later."""
        await asyncio.sleep(0)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def finished(self) -> bool:
        return len(self.messages) > 1 and not self.messages[-1]["more_body"]


class Case:
    """A response, its client and the books of its credit."""

    def __init__(
        self,
        *,
        bound: int = 1_000,
        total: int = 1_000_000,
        path: str = "/v1/chat/completions",
        send: Send | None = None,
    ) -> None:
        self.client = Client()
        self.hot = HotCounters()
        self.credited = 0
        self.received = 0
        self.response = HttpResponse(
            send or self.client.send,
            route=ROUTES_BY_PATH[path],
            request_id="req_1",
            buffers=ResponseBuffers(per_response_bytes=bound, total_bytes=total, hot=self.hot),
            on_consumed=self._consumed,
        )

    def _consumed(self, size: int) -> None:
        assert size > 0
        self.credited += size
        assert self.credited <= self.received

    def put(self, payload: bytes) -> int:
        self.received += len(payload)
        size = self.response.put(payload)
        self.credited += size
        assert self.credited <= self.received
        return size

    def committed(self) -> bool:
        return self.response.committed

    async def settled(self) -> None:
        """Return when nothing is held any more."""
        async with asyncio.timeout(PATIENCE_S):
            while self.hot.buffered_bytes:
                await self.client.took()


class Direct(NoDirectWay):
    """A direct way that takes everything as soon as it is `open`."""

    def __init__(self) -> None:
        self.open = False
        self.aborted = False

    def write(self, payload: bytes) -> bool:
        return self.open

    def finish(self, payload: bytes) -> bool:
        return self.open

    def abort(self) -> None:
        self.aborted = True


@contextmanager
def closed(case: Case) -> Iterator[Case]:
    """At the end the handler closes the response, which must hold nothing then."""
    yield case
    case.response.close()
    assert case.hot.buffered_bytes == 0


# --- Clients that keep up ------------------------------------------------------------------------------------------


async def test_chunks_of_an_event_stream_leave_at_once_and_in_order() -> None:
    with closed(Case()) as case:
        case.response.start(200, SSE)
        assert not case.client.messages
        assert not case.committed()
        assert case.put(b"data: 1\n\n") == 9
        assert case.committed()
        assert case.put(b"data: 2\n\n" + DONE) == 9 + len(DONE)
        assert case.response.end() is None
        assert case.client.body == b"data: 1\n\ndata: 2\n\n" + DONE
        assert case.client.finished
        assert case.client.headers["content-type"] == SSE
        assert case.client.headers["x-request-id"] == "req_1"
        assert case.client.headers["cache-control"] == "no-cache"
        assert case.client.headers["x-accel-buffering"] == "no"
        assert "content-length" not in case.client.headers
        assert case.response.sent_bytes == case.received == case.credited


@pytest.mark.parametrize("content_type", ["text/html\r\nset-cookie: a=b", "text/plain; charset=\u00e9", "a\x00b"])
async def test_a_content_type_that_is_no_header_is_not_passed_on(content_type: str) -> None:
    with closed(Case()) as case:
        case.response.start(200, content_type)
        case.put(b"{}")
        assert case.response.end() is None
        assert case.client.headers["content-type"] == "application/octet-stream"
        assert case.client.body == b"{}"


async def test_a_whole_body_leaves_at_its_end_with_its_length() -> None:
    with closed(Case()) as case:
        case.response.start(400, "application/json")
        assert case.put(b'{"a":') == 5
        assert case.put(b" 1}") == 3
        assert not case.client.messages
        assert case.response.end() is None
        assert case.hot.buffered_bytes == 0
        assert (case.client.status, case.client.body) == (400, b'{"a": 1}')
        assert case.client.headers["content-length"] == "8"
        assert case.client.headers["content-type"] == "application/json"
        assert "cache-control" not in case.client.headers


async def test_an_empty_body_is_an_answer() -> None:
    with closed(Case()) as case:
        case.response.start(204, "text/plain")
        assert case.response.end() is None
        assert (case.client.status, case.client.body, case.client.finished) == (204, b"", True)


@pytest.mark.parametrize("status", [100, 101, 199, 204, 304, 600, 999])
@pytest.mark.parametrize("content_type", ["application/json", SSE])
async def test_a_status_that_no_answer_with_a_body_has_is_a_bad_gateway(status: int, content_type: str) -> None:
    with closed(Case()) as case:
        case.response.start(status, content_type)
        assert case.put(DONE) == len(DONE)
        assert case.response.end() is None
        assert (case.client.status, case.client.body, case.client.finished) == (502, DONE, True)


@pytest.mark.parametrize("content_type", ["application/json", SSE])
async def test_what_the_server_cannot_send_ends_this_answer_and_raises_nothing(
    content_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(message: Message) -> None:
        raise RuntimeError("Invalid HTTP header value.")

    with closed(Case(send=refuse)) as case:
        case.response.start(200, content_type)
        case.put(b"data: 1\n\n")
        case.put(DONE)
        case.response.end()
    assert [record.message for record in caplog.records] == ["answer cannot be sent"]


async def test_a_whole_body_over_the_bound_begins_to_leave_and_counts_each_byte_once() -> None:
    with closed(Case(bound=10)) as case:
        case.response.start(200, "application/json")
        assert case.put(b"0123456789") == 10
        assert not case.committed()
        assert case.put(b"abc") == 3
        assert case.committed()
        assert case.client.body == b"0123456789abc"
        assert case.put(b"def") == 3
        case.response.end()
        assert case.client.body == b"0123456789abcdef"
        assert case.credited == case.received == 16
        assert "content-length" not in case.client.headers


async def test_before_the_commit_point_another_attempt_begins_anew() -> None:
    with closed(Case()) as case:
        case.response.start(200, "application/json")
        case.put(b'{"half":')
        case.response.reset()
        assert case.hot.buffered_bytes == 0
        case.response.start(201, "application/json; v=2")
        case.put(b"{}")
        case.response.end()
        assert (case.client.status, case.client.body) == (201, b"{}")
        assert case.client.headers["content-type"] == "application/json; v=2"


async def test_another_attempt_may_be_of_another_kind() -> None:
    with closed(Case()) as case:
        case.response.start(200, SSE)
        case.response.reset()
        case.response.start(400, "application/json")
        case.put(b"{}")
        assert not case.response.committed
        case.response.end()
        assert case.client.headers["content-length"] == "2"


# --- Slow clients --------------------------------------------------------------------------------------------------


async def test_what_a_slow_client_does_not_take_is_held_and_leaves_in_order() -> None:
    with closed(Case(bound=1_000_000)) as case:
        case.response.start(200, SSE)
        case.put(b"data: 0\n\n")
        case.client.stop()
        expected = b"data: 0\n\n"
        for number in range(1, 50):
            payload = b"data: %d\n\n" % number
            expected += payload
            # Within the bound a slow client slows nobody.
            assert case.put(payload) == len(payload)
        assert case.hot.buffered_bytes == len(expected) - 9
        case.client.read()
        await case.settled()
        case.put(DONE)
        case.response.end()
        assert case.client.body == expected + DONE
        assert case.client.finished
        # What gathered left as one, not chunk by chunk.
        assert len(case.client.messages) < 10
        assert case.credited == case.received


async def test_a_chunk_that_comes_while_others_are_held_does_not_overtake_them() -> None:
    with closed(Case()) as case:
        case.response.start(200, SSE)
        case.put(b"data: 0\n\n")
        case.client.stop()
        case.put(b"data: 1\n\n")
        case.client.read()
        # The client is ready, but the held chunk has not left yet.
        case.put(b"data: 2\n\n")
        await case.settled()
        case.put(b"data: 3\n\n" + DONE)
        assert case.client.body == b"".join(b"data: %d\n\n" % n for n in range(4)) + DONE


async def test_above_the_bound_credit_returns_as_bytes_leave_and_each_byte_counts_once() -> None:
    with closed(Case(bound=100)) as case:
        case.response.start(200, SSE)
        case.put(b"data: 0\n\n")
        case.client.stop()
        sizes = [case.put(b"x" * 40) for _ in range(6)]
        assert sizes == [40, 40, 0, 0, 0, 0]
        assert case.received - case.credited == 160
        case.client.read()
        await case.settled()
        assert case.credited == case.received
        assert case.put(b"y" * 40) == 40
        assert case.credited == case.received


async def test_above_the_total_of_all_answers_nothing_counts_before_it_left() -> None:
    with closed(Case(bound=1_000, total=50)) as case:
        case.response.start(200, SSE)
        case.put(b"data: 0\n\n")
        case.client.stop()
        assert [case.put(b"x" * 30) for _ in range(3)] == [30, 0, 0]
        case.client.read()
        await case.settled()
        assert case.credited == case.received


async def test_a_large_body_for_a_slow_client_counts_each_byte_once() -> None:
    with closed(Case(bound=100)) as case:
        case.client.stop()
        case.response.start(200, "application/json")
        assert case.put(b"a" * 100) == 100
        # The whole of it leaves now, of which 100 bytes were counted before.
        assert case.put(b"b" * 50) == 0
        assert case.put(b"c" * 50) == 0
        case.response.end()
        case.client.read()
        await case.settled()
        assert case.client.body == b"a" * 100 + b"b" * 50 + b"c" * 50
        assert case.credited == case.received
        assert case.client.finished


async def test_what_waits_for_a_client_is_told_and_what_waits_for_the_engine_is_not() -> None:
    with closed(Case(bound=100)) as case:
        case.response.start(200, "application/json")
        case.put(b"x" * 60)
        assert case.response.waiting_bytes() == 0
        case.client.stop()
        case.put(b"x" * 60)
        assert case.response.waiting_bytes() == 120
        case.client.read()
        await case.settled()
        assert case.response.waiting_bytes() == 0


async def test_closing_gives_back_what_was_held_and_sends_no_more() -> None:
    case = Case()
    case.response.start(200, SSE)
    case.put(b"data: 0\n\n")
    case.client.stop()
    case.put(b"data: 1\n\n")
    case.put(b"data: 2\n\n")
    case.response.close()
    assert case.hot.buffered_bytes == 0
    case.client.read()
    for _ in range(5):
        await asyncio.sleep(0)
    assert case.client.body == b"data: 0\n\n"


# --- Ends ----------------------------------------------------------------------------------------------------------


async def test_an_event_stream_without_its_terminal_event_ends_in_an_error() -> None:
    with closed(Case()) as case:
        case.response.start(200, SSE)
        case.put(b'data: {"half')
        assert case.response.end() == "engine_error"
        assert case.client.body.startswith(b'data: {"half\n\ndata: {"error":{')
        assert case.client.finished
        assert b"[DONE]" not in case.client.body


async def test_an_event_stream_that_ended_before_its_first_byte_is_an_error_answer() -> None:
    with closed(Case()) as case:
        case.response.start(200, SSE)
        assert case.response.end() == "engine_error"
        assert case.client.status == 502
        assert json.loads(case.client.body)["error"]["code"] == "engine_error"


async def test_an_event_stream_that_is_an_error_of_the_engine_needs_no_terminal_event() -> None:
    with closed(Case()) as case:
        case.response.start(400, SSE)
        case.put(b"data: {}\n\n")
        assert case.response.end() is None


@pytest.mark.parametrize("code", list(FailCode))
async def test_every_failure_before_the_commit_point_is_an_error_answer(code: FailCode) -> None:
    with closed(Case()) as case:
        case.response.start(200, "application/json")
        case.put(b'{"half":')
        word = case.response.fail(code, "")
        assert word == FAILURES[code][0]
        assert json.loads(case.client.body)["error"]["code"] == word
        assert case.client.status >= 400
        assert case.client.headers["x-request-id"] == "req_1"
        assert ("retry-after" in case.client.headers) == (case.client.status == 503)
        assert case.client.finished


@pytest.mark.parametrize("code", list(FailCode))
async def test_every_failure_after_the_commit_point_is_an_error_event(code: FailCode) -> None:
    with closed(Case()) as case:
        case.response.start(200, SSE)
        case.put(b"data: 1\n\n")
        word = case.response.fail(code, "a sentence")
        event = case.client.body.removeprefix(b"data: 1\n\n")
        assert json.loads(event.removeprefix(b"data: "))["error"] | {"type": ""} == {
            "message": "a sentence",
            "type": "",
            "code": word,
            "param": None,
        }
        assert case.client.finished


async def test_a_failure_behind_held_chunks_waits_its_turn() -> None:
    with closed(Case()) as case:
        case.response.start(200, SSE)
        case.put(b"data: 0\n\n")
        case.client.stop()
        case.put(b"data: 1\n\n")
        case.response.fail(FailCode.AGENT_LOST, "")
        case.client.read()
        await case.settled()
        for _ in range(5):
            await asyncio.sleep(0)
        assert case.client.body.startswith(b"data: 0\n\ndata: 1\n\ndata: {")
        assert case.client.finished


async def test_a_plain_body_that_fails_after_its_first_byte_is_never_finished() -> None:
    with closed(Case(bound=4)) as case:
        direct = case.response._direct = Direct()
        case.response.start(200, "application/json")
        case.put(b"12345")
        assert case.response.fail(FailCode.AGENT_LOST, "") == "agent_lost"
        assert not case.client.finished
        assert direct.aborted


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (FailCode.STALLED, (504, "stalled")),
        (FailCode.ENGINE_UNAVAILABLE, (503, "engine_unavailable")),
        (FailCode.ENGINE_BROKEN, (502, "engine_error")),
        (FailCode.AGENT_LOST, (502, "agent_lost")),
        (FailCode.OUTRUN, (502, "agent_lost")),
        (FailCode.BODY_INVALID, (400, "invalid_body")),
        (FailCode.TIME_UP, (504, "request_timeout")),
        (FailCode.INTERNAL, (502, "engine_error")),
    ],
)
async def test_a_failure_before_the_first_byte_is_a_status(failure: FailCode, told: tuple[int, str]) -> None:
    with closed(Case()) as case:
        case.response.start(200, "application/json")
        case.put(b"half")
        case.response.fail(failure, "")
        assert case.hot.buffered_bytes == 0
        assert (case.client.status, json.loads(case.client.body)["error"]["code"]) == told


@pytest.mark.parametrize("reason", list(Rejection))
async def test_every_rejection_is_an_error_answer(reason: Rejection) -> None:
    with closed(Case()) as case:
        code = case.response.reject(reason)
        assert json.loads(case.client.body)["error"]["code"] == code
        assert case.client.status in (502, 503)
        assert case.client.finished
