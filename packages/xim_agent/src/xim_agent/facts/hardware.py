"""What a machine is, as far as starting an engine depends on it: types, and their form as JSON.

What could not be read is `None`, never a guess. The same JSON describes a machine that is not at hand
(`xerotier-xim-agent plan --hardware file.json`); only `gpus` and `cpu` are needed there.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

_STRICT = ConfigDict(extra="forbid")
"""A misspelled field in a description must not pass for an unknown fact."""


REFERENCE = "docs/reference/described-machine.md"
"""The page of the fields below, which is made from them."""


class HardwareUnreadable(ValueError):
    """A machine's description cannot be used."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"This does not describe a machine: {what}. Start from the output of "
            f"`xerotier-xim-agent plan --json` on a real one; every field stands in {REFERENCE}."
        )
        self.what = what


class Vendor(StrEnum):
    """Who makes an accelerator that vLLM has a build for."""

    NVIDIA = "nvidia"
    AMD = "amd"


def _capability(value: object) -> object:
    """`8.6`, `"8.6"` and `[8, 6]` are the same compute capability."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(float(value))
    return value.split(".") if isinstance(value, str) else value


Positive = Annotated[int, Field(gt=0)]
ComputeCapability = Annotated[tuple[int, int], BeforeValidator(_capability)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuFacts:
    """One accelerator, or one MIG slice of it, that the engine may use."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    """As the driver says it: `NVIDIA A30`, `AMD Instinct MI300X`."""
    vendor: Vendor
    """Whose driver and whose build of vLLM it needs."""
    memory_bytes: Positive | None = None
    """Of the slice where `mig` is true, not of the board."""
    compute_capability: ComputeCapability | None = None
    """CUDA's (major, minor); `None` for AMD."""
    architecture: str | None = None
    """LLVM's name of an AMD target, `gfx942`; `None` for NVIDIA."""
    mig: bool = False
    """Whether it is a MIG slice of a board."""
    index: int | None = None
    """Among all devices of its vendor on this machine, before any mask."""
    uuid: str | None = None
    """The driver's own name of it, as masks may use it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NumaNode:
    """One NUMA node and the logical CPUs of it that this process may run on."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    node: int
    """Its number."""
    cpus: tuple[int, ...]
    """Numbers of its logical CPUs."""
    memory_bytes: Positive | None = None
    """Its part of the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuFacts:
    """The processors that this process may run on."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: str | None = None
    """As the processor says it."""
    vendor: str | None = None
    """As the processor says it: `AuthenticAMD`, `GenuineIntel`."""
    architecture: str | None = None
    """`x86_64`, `aarch64`."""
    physical_cores: Positive | None = None
    """Without hardware threads."""
    logical_cpus: Positive | None = None
    """With hardware threads."""
    flags: tuple[str, ...] | None = None
    """Those of `FLAGS_OF_INTEREST` that it has, sorted; `None` where it cannot be asked."""
    numa_nodes: tuple[NumaNode, ...] | None = None
    """`None` where the system does not tell."""

    def has(self, flag: str) -> bool | None:
        """Whether it has `flag`; `None` where that is not known."""
        return None if self.flags is None else flag in self.flags


FLAGS_OF_INTEREST = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
"""The instruction sets that vLLM's CPU kernels are built for, as /proc/cpuinfo spells them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareFacts:
    """One machine as the agent's process sees it: after device masks and within its control group."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    gpus: tuple[GpuFacts, ...] = ()
    """Those left by the visibility mask, in the order the engine will number them."""
    cpu: CpuFacts = CpuFacts()
    """The processors."""
    ram_bytes: Positive | None = None
    """The machine's memory."""
    ram_limit_bytes: Positive | None = None
    """The control group's memory limit; `None` where it sets none."""
    cpu_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The control group's quota in CPUs, 1.5 for one and a half; `None` where it sets none."""
    disk_total_bytes: Positive | None = None
    """Of the file system that holds the model cache."""
    disk_free_bytes: Annotated[int, Field(ge=0)] | None = None
    """Of the same file system."""
    shm_free_bytes: Annotated[int, Field(ge=0)] | None = None
    """What may still be written to /dev/shm, which a container limits by itself; `None` where there is none."""
    nvidia_driver: str | None = None
    """Version of the driver."""
    cuda_version: str | None = None
    """The newest CUDA that the driver serves, `12.8`."""
    amd_driver: str | None = None
    """Version of the driver."""
    rocm_version: str | None = None
    """Version of the ROCm that is installed."""
    system: str | None = None
    """`Linux`, `Darwin`."""
    problems: tuple[str, ...] = ()
    """What is there and could not be asked, each with its remedy."""

    @property
    def usable_ram_bytes(self) -> int | None:
        """Memory that this process may use: the machine's, or its control group's where that is less."""
        known = [size for size in (self.ram_bytes, self.ram_limit_bytes) if size is not None]
        return min(known, default=None)

    @property
    def usable_cpus(self) -> float | None:
        """CPUs that this process may use at once, hardware threads counted, under its quota."""
        known = [float(count) for count in (self.cpu.logical_cpus, self.cpu_limit) if count is not None]
        return min(known, default=None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        described: dict[str, Any] = _HARDWARE.dump_python(self, mode="json", exclude_defaults=True)
        return described

    @staticmethod
    def from_json(text: str | bytes) -> "HardwareFacts":
        """The machine that `text` describes.

        Raises:
            HardwareUnreadable: it is not JSON, or a field is unknown or has a wrong value; every one is named.
        """
        try:
            return _HARDWARE.validate_json(text)
        except ValidationError as error:
            raise HardwareUnreadable(described_errors(error)) from None


def described_errors(error: ValidationError) -> str:
    """Every problem that `error` holds, each after the path of its field."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'the whole'}: {problem['msg'].lower()}"
        for problem in error.errors(include_url=False, include_input=False)
    )


_HARDWARE = TypeAdapter(HardwareFacts)
