"""What a request leaves in memory: nothing that only a full collection would find."""

import gc

from tests.router.link.rig import Rig
from xim_router.http.response import HttpResponse
from xim_router.link.exchange import Exchange


async def test_a_request_that_is_over_is_freed_without_a_collection() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=lambda work: work.answer(work.body)):
        await rig.ask()
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                assert (await rig.ask()).status == 200
            await rig.idle()
            left = [each for each in gc.get_objects() if type(each) in (Exchange, HttpResponse)]
        finally:
            gc.enable()
        # The last one's handler may have a step to go.
        assert len(left) <= 2
