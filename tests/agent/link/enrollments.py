"""A router's enrollment API, as a real HTTP server that answers what the test tells it to."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ssl import SSLContext

from aiohttp import web

from xim_protocol.enrollment import Enrollment, JoinKey, LeaseTerms, RouterAddress
from xim_protocol.ids import AgentId, ProjectId

GRANTED = Enrollment(
    agent_id=AgentId("agent-1"),
    project_id=ProjectId("proj_1"),
    name="node",
    xem_token="xem-secret-0",
    token_expires_in_s=3600.0,
    refresh_token="refresh-secret-0",
    mesh=(RouterAddress(control_addr="tcp://r:5555", streaming_addr="tcp://r:5556", server_curve_key=b"s" * 32),),
    lease=LeaseTerms(duration_ms=30_000, renewal_interval_ms=10_000),
)


@dataclass
class FakeRouter:
    """Answers each request with the next of `answers`; when there is none left, with a new enrollment."""

    url: str = ""
    answers: list[web.Response | None] = field(default_factory=list)
    """None closes the connection without an answer, after the request was taken."""
    requests: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    life_s: float = 3600.0
    issued: int = 0
    refuse_after: int | None = None
    """Once so many enrollments were issued, refreshes are refused as reused."""

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append((request.path, json.loads(await request.read())))
        if self.answers:
            answer = self.answers.pop(0)
            if answer is None:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            return answer
        if self.issued == self.refuse_after:
            return refusal(401, "refresh_token_reused")
        self.issued += 1
        token = f"refresh-secret-{self.issued}"
        return web.json_response(replace(GRANTED, refresh_token=token, token_expires_in_s=self.life_s).to_json())

    def key(self) -> JoinKey:
        """A join key that points here."""
        return JoinKey.from_entropy(bytes(40), project_slug="p", enroll_url=self.url)

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


def refusal(status: int, code: str, message: str = "as the router says it") -> web.Response:
    """The envelope of an error."""
    return web.json_response({"error": {"message": message, "type": "t", "code": code, "param": None}}, status=status)


@asynccontextmanager
async def router(tls: SSLContext | None = None) -> AsyncIterator[FakeRouter]:
    """A running router on a free port of the loopback."""
    fake = FakeRouter()
    app = web.Application()
    app.router.add_post("/{path:.*}", fake.handle)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    fake.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()
