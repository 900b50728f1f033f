"""Lookups in a snapshot."""

from tests.router.dispatch.watched import CHAT
from xim_protocol.ids import ProjectId
from xim_router.dispatch.catalog import Catalog, Endpoint

PROJECT = ProjectId("proj_1")


def test_an_endpoint_is_found_by_a_name_of_its_own_project_only() -> None:
    endpoint = Endpoint(endpoint=CHAT, project=PROJECT, slug="chat", model="tiny")
    catalog = Catalog(endpoints={CHAT: endpoint}, endpoints_by_name={(PROJECT, "chat"): CHAT, (PROJECT, "tiny"): CHAT})
    assert catalog.endpoint_named(PROJECT, "chat") is endpoint
    assert catalog.endpoint_named(PROJECT, "tiny") is endpoint
    assert catalog.endpoint_named(PROJECT, "other") is None
    assert catalog.endpoint_named(ProjectId("proj_2"), "chat") is None
