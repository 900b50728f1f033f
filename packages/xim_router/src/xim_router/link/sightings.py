"""What is told of agents' sessions: to the log, and to the control plane when each agent was heard of last.

Reports are facts that may be lost; what becomes of them is the control plane's to decide. Where there are several
routers an agent may serve by the others: one of them says that the agent has left only if it goes from all, or if its
lease is over, and with the last sign of life that it had itself.
"""

import logging
import time
from collections.abc import Callable

from xim_protocol.messages import AgentState, GoodbyeCode
from xim_router.dispatch.reports import AgentSeen
from xim_router.link.agent_link import AgentLink

log = logging.getLogger(__name__)

_FROM_ONE_ROUTER = frozenset(GoodbyeCode) - {GoodbyeCode.LEAVING, GoodbyeCode.REVOKED, GoodbyeCode.SUSPENDED}


class Sightings:
    """See the module's docstring."""

    def __init__(self, report: Callable[[AgentSeen], None]) -> None:
        self._report = report

    def seen(self, link: AgentLink, state: AgentState) -> None:
        """The agent said how it is."""
        link.seen_at = time.time()
        self._report(AgentSeen(agent=link.agent, seen_at=link.seen_at, state=state.value))

    def said_goodbye(self, link: AgentLink, code: GoodbyeCode) -> None:
        """The agent ends its session, and was alive to say so."""
        log.info("agent left", extra={"agent": link.agent, "code": code.value})
        link.seen_at = time.time()
        link.goodbye = code

    def lost(self, link: AgentLink, *, several: bool) -> None:
        """The agent's link is down; its session waits for it."""
        log.info("link lost", extra={"agent": link.agent})
        if not several:
            self._left(link)

    def ended(self, link: AgentLink, code: GoodbyeCode | None, message: str, *, several: bool) -> None:
        """A session is over: ended here with `code`, or else by its agent or its lease."""
        if code is not None:
            level = logging.INFO if code is GoodbyeCode.SHUTDOWN else logging.WARNING
            log.log(level, "session ended", extra={"agent": link.agent, "code": code.value, "why": message})
        if not (several and (code or link.goodbye) in _FROM_ONE_ROUTER):
            self._left(link)

    def _left(self, link: AgentLink) -> None:
        self._report(AgentSeen(agent=link.agent, seen_at=link.seen_at, departed=True))
