"""Takes and refuses the routers' requests, and counts the places that they hold.

A place is taken when a request is accepted and given back exactly once, before its end is told, so that the next
request finds it free. What becomes of an accepted request is the business of its `Relay`.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from xim_agent.counting import Tokenizer, UsageCounter
from xim_agent.places import Places
from xim_agent.relay import ChunkCounters, EngineCalls, Outcome, Relay, Relaying, RouterLink, ServedModel
from xim_protocol.events import (
    AgentEvent,
    BodyReceived,
    RequestReceived,
    StreamAborted,
    StreamCancelled,
    StreamFailed,
)
from xim_protocol.ids import ProjectId, StreamId
from xim_protocol.messages import FailCode, RefusalReason, Submit
from xim_protocol.routes import ROUTES_BY_PATH, Route

log = logging.getLogger(__name__)


class Engine(EngineCalls, Tokenizer, Protocol):
    """What is asked of the engine; `engine.client.EngineClient` is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingStatistics:
    """What was served so far."""

    in_flight: int
    accepted: int
    outcomes: Mapping[Outcome, int]


class Serving:
    """See the module's docstring. Everything happens in the loop of `tasks`."""

    def __init__(
        self,
        *,
        engine: Engine,
        tasks: asyncio.TaskGroup,
        capacity: int,
        salt_secret: str,
        counters: ChunkCounters,
        on_in_flight: Callable[[int], None],
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        """`on_in_flight` is told every change of the number of places taken."""
        self._on_outcome = on_outcome
        self._model: ServedModel | None = None
        self._relays: dict[tuple[RouterLink, StreamId], Relay] = {}
        self._places = Places(capacity, on_in_flight)
        self._usage = UsageCounter(engine, tasks)
        self._relaying = Relaying(
            loop=asyncio.get_running_loop(),
            engine=engine,
            tasks=tasks,
            counters=counters,
            usage=self._usage,
            salt_secret=salt_secret,
            on_outcome=self._ends,
            on_closed=self._forget,
        )
        self._draining = False
        self._unsalted_project: ProjectId | None = None
        self._accepted = 0
        self._outcomes: Counter[Outcome] = Counter()

    # --- For the owner ---------------------------------------------------------------------------------------------

    def engine_ready(self, model: ServedModel) -> None:
        """The engine answers: take requests."""
        self._model = model
        self._places.closed = self._draining
        self._places.offer()

    def engine_unready(self) -> None:
        """The engine does not answer: refuse what comes."""
        self._model = None
        self._places.closed = True

    def linked(self) -> None:
        """A link is open: a router that was refused hears of places that became free without one."""
        self._places.offer()

    def unlink(self, link: RouterLink) -> None:
        """The router left the mesh for good; its streams were aborted before."""
        self._places.forget(link)

    def engine_emptied(self) -> None:
        """A fresh engine process: its caches hold nothing of any project."""
        self._unsalted_project = None

    def receive(self, link: RouterLink, event: AgentEvent) -> None:
        """Take an event of `link`'s session; events that are no business of streams are ignored."""
        try:
            self._take(link, event)
        except Exception:
            # Its message has other streams' events too, and an error in it would end the link and all of the agent.
            self._spoiled(link, event)

    def _take(self, link: RouterLink, event: AgentEvent) -> None:
        match event:
            case RequestReceived():
                self._requested(link, event.submit)
            case BodyReceived():
                relay = self._relays.get((link, event.stream))
                if relay is not None:
                    relay.bring(event.body)
            case StreamCancelled():
                self._stop(link, event.stream, Outcome.CANCELLED)
            case StreamAborted():
                self._stop(link, event.stream, Outcome.ABORTED)
            case StreamFailed():
                self._stop(link, event.stream, Outcome.STALLED)

    def _spoiled(self, link: RouterLink, event: AgentEvent) -> None:
        """A fault of ours, while `event` was seen to: it ends the one stream that it belongs to."""
        submit = event.submit if isinstance(event, RequestReceived) else None
        number: StreamId | None = getattr(event, "stream", None) if submit is None else submit.stream
        log.exception("stream failed", extra={"request": None if submit is None else submit.request})
        if number is None:
            return
        relay = self._relays.get((link, number))
        if relay is not None:
            if relay.placed:
                self._ends(relay, Outcome.FAILED)
            relay.close()
        if link.is_live(number):
            link.fail(number, FailCode.INTERNAL, "The agent failed.", retryable=False)

    def take_nothing_new(self) -> None:
        """Refuse everything from here on; what is in flight goes on."""
        self._draining = self._places.closed = True

    async def all_ended(self) -> None:
        """Return when nothing is in flight. The caller sets the deadline."""
        await self._places.all_free()

    def statistics(self) -> ServingStatistics:
        """A reading for metrics and tests."""
        return ServingStatistics(in_flight=self._places.taken, accepted=self._accepted, outcomes=dict(self._outcomes))

    # --- Taking and refusing ---------------------------------------------------------------------------------------

    def _requested(self, link: RouterLink, submit: Submit) -> None:
        route = ROUTES_BY_PATH.get(submit.path)
        reason = self._reason_against(submit, route)
        if reason is None and route is not None and self._model is not None:
            self._accept(link, submit, route, self._model)
            return
        refusal = reason or RefusalReason.ROUTE
        if refusal is RefusalReason.AT_CAPACITY:
            self._places.refused(link)
        link.refuse(submit.stream, refusal, self._places.taken)
        self._count(Outcome.REFUSED)

    def _reason_against(self, submit: Submit, route: Route | None) -> RefusalReason | None:
        """Why the request is not taken, or None."""
        if route is None or submit.method != "POST":
            return RefusalReason.ROUTE
        if self._draining:
            return RefusalReason.DRAINING
        if self._model is None:
            return RefusalReason.NOT_READY
        if self._places.full:
            return RefusalReason.AT_CAPACITY
        if not route.cache_salt:
            # Nothing keeps two projects apart in the prefix cache on such a route: the first one has the node.
            if self._unsalted_project not in (None, submit.project):
                return RefusalReason.ROUTE
            self._unsalted_project = submit.project
        return None

    def _accept(self, link: RouterLink, submit: Submit, route: Route, model: ServedModel) -> None:
        relay = Relay(self._relaying, link, submit, route, model)
        self._relays[link, submit.stream] = relay
        self._accepted += 1
        self._places.take()
        relay.start()

    def _stop(self, link: RouterLink, number: StreamId, outcome: Outcome) -> None:
        """Nobody waits for the stream."""
        relay = self._relays.get((link, number))
        if relay is None:
            return
        if relay.placed:
            self._ends(relay, outcome)
        if outcome is not Outcome.ABORTED:
            relay.count_usage()
        relay.close()

    def _ends(self, relay: Relay, outcome: Outcome) -> None:
        self._give_back(relay)
        self._count(outcome)

    def _forget(self, relay: Relay) -> None:
        key = (relay.link, relay.submit.stream)
        if self._relays.get(key) is relay:
            del self._relays[key]
        self._give_back(relay)

    def _give_back(self, relay: Relay) -> None:
        if relay.placed:
            relay.placed = False
            self._places.give_back()

    def _count(self, outcome: Outcome) -> None:
        self._outcomes[outcome] += 1
        self._on_outcome(outcome)
