"""What the data plane reports to the control plane: facts that may be lost, never questions."""

from dataclasses import dataclass

from xim_protocol.ids import AgentId


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentSeen:
    """An agent gave a sign of life, or has left; the latest report per agent is what counts."""

    agent: AgentId
    seen_at: float
    """When it gave its last sign of life, in Unix seconds."""
    state: str | None = None
    """The agent's own word for its state, such as `ready`; None when the report says nothing of it."""
    departed: bool = False
    """It has no link any more, so that its state is not known; void where another router saw it later."""
