"""What a request leaves in memory: nothing that only a full collection would find."""

import gc
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.router.link.rig import Rig
from tests.support.blocks import blocks_kept
from xim_protocol.messages import FailCode
from xim_router.dispatch.catalog import Catalog
from xim_router.dispatch.dispatcher import Dispatcher
from xim_router.dispatch.effects import Rejection
from xim_router.http.inference import RELAYED_HEADERS, _relayed
from xim_router.http.response import HttpResponse
from xim_router.link.exchange import Exchange
from xim_router.link.journal import Journal
from xim_router.telemetry.metrics import RouterMetrics

TIMES = 1_000


async def test_a_request_that_is_over_is_freed_without_a_collection() -> None:
    async with Rig("a") as rig, rig.agent("a", serve=lambda work: work.answer(work.body)):
        await rig.ask()
        await rig.idle()
        gc.collect()
        before = requests_in_memory()  # such as a test holds that failed
        gc.disable()
        try:
            for _ in range(10):
                assert (await rig.ask()).status == 200
            await rig.idle()
            left = [each for each in requests_in_memory() if not any(each is other for other in before)]
        finally:
            gc.enable()
        # The last one's handler may have a step to go.
        assert len(left) <= 2


def requests_in_memory() -> list[object]:
    return [each for each in gc.get_objects() if type(each) in (Exchange, HttpResponse)]


@pytest.fixture
def metrics() -> RouterMetrics:
    dispatcher = Dispatcher(queue_timeout_s=30.0)
    return RouterMetrics(statistics=dispatcher.statistics, catalog=Catalog, control_stale_s=lambda: 0.0)


def test_what_is_counted_leaves_nothing_but_its_count(metrics: RouterMetrics) -> None:
    journal = Journal(metrics)
    sink = SimpleNamespace(committed=True)
    exchange = cast(Exchange, cast(Any, SimpleNamespace(queue_wait_s=0.5, sink=sink, stream=None)))

    def counted() -> None:
        journal.assigned(exchange)
        journal.left(exchange)
        journal.retried(FailCode.AGENT_LOST)
        journal.refused()
        journal.rejected(exchange, Rejection.QUEUE_TIMEOUT)
        metrics.refused("invalid_request")

    assert blocks_kept(counted, TIMES) < 0.5


def test_headers_that_an_engine_may_see_leave_nothing() -> None:
    headers = [(name, b"value") for name in RELAYED_HEADERS]
    assert blocks_kept(lambda: _relayed(headers), TIMES) < 0.5
