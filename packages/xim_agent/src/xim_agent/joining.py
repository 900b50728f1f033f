"""What a node says of itself when it enrolls, by whichever command that happens."""

import importlib.metadata
import socket

from xim_agent.link.enrollment import NodeFacts
from xim_agent.settings import AgentSettings
from xim_protocol.messages import PROTOCOL_VERSION


def version() -> str:
    """The agent's version."""
    return importlib.metadata.version("xim_agent")


def node_facts(settings: AgentSettings) -> NodeFacts:
    """What this node says of itself."""
    return NodeFacts(
        hostname=socket.gethostname(),
        agent_version=version(),
        protocol_version=PROTOCOL_VERSION,
        name=settings.name,
        max_concurrent=settings.max_concurrent or 0,
    )
