"""The engine's command, as the part that starts processes gets it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCommand:
    """How the engine is started."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """The child's whole environment; kept out of logs, since it may hold registry tokens."""
    socket_path: Path
    served_name: str
