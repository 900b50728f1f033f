"""What `xerotier-vllm` does to the hub's client, with the very client that vLLM's environment has."""

import json
import subprocess
from pathlib import Path

import pytest

from demo.engine import choose_engine
from xim_agent.wrapper import LAUNCH, interpreter_of

pytestmark = pytest.mark.engine

LOOK = f"""
import json, sys
sys.path.insert(0, {str(LAUNCH.parent)!r})
import xim_vllm_launch
import huggingface_hub, transformers
from huggingface_hub.errors import OfflineModeIsEnabled
from vllm.transformers_utils.config import hf_api, try_get_safetensors_metadata

def asked(repository):
    try:
        return huggingface_hub.get_safetensors_metadata(repository)
    except OfflineModeIsEnabled:
        return "offline"

print(json.dumps({{
    "offline": huggingface_hub.constants.HF_HUB_OFFLINE,
    "telemetry": not huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY,
    "local": [hf_api().get_safetensors_metadata(sys.argv[1]), asked(sys.argv[1])],
    "remote": asked("org/model"),
    "vllm": try_get_safetensors_metadata(sys.argv[1]),
}}))
"""
"""Imports transformers, which looks at the client's version first: it needs no other told than the true one."""


def test_the_client_is_offline_and_asks_nobody_about_a_local_directory(tmp_path: Path) -> None:
    program = choose_engine().path
    python = interpreter_of(Path(program))
    assert python is not None
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [python, "-c", LOOK, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"offline": True, "telemetry": False, "local": [None, None], "remote": "offline", "vllm": None}
