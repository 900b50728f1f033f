"""Starts vLLM's command line in vLLM's own environment, as `xerotier-vllm` does everywhere.

Run by path with vLLM's Python. What it sets is inherited by every process of the engine; a process that is made by
`spawn` runs this file's top level again, as `__mp_main__`, and so gets the patches as well.
"""

import importlib
import os
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

from xim_vllm_hooks import after_import  # type: ignore[import-not-found]  # beside this file

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Set where the operator has not: the engine runs on local files and asks nobody."""
QUIET = "ignore:invalid escape sequence:SyntaxWarning,ignore:invalid escape sequence:DeprecationWarning"
"""Several packages that vLLM imports spell regular expressions without r""; nobody who serves can mend that."""
PLUGIN = "xim_short_prompts"


def prepare(environment: MutableMapping[str, str], here: str) -> None:
    """Set what every process of the engine inherits. Doing it twice changes nothing."""
    for name, value in OFFLINE.items():
        environment.setdefault(name, value)
    path = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part and part != here]
    environment["PYTHONPATH"] = os.pathsep.join([here, *path])
    quiet = QUIET.split(",")
    rules = [part for part in environment.get("PYTHONWARNINGS", "").split(",") if part and part not in quiet]
    environment["PYTHONWARNINGS"] = ",".join([*quiet, *rules])
    named = environment.get("VLLM_PLUGINS")
    if named and PLUGIN not in named.split(","):  # with a list, vLLM loads what is on it alone
        environment["VLLM_PLUGINS"] = f"{named},{PLUGIN}"


def patch_hub(module: ModuleType) -> None:
    """A local directory has no metadata on the hub: None at once, in place of an error after several tries."""
    api: Any = getattr(module, "HfApi", None)
    asked = getattr(api, "get_safetensors_metadata", None)
    if asked is None:
        return

    def get_safetensors_metadata(self: Any, repo_id: str, **options: Any) -> Any:
        return None if os.path.isdir(repo_id) else asked(self, repo_id, **options)

    api.get_safetensors_metadata = get_safetensors_metadata
    if hasattr(module, "api"):
        module.get_safetensors_metadata = module.api.get_safetensors_metadata  # type: ignore[attr-defined]


def main() -> int:
    """Run `vllm` with this process's arguments."""
    for rule in QUIET.split(","):
        _, message, kind = rule.split(":")
        warnings.filterwarnings("ignore", message, {"SyntaxWarning": SyntaxWarning}.get(kind, DeprecationWarning))
    sys.argv[0] = "vllm"
    return int(importlib.import_module("vllm.entrypoints.cli.main").main() or 0)


prepare(os.environ, str(Path(__file__).resolve().parent))
after_import("huggingface_hub.hf_api", patch_hub)

if __name__ == "__main__":
    sys.exit(main())
