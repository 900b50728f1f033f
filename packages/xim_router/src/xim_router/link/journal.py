"""What the broker counts and logs: one line per request at its end, numbers for the rest. Nothing per chunk.

Requests that are over are written down together, a moment later: it costs less than writing down each at its end
(bench/README.md), and no bytes wait behind it. Who reads metrics, or a later line of the same request, finds it done.
"""

import asyncio
import logging
import time
from functools import cache

from prometheus_client import Counter, Histogram

from xim_protocol.errors import FaultReason
from xim_protocol.ids import AgentId, RequestId
from xim_protocol.messages import Counted, FailCode
from xim_router.dispatch.catalog import Endpoint
from xim_router.dispatch.effects import Rejection
from xim_router.link.exchange import Exchange
from xim_router.telemetry.logs import log_facts
from xim_router.telemetry.metrics import ClientPhase, QueueOutcome, RetryReason, RouterMetrics

log = logging.getLogger("xim_router.request")

_RETRIES = {
    FailCode.AGENT_LOST: RetryReason.AGENT_LOST,
    FailCode.ENGINE_UNAVAILABLE: RetryReason.ENGINE_UNAVAILABLE,
}


SETTLE_S = 0.1
"""How long the line and the figures of a request that is over may wait for others."""
UNCOUNTED = 4096
"""Requests without a report whose count may still come, at most;"""
UNCOUNTED_S = 10.0
"""and how long it may take; an agent counts within moments, and what comes later is not logged."""


