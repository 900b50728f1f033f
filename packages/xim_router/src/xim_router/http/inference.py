"""The relayed routes, from a client's request to an exchange at the broker.

The body is read once and stays bytes; the broker drives the response from the sockets' callbacks (`HttpResponse`).
A request that arrived whole needs nobody to wait for it: `take` does all there is to do, and the connection says when
it is over. For every other one, `relay` is raw ASGI: it waits in `receive()`, which returns when the client leaves or
when the response is complete, one wait for both.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from xim_protocol.ids import RequestId
from xim_protocol.routes import Route
from xim_router.dispatch.catalog import Endpoint, Principal
from xim_router.http.auth import principal_of, resolve_endpoint
from xim_router.http.client_watch import ClientWatch
from xim_router.http.errors import ApiError, new_request_id
from xim_router.http.request import (
    Disconnected,
    RequestHead,
    check_body_size,
    check_content_type,
    client_request_id,
    header,
    read_body,
    read_head,
)
from xim_router.http.response import HttpResponse, ResponseBuffers
from xim_router.http.resumed import Resumed
from xim_router.http.task_mode import check_task_mode
from xim_router.link.broker import Broker
from xim_router.link.exchange import Exchange

log = logging.getLogger(__name__)

RELAYED_HEADERS = (b"accept", b"anthropic-version", b"anthropic-beta", b"x-slo-ttft-ms", b"x-slo-tpot-ms")
"""What an engine may see of a client's headers; never credentials or cookies."""
_HEADER_CHARACTERS = 1_024


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestIds:
    """The router's own id of a request, and the client's where it sent a well-formed one."""

    own: str
    client: str | None

    @property
    def shown(self) -> str:
        """What stands in `X-Request-ID`; the log line has both."""
        return self.client or self.own


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceLimits:
    """What one request may take."""

    max_body_bytes: int
    request_timeout_s: float
    client_stall_timeout_s: float


