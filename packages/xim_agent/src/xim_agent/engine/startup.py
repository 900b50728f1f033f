"""What an engine's output and the clock say about its start. Pure: the clock is an argument.

Readiness is not decided here: vLLM is ready when its `/health` answers 200, and its last line comes a little earlier.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

MILESTONES = re.compile(
    r"Initializing a V\d|Model loading took|Available KV cache|GPU KV cache size|CPU KV cache size"
    r"|Maximum concurrency|init engine|Application startup complete"
)
"""Lines of a start that an operator wants to see; vLLM's wording as of 0.32, so none of them is relied on."""

STEP_PERCENT = 10
"""A stage is told again after so many points."""


class Stage(StrEnum):
    """What a start is busy with, in the order it happens."""

    LOADING = "loading weights"
    COMPILING = "compiling"
    CAPTURING = "capturing graphs"


_STAGES: tuple[tuple[Stage, re.Pattern[str]], ...] = (
    (Stage.LOADING, re.compile(r"Loading (?:weights|model weights|safetensors|pt checkpoint)|Starting to load model")),
    (Stage.COMPILING, re.compile(r"torch\.compile took|Dynamo bytecode|Compiling a graph|Cache the graph")),
    (Stage.CAPTURING, re.compile(r"Capturing CUDA graph|Graph capturing|Capturing cudagraphs", re.IGNORECASE)),
)
_PERCENT = re.compile(r"\b(\d{1,3})%(?:\s+Completed)?\s*\|")
"""As tqdm draws it: `50% Completed | 1/2` or ` 45%|####   | 30/67`."""
_DONE = re.compile(r"Loading weights took|[Tt]orch\.compile took|Graph capturing finished")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a start is."""

    stage: Stage
    percent: int | None
    """Of the stage, where vLLM gives it."""


class Startup(StrEnum):
    """How a start stands."""

    WAITING = "waiting"
    STUCK = "stuck"
    """No output for the inactivity grace."""
    TIMED_OUT = "timed_out"
    """Longer than the ceiling."""


class StartupWatch:
    """One start: told of every line and asked how it stands."""

    def __init__(self, *, now: float, ceiling_s: float, inactivity_grace_s: float) -> None:
        self._ceiling_at = now + ceiling_s
        self._grace_s = inactivity_grace_s
        self._heard_at = now

    def heard(self, now: float) -> None:
        """The engine wrote something; any output is a sign of life, also half a progress bar."""
        self._heard_at = now

    def verdict(self, now: float) -> Startup:
        """How the start stands at `now`."""
        if now >= self._ceiling_at:
            return Startup.TIMED_OUT
        if now >= self._heard_at + self._grace_s:
            return Startup.STUCK
        return Startup.WAITING

    def next_deadline(self) -> float:
        """When the verdict would change without further output."""
        return min(self._ceiling_at, self._heard_at + self._grace_s)


def progress_of(line: str) -> Progress | None:
    """What `line` says of how far the start is, or `None`."""
    stage = next((stage for stage, words in _STAGES if words.search(line)), None)
    if stage is None:
        return None
    drawn = _PERCENT.search(line)
    if drawn is not None:
        return Progress(stage, min(int(drawn[1]), 100))
    return Progress(stage, 100 if _DONE.search(line) else None)


def is_milestone(line: str) -> bool:
    """Whether an operator wants to read `line` as it stands."""
    return MILESTONES.search(line) is not None


class ProgressTold:
    """Which progress an operator has been told: every new stage, and every further `STEP_PERCENT` points of it."""

    def __init__(self) -> None:
        self.latest: Progress | None = None
        self._told: Progress | None = None

    def heard(self, line: str) -> Progress | None:
        """The progress in `line`, if it is to be told."""
        now = progress_of(line)
        if now is None:
            return None
        # A line of a stage without a number keeps the number that came before.
        if now.percent is None and self.latest is not None and self.latest.stage is now.stage:
            now = self.latest
        self.latest = now
        told = self._told
        if told is not None and told.stage is now.stage and not _further(told.percent, now.percent):
            return None
        self._told = now
        return now


def _further(told: int | None, now: int | None) -> bool:
    return now is not None and (told is None or now >= told + STEP_PERCENT or (now == 100 and told < 100))
