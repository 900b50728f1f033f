"""The names that `xim_protocol` promises: a change here is a change for everyone who builds on it."""

import xim_protocol

PROMISED = [
    "PROTOCOL_VERSION",
    "ROUTES",
    "ROUTES_BY_PATH",
    "AgentConfig",
    "AgentReport",
    "AgentSession",
    "AgentState",
    "Channel",
    "LeaseHolder",
    "LeaseTable",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "Route",
    "RouterSession",
]


def test_the_promised_names_are_these() -> None:
    assert xim_protocol.__all__ == PROMISED


def test_each_of_them_is_there() -> None:
    assert [name for name in PROMISED if not hasattr(xim_protocol, name)] == []
