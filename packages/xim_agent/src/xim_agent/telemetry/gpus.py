"""What the GPUs do now: by NVML for NVIDIA, by the kernel's own files for AMD. Read when metrics are asked for."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from xim_agent.facts.hardware import GpuFacts, Vendor

DRM = Path("/sys/class/drm")
AMD_ID = "0x1002"


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """One GPU now; what it does not tell is `None`."""

    gpu: str
    """Its number, or for AMD the kernel's name of the card."""
    name: str
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization: float | None = None
    """Part of the last moment in which it worked, 0 to 1."""
    power_watts: float | None = None


class GpuReader:
    """Reads the GPUs that the engine may use. `read` blocks for some milliseconds; call it in a thread."""

    def __init__(self, gpus: Sequence[GpuFacts], *, nvml: Any = None, drm: Path = DRM) -> None:
        self._nvidia = [gpu for gpu in gpus if gpu.vendor is Vendor.NVIDIA]
        self._amd = any(gpu.vendor is Vendor.AMD for gpu in gpus)
        self._drm = drm
        self._nvml = nvml
        self._open = False

    def read(self) -> list[GpuReading]:
        """Every GPU that answers."""
        readings = self._read_nvidia() if self._nvidia else []
        return readings + (read_amd(self._drm) if self._amd else [])

    def _read_nvidia(self) -> list[GpuReading]:
        if self._nvml is None:
            self._nvml = import_module("pynvml")
        nvml = self._nvml
        try:
            if not self._open:
                nvml.nvmlInit()
                self._open = True
            return [self._reading(gpu) for gpu in self._nvidia]
        except nvml.NVMLError:  # the driver went away; the next scrape tries again
            self._open = False
            return []

    def _reading(self, gpu: GpuFacts) -> GpuReading:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid) if gpu.uuid else nvml.nvmlDeviceGetHandleByIndex(gpu.index)

        def ask(name: str) -> Any:
            with contextlib.suppress(nvml.NVMLError):  # a MIG slice has no utilisation, for one
                return getattr(nvml, name)(handle)
            return None

        memory, rates, power = (
            ask(f"nvmlDeviceGet{word}") for word in ("MemoryInfo", "UtilizationRates", "PowerUsage")
        )
        return GpuReading(
            gpu=str(gpu.index if gpu.index is not None else gpu.uuid),
            name=gpu.name,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            utilization=None if rates is None else rates.gpu / 100,
            power_watts=None if power is None else power / 1000,
        )


def read_amd(drm: Path) -> list[GpuReading]:
    """Every AMD card that has memory of its own."""
    readings: list[GpuReading] = []
    for card in sorted(drm.glob("card*[0-9]")):
        device = card / "device"
        total = _number(device / "mem_info_vram_total")
        if _text(device / "vendor") != AMD_ID or total is None:
            continue
        busy = _number(device / "gpu_busy_percent")
        power = next((watts for each in device.glob("hwmon/*/power1_average") if (watts := _number(each))), None)
        readings.append(
            GpuReading(
                gpu=card.name,
                name=_text(device / "product_name") or "AMD GPU",
                memory_used_bytes=_number(device / "mem_info_vram_used"),
                memory_total_bytes=total,
                utilization=None if busy is None else busy / 100,
                power_watts=None if power is None else power / 1_000_000,
            )
        )
    return readings


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None
