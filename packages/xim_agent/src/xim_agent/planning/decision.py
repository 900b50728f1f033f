"""What a plan is made of: decisions with their reasons, and what they are decided from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from xim_agent.facts.hardware import GpuFacts, HardwareFacts, Vendor
from xim_agent.facts.model import ModelFacts
from xim_agent.planning.engine_facts import EngineFacts
from xim_agent.planning.operator_words import OperatorWords
from xim_agent.settings import AgentSettings


class Source(StrEnum):
    """Where a decision comes from."""

    OPERATOR = "operator"
    """A flag or a variable."""
    ENDPOINT = "endpoint"
    """The assignment, which carries what was set when the endpoint was made."""
    MODEL = "model"
    HARDWARE = "hardware"
    AUTOMATIC = "automatic"
    """Chosen from several facts together."""
    DEFAULT = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFile:
    """A file that the engine reads; to be written before it starts, for its owner only."""

    path: Path
    content: str = field(repr=False)
    """May hold a secret; `shown` holds none."""
    shown: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One option of the engine: its value, where that comes from, and why."""

    option: str
    value: str
    """In words, for a reader; what vLLM gets stands in `arguments` and `environment`."""
    source: Source
    reason: str
    arguments: tuple[tuple[str, ...], ...] = ()
    """Of `vllm serve`, a flag and its values each."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of the engine. They yield to what the agent's own environment says, unless `forced`."""
    forced: bool = False
    files: tuple[PlannedFile, ...] = ()
    warning: str = ""
    """What will need the operator's attention."""
    problem: str = ""
    """Why the engine cannot be started like this, with the remedy."""


class Device(StrEnum):
    """What the engine computes on."""

    CUDA = "cuda"
    ROCM = "rocm"
    CPU = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the engine is to serve."""

    served_name: str
    quantization: str | None = None
    """The endpoint's."""
    task_mode: str = "generate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Paths on the machine that the engine runs on."""

    executable: str
    socket_path: Path
    config: Path
    """The agent's config directory."""
    caches: Path
    """Holds what the engine may keep between starts: compiled graphs, kernel configurations."""
    lmcache: Path
    """LMCache's disk tier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """Everything that a plan is made from."""

    settings: AgentSettings
    model: ModelFacts
    hardware: HardwareFacts
    engine: EngineFacts
    wanted: Wanted
    places: Places
    inherited: Mapping[str, str]
    """The environment that the engine starts from, without the agent's own variables."""

    @property
    def words(self) -> OperatorWords:
        """The operator's own arguments."""
        return OperatorWords(self.settings.vllm_args)

    @property
    def device(self) -> Device:
        """vLLM's build decides where its version names a platform; otherwise the first GPU does."""
        vendors = [gpu.vendor for gpu in self.hardware.gpus]
        if not vendors or self.engine.on_cpu:
            return Device.CPU
        if "rocm" in (self.engine.version or "") and Vendor.AMD in vendors:
            return Device.ROCM
        return Device.CUDA if vendors[0] is Vendor.NVIDIA else Device.ROCM

    @property
    def gpus(self) -> tuple[GpuFacts, ...]:
        """Those that the engine computes on; none on the CPU."""
        vendors = {Device.CUDA: Vendor.NVIDIA, Device.ROCM: Vendor.AMD}
        return tuple(gpu for gpu in self.hardware.gpus if vendors.get(self.device) is gpu.vendor)

    @property
    def pooling(self) -> bool:
        """Whether it embeds or scores rather than generates."""
        return self.wanted.task_mode != "generate" or self.model.pooling


def said(given: Given, flag: str, field: str | None) -> Decision | None:
    """The operator's own value of `flag`: from VLLM_ARGS, which come last and so win, else from the setting `field`.

    The decision's arguments are those that are still to be passed: none where VLLM_ARGS have them already.
    """
    word = given.words.value(flag)
    if word is not None:
        return Decision(option="", value=word, source=Source.OPERATOR, reason=f"{flag} in VLLM_ARGS")
    if field is None or not given.settings.is_set(field) or getattr(given.settings, field) is None:
        return None
    value: Any = getattr(given.settings, field)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    variable = str(type(given.settings).model_fields[field].alias)
    return Decision(
        option="", value=text, source=Source.OPERATOR, reason=f"set by {variable}", arguments=((flag, text),)
    )
