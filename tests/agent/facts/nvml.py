"""A stand-in for the module pynvml: the boards it is built with, behind the functions that are asked."""

from dataclasses import dataclass, field
from typing import Any

GIB = 1024**3


class FakeNvmlError(Exception):
    """What every function of pynvml raises."""


@dataclass
class Memory:
    """What `nvmlDeviceGetMemoryInfo` answers."""

    total: int


@dataclass
class Board:
    """One device, and the slices it is cut into; `fails` are functions that it does not answer."""

    name: str
    uuid: str
    memory: int = 24 * GIB
    capability: tuple[int, int] = (8, 6)
    slices: list["Board"] = field(default_factory=list)
    fails: frozenset[str] = frozenset()


class FakeNvml:
    """pynvml on a machine with `boards`; `broken` makes it fail to start, `uncounted` to count them."""

    NVMLError: type[Exception] = FakeNvmlError

    def __init__(self, *boards: Board, broken: str | None = None, uncounted: bool = False) -> None:
        self.boards, self.broken, self.uncounted = boards, broken, uncounted
        self.open = 0

    def _asked(self, board: Board, question: str) -> Board:
        if question in board.fails:
            raise FakeNvmlError("Not Supported")
        return board

    def nvmlInit(self) -> None:
        if self.broken is not None:
            raise FakeNvmlError(self.broken)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        if self.uncounted:
            raise FakeNvmlError("Unknown Error")
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any:
        return self._asked(self.boards[index], "handle")

    def nvmlDeviceGetName(self, handle: Any, /) -> str | bytes:
        name: str = self._asked(handle, "name").name
        return name.encode()

    def nvmlDeviceGetUUID(self, handle: Any, /) -> str | bytes:
        return self._asked(handle, "uuid").uuid

    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any:
        return Memory(self._asked(handle, "memory").memory)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, /) -> tuple[int, int]:
        return self._asked(handle, "capability").capability

    def nvmlDeviceGetMigMode(self, handle: Any, /) -> Any:
        board = self._asked(handle, "mig")
        return [1, 1] if board.slices else [0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, /) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int, /) -> Any:
        if index >= len(handle.slices):
            raise FakeNvmlError("Not Found")
        return handle.slices[index]

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return "570.124.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12080
