"""The engine's routes that may be relayed, as one table.

The router relays exactly these, the agent refuses any other, so that nothing else of an engine's HTTP surface (its
metrics, its admin routes) can be reached through the wire.
"""

from dataclasses import dataclass
from enum import StrEnum


class TerminalEvent(StrEnum):
    """How an event stream of a route says that it is complete."""

    DONE = "done"
    """`data: [DONE]`, as in chat completions."""
    RESPONSE = "response"
    """`response.completed`, `response.incomplete` or `response.failed`, as in the Responses API."""
    MESSAGE_STOP = "message_stop"
    """`message_stop`, as in the Messages API."""
    NONE = "none"
    """The route never streams."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One relayed route; always `POST` with a JSON object as its body."""

    path: str
    terminal: TerminalEvent = TerminalEvent.NONE
    cache_salt: bool = False
    """The engine knows `cache_salt` in this body. A route that does not is served to one project per node only."""
    stream_options: bool = False
    """The engine knows `stream_options.include_usage` in this body."""


ROUTES: tuple[Route, ...] = (
    Route(path="/v1/chat/completions", terminal=TerminalEvent.DONE, cache_salt=True, stream_options=True),
    Route(path="/v1/completions", terminal=TerminalEvent.DONE, cache_salt=True, stream_options=True),
    Route(path="/v1/responses", terminal=TerminalEvent.RESPONSE, cache_salt=True),
    Route(path="/v1/messages", terminal=TerminalEvent.MESSAGE_STOP, cache_salt=False),
    Route(path="/v1/messages/count_tokens"),
    Route(path="/v1/embeddings", cache_salt=False),
    Route(path="/v1/rerank"),
    Route(path="/v1/score"),
    Route(path="/pooling"),
    Route(path="/classify"),
    Route(path="/tokenize"),
    Route(path="/detokenize"),
)

ROUTES_BY_PATH: dict[str, Route] = {route.path: route for route in ROUTES}
