"""What an XIM agent and a router say to each other, without I/O.

The names below are the package's promise; anything else may change. `docs/reference/wire-protocol.md` describes the
wire so that a stranger can implement it; `docs/howto/drive-the-protocol.md` shows how to drive the two sessions.
"""

from xim_protocol.agent_session import AgentConfig, AgentReport, AgentSession
from xim_protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from xim_protocol.lease import LeaseHolder, LeaseTable
from xim_protocol.messages import PROTOCOL_VERSION, AgentState, Channel
from xim_protocol.router_session import RouterSession
from xim_protocol.routes import ROUTES, ROUTES_BY_PATH, Route

__all__ = [
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
