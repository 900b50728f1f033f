"""One response that says nothing for a while, or whose client takes nothing: pings, order and credit."""

import asyncio

import pytest
from starlette.types import Message

from tests.router.http.test_response import DONE, SSE, Case, Direct, closed


async def test_a_silent_event_stream_is_pinged_at_every_second_look_and_at_a_boundary_only() -> None:
    with closed(Case()) as case:
        case.response.ping()
        case.response.ping()
        assert not case.client.messages
        case.response.start(200, SSE)
        case.put(b"data: 1\n\n")
        case.response.ping()
        assert case.client.body == b"data: 1\n\n"
        case.response.ping()
        assert case.client.body == b"data: 1\n\n: ping\n\n"
        case.put(b"data: {")
        for _ in range(5):
            case.response.ping()
        assert case.client.body == b"data: 1\n\n: ping\n\ndata: {"
        case.put(b"}\n\n" + DONE)
        case.response.end()
        case.response.ping()
        case.response.ping()
        assert case.client.body.endswith(DONE)
        # Comments of the router's own are no bytes of the engine.
        assert case.credited == case.received


async def test_a_stream_that_said_something_since_the_last_look_is_not_silent() -> None:
    with closed(Case()) as case:
        case.response.start(200, SSE)
        for _ in range(3):
            case.put(b"data: 1\n\n")
            case.response.ping()
        assert case.client.body == b"data: 1\n\n" * 3


async def test_a_client_that_has_something_to_take_is_not_pinged() -> None:
    with closed(Case()) as case:
        case.response.start(200, SSE)
        case.put(b"data: 1\n\n")
        case.client.stop()
        case.put(b"data: 2\n\n")
        case.response.ping()
        case.response.ping()
        case.client.read()
        await case.settled()
        assert case.client.body == b"data: 1\n\ndata: 2\n\n"


async def test_nothing_overtakes_what_a_slow_client_is_still_to_take() -> None:
    """The connection may take bytes again before the task that has the older ones gets its turn."""
    with closed(Case()) as case:
        direct = case.response._direct = Direct()
        case.response.start(200, SSE)
        case.put(b"data: 1\n\n")
        case.client.stop()
        case.put(b"data: 2\n\n")
        case.client.read()
        direct.open = True
        case.put(DONE)
        case.response.end()
        await case.settled()
        for _ in range(5):
            await asyncio.sleep(0)
        assert case.client.body == b"data: 1\n\ndata: 2\n\n" + DONE
        assert case.client.finished


async def test_credit_that_was_held_back_comes_with_the_bytes_it_is_for() -> None:
    turn = asyncio.Semaphore(1)

    async def one_at_a_time(message: Message) -> None:
        await turn.acquire()

    with closed(Case(bound=0, send=one_at_a_time)) as case:
        case.response.start(200, SSE)
        assert case.put(b"data: 1\n\n") == 0
        assert case.put(b"data: 2\n\n") == 0
        turn.release()
        for _ in range(10):
            await asyncio.sleep(0)
        assert case.credited == 9


@pytest.mark.parametrize("total", [1_000_000, 0])
async def test_a_ping_for_a_slow_client_asks_for_no_credit_later(total: int) -> None:
    with closed(Case(bound=20, total=total)) as case:
        case.response.start(200, SSE)
        case.put(b"data: 1\n\n")
        case.client.stop()
        case.response.ping()
        case.response.ping()
        assert case.put(b"data: 2\n\n" * 3) == 0
        case.client.read()
        await case.settled()
        assert case.credited == case.received


async def test_a_whole_body_is_never_pinged() -> None:
    with closed(Case()) as case:
        case.response.start(200, "application/json")
        case.put(b"{")
        for _ in range(5):
            case.response.ping()
        assert not case.client.messages
