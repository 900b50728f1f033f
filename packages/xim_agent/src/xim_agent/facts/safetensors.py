"""The headers of safetensors files: what a checkpoint really holds, without reading its weights.

A file is 8 bytes of length (little endian), so many bytes of JSON, then the tensors (the format's own description).
"""

import json
import os
import stat
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from xim_agent.facts.config_file import FETCH_AGAIN, LARGEST, read_config
from xim_agent.facts.model import ModelUnreadable

HEADER_LIMIT_BYTES = 100_000_000
"""What the reference implementation accepts (`MAX_HEADER_SIZE`)."""
INDEX_LIMIT_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"

_SCALE_ENDINGS = (
    *(".scales", ".qzeros", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale"),
    *(".weight_zero_point", ".weight_shape", ".weight_g_idx", ".k_scale", ".v_scale", ".q_scale", ".SCB"),
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", "_scales", ".input_zero_point"),
)
"""Tensors that say how weights are packed, and are none: of AWQ, GPTQ, compressed-tensors, fp8, bitsandbytes, mxfp4."""
_PACKED_DTYPES = {"I32": 32, "U8": 8}
"""Dtypes that hold several quantised weights in one element, and their bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHeader:
    """One tensor as a header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """All tensors of a model's safetensors files."""

    tensors: tuple[TensorHeader, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def main_dtype(self) -> str | None:
        """The dtype that most bytes have."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.size_bytes
        return sizes.most_common(1)[0][0] if sizes else None

    @property
    def has_mtp(self) -> bool:
        """Whether it brings layers for multi-token prediction under their own name (Qwen3-Next, MiMo)."""
        return any(tensor.name.startswith(("mtp.", "model.mtp")) for tensor in self.tensors)

    def parameters(self, quantized_bits: int | None) -> int:
        """Weights, each counted once; elements that pack several weights of `quantized_bits` are unpacked."""
        return sum(_weights(tensor, quantized_bits) for tensor in self.tensors)


def read_checkpoint(directory: Path) -> Checkpoint | None:
    """The headers of all safetensors files of the model in `directory`; `None` where it has none. Blocks.

    Raises:
        ModelUnreadable: a file that the index names is missing, or a header is not one, or a file is cut short.
    """
    files = _files(directory)
    if not files:
        return None
    return Checkpoint(tensors=tuple(tensor for file in files for tensor in read_header(file)))


def read_header(file: Path) -> list[TensorHeader]:
    """The tensors that `file` announces, after checking that it is long enough to hold them. Blocks.

    Raises:
        ModelUnreadable: as for `read_checkpoint`.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _broken(file, "it is no file")
        size = found.st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise _broken(file, f"it has {size} bytes, which is not a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(HEADER_LIMIT_BYTES, size - 8):
                raise _broken(file, f"its header claims {length} bytes, and the file has {size}")
            raw = stream.read(length)
    except FileNotFoundError:
        raise _broken(file, "it is not there") from None
    except OSError as error:
        raise ModelUnreadable(file, f"it cannot be read: {error.strerror}", "Let the agent's user read it.") from None
    tensors, data_bytes = _parsed(file, raw)
    if size - 8 - length < data_bytes:
        raise _broken(file, f"it is cut short: {size} of {8 + length + data_bytes} bytes are there")
    return tensors


def _parsed(file: Path, raw: bytes) -> tuple[list[TensorHeader], int]:
    """The tensors of a header, and the bytes of data it announces."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _broken(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    tensors, end = [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, stop = _tensor(file, name, entry)
        tensors.append(tensor)
        end = max(end, stop)
    return tensors, end


def _tensor(file: Path, name: str, entry: object) -> tuple[TensorHeader, int]:
    """One tensor, and where its data ends."""
    described = entry if isinstance(entry, dict) else {}
    dtype, shape = described.get("dtype"), _whole(described.get("shape"))
    offsets = _whole(described.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _broken(file, f"its header does not describe the tensor {name[:80]!r}")
    if prod(shape) > LARGEST:
        raise _broken(file, f"its header does not describe the tensor {name[:80]!r}")
    return TensorHeader(name=name, dtype=dtype, shape=shape, size_bytes=offsets[1] - offsets[0]), offsets[1]


def _whole(values: object) -> tuple[int, ...] | None:
    """A list of whole numbers as a tuple; `None` for anything else."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        return None
    return tuple(values)


def _files(directory: Path) -> list[Path]:
    """The files that make up the checkpoint: those of the index, else all that are there."""
    index = directory / INDEX_NAME
    if os.path.exists(index):
        weight_map = read_config(index, INDEX_LIMIT_BYTES).inner("weight_map")
        if weight_map is None:
            raise _broken(index, "it has no weight_map")
        names = weight_map.all_texts()
        for name in names:
            if Path(name).name != name:
                raise _broken(index, f"it names {name[:80]!r}, which is not a file beside it")
        return [directory / name for name in sorted(names)]
    files = sorted(directory.glob("*.safetensors"))
    # Some repositories hold the same weights twice, once in the format of the model's author.
    other = [file for file in files if not file.name.startswith("consolidated")]
    return other or files


def _weights(tensor: TensorHeader, quantized_bits: int | None) -> int:
    if tensor.name.endswith(_SCALE_ENDINGS) or ".quant_state." in tensor.name:
        return 0
    elements = prod(tensor.shape)
    bits = _PACKED_DTYPES.get(tensor.dtype)
    if bits is None or quantized_bits is None or quantized_bits >= bits:
        return elements
    return elements * bits // quantized_bits


def _broken(file: Path, what: str) -> ModelUnreadable:
    return ModelUnreadable(file, what, f"{FETCH_AGAIN}.")
