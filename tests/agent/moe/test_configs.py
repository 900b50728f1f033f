"""Configurations on disk: whose they are, and what another vLLM made."""

import json
from pathlib import Path

import pytest

from xim_agent.moe.configs import ConfigFolder, ConfigInvalid, Found, checked
from xim_agent.moe.shapes import MoeShape

SHAPE = MoeShape(experts=8, width=64, hidden=128, experts_per_token=2, device="NVIDIA L40S")
PARAMETERS = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4}
CONFIG = json.dumps({"1": PARAMETERS, "64": PARAMETERS})


def folder(tmp_path: Path, version: str = "0.32.0") -> ConfigFolder:
    return ConfigFolder(tmp_path / "own", tmp_path / "shipped", version)


def test_what_is_nowhere_is_shipped_or_made(tmp_path: Path) -> None:
    configs = folder(tmp_path)
    assert configs.find(SHAPE) is Found.NOWHERE
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / SHAPE.file_name).write_text(CONFIG)
    assert configs.find(SHAPE) is Found.SHIPPED
    file = configs.keep(SHAPE, CONFIG)
    assert configs.find(SHAPE) is Found.MADE
    assert json.loads(file.read_text()) == json.loads(CONFIG)


def test_another_vllms_is_removed_and_the_operators_own_is_not(tmp_path: Path) -> None:
    file = folder(tmp_path, "0.31.0").keep(SHAPE, CONFIG)
    newer = folder(tmp_path)
    assert newer.find(SHAPE) is Found.NOWHERE
    assert list(file.parent.iterdir()) == []
    file.write_text(CONFIG)
    assert newer.find(SHAPE) is Found.OPERATOR


@pytest.mark.parametrize(
    "text",
    ["", "no", "[]", "{}", '{"x": {}}', '{"1": 5}', '{"1": {"BLOCK_SIZE_M": 16}}', CONFIG.replace("16", "-16")],
)
def test_what_vllm_would_not_read_is_not_kept(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigInvalid):
        checked(text)
    with pytest.raises(ConfigInvalid):
        folder(tmp_path).keep(SHAPE, text)
    assert folder(tmp_path).find(SHAPE) is Found.NOWHERE
