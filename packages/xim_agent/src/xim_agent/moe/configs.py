"""Kernel configurations on disk: those shipped with vLLM, and those made here.

A file made here has a stamp beside it that names the vLLM it was made with. Another vLLM's kernels may take other
parameters, so such a file is removed and made anew; one without a stamp is the operator's own, and is left alone.
"""

import json
import logging
import os
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from xim_agent.moe.shapes import MoeShape

log = logging.getLogger(__name__)

SHIPPED = Path("model_executor/layers/fused_moe/configs")
"""Within vLLM's package."""
STAMP = ".made-by.json"
REQUIRED = frozenset({"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M"})


class Found(StrEnum):
    """Where a configuration is."""

    OPERATOR = "operator"
    """In the folder, without a stamp."""
    MADE = "made"
    """In the folder, made here with this vLLM."""
    SHIPPED = "shipped"
    NOWHERE = "nowhere"


class ConfigInvalid(ValueError):
    """A tuner's result is not what vLLM reads."""


@dataclass(frozen=True, slots=True)
class ConfigFolder:
    """The folder that vLLM is told to look into first, and vLLM's own behind it."""

    path: Path
    shipped: Path | None
    vllm_version: str | None

    def find(self, shape: MoeShape) -> Found:
        """Where vLLM will find the configuration of `shape`. What another vLLM made is removed."""
        file = self.path / shape.file_name
        made_with = self._made_with(file)
        if file.is_file() and made_with is not None and made_with != self.vllm_version:
            log.info("kernel configuration is another vLLM's", extra={"file": str(file), "made_with": made_with})
            file.unlink()
            _stamp(file).unlink(missing_ok=True)
        if file.is_file():
            return Found.OPERATOR if made_with is None else Found.MADE
        if self.shipped is not None and (self.shipped / shape.file_name).is_file():
            return Found.SHIPPED
        return Found.NOWHERE

    def keep(self, shape: MoeShape, text: str) -> Path:
        """Store a tuner's result, whole or not at all.

        Raises:
            ConfigInvalid: it is not what vLLM reads.
            OSError: the folder cannot be written.
        """
        config = checked(text)
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / shape.file_name
        _write(_stamp(file), json.dumps({"vllm": self.vllm_version, "device": shape.device}))
        _write(file, json.dumps(config, indent=1))
        return file

    def _made_with(self, file: Path) -> str | None:
        try:
            stamped = json.loads(_stamp(file).read_text(encoding="utf-8"))
            return str(stamped["vllm"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def checked(text: str) -> dict[str, Any]:
    """A configuration as vLLM reads it: batch sizes, each with the kernel's parameters.

    Raises:
        ConfigInvalid: it is anything else.
    """
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ConfigInvalid(f"no JSON: {error}") from None
    if not isinstance(config, dict) or not config:
        raise ConfigInvalid("no object of batch sizes")
    for size, parameters in config.items():
        if not size.isdigit() or not isinstance(parameters, dict) or not set(parameters) >= REQUIRED:
            raise ConfigInvalid(f"batch size {size!r} has no whole set of parameters")
        if not all(isinstance(value, int) and value > 0 for value in parameters.values()):
            raise ConfigInvalid(f"batch size {size!r} has a parameter that is no positive number")
    return config


def _stamp(file: Path) -> Path:
    return file.with_name(file.name + STAMP)


def _write(path: Path, text: str) -> None:
    """Replace `path` whole: vLLM may read it at any moment."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".new")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
