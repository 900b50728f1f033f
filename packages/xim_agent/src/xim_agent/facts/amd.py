"""AMD GPUs by the kernel's own files, with amdsmi's names and sizes where that is installed, in HIP's order.

The kernel's compute topology (/sys/class/kfd) lists one node per CPU socket and GPU; a GPU's node names its render
device, and that one's directory under /sys/class/drm has the memory and, on server cards, the product's name.
"""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from xim_agent.facts.hardware import GpuFacts, Vendor
from xim_agent.facts.proc_files import number_of, pairs_of, text_of

_MIB = 1024**2


class AmdSmi(Protocol):
    """The part of amdsmi that is used; its functions raise `AmdSmiException`."""

    AmdSmiException: type[Exception]

    def amdsmi_init(self) -> Any: ...
    def amdsmi_shut_down(self) -> Any: ...
    def amdsmi_get_processor_handles(self) -> list[Any]: ...
    def amdsmi_get_gpu_asic_info(self, handle: Any, /) -> dict[str, Any]: ...
    def amdsmi_get_gpu_vram_info(self, handle: Any, /) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AmdFacts:
    """Every AMD GPU that the kernel offers for computing, unmasked."""

    gpus: tuple[GpuFacts, ...] = ()
    driver: str | None = None
    rocm_version: str | None = None
    problem: str | None = None


def load_amdsmi() -> AmdSmi | None:
    """amdsmi, where it is installed: it comes with ROCm and needs its libraries, and the kernel's files suffice."""
    try:
        return cast(AmdSmi, import_module("amdsmi"))
    except (ImportError, OSError, KeyError):
        # Without its libraries amdsmi raises whatever the loader raises, and KeyError when it looks for ROCm's place.
        return None


def read_amd(amdsmi: AmdSmi | None, root: Path) -> AmdFacts:
    """What is there. Blocks."""
    gpus = _by_kernel(root)
    if amdsmi is not None and gpus:
        gpus = _told(gpus, _by_amdsmi(amdsmi))
    problem = None
    if gpus and not (root / "dev/kfd").exists():
        problem = (
            "AMD GPUs are there and /dev/kfd is not, so ROCm cannot use them. "
            "In a container, pass --device /dev/kfd --device /dev/dri and the groups video and render."
        )
    return AmdFacts(
        gpus=tuple(gpus),
        driver=text_of(root / "sys/module/amdgpu/version"),
        rocm_version=text_of(root / "opt/rocm/.info/version"),
        problem=problem,
    )


def target_name(version: int) -> str:
    """LLVM's name of a `gfx_target_version`: 90402 is gfx942, 90010 gfx90a, 110000 gfx1100."""
    major, minor, stepping = version // 10_000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{stepping:x}"


def _by_kernel(root: Path) -> list[GpuFacts]:
    nodes = [node for node in (root / "sys/class/kfd/kfd/topology/nodes").glob("*") if node.name.isdecimal()]
    gpus: list[GpuFacts] = []
    for node in sorted(nodes, key=lambda node: int(node.name)):
        properties = pairs_of(node / "properties")
        version = properties.get("gfx_target_version", "0")
        if not version.isdecimal() or version == "0":
            continue  # a CPU socket
        device = root / "sys/class/drm" / f"renderD{properties.get('drm_render_minor', '')}" / "device"
        unique = text_of(device / "unique_id")
        architecture = target_name(int(version))
        gpus.append(
            GpuFacts(
                name=text_of(device / "product_name") or f"AMD {architecture}",
                vendor=Vendor.AMD,
                memory_bytes=number_of(device / "mem_info_vram_total") or None,
                architecture=architecture,
                index=len(gpus),
                uuid=None if not unique else f"GPU-{unique}",
            )
        )
    return gpus


def _told(gpus: list[GpuFacts], by_amdsmi: list[GpuFacts]) -> list[GpuFacts]:
    """`gpus` with what amdsmi adds, matched by UUID, since amdsmi may count in another order than HIP."""
    known = {gpu.uuid: gpu for gpu in by_amdsmi if gpu.uuid is not None}
    return [
        gpu
        if gpu.uuid not in known
        else replace(
            gpu,
            name=known[gpu.uuid].name or gpu.name,
            memory_bytes=gpu.memory_bytes or known[gpu.uuid].memory_bytes,
        )
        for gpu in gpus
    ]


def _by_amdsmi(amdsmi: AmdSmi) -> list[GpuFacts]:
    """As amdsmi has them; nothing where it fails, since the kernel's files say nearly the same."""
    try:
        amdsmi.amdsmi_init()
    except amdsmi.AmdSmiException:
        return []
    try:
        return [_gpu(amdsmi, handle, index) for index, handle in enumerate(amdsmi.amdsmi_get_processor_handles())]
    except amdsmi.AmdSmiException:
        return []
    finally:
        amdsmi.amdsmi_shut_down()


def _gpu(amdsmi: AmdSmi, handle: Any, index: int) -> GpuFacts:
    asic = amdsmi.amdsmi_get_gpu_asic_info(handle)
    memory = amdsmi.amdsmi_get_gpu_vram_info(handle).get("vram_size")
    serial = str(asic.get("asic_serial", "")).lower().removeprefix("0x")
    return GpuFacts(
        name=str(asic.get("market_name") or ""),
        vendor=Vendor.AMD,
        memory_bytes=memory * _MIB if isinstance(memory, int) and memory > 0 else None,
        index=index,
        uuid=f"GPU-{serial}" if serial and serial != "n/a" else None,
    )
