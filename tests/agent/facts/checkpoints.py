"""Small model directories on disk: a config.json and safetensors files whose data is zeros."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A file with `tensors` by name, each a dtype and a shape."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(end)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A file with whatever stands for its header."""
    return struct.pack("<Q", len(header)) + header + data


def model(directory: Path, config: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A directory with `config` (else a small dense model) and `changes`; a change to None takes away."""
    values = {**(CONFIG if config is None else config), **changes}
    kept = {name: value for name, value in values.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory
