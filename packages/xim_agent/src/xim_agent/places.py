"""The agent's places for requests: who holds how many, and which router hears of a free one.

A router that was refused dispatches nothing until it hears, so every refusal is answered by a place offered, once.
Both ends keep that count (docs/reference/wire-protocol.md, "Several routers"); without it a router with a long queue
would send all of it for each place.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

NEXT_ROUTER_S = 0.05
"""A free place is offered to one refused router at a time; the next hears of it after this."""


class Refused(Protocol):
    """A router that was refused for capacity."""

    def announce_slots(self, free: int) -> bool:
        """Places are free again. False while no link can carry it."""
        ...


class Places:
    """Counts the places taken, over all routers. What is refused for capacity dispatches nothing until it hears."""

    def __init__(self, capacity: int, on_change: Callable[[int], None]) -> None:
        """`on_change` is told every change of the number of places taken."""
        self.capacity = capacity
        self.closed = True
        """Nothing new is taken, so nothing is offered."""
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._taken = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._refused: dict[Refused, int] = {}
        """How many requests each router took back and has not heard of a place for; longest ago first."""
        self._offering: asyncio.Handle | None = None

    @property
    def taken(self) -> int:
        """How many are taken now."""
        return self._taken

    @property
    def full(self) -> bool:
        """True when no place is free."""
        return self._taken >= self.capacity

    def take(self) -> None:
        """One more is taken."""
        self._set(self._taken + 1)

    def give_back(self) -> None:
        """One is free again; a refused router hears of it after this turn of the loop, so that the end of the
        stream that left goes out first."""
        self._set(self._taken - 1)
        self.offer()

    def refused(self, router: Refused) -> None:
        """A request of `router` was refused for capacity."""
        self._refused[router] = self._refused.get(router, 0) + 1

    def forget(self, router: Refused) -> None:
        """`router` is gone for good."""
        self._refused.pop(router, None)

    def offer(self) -> None:
        """Tell the router that was refused longest ago of free places; the next one a little later."""
        if self._offering is None and self._refused:
            self._offering = self._loop.call_soon(self._offer_next)

    async def all_free(self) -> None:
        """Return when none is taken. The caller sets the deadline."""
        await self._idle.wait()

    def _set(self, taken: int) -> None:
        self._taken = taken
        if taken:
            self._idle.clear()
        else:
            self._idle.set()
        self._on_change(taken)

    def _offer_next(self) -> None:
        self._offering = None
        if not self._refused or self.full or self.closed:
            return
        free = self.capacity - self._taken
        router = next((each for each in self._refused if each.announce_slots(free)), None)
        if router is None:
            return  # nobody can hear it; the next link that opens is a reason to look again
        waiting = self._refused.pop(router) - free
        if waiting > 0:
            self._refused[router] = waiting
        if self._refused:
            self._offering = self._loop.call_later(NEXT_ROUTER_S, self._offer_next)
