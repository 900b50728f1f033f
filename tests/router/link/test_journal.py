"""Requests that are over are written down a moment later, and nobody finds them missing."""

import logging
import time

import pytest

from tests.router.link.rig import CHAT, Rig, until
from tests.support.agent_stub import SSE, Work
from xim_router.link import journal


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is written down by the clock, unless a test says so."""
    monkeypatch.setattr(journal, "SETTLE_S", 3_600.0)
    caplog.set_level(logging.INFO)


def written(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """The lines of requests."""
    return [record for record in caplog.records if record.name == journal.log.name]


async def test_they_are_written_in_their_order_and_of_the_time_of_their_end(caplog: pytest.LogCaptureFixture) -> None:
    async with Rig("a") as rig, rig.agent("a"):
        ends = []
        for number in range(3):
            began = time.time()
            await rig.ask(x_request_id=f"mine-{number}")
            ends.append((began, time.time()))
        assert written(caplog) == []
        rig.journal.settle()
        assert [vars(line)["client_request"] for line in written(caplog)] == ["mine-0", "mine-1", "mine-2"]
        for line, (began, over) in zip(written(caplog), ends, strict=True):
            assert began <= line.created <= over
            assert line.msecs == pytest.approx(line.created % 1.0 * 1000)


async def test_they_are_written_by_the_clock(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SETTLE_S", 0.01)
    async with Rig("a") as rig, rig.agent("a"):
        for count in (1, 2):
            await rig.ask()
            await until(lambda count=count: len(written(caplog)) == count)  # type: ignore[misc]


async def test_who_reads_metrics_finds_them_counted(caplog: pytest.LogCaptureFixture) -> None:
    async with Rig("a") as rig, rig.agent("a"):
        await rig.ask()
        names = {"project": CHAT.project, "endpoint": CHAT.slug}
        await until(lambda: rig.count("xim_router_requests_total", **names, code="200") == 1)
        assert rig.count("xim_router_request_seconds_count", **names) == 1
        assert len(written(caplog)) == 1


async def test_a_later_line_of_a_request_comes_after_its_own(caplog: pytest.LogCaptureFixture) -> None:
    async def large(work: Work) -> None:
        await work.answer(b"data: " + b"x" * 8_000_000 + b"\n\ndata: [DONE]\n\n", content_type=SSE)

    async with (
        Rig("a", client_stall_timeout_s=0.4, response_buffer_bytes=1 << 30) as rig,
        rig.agent("a", serve=large),
        await rig.call(receive_buffer_bytes=4_096),
    ):
        await until(lambda: any(record.getMessage() == "client cut off" for record in caplog.records))
        told = [record.getMessage() for record in caplog.records]
        assert told.index("request") < told.index("client cut off")


async def test_at_the_end_all_are_written(caplog: pytest.LogCaptureFixture) -> None:
    async with Rig("a") as rig, rig.agent("a"):
        await rig.ask()
        assert written(caplog) == []
    assert len(written(caplog)) == 1
