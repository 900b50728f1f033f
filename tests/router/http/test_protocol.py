"""Bytes that are no request, on a raw socket: each gets the envelope, or a closed connection, and harms no other."""

import asyncio
import contextlib
import json
import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import pytest
from fastapi import FastAPI

from tests.router.link.rig import CHAT_PATH, KEY, Rig, until
from tests.support.agent_stub import SSE, hold
from tests.support.http_client import open_call, request_bytes
from tests.support.programs import PATIENCE_S
from xim_router.control.enrollment import Enroller
from xim_router.control.routes.enroll import enroll_routes
from xim_router.http import protocol
from xim_router.http.errors import install_error_handlers
from xim_router.http.protocol import MAX_HEAD_BYTES, MAX_URL_BYTES, HttpProtocol

HEAD = b"GET /healthz HTTP/1.1\r\nhost: router\r\n"
WHOLE = HEAD + b"\r\n"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer on the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        error = json.loads(self.body)["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        return str(error["code"])


async def say(rig: Rig, *pieces: bytes) -> list[Answered]:
    """Send `pieces` and read until the router closes the connection; returns its answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.http_port)
    try:
        for piece in pieces:
            # Also a router that had enough goes on taking: what it says would be lost with a reset.
            writer.write(piece)
            await writer.drain()
        async with asyncio.timeout(PATIENCE_S):
            return answers_in(await reader.read())
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def answers_in(raw: bytes) -> list[Answered]:
    found = []
    while raw:
        head, _, rest = raw.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers["content-length"])
        found.append(Answered(status=int(status.split()[1]), headers=headers, body=rest[:size]))
        raw = rest[size:]
    return found


@pytest.mark.parametrize(
    "garbage",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        HEAD + b"no colon here\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n",
    ],
    ids=["no method", "a TLS handshake", "version", "no path", "not ASCII", "header", "two framings", "length"],
)
async def test_what_is_no_request_is_told_so_in_the_envelope(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with Rig() as rig:
        (told,) = await say(rig, garbage)
        assert (told.status, told.code) == (400, "invalid_request")
        assert told.headers["content-type"] == "application/json"
        assert told.headers["connection"] == "close"
        assert told.headers["x-request-id"].startswith("req_")
        # The next connection is served.
        assert (await rig.ask(method="GET", path="/healthz", body=b"")).status == 200
    assert_nothing_failed(caplog)


async def test_a_clients_own_id_is_echoed_where_it_came_before_the_fault() -> None:
    async with Rig() as rig:
        (told,) = await say(rig, HEAD + b"x-request-id: mine-7\r\naccept: */*\r\nno colon here\r\n\r\n")
        assert told.headers["x-request-id"] == "mine-7"


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in pieces"])
@pytest.mark.parametrize(
    ("start", "filling", "end", "expected"),
    [
        (b"GET /", MAX_URL_BYTES, b" HTTP/1.1\r\nhost: x\r\n\r\n", (414, "url_too_long")),
        (HEAD + b"x-long: ", MAX_HEAD_BYTES, b"\r\n\r\n", (431, "headers_too_large")),
        (HEAD + b"x: " + b"y\r\nx: " * (MAX_HEAD_BYTES // 4), 1, b"\r\n\r\n", (431, "headers_too_large")),
        (b"GET /", 20 * MAX_HEAD_BYTES, b"", (414, "url_too_long")),
        (HEAD + b"x-endless: ", 20 * MAX_HEAD_BYTES, b"", (431, "headers_too_large")),
    ],
    ids=["url", "one header", "many headers", "endless url", "endless header"],
)
async def test_a_head_that_is_too_large_is_told_so(
    start: bytes, filling: int, end: bytes, expected: tuple[int, str], at_once: bool
) -> None:
    async with Rig() as rig:
        raw = start + b"a" * filling + end
        step = len(raw) if at_once else 1000
        (told,) = await say(rig, *(raw[at : at + step] for at in range(0, len(raw), step)))
        assert (told.status, told.code) == expected
        assert told.headers["x-request-id"].startswith("req_")


async def test_a_head_just_within_the_limits_is_served() -> None:
    async with Rig() as rig:
        url = b"GET /" + b"a" * (MAX_URL_BYTES - 1)
        (found,) = await say(rig, url + b" HTTP/1.1\r\nconnection: close\r\n\r\n")
        assert (found.status, found.code) == (404, "route_not_found")
        (found,) = await say(rig, HEAD + b"connection: close\r\nx: " + b"a" * (MAX_HEAD_BYTES - 200) + b"\r\n\r\n")
        assert found.status == 200


async def test_the_heads_of_many_requests_on_one_connection_count_each_for_itself() -> None:
    async with Rig() as rig:
        large = HEAD + b"x: " + b"a" * (MAX_HEAD_BYTES // 2) + b"\r\n\r\n"
        last = HEAD + b"connection: close\r\n\r\n"
        # In pieces that end in the middle of a head, with the end of another before; a socket might join them.
        raw = large * 5 + last
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.http_port)
        await until(lambda: connections(rig))
        (connection,) = connections(rig)
        for at in range(0, len(raw), 40_000):
            connection.data_received(raw[at : at + 40_000])
        async with asyncio.timeout(PATIENCE_S):
            found = answers_in(await reader.read())
        assert [answered.status for answered in found] == [200] * 6
        writer.close()


async def test_a_body_that_breaks_its_framing_is_told_so_once() -> None:
    async with Rig() as rig:
        chunked = request_bytes(
            "POST",
            CHAT_PATH,
            {"authorization": f"Bearer {KEY}", "content-type": "application/json", "transfer-encoding": "chunked"},
        )
        (told,) = await say(rig, chunked, b'5\r\n{"a":\r\n', b"not a size\r\n")
        assert (told.status, told.code) == (400, "invalid_request")


async def test_garbage_behind_a_request_ends_the_connection_after_its_answer() -> None:
    async with Rig() as rig:
        found = await say(rig, WHOLE + b"GARBAGE\r\n\r\n")
        assert [answered.status for answered in found] == [200]


async def test_garbage_behind_a_running_stream_never_stands_in_it() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await rig.call() as call:
        work = await agent.work()
        work.start(200, SSE)
        await work.write(b"data: first\n\n")
        await call.head()
        await call.until(b"first\n\n")
        call.writer.write(b"GARBAGE\r\n\r\n")
        await call.writer.drain()
        await work.write(b"data: second\n\n")
        await call.until(b"second\n\n")
        await work.write(b"data: [DONE]\n\n")
        work.end()
        await call.rest()
        assert bytes(call.body) == b"data: first\n\ndata: second\n\ndata: [DONE]\n\n"
        assert await call.reader.read() == b""


# --- What never becomes a whole request ----------------------------------------------------------------------------


POST_HALF = request_bytes(
    "POST",
    CHAT_PATH,
    {"authorization": f"Bearer {KEY}", "content-type": "application/json", "content-length": "1000000"},
    b'{"model": ',
)
ENROLL_HALF = request_bytes("POST", "/v1/enroll", {"content-length": "1000"}, b"{")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not come is not waited for long; what was sent has arrived by then."""
    monkeypatch.setattr(protocol, "ARRIVAL_S", 0.3)


def connections(rig: Rig) -> list[HttpProtocol]:
    """The router's ends of all connections of clients."""
    return [each for each in rig._server.server_state.connections if isinstance(each, HttpProtocol)]


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"\r\n\r\n"], ids=["nothing", "an empty line", "two"])
async def test_a_connection_without_a_request_is_closed_without_a_word(
    impatient: None, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with Rig() as rig:
        assert await say(rig, sent) == []
    assert_nothing_failed(caplog)


async def test_an_empty_line_before_the_first_request_is_passed_over() -> None:
    """RFC 9112, section 2.2."""
    async with Rig() as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.http_port)
        await until(lambda: connections(rig))
        (connection,) = connections(rig)
        connection.data_received(b"\r\n")  # as it comes when the request is not sent with it
        writer.write(HEAD + b"connection: close\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            (answered,) = answers_in(await reader.read())
        assert answered.status == 200
        writer.close()


async def test_empty_lines_without_end_are_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async with Rig() as rig:
        (told,) = await say(rig, b"\r\n" * MAX_HEAD_BYTES)
        assert (told.status, told.code) == (431, "headers_too_large")
    assert_nothing_failed(caplog)


@pytest.mark.parametrize("sent", [b"G", b"GET /healthz", HEAD, HEAD + b"x-half: "])
async def test_half_a_head_is_told_that_it_came_too_late(impatient: None, sent: bytes) -> None:
    async with Rig() as rig:
        (told,) = await say(rig, sent)
        assert (told.status, told.code) == (408, "request_incomplete")
        assert told.headers["connection"] == "close"
        assert told.headers["x-request-id"].startswith("req_")


async def test_half_a_body_is_told_that_it_came_too_late(impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    async with Rig("a") as rig:
        (told,) = await say(rig, POST_HALF)
        assert (told.status, told.code) == (408, "request_incomplete")
    assert_nothing_failed(caplog)


async def test_half_an_enrollment_is_told_that_it_came_too_late(
    impatient: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolling = FastAPI()
    install_error_handlers(enrolling)
    enrolling.include_router(
        enroll_routes(cast(Enroller, SimpleNamespace(enroll=None)))
    )  # it is never asked: no body is ever whole
    monkeypatch.setattr(Rig, "_control", lambda _rig: enrolling)
    async with Rig() as rig:
        (told,) = await say(rig, ENROLL_HALF)
        assert (told.status, told.code) == (408, "request_incomplete")
    assert_nothing_failed(caplog)


def assert_nothing_failed(caplog: pytest.LogCaptureFixture) -> None:
    """A client that is slow is nothing that an operator must look at."""
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_half_a_head_behind_an_answer_is_told_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig() as rig, await rig.call(b"", method="GET", path="/healthz") as call:
        await call.rest()
        (connection,) = connections(rig)
        assert connection._overdue is None
        monkeypatch.setattr(protocol, "ARRIVAL_S", 0.05)
        call.writer.write(HEAD)
        (told,) = answers_in(await call.reader.read())
        assert (told.status, told.code) == (408, "request_incomplete")


async def test_bytes_that_are_no_head_do_not_keep_a_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig() as rig, await rig.call(b"", method="GET", path="/healthz") as call:
        await call.rest()
        monkeypatch.setattr(protocol, "ARRIVAL_S", 0.05)
        call.writer.write(b"\r\n")
        assert await call.reader.read() == b""


async def test_a_body_that_nobody_waits_for_does_not_keep_a_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig() as rig:
        headers = {"content-length": "1000000", "content-type": "text/plain", "authorization": f"Bearer {KEY}"}
        async with await open_call(rig.http_port, request_bytes("POST", CHAT_PATH, headers, b"{")) as call:
            await call.rest()
            assert call.status == 415
            monkeypatch.setattr(protocol, "ARRIVAL_S", 0.05)
            for connection in connections(rig):
                connection._wait_no_more()
            call.writer.write(b"more")
            assert await call.reader.read() == b""


async def test_nothing_is_waited_for_while_a_request_runs_or_after_its_answer() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await rig.call() as call:
        work = await agent.work()
        (connection,) = connections(rig)
        assert connection._overdue is None
        work.start(200, SSE)
        await work.write(b"data: [DONE]\n\n")
        work.end()
        await call.rest()
        assert connection._overdue is None
        assert connection.timeout_keep_alive_task is not None


async def test_half_a_head_behind_a_running_stream_leaves_the_stream_whole() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent, await rig.call() as call:
        work = await agent.work()
        work.start(200, SSE)
        await work.write(b"data: first\n\n")
        await call.head()
        call.writer.write(HEAD)
        (connection,) = connections(rig)
        await until(lambda: connection._overdue is not None)
        connection._on_overdue()
        await work.write(b"data: [DONE]\n\n")
        work.end()
        await call.rest()
        assert bytes(call.body) == b"data: first\n\ndata: [DONE]\n\n"
        assert await call.reader.read() == b""


async def test_a_body_that_moves_is_waited_for_and_one_that_stands_still_is_not() -> None:
    async with Rig("a") as rig, await open_call(rig.http_port, POST_HALF) as call:
        await until(lambda: any(each.cycle is not None for each in connections(rig)))
        (connection,) = connections(rig)
        for _ in range(3):
            before = connection._received
            call.writer.write(b" " * protocol.LEAST_BODY_BYTES)
            await until(lambda before=before: connection._received >= before + protocol.LEAST_BODY_BYTES)  # type: ignore[misc]
            connection._on_overdue()
            assert connection._overdue is not None
        connection.flow.pause_reading()  # it is the router that takes nothing now
        connection._on_overdue()
        assert connection._overdue is not None
        connection.flow.resume_reading()
        connection._on_overdue()
        await call.rest()
        assert (call.status, call.code) == (408, "request_incomplete")


async def test_a_body_that_trickles_is_not_waited_for() -> None:
    async with Rig("a") as rig, await open_call(rig.http_port, POST_HALF) as call:
        await until(lambda: any(each.cycle is not None for each in connections(rig)))
        (connection,) = connections(rig)
        before = connection._received
        call.writer.write(b" ")
        await until(lambda: connection._received > before)
        connection._on_overdue()
        await call.rest()
        assert (call.status, call.code) == (408, "request_incomplete")


async def test_what_still_comes_from_a_client_that_was_told_is_thrown_away() -> None:
    async with Rig("a") as rig, await open_call(rig.http_port, b"GARBAGE\r\n\r\n") as call:
        await call.rest()
        assert call.status == 400
        (connection,) = connections(rig)
        connection.data_received(b"GARBAGE\r\n\r\n")
        assert rig.count("xim_router_requests_refused_total", code="invalid_request") == 1
