"""Identifiers, each its own type: an agent's id cannot be passed where a stream's is meant."""

from typing import NewType

AgentId = NewType("AgentId", str)
"""UUID of an enrolled agent."""

ProjectId = NewType("ProjectId", str)
"""External id of a project (tenant), such as `proj_3kTMd9QzWx`."""

EndpointId = NewType("EndpointId", str)
"""UUID of an endpoint: what a client calls as `model`."""

RequestId = NewType("RequestId", str)
"""The router's own id of one client request, `req_` and 24 hex digits."""

StreamId = NewType("StreamId", int)
"""One dispatch of a request to an agent; rises within a session, never used twice in it."""

SessionId = NewType("SessionId", str)
"""What the router calls one agent process's session; survives a lost link, not an expired lease."""

InstanceId = NewType("InstanceId", str)
"""Random per agent process, so that a restarted agent is told from a returning one."""