class UnderWay:
    """A request at the broker, from its making to `close`, which whoever began it calls once."""

    __slots__ = ("_broker", "_exchange", "_sink", "_timer", "_watch")

    def __init__(self, broker: Broker, watch: ClientWatch, exchange: Exchange, sink: HttpResponse) -> None:
        """Opens the exchange; its answer may be complete when this returns."""
        self._broker, self._watch, self._exchange, self._sink = broker, watch, exchange, sink
        self._timer = asyncio.get_running_loop().call_at(exchange.deadline, broker.time_up, exchange)
        watch.add(exchange, sink)
        try:
            broker.open(exchange)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The client has its whole answer, or left: give back what the request still holds."""
        self._timer.cancel()
        self._broker.close(self._exchange)
        self._sink.close()
        self._watch.leave(self._exchange)


class Inference:
    """Relays requests to agents."""

    def __init__(
        self,
        broker: Broker,
        *,
        hash_key: Callable[[str], bytes],
        buffers: ResponseBuffers,
        limits: InferenceLimits,
        body_given_up: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`hash_key` is the keyed hash of an API key; `body_given_up` is told of a client that left before its body was
        whole; `clock` is in Unix seconds."""
        self._broker = broker
        self._hash_key = hash_key
        self._buffers = buffers
        self._limits = limits
        self._body_given_up = body_given_up
        self._clock = clock
        self.watch = ClientWatch(broker, buffers.hot, timeout_s=limits.client_stall_timeout_s)

    def principal(self, scope: Scope) -> Principal:
        """Who asks.

        Raises:
            ApiError: as `auth.principal_of`.
        """
        headers = scope["headers"]
        return principal_of(
            header(headers, b"authorization"),
            header(headers, b"x-api-key"),
            self._broker.catalog,
            self._hash_key,
            self._clock(),
        )

    async def relay(
        self, scope: Scope, receive: Receive, send: Send, route: Route, project: str | None, slug: str | None
    ) -> None:
        """Serve one request of `route`; `project` and `slug` are the URL's, if it has them.

        Raises:
            ApiError: the request cannot be admitted; nothing was sent.
        """
        received_at = asyncio.get_running_loop().time()
        principal = self._admit(scope)
        body = await self._body(receive, scope["headers"], received_at)
        if isinstance(body, Disconnected):
            self._body_given_up()
            return
        under_way = self._open(scope, body, send, route, project, slug, principal, received_at)
        try:
            # Ended by the client's leaving or by the whole response; a stray empty message ends nothing.
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            under_way.close()

    def take(
        self, scope: Scope, body: bytes, send: Send, route: Route, project: str | None, slug: str | None
    ) -> "UnderWay":
        """As `relay`, for a request that is whole already; whoever calls says by `close` when it is over.

        Raises:
            ApiError: the request cannot be admitted; nothing was sent, and nothing is under way.
        """
        received_at = asyncio.get_running_loop().time()
        principal = self._admit(scope)
        check_body_size(len(body), self._limits.max_body_bytes)
        return self._open(scope, body, send, route, project, slug, principal, received_at)

    def _admit(self, scope: Scope) -> Principal:
        """Who asks; all that can be said against a request before its body is read."""
        principal = self.principal(scope)
        check_content_type(header(scope["headers"], b"content-type"))
        return principal

    def _open(
        self,
        scope: Scope,
        body: bytes,
        send: Send,
        route: Route,
        project: str | None,
        slug: str | None,
        principal: Principal,
        received_at: float,
    ) -> "UnderWay":
        head = read_head(body)
        endpoint = resolve_endpoint(self._broker.catalog, principal, project, slug, head.model)
        check_task_mode(route, endpoint)
        self._check_continuation(head, endpoint)
        ids: RequestIds = scope["state"]["request_ids"]
        exchange: Exchange
        sink = HttpResponse(
            send,
            route=route,
            request_id=ids.shown,
            buffers=self._buffers,
            on_consumed=lambda size: self._broker.consumed(exchange, size),
        )
        exchange = Exchange(
            request=RequestId(ids.own),
            client_request=ids.client,
            project=principal.project,
            endpoint=endpoint,
            route=route,
            body=body,
            headers=_relayed(scope["headers"]),
            sink=sink,
            received_at=received_at,
            deadline=received_at + self._limits.request_timeout_s,
        )
        return UnderWay(self._broker, self.watch, exchange, sink)

    async def _body(
        self, receive: Receive, headers: list[tuple[bytes, bytes]], received_at: float
    ) -> bytes | Disconnected:
        reading = read_body(receive, self._limits.max_body_bytes, headers)
        try:
            # Nearly every body has come with its head.
            future = reading.send(None)
        except StopIteration as read:
            body: bytes | Disconnected = read.value
            return body
        try:
            async with asyncio.timeout_at(received_at + self._limits.request_timeout_s):
                return await Resumed(reading, future)
        except TimeoutError:
            raise ApiError("request_timeout", "The request body did not arrive in time.") from None

    def _check_continuation(self, head: RequestHead, endpoint: Endpoint) -> None:
        """A stored response lives in one engine's memory: with several agents it cannot be found again."""
        if not head.continues_response:
            return
        agents = sum(agent.endpoint == endpoint.endpoint for agent in self._broker.catalog.agents.values())
        if agents > 1:
            raise ApiError(
                "invalid_request",
                "`previous_response_id` needs an endpoint that one agent alone serves. Send the whole conversation.",
                param="previous_response_id",
            )


def identify(scope: Scope) -> RequestIds:
    """The ids of this request, left in the scope's state; the control plane's application reads `request_id` there."""
    ids = RequestIds(own=new_request_id(), client=client_request_id(scope["headers"]))
    scope.setdefault("state", {}).update(request_ids=ids, request_id=ids.shown)
    return ids


def _relayed(headers: list[tuple[bytes, bytes]]) -> tuple[tuple[str, str], ...]:
    return tuple(
        [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in headers
            if name in RELAYED_HEADERS and len(value) <= _HEADER_CHARACTERS
        ]
    )
