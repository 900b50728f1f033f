"""Who hears of a free place: every router that was refused, once for each refusal, one after the other."""

import asyncio

from tests.support.programs import PATIENCE_S
from xim_agent.places import NEXT_ROUTER_S, Places


class Router:
    """What one router heard, and when."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.at: list[float] = []
        self.linked = True

    def announce_slots(self, free: int) -> bool:
        if self.linked:
            self.heard.append(free)
            self.at.append(asyncio.get_running_loop().time())
        return self.linked


def full(capacity: int, *, refused: dict[Router, int]) -> Places:
    """Places that are all taken, after so many refusals to each router."""
    places = Places(capacity, lambda taken: None)
    places.closed = False
    for _ in range(capacity):
        places.take()
    for router, times in refused.items():
        for _ in range(times):
            places.refused(router)
    return places


async def turns() -> None:
    """Let the offers of a few turns of the next router happen."""
    # One after the other, as the offers come: a loop that stands still for a while delays these as well.
    for _ in range(6):
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(NEXT_ROUTER_S, done.set)
        await done.wait()


async def test_a_place_is_offered_once_for_each_refusal_and_then_no_more() -> None:
    first, second = Router(), Router()
    places = full(1, refused={first: 2, second: 1})
    places.give_back()
    await turns()
    assert (first.heard, second.heard) == ([1, 1], [1])
    assert first.at[0] < second.at[0] < first.at[1], "one that has more stands at the end of the line"
    assert second.at[0] - first.at[0] >= 0.9 * NEXT_ROUTER_S
    places.take()
    places.give_back()
    await turns()
    assert (first.heard, second.heard) == ([1, 1], [1]), "nobody waits any more"


async def test_more_places_than_refusals_settle_them_all() -> None:
    router = Router()
    places = full(3, refused={router: 2})
    for _ in range(3):
        places.give_back()
    await turns()
    assert router.heard == [3]


async def test_who_takes_the_place_ends_the_offers() -> None:
    first, second = Router(), Router()
    places = full(1, refused={first: 1, second: 1})
    places.give_back()
    await asyncio.sleep(0)
    assert (first.heard, second.heard) == ([1], [])
    places.take()
    await turns()
    assert second.heard == []
    places.give_back()
    await turns()
    assert second.heard == [1]


async def test_a_router_without_a_link_hears_when_it_has_one() -> None:
    away, other = Router(), Router()
    away.linked = False
    places = full(1, refused={away: 1, other: 1})
    places.give_back()
    await turns()
    assert (away.heard, other.heard) == ([], [1])
    away.linked = True
    places.offer()
    await turns()
    assert away.heard == [1]


async def test_a_router_that_left_for_good_is_offered_nothing() -> None:
    gone = Router()
    places = full(1, refused={gone: 3})
    places.forget(gone)
    places.give_back()
    await turns()
    assert gone.heard == []


async def test_while_nothing_new_is_taken_no_place_is_offered() -> None:
    router = Router()
    places = full(1, refused={router: 1})
    places.closed = True
    places.give_back()
    await turns()
    assert router.heard == []
    places.closed = False
    places.offer()
    await turns()
    assert router.heard == [1]


async def test_all_are_free_when_the_last_one_is() -> None:
    places = full(2, refused={})
    waiting = asyncio.create_task(places.all_free())
    places.give_back()
    await turns()
    assert not waiting.done()
    places.give_back()
    async with asyncio.timeout(PATIENCE_S):
        await waiting
    places.take()
    again = asyncio.create_task(places.all_free())
    await turns()
    assert not again.done()
    again.cancel()
    await asyncio.wait([again])
