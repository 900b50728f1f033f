"""Enroll, refresh, rotate, revoke: over HTTP, on both databases."""

import asyncio
import logging
from dataclasses import replace

import pytest

from tests.router.control.plane_under_test import Clock, Node, PlaneUnderTest
from xim_protocol.enrollment import ED25519_SIGNATURE_BYTES, JoinKey
from xim_protocol.ids import AgentId
from xim_router.control.enrollment import REPEAT_WINDOW_S
from xim_router.settings import RouterSettings


async def test_a_join_key_makes_an_agent_that_the_catalog_knows_before_the_answer(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    node = Node()
    enrolled = await under_test.enroll(node.request(await under_test.join_key()))
    registered = under_test.catalog.agents[enrolled.agent_id]
    assert under_test.catalog.agents_by_curve_key == {node.curve: enrolled.agent_id}
    assert registered.name == "node"
    assert enrolled.assignment is not None
    assert registered.endpoint == enrolled.assignment.endpoint_id
    assert (enrolled.assignment.served_name, enrolled.assignment.model) == ("tiny", "Tiny-1B")
    assert enrolled.region == "eu-1"
    assert enrolled.mesh[0].control_addr == "tcp://127.0.0.1:5555"
    assert enrolled.mesh[0].server_curve_key == under_test.plane.curve_keypair.public_key
    assert enrolled.token_expires_in_s == 3600


async def test_the_answer_may_not_be_kept_on_the_way(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    answer = await under_test.post("/v1/enroll", Node().request(await under_test.join_key()).to_json())
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("endpoints", "named", "served"),
    [((), None, None), (("a",), None, "a"), (("a", "b"), None, None), (("a", "b"), "b", "b")],
)
async def test_the_join_key_or_an_only_endpoint_decides_the_assignment(
    under_test: PlaneUnderTest, endpoints: tuple[str, ...], named: str | None, served: str | None
) -> None:
    await under_test.demo_project(endpoints)
    enrolled = await under_test.enroll(Node().request(await under_test.join_key(endpoint=named), name=None))
    assert (None if enrolled.assignment is None else enrolled.assignment.served_name) == served
    assert enrolled.name == "node-1.example"


async def test_of_two_at_once_with_a_single_use_key_exactly_one_wins(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    key = await under_test.join_key(max_uses=1)
    nodes = [Node(curve=bytes([n]) * 32) for n in range(1, 7)]
    answers = await asyncio.gather(*(under_test.post("/v1/enroll", n.request(key).to_json()) for n in nodes))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409, 409]
    assert {a.json()["error"]["code"] for a in answers if a.status_code == 409} == {"join_key_used_up"}
    assert len(under_test.catalog.agents) == 1


async def test_of_two_at_once_with_one_curve_key_exactly_one_wins(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    keys = [await under_test.join_key() for _ in range(4)]
    answers = await asyncio.gather(*(under_test.post("/v1/enroll", Node().request(key).to_json()) for key in keys))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    assert {a.json()["error"]["code"] for a in answers if a.status_code == 409} == {"curve_key_conflict"}


async def test_a_key_for_several_agents_enrolls_that_many(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    key = await under_test.join_key(max_uses=2)
    for n in (1, 2):
        await under_test.enroll(Node(curve=bytes([n]) * 32).request(key))
    assert await under_test.refusal(Node(curve=b"3" * 32).request(key)) == (409, "join_key_used_up")


async def test_each_failure_of_a_join_key_has_its_code(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    node, key = Node(), await under_test.join_key(expires_in_s=60.0)
    unknown = replace(key, key_id="0" * 16)
    assert await under_test.refusal(node.request(unknown)) == (401, "join_key_unknown")
    assert await under_test.refusal(node.request(replace(key, secret="guessed"))) == (401, "join_key_unknown")
    body = node.request(key).to_json()
    for text, code in ((key.encode()[:-3], "join_key_truncated"), (f"{key.encode()}x", "join_key_malformed")):
        answer = await under_test.post("/v1/enroll", body | {"join_key": text})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
        assert "join-key create" in answer.json()["error"]["message"]
    under_test.clock.now += 60.0
    assert await under_test.refusal(node.request(key)) == (401, "join_key_expired")
    await under_test.plane.accounts.revoke_join_key(key.key_id)
    assert await under_test.refusal(node.request(key)) == (401, "join_key_revoked")
    assert under_test.catalog.agents == {}


async def test_a_lost_enroll_answer_is_answered_again_without_a_second_use(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    node, key = Node(), await under_test.join_key(max_uses=1)
    lost = await under_test.enroll(node.request(key))
    again = await under_test.enroll(node.request(key))
    assert again.agent_id == lost.agent_id
    assert (await under_test.refresh(node.refresh(again.agent_id, again.refresh_token))).agent_id == lost.agent_id
    assert [each.uses for each in await under_test.plane.accounts.join_keys("demo")] == [1]


@pytest.mark.parametrize("why", ["another signing key", "too late", "refreshed already", "another join key"])
async def test_what_is_no_repeat_of_an_enrollment_is_a_conflict(under_test: PlaneUnderTest, why: str) -> None:
    await under_test.demo_project()
    node, key = Node(), await under_test.join_key(expires_in_s=86_400.0)
    enrolled = await under_test.enroll(node.request(key))
    again = node.request(key)
    match why:
        case "another signing key":
            again = Node().request(key)
        case "too late":
            under_test.clock.now += REPEAT_WINDOW_S + 1
        case "refreshed already":
            await under_test.refresh(node.refresh(enrolled.agent_id, enrolled.refresh_token))
        case _:
            again = node.request(await under_test.join_key())
    assert await under_test.refusal(again) == (409, "curve_key_conflict")


async def test_a_refresh_rotates_the_token_and_keeps_the_agent(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    node = Node()
    enrolled = await under_test.enroll(node.request(await under_test.join_key()))
    token, published = enrolled.refresh_token, len(under_test.catalogs)
    for _ in range(4):
        refreshed = await under_test.refresh(node.refresh(enrolled.agent_id, token))
        assert refreshed.refresh_token != token
        assert refreshed.assignment == enrolled.assignment
        token = refreshed.refresh_token
    assert len(under_test.catalogs) == published


async def test_a_lost_refresh_answer_never_locks_a_node_out(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    node = Node()
    enrolled = await under_test.enroll(node.request(await under_test.join_key()))
    agent, held = enrolled.agent_id, enrolled.refresh_token
    for _ in range(3):
        for _lost in range(3):
            await under_test.refresh(node.refresh(agent, held))
        held = (await under_test.refresh(node.refresh(agent, held))).refresh_token
    # A request that was slow arrives after its repetition was answered; the answer that was received stays good.
    received = await under_test.refresh(node.refresh(agent, held))
    await under_test.refresh(node.refresh(agent, held))
    assert (await under_test.refresh(node.refresh(agent, received.refresh_token))).agent_id == agent


@pytest.mark.parametrize("copy", ["an older token", "a sibling"])
async def test_a_copied_token_cuts_the_family_off(under_test: PlaneUnderTest, copy: str) -> None:
    await under_test.demo_project()
    node = Node()
    enrolled = await under_test.enroll(node.request(await under_test.join_key()))
    agent, first = enrolled.agent_id, enrolled.refresh_token
    second = (await under_test.refresh(node.refresh(agent, first))).refresh_token
    stolen = (await under_test.refresh(node.refresh(agent, first))).refresh_token if copy == "a sibling" else first
    third = (await under_test.refresh(node.refresh(agent, second))).refresh_token
    assert await under_test.refusal(node.refresh(agent, stolen)) == (401, "refresh_token_reused")
    assert await under_test.refusal(node.refresh(agent, third)) == (403, "agent_revoked")
    assert under_test.catalog.agents == {}
    assert under_test.catalog.revoked_curve_keys == {node.curve}


async def test_a_refresh_that_is_not_the_agents_own_changes_nothing(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    node = Node()
    enrolled = await under_test.enroll(node.request(await under_test.join_key()))
    good = node.refresh(enrolled.agent_id, enrolled.refresh_token)
    forged = replace(good, signature=b"\x07" * ED25519_SIGNATURE_BYTES)
    assert await under_test.refusal(forged) == (401, "signature_invalid")
    assert await under_test.refusal(Node().refresh(good.agent_id, good.refresh_token)) == (401, "signature_invalid")
    assert await under_test.refusal(replace(good, curve_public_key=b"x" * 32)) == (401, "signature_invalid")
    assert await under_test.refusal(node.refresh(AgentId("nobody"), "t")) == (401, "refresh_token_unknown")
    assert await under_test.refusal(node.refresh(good.agent_id, "guessed")) == (401, "refresh_token_unknown")
    await under_test.refresh(good)


async def test_a_signed_refresh_may_bring_a_new_curve_key(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    node, other = Node(), Node(curve=b"\x02" * 32)
    enrolled = await under_test.enroll(node.request(await under_test.join_key()))
    await under_test.enroll(other.request(await under_test.join_key()))
    taken = replace(node, curve=other.curve).refresh(enrolled.agent_id, enrolled.refresh_token)
    assert await under_test.refusal(taken) == (409, "curve_key_conflict")
    await under_test.refresh(replace(node, curve=b"\x03" * 32).refresh(enrolled.agent_id, enrolled.refresh_token))
    assert under_test.catalog.agents_by_curve_key[b"\x03" * 32] == enrolled.agent_id
    assert node.curve not in under_test.catalog.agents_by_curve_key


async def test_a_suspended_agent_is_refused_until_it_is_resumed(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    node = Node()
    enrolled = await under_test.enroll(node.request(await under_test.join_key()))
    await under_test.plane.accounts.suspend_agent(enrolled.agent_id)
    await under_test.plane.poll()
    assert under_test.catalog.agents[enrolled.agent_id].suspended
    request = node.refresh(enrolled.agent_id, enrolled.refresh_token)
    assert await under_test.refusal(request) == (403, "agent_suspended")
    await under_test.plane.accounts.resume_agent(enrolled.agent_id)
    await under_test.refresh(request)


async def test_a_revoked_node_may_enroll_anew_with_its_old_key(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    node = Node()
    first = await under_test.enroll(node.request(await under_test.join_key()))
    await under_test.plane.accounts.revoke_agent(first.agent_id)
    assert await under_test.refusal(node.refresh(first.agent_id, first.refresh_token)) == (403, "agent_revoked")
    second = await under_test.enroll(node.request(await under_test.join_key()))
    assert second.agent_id != first.agent_id
    assert under_test.catalog.agents_by_curve_key == {node.curve: second.agent_id}
    assert under_test.catalog.revoked_curve_keys == frozenset()


@pytest.mark.parametrize("path", ["/v1/enroll", "/v1/enroll/refresh"])
async def test_a_body_that_breaks_a_rule_names_its_field(under_test: PlaneUnderTest, path: str) -> None:
    answer = await under_test.post(path, {"join_key": 7, "agent_id": 7})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_body")
    assert error["param"] in ("join_key", "agent_id")
    too_large = await under_test.post(path, {"join_key": "x" * 70_000})
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "body_too_large")


async def test_an_unknown_route_of_the_control_plane_answers_the_envelope(under_test: PlaneUnderTest) -> None:
    answer = await under_test.post("/v1/enrol", {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found")


async def test_refused_enrollments_do_not_make_routers_read_their_catalogs(under_test: PlaneUnderTest) -> None:
    await under_test.demo_project()
    key = await under_test.join_key()
    await under_test.plane.poll()
    published = len(under_test.catalogs)
    await under_test.refusal(Node().request(replace(key, secret="guessed")))
    await under_test.plane.poll()
    assert len(under_test.catalogs) == published


async def test_no_secret_reaches_a_log(under_test: PlaneUnderTest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "xim_router")
    await under_test.demo_project()
    node, key = Node(), await under_test.join_key()
    enrolled = await under_test.enroll(node.request(key))
    await under_test.refusal(Node(curve=b"9" * 32).request(key))
    await under_test.refusal(node.refresh(enrolled.agent_id, "guessed-token"))
    said = "".join(str(vars(record)) for record in caplog.records)
    assert "agent enrolled" in said
    for secret in (key.secret, key.encode(), enrolled.refresh_token, enrolled.xem_token, "guessed-token"):
        assert secret not in said


async def test_a_router_on_the_same_database_knows_the_agents_after_a_restart(settings: RouterSettings) -> None:
    first = PlaneUnderTest(settings, Clock())
    await first.plane.start()
    await first.demo_project()
    node = Node()
    enrolled = await first.enroll(node.request(await first.join_key()))
    await first.plane.close()
    second = PlaneUnderTest(settings, Clock())
    await second.plane.start()
    assert enrolled.agent_id in second.catalog.agents
    assert second.plane.curve_keypair == first.plane.curve_keypair
    await second.refresh(node.refresh(enrolled.agent_id, enrolled.refresh_token))
    await second.plane.close()


def test_the_key_that_the_operator_copies_is_the_one_that_enrolls() -> None:
    key = JoinKey.from_entropy(bytes(40), project_slug="demo", enroll_url="https://router.example")
    assert Node().request(JoinKey.parse(key.encode())).join_key == key
