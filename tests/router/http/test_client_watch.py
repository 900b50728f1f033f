"""Which clients take nothing, told look by look; the clock is the test's."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest

from xim_router.http.client_watch import ClientWatch
from xim_router.link.broker import Broker
from xim_router.link.exchange import Exchange
from xim_router.telemetry.metrics import HotCounters, StallCause


@dataclass
class Response:
    """What was sent, and what of that, framing included, waits."""

    sent_bytes: int = 0
    waiting: int = 0
    unacknowledged: int = 0

    def waiting_bytes(self) -> int:
        return self.waiting

    def unacknowledged_bytes(self) -> int:
        return self.unacknowledged


@dataclass(eq=False)
class Request:
    """As much of an exchange as the watch looks at."""

    stream: object = None
    concluded: bool = False
    received_bytes: int = 0


class Clock:
    """In the loop's place; the test looks itself."""

    now = 1_000.0

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, look: Callable[[], None]) -> None:
        pass


class Watched:
    """One response and its watch, which cuts off after four seconds; looked at once a second."""

    def __init__(self) -> None:
        self.hot = HotCounters()
        self.linked = True
        self.stalled: list[object] = []
        self.watch = ClientWatch(cast(Broker, self), self.hot, timeout_s=4.0)
        self.clock = Clock()
        self.watch._loop = cast(asyncio.AbstractEventLoop, self.clock)
        self.request, self.response = Request(stream="a stream"), Response()
        self.exchange = cast(Exchange, self.request)
        self.watch.add(self.exchange, self.response)

    def client_stalled(self, exchange: object) -> None:
        self.stalled.append(exchange)

    def is_linked(self, exchange: object) -> bool:
        return self.linked

    def look(self, *, after_s: float = 1.0, **changes: Any) -> None:
        """Let `after_s` pass and the watch look."""
        for name, value in changes.items():
            setattr(self.response, name, value)
        self.clock.now += after_s
        self.watch._look()

    def stalled_for(self, cause: StallCause) -> float:
        return round(self.hot.stalled_s[cause], 1)


async def test_a_client_that_takes_from_the_kernels_buffer_alone_is_not_cut_off() -> None:
    case = Watched()
    case.look(sent_bytes=100, waiting=100, unacknowledged=1_000)
    for left in range(990, 900, -10):
        case.look(unacknowledged=left)
    assert not case.stalled
    assert case.stalled_for(StallCause.CLIENT) == 1.0  # before it took the first of it
    for _ in range(4):
        assert not case.stalled
        case.look()
    assert case.stalled == [case.exchange]


async def test_what_the_kernel_took_more_is_no_sign_of_the_client() -> None:
    case = Watched()
    for queued in range(1_000, 5_000, 1_000):
        assert not case.stalled
        case.look(sent_bytes=100, waiting=100, unacknowledged=queued)
    case.look()
    assert case.stalled == [case.exchange]


async def test_a_client_that_takes_nothing_is_cut_off_after_the_timeout() -> None:
    case = Watched()
    case.look(sent_bytes=100, waiting=100)
    for _ in range(2):
        case.look()
        assert not case.stalled
    case.look()
    assert case.stalled == [case.exchange]
    assert case.stalled_for(StallCause.CLIENT) == 4.0
    assert case.watch.unfinished == 0


async def test_a_look_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Watched()

    def gone() -> int:
        raise OSError("gone")

    monkeypatch.setattr(case.response, "waiting_bytes", gone)
    with pytest.raises(OSError, match="gone"):
        case.look()
    # The next look is a second from now.
    assert case.watch._looked_at == case.clock.now


async def test_a_client_that_takes_some_while_more_comes_moves() -> None:
    case = Watched()
    for second in range(20):
        case.look(sent_bytes=1_000 * second, waiting=990 * second)
    assert not case.stalled


async def test_a_client_that_takes_framing_only_moves() -> None:
    case = Watched()
    for second in range(20):
        case.look(sent_bytes=100, waiting=500 - second)
    assert not case.stalled


async def test_a_client_that_moved_has_its_whole_time_again() -> None:
    case = Watched()
    case.look(sent_bytes=100, waiting=100)
    for waiting in (90, 80, 70):
        for _ in range(2):
            case.look()
        case.look(waiting=waiting)
    assert not case.stalled


async def test_a_router_that_stood_still_blames_no_client() -> None:
    case = Watched()
    case.look(sent_bytes=100, waiting=100)
    case.look(after_s=100.0)
    assert not case.stalled
    assert case.stalled_for(StallCause.CLIENT) == 3.0  # twice the time between two looks for the second


async def test_a_response_that_came_between_two_looks_is_charged_for_its_own_time() -> None:
    case = Watched()
    case.look()
    case.clock.now += 0.8
    request, response = Request(), Response(sent_bytes=100, waiting=100)
    case.watch.add(cast(Exchange, request), response)
    case.look(after_s=0.2)
    assert case.stalled_for(StallCause.CLIENT) == 0.2
    for _ in range(3):
        case.look()
    assert not case.stalled
    case.look()
    assert case.stalled == [request]
    assert case.stalled_for(StallCause.CLIENT) == 4.2


@pytest.mark.parametrize(("linked", "cause"), [(True, StallCause.ENGINE), (False, StallCause.LINK)])
async def test_what_a_client_waits_for_is_told_apart(linked: bool, cause: StallCause) -> None:
    case = Watched()
    case.linked = linked
    case.look()
    case.look()
    case.request.received_bytes = 10
    case.look()
    assert {each: case.stalled_for(each) for each in StallCause} == dict.fromkeys(StallCause, 0.0) | {cause: 2.0}


async def test_a_response_that_is_done_is_watched_until_its_client_has_it() -> None:
    case = Watched()
    case.look(sent_bytes=100, waiting=100)
    case.watch.leave(case.exchange)
    case.look(waiting=50)
    assert case.watch.unfinished == 1
    case.look(waiting=0)
    assert (case.watch.unfinished, case.watch._looked_at) == (0, None)
