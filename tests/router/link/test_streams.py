"""One request's way through the router and back, over real sockets."""

import asyncio

import pytest

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import Work
from tests.support.http_client import Unfinished
from tests.support.programs import PATIENCE_S
from xim_protocol.messages import FailCode

DONE = b"data: [DONE]\n\n"


def event(number: int) -> bytes:
    return f'data: {{"n": {number}}}\n\n'.encode()


async def test_a_whole_answer_arrives_with_its_length() -> None:
    async with Rig("a") as rig, rig.agent("a"):
        call = await rig.ask({"model": "chat", "prompt": "héllo"})
        assert call.status == 200
        assert call.json() == {"model": "chat", "prompt": "héllo"}
        assert call.headers["content-length"] == str(len(call.body))
        assert call.headers["content-type"] == "application/json"


async def test_a_plain_body_that_breaks_off_after_its_first_byte_closes_the_connection_unfinished() -> None:
    async def serve(work: Work) -> None:
        work.start()
        await work.write(b"x" * 100_000)
        work.fail(FailCode.ENGINE_BROKEN)

    async with Rig("a", response_buffer_bytes=65_536) as rig, rig.agent("a", serve=serve), await rig.call() as call:
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(Unfinished):
                await call.rest()
        assert call.status == 200


async def test_an_agent_is_told_to_forget_a_stream_without_waiting_for_other_news() -> None:
    async with Rig("a") as rig, rig.agent("a", lease_s=300.0) as agent:
        await rig.ask()
        await agent.until(lambda: not agent.session.statistics().streams)


async def test_a_kept_connection_owes_nothing_between_two_requests() -> None:
    """The handler of the first has returned, though the client stays."""
    async with Rig("a") as rig, rig.agent("a"), await rig.call() as call:
        await call.rest()
        await until(lambda: not rig._server.server_state.tasks)
