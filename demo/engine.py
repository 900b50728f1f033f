"""Which vLLM the demo and the engine tests start, and with what.

    python -m demo.engine        print the path of the vLLM in use; prepares one for the CPU where none is found

The order: XEROTIER_AGENT_VLLM_PATH, `vllm` on PATH when it runs, else the CPU environment of `prepare_engine`.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.prepare_engine import ROOT, VLLM_VERSION, PreparationFailed, prepare
from demo.progress import say, step

VARIABLE = "XEROTIER_AGENT_VLLM_PATH"
SEEN = ROOT / ".venvs" / "engine-seen.json"
VERSION_TIMEOUT_S = 180.0  # `vllm --version` imports half of vLLM: 8 s warm, far more from a cold network disk


class EngineUnusable(Exception):
    """The vLLM that the user named does not run; the message says how it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A vLLM that runs."""

    path: str
    version: str

    @property
    def on_cpu(self) -> bool:
        """vLLM itself chooses its platform by this word in its version."""
        return "cpu" in self.version


@dataclass(frozen=True, kw_only=True, slots=True)
class StartOptions:
    """What makes the engine start fast, as the agent's settings take it."""

    arguments: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    def as_environment(self) -> dict[str, str]:
        """The variables of the agent's process."""
        return {
            "XEROTIER_AGENT_VLLM_ARGS": " ".join(self.arguments),
            "XEROTIER_AGENT_VLLM_ENV": " ".join(self.variables),
            **dict(self.settings),
        }


# Measured on two cores without a GPU: 19 to 25 s to the first answer instead of 43 to 75 s. No compilation, one
# thread, no worker processes, and a key-value cache that fits the tiny model. The block size is 128 on a CPU by
# default, and then no prompt of this size ever hits the prefix cache.
TINY_ON_CPU = StartOptions(
    arguments=(
        *("--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni"),
        *("--kv-cache-memory-bytes", "128M", "--block-size", "32", "--shutdown-timeout", "10"),
    ),
    variables=("OMP_NUM_THREADS=1", "VLLM_ENABLE_V1_MULTIPROCESSING=0"),
    settings=(("XEROTIER_AGENT_MAX_MODEL_LEN", "4096"),),
)
# A megabyte of weights does not need the card: what else runs on it stays.
TINY_ON_GPU = StartOptions(
    settings=(
        ("XEROTIER_AGENT_MAX_MODEL_LEN", "4096"),
        ("XEROTIER_AGENT_GPU_MEMORY_UTILIZATION", "0.3"),
        ("XEROTIER_AGENT_VLLM_DISABLE_CUDA_GRAPHS", "1"),
    ),
)
OWN_ON_CPU = StartOptions(arguments=("--distributed-executor-backend", "uni", "--block-size", "32"))


def start_options(engine: Engine, *, tiny: bool) -> StartOptions:
    """How to start `engine`: fast for the tiny model, as vLLM itself decides for any other on a GPU."""
    if engine.on_cpu:
        return TINY_ON_CPU if tiny else OWN_ON_CPU
    return TINY_ON_GPU if tiny else StartOptions()


def choose_engine() -> Engine:
    """The first vLLM of the order that runs; the last one is made when it is missing.

    Raises: EngineUnusable when the named one does not run; PreparationFailed when none can be made.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = shutil.which(named)
        engine = _version_of(path) if path else None
        if engine is None:
            raise EngineUnusable(
                f"{VARIABLE} names {named}, and `{named} --version` does not run. Unset it, or mend it."
            )
        return engine
    found = shutil.which("vllm")
    if found:
        engine = _version_of(found)
        if engine:
            return engine
        say(f"{found} --version does not run; going on without it.")
    return Engine(path=str(prepare()), version=VLLM_VERSION)


def _version_of(path: str) -> Engine | None:
    """The version that the program reports, remembered until the file changes; None when it does not run."""
    # The link in an environment stays the same when the environment is made anew, hence the file's own time as well.
    key = f"{path} {os.stat(path).st_mtime_ns} {os.path.realpath(path)}"
    seen = _read_seen()
    if seen.get("key") == key:
        return Engine(path=path, version=seen["version"])
    with step(f"Asking {path} for its version"):
        version = _ask(path)
    if version is None:
        return None
    engine = Engine(path=path, version=version)
    SEEN.parent.mkdir(exist_ok=True)
    SEEN.write_text(json.dumps({"key": key, **asdict(engine)}), encoding="utf-8")
    return engine


def _read_seen() -> dict[str, str]:
    try:
        seen = json.loads(SEEN.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return seen if isinstance(seen, dict) else {}


def _ask(path: str) -> str | None:
    try:
        answer = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=VERSION_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = answer.stdout.split()
    return words[-1] if answer.returncode == 0 and words else None


def main() -> int:
    """Print the chosen path; 0 when there is one."""
    try:
        engine = choose_engine()
    except (EngineUnusable, PreparationFailed) as failure:
        say(f"error: {failure}")
        return 1
    say(f"vLLM {engine.version}: {engine.path}")
    sys.stdout.write(f"{Path(engine.path).absolute()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
