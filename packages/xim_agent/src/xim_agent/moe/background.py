"""Decides for a running engine whether kernels are to be tuned, finds what that takes, and does it."""

import asyncio
import json
import logging
import subprocess
from pathlib import Path

from xim_agent.moe.configs import SHIPPED, ConfigFolder
from xim_agent.moe.shapes import MoeShape, NotTuned, shape_of
from xim_agent.moe.tuning import OnProgress, Outcome, tune, tuner_command
from xim_agent.planning.decision import Device
from xim_agent.planning.moe import configs_folder
from xim_agent.planning.plan import EnginePlan
from xim_agent.planning.quantization import OPTION as QUANTIZATION
from xim_agent.planning.render import command_of
from xim_agent.wrapper import interpreter_of, is_wrapper, vllm_python

log = logging.getLogger(__name__)

LOOK_TIMEOUT_S = 20.0
_LOOK = "import importlib.util as u; s = u.find_spec('vllm'); print(s.submodule_search_locations[0] if s else '')"
"""Where vLLM is; imports nothing of it."""


async def tune_for(plan: EnginePlan, on_progress: OnProgress) -> Outcome:
    """Tune the kernels of the model that `plan` serves, where it is a mixture of experts, on a GPU, and switched on."""
    shape = await asyncio.to_thread(shape_for, plan)
    if isinstance(shape, NotTuned):
        log.info("kernels are not tuned", extra={"reason": shape.reason})
        return Outcome.SKIPPED
    found = await asyncio.to_thread(find_vllm, Path(plan.given.places.executable))
    if found is None:
        log.info("kernels are not tuned", extra={"reason": "vLLM's Python is not found beside its program"})
        return Outcome.SKIPPED
    python, package = found
    folder = ConfigFolder(configs_folder(plan.given), package / SHIPPED, plan.given.engine.version)
    return await tune(shape, folder, tuner_command(python, command_of(plan).environment), on_progress)


def shape_for(plan: EnginePlan) -> MoeShape | NotTuned:
    """The shape that the engine looks up, or why nothing is tuned. Reads the model's config.json."""
    given = plan.given
    if not given.settings.moe_config_enabled:
        return NotTuned("switched off by XEROTIER_AGENT_MOE_CONFIG_ENABLED")
    if given.model.moe is not None and given.device is Device.CPU:
        return NotTuned("the engine computes on a CPU; the kernels are a GPU's")
    if given.words.has("--enable-expert-parallel"):
        return NotTuned("experts are shared out whole among the GPUs; the search is for their parts")
    method = next((each.value for each in plan.decisions if each.option == QUANTIZATION), "none")
    return shape_of(
        given.model,
        given.hardware,
        quantization=method,
        tensor_parallel_size=plan.tensor_parallel_size,
        block=block_of(given.model.path),
    )


def block_of(model: Path) -> tuple[int, int] | None:
    """Rows and columns of weights that share a scale, where the checkpoint says so."""
    try:
        described = json.loads((model / "config.json").read_text(encoding="utf-8"))
        rows, columns = described["quantization_config"]["weight_block_size"]
        return int(rows), int(columns)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_vllm(executable: Path) -> tuple[str, Path] | None:
    """The Python that has vLLM, and vLLM's package; `executable` may be vLLM's own program or our wrapper of it."""
    python = vllm_python() if is_wrapper(str(executable)) else interpreter_of(executable)
    if python is None:
        return None
    try:
        done = subprocess.run(
            [python, "-c", _LOOK], capture_output=True, text=True, errors="replace", timeout=LOOK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    package = done.stdout.strip() if done.returncode == 0 else ""
    return (python, Path(package)) if package else None
