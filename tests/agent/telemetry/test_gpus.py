"""What GPUs tell: AMD's from files as the kernel writes them, NVIDIA's from NVML's functions."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from xim_agent.engine.startup import Progress, Stage
from xim_agent.facts.hardware import GpuFacts, Vendor
from xim_agent.telemetry.gpus import GpuReader, GpuReading, read_amd
from xim_agent.telemetry.metrics import AgentMetrics


def card(drm: Path, name: str, **files: str) -> None:
    device = drm / name / "device"
    device.mkdir(parents=True)
    for file, text in files.items():
        (device / file).write_text(text + "\n")


def test_an_amd_card_is_read_and_others_are_left_out(tmp_path: Path) -> None:
    card(
        tmp_path,
        "card0",
        vendor="0x1002",
        product_name="Instinct MI300X",
        mem_info_vram_total="1000",
        mem_info_vram_used="250",
        gpu_busy_percent="40",
    )
    power = tmp_path / "card0" / "device" / "hwmon" / "hwmon3"
    power.mkdir(parents=True)
    (power / "power1_average").write_text("350000000")
    card(tmp_path, "card1", vendor="0x8086", mem_info_vram_total="5")
    card(tmp_path, "card2", vendor="0x1002")  # shares the machine's memory
    (tmp_path / "card0-DP-1").mkdir()
    assert read_amd(tmp_path) == [
        GpuReading(
            gpu="card0",
            name="Instinct MI300X",
            memory_used_bytes=250,
            memory_total_bytes=1000,
            utilization=0.4,
            power_watts=350.0,
        )
    ]


class Nvml:
    """NVML's functions as a driver answers them; a MIG slice knows its memory alone."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.up = True

    def nvmlInit(self) -> None:
        self._alive()

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._alive()
        return uuid

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self._alive()
        return f"board {index}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=3, total=10)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        if handle.startswith("MIG"):
            raise self.NVMLError
        return SimpleNamespace(gpu=75)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if handle.startswith("MIG"):
            raise self.NVMLError
        return 120_500

    def _alive(self) -> None:
        if not self.up:
            raise self.NVMLError


def test_nvidias_are_those_that_the_engine_may_use_and_a_lost_driver_comes_back() -> None:
    nvml = Nvml()
    gpus = [
        GpuFacts(name="NVIDIA A40", vendor=Vendor.NVIDIA, index=1),
        GpuFacts(name="NVIDIA A100 MIG 1g.10gb", vendor=Vendor.NVIDIA, index=0, uuid="MIG-1", mig=True),
    ]
    reader = GpuReader(gpus, nvml=nvml)
    board, piece = reader.read()
    assert board == GpuReading(
        gpu="1", name="NVIDIA A40", memory_used_bytes=3, memory_total_bytes=10, utilization=0.75, power_watts=120.5
    )
    assert (piece.memory_used_bytes, piece.utilization, piece.power_watts) == (3, None, None)
    nvml.up = False
    assert reader.read() == []
    nvml.up = True
    assert len(reader.read()) == 2


def test_without_gpus_nothing_is_asked() -> None:
    assert GpuReader([], nvml=None).read() == []


def test_figures_and_progress_are_served() -> None:
    metrics = AgentMetrics(version="1")
    metrics.gpus = [GpuReading(gpu="0", name="NVIDIA A40", memory_used_bytes=3, utilization=0.5)]
    metrics.start_progress(Progress(Stage.CAPTURING, 45))
    found = {
        (sample.name, sample.labels.get("gpu") or sample.labels.get("stage")): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }
    assert found["xim_agent_gpu_memory_used_bytes", "0"] == 3
    assert found["xim_agent_gpu_utilization_ratio", "0"] == 0.5
    assert ("xim_agent_gpu_power_watts", "0") not in found
    assert found["xim_agent_engine_start_ratio", "capturing graphs"] == pytest.approx(0.45)
    metrics.start_progress(None)
    assert b"capturing" not in metrics.text()
