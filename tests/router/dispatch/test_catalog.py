"""Lookups in a snapshot."""

from dataclasses import replace

from tests.router.dispatch.watched import CHAT
from xim_protocol.ids import AgentId, ProjectId
from xim_protocol.messages import Assignment
from xim_router.dispatch.catalog import Catalog, Endpoint, RegisteredAgent, TaskMode

PROJECT = ProjectId("proj_1")


def test_an_endpoint_is_found_by_a_name_of_its_own_project_only() -> None:
    endpoint = Endpoint(endpoint=CHAT, project=PROJECT, slug="chat", model="tiny")
    catalog = Catalog(endpoints={CHAT: endpoint}, endpoints_by_name={(PROJECT, "chat"): CHAT, (PROJECT, "tiny"): CHAT})
    assert catalog.endpoint_named(PROJECT, "chat") is endpoint
    assert catalog.endpoint_named(PROJECT, "tiny") is endpoint
    assert catalog.endpoint_named(PROJECT, "other") is None
    assert catalog.endpoint_named(ProjectId("proj_2"), "chat") is None


def test_an_agent_is_assigned_its_endpoint_as_long_as_that_is_there() -> None:
    endpoint = Endpoint(
        endpoint=CHAT, project=PROJECT, slug="chat", model="tiny", task_mode=TaskMode.EMBED, quantization="awq"
    )
    agent = RegisteredAgent(
        agent=AgentId("a"), name="a", project=PROJECT, curve_public_key=b"k" * 32, endpoint=CHAT, suspended=False
    )
    assert Catalog(endpoints={CHAT: endpoint}).assignment_of(agent) == Assignment(
        endpoint=CHAT, served_name="chat", model="tiny", task_mode="embed", quantization="awq"
    )
    assert Catalog().assignment_of(agent) is None
    assert Catalog(endpoints={CHAT: endpoint}).assignment_of(replace(agent, endpoint=None)) is None
