"""A fault of ours in one client's answer is that client's alone."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.router.link.rig import CHAT, Rig
from tests.support.agent_stub import SSE, hold
from tests.support.http_client import Unfinished
from xim_router.dispatch.dispatcher import Dispatcher
from xim_router.http.response import HttpResponse

FIRST, SECOND, DONE = b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"


def failing(method: Callable[..., Any], *, at: str) -> Callable[..., Any]:
    """`method` of a response, which fails where the request's id is `at`."""

    def call(response: HttpResponse, *arguments: object) -> object:
        if response._request_id == at:
            raise RuntimeError("a fault of ours")
        return method(response, *arguments)

    return call


@pytest.mark.parametrize("where", ["start", "put", "end"])
async def test_it_costs_no_other_client_a_byte(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(HttpResponse, where, failing(getattr(HttpResponse, where), at="unlucky"))
    async with (
        Rig("a") as rig,
        rig.agent("a", serve=hold, capacity=2) as agent,
        await rig.call(x_request_id="unlucky") as unlucky,
        await rig.call(x_request_id="other") as other,
    ):
        works = [await agent.work(), await agent.work(1)]
        # Each of these is one message to both.
        for work in works:
            work.start(200, SSE)
            agent.session.produce(work.stream, FIRST, agent.now())
        agent.flush()
        await other.head()
        await other.until(FIRST)
        for work in works:
            if not work.over:
                agent.session.produce(work.stream, SECOND + DONE, agent.now())
                agent.session.end(work.stream, None)
        agent.flush()
        await other.rest()
        assert bytes(other.body) == FIRST + SECOND + DONE
        with pytest.raises(Unfinished):
            await unlucky.rest()
        await rig.idle()
        assert (
            rig.count("xim_router_requests_total", project=CHAT.project, endpoint=CHAT.slug, code="internal_error") == 1
        )
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert record.getMessage() == "answer failed"
    assert "a fault of ours" in str(record.exc_info)


async def test_one_that_is_nobodys_answer_is_logged_and_what_follows_is_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    async with Rig("a") as rig, rig.agent("a") as agent:
        with monkeypatch.context() as patch:
            patch.setattr(Dispatcher, "slots_free", broken)
            agent.session.announce_slots(1)
            agent.flush()
            assert (await rig.ask()).status == 200
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "a fault of ours" in str(record.exc_info)
