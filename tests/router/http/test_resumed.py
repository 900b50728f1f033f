"""A coroutine that was driven by hand up to its first wait, and goes on in a task."""

import asyncio

import pytest

from xim_router.http.resumed import Resumed


async def of_two(first: asyncio.Future[int], second: asyncio.Future[int]) -> int:
    try:
        one = await first
    except ZeroDivisionError:
        one = 100
    return one + await second


async def test_it_gives_the_result_after_all_waits() -> None:
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()
    coroutine = of_two(first, second)
    resumed = Resumed(coroutine, coroutine.send(None))
    loop.call_soon(first.set_result, 1)
    loop.call_soon(second.set_result, 2)
    assert await resumed == 3


async def test_what_a_wait_raises_reaches_the_coroutine_and_what_it_raises_the_caller() -> None:
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()
    coroutine = of_two(first, second)
    resumed = Resumed(coroutine, coroutine.send(None))
    first.set_exception(ZeroDivisionError())
    loop.call_soon(second.set_exception, KeyError("second"))
    with pytest.raises(KeyError):
        await resumed


async def test_a_time_limit_around_it_ends_the_coroutine() -> None:
    never: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    coroutine = of_two(never, never)
    resumed = Resumed(coroutine, coroutine.send(None))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await resumed
    assert never.cancelled()
    with pytest.raises(RuntimeError, match="already awaited"):
        await coroutine
