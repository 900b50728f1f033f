"""Builders: a control plane that keeps what it publishes, and a node that enrolls with it over HTTP."""

from dataclasses import dataclass, field, replace

import httpx2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xim_protocol.enrollment import Enrollment, EnrollRequest, JoinKey, RefreshRequest
from xim_protocol.ids import AgentId
from xim_router.control.plane import ControlPlane
from xim_router.dispatch.catalog import Catalog, TaskMode
from xim_router.settings import RouterSettings

START = 1_800_000_000.0


class Clock:
    """A number that a test moves."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@dataclass
class Node:
    """One machine with its keys, as an agent holds them."""

    curve: bytes = b"\x01" * 32
    signing: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def request(self, key: JoinKey, name: str | None = "node") -> EnrollRequest:
        """What this node sends to enroll."""
        return EnrollRequest(
            join_key=key,
            name=name,
            hostname="node-1.example",
            agent_version="0.1.0",
            protocol_version=1,
            curve_public_key=self.curve,
            signing_public_key=self.signing.public_key().public_bytes_raw(),
            accelerator={"type": "cpu"},
            max_concurrent=4,
        )

    def refresh(self, agent: AgentId, token: str) -> RefreshRequest:
        """What this node sends to refresh, signed."""
        unsigned = RefreshRequest(
            agent_id=agent, refresh_token=token, curve_public_key=self.curve, signature=b"\x00" * 64
        )
        return replace(unsigned, signature=self.signing.sign(unsigned.signed_message()))


class PlaneUnderTest:
    """A control plane, the catalogs it published, and HTTP to its routes."""

    def __init__(self, settings: RouterSettings, clock: Clock, member: int = 0) -> None:
        self.clock = clock
        self.catalogs: list[Catalog] = []
        self.plane = ControlPlane(settings, self.catalogs.append, member=member, clock=clock, monotonic=clock)

    @property
    def catalog(self) -> Catalog:
        """The one published last."""
        return self.catalogs[-1]

    async def post(self, path: str, body: object) -> httpx2.Response:
        """One request to the control plane's routes."""
        transport = httpx2.ASGITransport(app=self.plane.api(), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.post(path, json=body)

    async def enroll(self, request: EnrollRequest) -> Enrollment:
        """Enroll, which must succeed."""
        answer = await self.post("/v1/enroll", request.to_json())
        assert answer.status_code == 201, answer.text
        return Enrollment.from_json(answer.json())

    async def refresh(self, request: RefreshRequest) -> Enrollment:
        """Refresh, which must succeed."""
        answer = await self.post("/v1/enroll/refresh", request.to_json())
        assert answer.status_code == 200, answer.text
        return Enrollment.from_json(answer.json())

    async def refusal(self, request: EnrollRequest | RefreshRequest) -> tuple[int, str]:
        """Status and code of an enrollment or refresh, which must fail."""
        path = "/v1/enroll" if isinstance(request, EnrollRequest) else "/v1/enroll/refresh"
        answer = await self.post(path, request.to_json())
        return answer.status_code, answer.json()["error"]["code"]

    async def demo_project(self, endpoints: tuple[str, ...] = ("tiny",)) -> None:
        """A project `demo` with these endpoints."""
        await self.plane.accounts.create_project("demo")
        for slug in endpoints:
            await self.plane.accounts.create_endpoint("demo", slug, "Tiny-1B", task_mode=TaskMode.GENERATE)

    async def join_key(
        self, *, max_uses: int = 1, endpoint: str | None = None, expires_in_s: float = 3600.0
    ) -> JoinKey:
        """A join key of project `demo`."""
        key, _ = await self.plane.accounts.create_join_key(
            "demo",
            enroll_url="https://router.example",
            endpoint_slug=endpoint,
            region="eu-1",
            max_uses=max_uses,
            expires_in_s=expires_in_s,
        )
        return key
