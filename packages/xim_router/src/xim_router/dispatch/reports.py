"""What the data plane reports to the control plane: facts that may be lost, never questions."""

from dataclasses import dataclass

from xim_protocol.ids import AgentId


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentSeen:
    """An agent gave a sign of life; the latest one per agent is what counts."""

    agent: AgentId
    seen_at: float
    """Unix time in seconds."""
    state: str | None = None
    """The agent's own word for its state, such as `ready`; None when the report says nothing of it."""
