"""Going on with a coroutine that was driven by hand up to its first wait.

Most of what might have to wait does not: such a coroutine is run on the spot, without task, timer or context, and only
one that does wait is handed to a task.
"""

from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Resumed(Generic[Result]):
    """Awaits the rest of a coroutine that was started with `send(None)` and has yielded `future`; gives its result."""

    __slots__ = ("_coroutine", "_future", "_result")

    def __init__(self, coroutine: Coroutine[Any, Any, Result], future: object) -> None:
        self._coroutine, self._future = coroutine, future
        self._result: Result

    def __await__(self) -> Generator[Any, Any, Result]:
        future = self._future
        while future is not _FINISHED:
            try:
                # The future was yielded with its blocking flag set, which nobody has taken note of yet: the task that
                # awaits this sees it exactly as if it had driven the coroutine itself.
                value = yield future
            except BaseException as error:
                future = self._step(self._coroutine.throw, error)
            else:
                future = self._step(self._coroutine.send, value)
        return self._result

    def _step(self, resume: Callable[[Any], object], value: object) -> object:
        try:
            return resume(value)
        except StopIteration as finished:
            self._result = finished.value
            return _FINISHED


_FINISHED = object()
