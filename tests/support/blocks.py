"""How much Python memory a piece of work keeps after it is over, in blocks, which are counted and not sampled."""

import gc
import sys
from collections.abc import Awaitable, Callable


def blocks_kept(work: Callable[[], object], times: int) -> float:
    """Blocks for each of `times` calls of `work` that are not given back, the interpreter's free lists included.

    A tuple that is built from a generator begins longer than it ends. It is taken from one free list and given back to
    another, which holds 2,000 of one length, and which a full collection alone empties: a slope for days.
    """
    for _ in range(times // 10):
        work()
    gc.collect()
    gc.disable()
    try:
        before = sys.getallocatedblocks()
        for _ in range(times):
            work()
        return (sys.getallocatedblocks() - before) / times
    finally:
        gc.enable()


async def blocks_kept_by(work: Callable[[], Awaitable[object]], times: int) -> float:
    """The same of work that waits."""
    for _ in range(times // 10):
        await work()
    gc.collect()
    gc.disable()
    try:
        before = sys.getallocatedblocks()
        for _ in range(times):
            await work()
        return (sys.getallocatedblocks() - before) / times
    finally:
        gc.enable()
