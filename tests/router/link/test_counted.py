"""Tokens that an agent counted after a stream ended without a report: one line, of its own requests alone."""

import logging
from typing import Any

import pytest

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import AgentStub, hold
from xim_protocol.ids import RequestId
from xim_protocol.messages import Counted
from xim_router.link import journal

USAGE = (5, 3, 0, "counted")


def lines(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.message == "usage counted"]


def tell(agent: AgentStub, request: RequestId) -> None:
    agent.session.report_counted(Counted(request=request, attempt=1, usage=USAGE))
    agent.flush()


async def cancelled(rig: Rig, agent: AgentStub) -> RequestId:
    """A request that `agent` works on until its client leaves."""
    before = len(agent.works)
    async with await rig.call():
        await agent.until(lambda: len(agent.works) > before)
    work = agent.works[-1]
    await agent.until(lambda: work.over)
    await rig.idle()
    # The loop's clock counts whole milliseconds: the next request ends later than this one by that clock too.
    ended = agent.now()
    await until(lambda: agent.now() > ended)
    return work.submit.request


async def test_a_count_is_one_line_with_whose_request_it_was(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent:
        request = await cancelled(rig, agent)
        tell(agent, request)
        tell(agent, request)
        await until(lambda: lines(caplog))
        # The answer to a later message: the repeated count was heard, too.
        later = await cancelled(rig, agent)
        tell(agent, later)
        await until(lambda: len(lines(caplog)) == 2)
        line = lines(caplog)[0]
        assert (line.request, line.attempt, line.agent, line.usage) == (request, 1, "a", USAGE)
        assert (line.project, line.endpoint) == ("proj_acme", "chat")
        assert [each.request for each in lines(caplog)] == [request, later]


async def test_nobody_counts_for_another_agent_or_for_no_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig("a", "b") as rig, rig.agent("a", serve=hold) as a:
        request = await cancelled(rig, a)
        async with rig.agent("b", serve=hold) as b:
            tell(b, request)
            tell(b, RequestId("req_unknown"))
            b.session.renew(b.now())
            b.flush()
            await b.until(lambda: any(type(message).__name__ == "Renewed" for message in b.messages))
        assert lines(caplog) == []
        tell(a, request)
        await until(lambda: lines(caplog))


@pytest.mark.parametrize(
    ("bound", "value", "kept"),
    [("UNCOUNTED", 2, 2), ("UNCOUNTED_S", 0.0, 1)],
    ids=["after many others", "after a while"],
)
async def test_counts_that_never_come_are_forgotten(
    bound: str, value: float, kept: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(journal, bound, value)
    async with Rig("a") as rig, rig.agent("a", serve=hold) as agent:
        # It is the end of a later request at which an earlier one is forgotten.
        requests = [await cancelled(rig, agent) for _ in range(3)]
        for request in requests:
            tell(agent, request)
        await until(lambda: len(lines(caplog)) == kept)
        assert [line.request for line in lines(caplog)] == requests[-kept:]
