"""Accelerators and their masks; the vendors' libraries are stand-ins at the edge, the kernel's files are real files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.agent.facts.nvml import GIB, Board, FakeNvml
from tests.agent.facts.trees import amd_gpus, two_socket_host, write
from xim_agent.facts.amd import read_amd, target_name
from xim_agent.facts.hardware import GpuFacts, HardwareFacts, Vendor
from xim_agent.facts.nvidia import NvidiaFacts, load_nvml, read_nvidia
from xim_agent.facts.read_hardware import read_hardware, read_this_machine
from xim_agent.facts.visible import visible

A40 = [Board("NVIDIA A40", f"GPU-{number}{number}", 48 * GIB) for number in range(4)]


def machine(
    root: Path, nvml: FakeNvml | None = None, *, cuda: str | None = None, hip: str | None = None
) -> HardwareFacts:
    return read_hardware(
        root=root,
        cache=root / "not" / "made" / "yet",
        cuda_mask=cuda,
        hip_mask=hip,
        nvml=nvml,
        amdsmi=None,
        system="Linux",
        architecture="x86_64",
    )


def test_four_boards_are_read_and_the_library_is_given_back(tmp_path: Path) -> None:
    nvml = FakeNvml(*A40)
    facts = read_nvidia(nvml, tmp_path)
    assert facts.gpus[2] == GpuFacts(
        name="NVIDIA A40",
        vendor=Vendor.NVIDIA,
        memory_bytes=48 * GIB,
        compute_capability=(8, 6),
        index=2,
        uuid="GPU-22",
    )
    assert (len(facts.gpus), facts.driver, facts.cuda_version, nvml.open) == (4, "570.124.06", "12.8", 0)


def test_a_board_cut_into_slices_is_its_slices(tmp_path: Path) -> None:
    slices = [Board("NVIDIA A100 MIG 3g.40gb", f"MIG-{letter}", 40 * GIB) for letter in "ab"]
    nvml = FakeNvml(Board("NVIDIA A100", "GPU-0", 80 * GIB, (8, 0), slices), Board("NVIDIA A100", "GPU-1", 80 * GIB))
    gpus = read_nvidia(nvml, tmp_path).gpus
    assert [(gpu.mig, gpu.memory_bytes, gpu.index) for gpu in gpus] == [
        (True, 40 * GIB, 0),
        (True, 40 * GIB, 0),
        (False, 80 * GIB, 1),
    ]
    assert gpus[0].compute_capability == (8, 0)
    assert [gpu.uuid for gpu in visible(gpus, None, "M")[0]] == ["MIG-a"]
    assert [gpu.uuid for gpu in visible(gpus, "MIG-b", "M")[0]] == ["MIG-b"]
    assert [gpu.uuid for gpu in visible(gpus, "1", "M")[0]] == ["GPU-1"]


def test_what_a_board_does_not_know_is_none(tmp_path: Path) -> None:
    fails = frozenset({"memory", "mig", "capability", "uuid"})
    (gpu,) = read_nvidia(FakeNvml(Board("NVIDIA GB10", "u", fails=fails)), tmp_path).gpus
    assert gpu == GpuFacts(name="NVIDIA GB10", vendor=Vendor.NVIDIA, index=0)


def test_a_board_that_does_not_answer_is_a_problem_and_the_others_are_used(tmp_path: Path) -> None:
    facts = read_nvidia(FakeNvml(A40[0], Board("x", "y", fails=frozenset({"handle"}))), tmp_path)
    assert len(facts.gpus) == 1
    assert "GPU 1 does not answer" in (facts.problem or "")


def test_boards_that_cannot_be_counted_are_a_problem(tmp_path: Path) -> None:
    nvml = FakeNvml(*A40, uncounted=True)
    facts = read_nvidia(nvml, tmp_path)
    assert (facts.gpus, nvml.open) == ((), 0)
    assert "does not count the GPUs" in (facts.problem or "")


def test_no_driver_is_no_problem(tmp_path: Path) -> None:
    assert read_nvidia(None, tmp_path) == NvidiaFacts()
    assert read_nvidia(FakeNvml(broken="Driver Not Loaded"), tmp_path) == NvidiaFacts()


def test_a_driver_that_cannot_be_asked_is_a_problem_with_a_remedy(tmp_path: Path) -> None:
    write(tmp_path, {"proc/driver/nvidia/version": "NVRM version"})
    assert "Install nvidia-ml-py" in (read_nvidia(None, tmp_path).problem or "")
    assert "nvidia-smi" in (read_nvidia(FakeNvml(broken="Unknown Error"), tmp_path).problem or "")


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("2,3", [2, 3]),
        ("3, 0", [3, 0]),
        ("GPU-11", [1]),
        ("GPU-2,0", [2, 0]),
        ("0,-1,2", [0]),
        ("NoDevFiles", []),
    ],
)
def test_a_mask_leaves_what_it_names_in_its_order(tmp_path: Path, mask: str | None, left: list[int]) -> None:
    gpus, problem = visible(read_nvidia(FakeNvml(*A40), tmp_path).gpus, mask, "CUDA_VISIBLE_DEVICES")
    assert ([gpu.index for gpu in gpus], problem) == (left, None)


@pytest.mark.parametrize(
    ("mask", "left", "said"),
    [
        ("0,7,1", [0], "7 names none of the 4 devices"),
        ("x", [], "x names none"),
        ("GPU-", [], "GPU- names none"),
        ("1,1", [1], "1 is named twice"),
    ],
)
def test_a_wrong_mask_ends_where_it_is_wrong(tmp_path: Path, mask: str, left: list[int], said: str) -> None:
    gpus, problem = visible(read_nvidia(FakeNvml(*A40), tmp_path).gpus, mask, "CUDA_VISIBLE_DEVICES")
    assert [gpu.index for gpu in gpus] == left
    assert problem is not None
    assert problem.startswith(f"CUDA_VISIBLE_DEVICES={mask}: ")
    assert said in problem


def test_the_whole_machine_is_read(tmp_path: Path) -> None:
    facts = machine(two_socket_host(tmp_path), FakeNvml(*A40), cuda="2,3")
    assert [gpu.index for gpu in facts.gpus] == [2, 3]
    assert facts.ram_bytes == 98304000 * 1024
    assert facts.disk_free_bytes is not None
    assert facts.disk_total_bytes is not None
    assert facts.disk_free_bytes <= facts.disk_total_bytes
    assert (facts.nvidia_driver, facts.system, facts.problems) == ("570.124.06", "Linux", ())


def test_shared_memory_is_measured_where_there_is_some(tmp_path: Path) -> None:
    assert machine(tmp_path).shm_free_bytes is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert machine(tmp_path).shm_free_bytes


def test_a_wrong_mask_is_a_problem_only_where_there_are_devices(tmp_path: Path) -> None:
    assert machine(tmp_path, FakeNvml(*A40), cuda="9").problems
    assert machine(tmp_path, cuda="0", hip="0").problems == ()


def test_this_machine_can_be_read() -> None:
    facts = read_this_machine(cache=Path.cwd())
    assert facts.ram_bytes
    assert facts.cpu.logical_cpus
    assert facts.disk_total_bytes


def test_the_library_is_optional() -> None:
    nvml = load_nvml()
    assert nvml is None or issubclass(nvml.NVMLError, Exception)


@pytest.mark.parametrize(
    ("version", "name"), [(90402, "gfx942"), (90010, "gfx90a"), (110000, "gfx1100"), (120001, "gfx1201")]
)
def test_a_target_version_has_llvms_name(version: int, name: str) -> None:
    assert target_name(version) == name


def test_the_kernel_names_amd_gpus_in_hips_order(tmp_path: Path) -> None:
    root = amd_gpus(tmp_path, [90402, 110000])
    write(root, {"sys/class/drm/renderD128/device/product_name": "AMD Instinct MI300X\n"})
    write(root, {"opt/rocm/.info/version": "6.4.1-83\n", "sys/module/amdgpu/version": "6.12.12\n"})
    facts = read_amd(None, root)
    assert facts.gpus[0] == GpuFacts(
        name="AMD Instinct MI300X",
        vendor=Vendor.AMD,
        memory_bytes=16 * GIB,
        architecture="gfx942",
        index=0,
        uuid="GPU-0000000000000000",
    )
    assert (facts.gpus[1].name, facts.gpus[1].architecture) == ("AMD gfx1100", "gfx1100")
    assert (facts.rocm_version, facts.driver, facts.problem) == ("6.4.1-83", "6.12.12", None)


def test_gpus_that_rocm_cannot_open_are_a_problem(tmp_path: Path) -> None:
    assert "/dev/kfd" in (read_amd(None, amd_gpus(tmp_path, [90402], kfd=False)).problem or "")


def test_the_hip_mask_leaves_what_it_names(tmp_path: Path) -> None:
    facts = machine(amd_gpus(tmp_path, [90402, 90402, 90402]), hip="1")
    assert [gpu.index for gpu in facts.gpus] == [1]


@dataclass
class FakeAmdSmi:
    """A stand-in for the module amdsmi, with one device."""

    serial: str
    fails: bool = False
    AmdSmiException: type[Exception] = RuntimeError
    open: int = 0

    def amdsmi_init(self) -> Any:
        if self.fails:
            raise RuntimeError("no driver")
        self.open += 1

    def amdsmi_shut_down(self) -> Any:
        self.open -= 1

    def amdsmi_get_processor_handles(self) -> list[Any]:
        return [object()]

    def amdsmi_get_gpu_asic_info(self, handle: Any, /) -> dict[str, Any]:
        return {"market_name": "AMD Radeon RX 7900 XTX", "asic_serial": self.serial}

    def amdsmi_get_gpu_vram_info(self, handle: Any, /) -> dict[str, Any]:
        return {"vram_size": 24 * 1024}


def test_amdsmi_adds_the_name_to_the_gpu_it_means(tmp_path: Path) -> None:
    root = amd_gpus(tmp_path, [90402, 110000])
    amdsmi = FakeAmdSmi("0x0000000000000001")
    names = [gpu.name for gpu in read_amd(amdsmi, root).gpus]
    assert (names, amdsmi.open) == (["AMD gfx942", "AMD Radeon RX 7900 XTX"], 0)


@pytest.mark.parametrize("amdsmi", [FakeAmdSmi("N/A"), FakeAmdSmi("0x1", fails=True)])
def test_without_amdsmis_help_the_kernels_word_stands(tmp_path: Path, amdsmi: FakeAmdSmi) -> None:
    assert [gpu.name for gpu in read_amd(amdsmi, amd_gpus(tmp_path, [110000])).gpus] == ["AMD gfx1100"]
