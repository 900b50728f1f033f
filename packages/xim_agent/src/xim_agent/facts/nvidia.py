"""NVIDIA GPUs by NVML: boards, MIG slices, driver and CUDA versions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from xim_agent.facts.hardware import GpuFacts, Vendor

Answer = TypeVar("Answer")


class Nvml(Protocol):
    """The part of pynvml (nvidia-ml-py) that is used; its functions raise `NVMLError`."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any, /) -> str | bytes: ...
    def nvmlDeviceGetUUID(self, handle: Any, /) -> str | bytes: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, /) -> tuple[int, int]: ...
    def nvmlDeviceGetMigMode(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, /) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int, /) -> Any: ...
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...
    def nvmlSystemGetCudaDriverVersion_v2(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NvidiaFacts:
    """What NVML says: every board or MIG slice, unmasked, in NVML's order, which is that of the PCI bus."""

    gpus: tuple[GpuFacts, ...] = ()
    driver: str | None = None
    cuda_version: str | None = None
    problem: str | None = None


def load_nvml() -> Nvml | None:
    """nvidia-ml-py, where it is installed: a node without NVIDIA GPUs runs without it."""
    try:
        return cast(Nvml, import_module("pynvml"))
    except ImportError:
        return None


def read_nvidia(nvml: Nvml | None, root: Path) -> NvidiaFacts:
    """What is there; nothing, and no problem, where no driver is. Blocks."""
    driver_there = (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists()
    if nvml is None:
        if not driver_there:
            return NvidiaFacts()
        return NvidiaFacts(
            problem="An NVIDIA driver is loaded and nvidia-ml-py is not installed, so its GPUs cannot be read. "
            "Install nvidia-ml-py beside the agent."
        )
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if not driver_there:
            return NvidiaFacts()
        return NvidiaFacts(
            problem=f"An NVIDIA driver is loaded and NVML does not start ({error}). Run nvidia-smi: it must list the "
            "GPUs; in a container, start it with --gpus all and the NVIDIA Container Toolkit."
        )
    try:
        return _read(nvml)
    finally:
        nvml.nvmlShutdown()


def _read(nvml: Nvml) -> NvidiaFacts:
    gpus: list[GpuFacts] = []
    problem = None
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        return NvidiaFacts(problem=f"NVML does not count the GPUs ({error}). Run nvidia-smi to see what is wrong.")
    for index in range(count):
        try:
            gpus += _board(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index)
        except nvml.NVMLError as error:
            problem = f"NVIDIA GPU {index} does not answer ({error}). Run nvidia-smi to see what is wrong with it."
    version = _asked(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    driver = _asked(nvml, nvml.nvmlSystemGetDriverVersion)
    return NvidiaFacts(
        gpus=tuple(gpus),
        driver=None if driver is None else _text(driver),
        cuda_version=None if version is None else f"{version // 1000}.{version % 1000 // 10}",
        problem=problem,
    )


def _board(nvml: Nvml, handle: Any, index: int) -> list[GpuFacts]:
    """The board, or its MIG slices where it is cut into some."""
    capability = _asked(nvml, lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    mode = _asked(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle))
    if mode is None or mode[0] != 1:
        return [_gpu(nvml, handle, index, capability, mig=False)]
    slices = []
    for position in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        one = _asked(nvml, partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, position))
        if one is not None:
            slices.append(_gpu(nvml, one, index, capability, mig=True))
    return slices


def _gpu(nvml: Nvml, handle: Any, index: int, capability: tuple[int, int] | None, *, mig: bool) -> GpuFacts:
    # Where CPU and GPU share one memory (GB10, Jetson) NVML has none to report.
    memory = _asked(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    uuid = _asked(nvml, lambda: nvml.nvmlDeviceGetUUID(handle))
    return GpuFacts(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        vendor=Vendor.NVIDIA,
        memory_bytes=None if memory is None else int(memory.total),
        compute_capability=None if capability is None else (int(capability[0]), int(capability[1])),
        mig=mig,
        index=index,
        uuid=None if uuid is None else _text(uuid),
    )


def _asked(nvml: Nvml, question: Callable[[], Answer]) -> Answer | None:
    """The answer, or `None` where this device or driver does not know."""
    try:
        return question()
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