class Journal:
    """Keeps the broker's branches free of metrics and log fields."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        # `labels()` costs more than counting does, and adds to a free list of the interpreter (see the codec).
        # There are as many as endpoints and outcomes.
        self._queue_waits = cache(metrics.queue_wait_seconds.labels)
        self._retries = cache(metrics.retries.labels)
        self._disconnects = cache(metrics.client_disconnects.labels)
        self._requests: dict[tuple[str, str, str], Counter] = {}
        self._seconds: dict[tuple[str, str], tuple[Histogram, Histogram]] = {}
        self._uncounted: dict[RequestId, tuple[AgentId, Endpoint, float]] = {}
        """In the order of their ends, with the time of each."""
        self._over: list[tuple[float, int, dict[str, object], float, float | None]] = []
        """Unix time, level, facts, seconds in all and to the first byte."""
        self._settling: asyncio.TimerHandle | None = None
        metrics.before_scrape = self.settle

    # --- Per message -----------------------------------------------------------------------------------------------

    def message(self, entries: int, chunks: int, received_bytes: int) -> None:
        """One message of an agent, with so many entries of streams, chunks among them."""
        hot = self._metrics.hot
        hot.wire_messages_received += 1
        if entries:
            hot.count_entries(entries)
            hot.relayed_chunks += chunks
            hot.relayed_bytes += received_bytes

    def fenced(self) -> None:
        """A message came by a link that is not the agent's latest."""
        self._metrics.hot.fenced_messages += 1

    def fault(self, reason: FaultReason) -> None:
        """An agent broke the protocol."""
        self._metrics.protocol_faults.labels(reason.value).inc()

    def link_lost(self) -> None:
        """A link was lost while its session lived."""
        self._metrics.link_lost.inc()

    def lease_expired(self) -> None:
        """A session ended because its lease was not renewed."""
        self._metrics.lease_expired.inc()

    # --- Per request -----------------------------------------------------------------------------------------------

    def assigned(self, exchange: Exchange) -> None:
        """The request goes to an agent."""
        if exchange.queue_wait_s:
            self._queue_waits(QueueOutcome.ASSIGNED).observe(exchange.queue_wait_s)

    def rejected(self, exchange: Exchange, reason: Rejection) -> None:
        """The request was turned away."""
        if exchange.queue_wait_s:
            timed_out = reason is Rejection.QUEUE_TIMEOUT
            outcome = QueueOutcome.TIMED_OUT if timed_out else QueueOutcome.REJECTED
            self._queue_waits(outcome).observe(exchange.queue_wait_s)

    def retried(self, code: FailCode) -> None:
        """An attempt failed before the commit point."""
        self._retries(_RETRIES.get(code, RetryReason.FAILED)).inc()

    def refused(self) -> None:
        """An agent did not take the request; it goes back."""
        self._retries(RetryReason.REFUSED).inc()

    def failed(self, code: FailCode) -> None:
        """A stream ended without its whole answer."""
        if code is FailCode.STALLED:
            self._metrics.credit_stalled.inc()

    def client_stalled(self, exchange: Exchange) -> None:
        """A client took nothing for too long."""
        self._metrics.client_stalled.inc()
        if exchange.concluded:
            self.settle()
            # Its line was written when the answer was whole, and does not say that nobody took it.
            log.warning("client cut off", extra={"request": exchange.request, "bytes": exchange.received_bytes})

    def left(self, exchange: Exchange) -> None:
        """The client left before its answer was whole."""
        if exchange.sink.committed:
            phase = ClientPhase.ANSWERING
        else:
            phase = ClientPhase.PARKED if exchange.stream is None else ClientPhase.DISPATCHED
        self._disconnects(phase).inc()

    def concluded(self, exchange: Exchange, code: str | None, now: float) -> None:
        """The request is over: note its one line, and its figures."""
        if code is not None:
            self._await_count(exchange, now)
        total_s = now - exchange.received_at
        ttft_s = None if exchange.first_byte_at is None else exchange.first_byte_at - exchange.received_at
        facts: dict[str, object] = {
            "request": exchange.request,
            "client_request": exchange.client_request,
            "project": exchange.project,
            "endpoint": exchange.endpoint.slug,
            "path": exchange.route.path,
            "agent": exchange.agent,
            "outcome": code or str(exchange.status or 0),
            "status": exchange.status,
            "attempts": exchange.attempts,
            "queue_wait_s": round(exchange.queue_wait_s, 3),
            "ttft_s": None if ttft_s is None else round(ttft_s, 3),
            "total_s": round(total_s, 3),
            "chunks": exchange.chunks,
            "bytes": exchange.received_bytes,
            "usage": exchange.usage,
        }
        level = logging.INFO if code is None or code == "client_closed_request" else logging.WARNING
        self._over.append((time.time(), level, facts, total_s, ttft_s))
        if self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(SETTLE_S, self.settle)

    def settle(self) -> None:
        """Write down the requests that are over, in the order of their ends."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        over, self._over = self._over, []
        for at, level, facts, total_s, ttft_s in over:
            names = str(facts["project"]), str(facts["endpoint"])
            self._count(names, str(facts["outcome"]))
            request_seconds, ttft_seconds = self._histograms(names)
            request_seconds.observe(total_s)
            if ttft_s is not None:
                ttft_seconds.observe(ttft_s)
            log_facts(log, level, "request", facts, at=at)

    def _await_count(self, exchange: Exchange, now: float) -> None:
        """The agent may count what the engine did not report; what comes late, or after many others, is not known."""
        if exchange.agent is None or exchange.usage is not None:
            return
        waiting = self._uncounted
        waiting[exchange.request] = (exchange.agent, exchange.endpoint, now)
        while len(waiting) > UNCOUNTED or next(iter(waiting.values()))[2] < now - UNCOUNTED_S:
            del waiting[next(iter(waiting))]

    def counted(self, agent: AgentId, counted: Counted) -> None:
        """`agent` counted the tokens of a request that ended without the engine's report; of no other agent's."""
        of_agent, endpoint, _ = self._uncounted.get(counted.request, (None, None, 0.0))
        if endpoint is None or of_agent != agent:
            return
        del self._uncounted[counted.request]
        self.settle()
        log.info(
            "usage counted",
            extra={
                "request": counted.request,
                "attempt": counted.attempt,
                "project": endpoint.project,
                "endpoint": endpoint.slug,
                "agent": agent,
                "usage": counted.usage,
            },
        )

    def _count(self, names: tuple[str, str], outcome: str) -> None:
        counter = self._requests.get((*names, outcome))
        if counter is None:
            counter = self._requests[(*names, outcome)] = self._metrics.requests.labels(*names, outcome)
        counter.inc()

    def _histograms(self, names: tuple[str, str]) -> tuple[Histogram, Histogram]:
        found = self._seconds.get(names)
        if found is None:
            metrics = self._metrics
            found = (metrics.request_seconds.labels(*names), metrics.ttft_seconds.labels(*names))
            self._seconds[names] = found
        return found
