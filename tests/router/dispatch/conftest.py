"""The dispatcher under test, watched: whatever it is told, its rules are checked after every step."""

from collections.abc import Callable, Iterator

import pytest

from tests.router.dispatch.watched import WatchedDispatcher


@pytest.fixture
def make_dispatcher() -> Iterator[Callable[..., WatchedDispatcher]]:
    """Builds watched dispatchers; a test that lets one break a rule fails at its end at the latest."""
    made: list[WatchedDispatcher] = []

    def make(*, queue_timeout_s: float = 30.0, queue_places: int = 10, attempts: int = 2) -> WatchedDispatcher:
        dispatcher = WatchedDispatcher(queue_timeout_s=queue_timeout_s, queue_places=queue_places, attempts=attempts)
        made.append(dispatcher)
        return dispatcher

    yield make
    for dispatcher in made:
        dispatcher.check()


@pytest.fixture
def dispatcher(make_dispatcher: Callable[..., WatchedDispatcher]) -> WatchedDispatcher:
    return make_dispatcher()
