"""`xerotier-vllm`: vLLM's command line, made ready for a node that has its models on its own disk.

Stands wherever the `vllm` program would (XEROTIER_AGENT_VLLM_PATH). It may be installed in another environment than
vLLM's, so it looks for vLLM's Python, and becomes that. Standard library only.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

LAUNCH = Path(__file__).parent / "vllm_plugin" / "xim_vllm_launch.py"
NAME = "xerotier-vllm"
NOT_FOUND = 127
NOT_THERE = """\
xerotier-vllm: vLLM is not installed beside it, and no `vllm` is on PATH.
  Install vLLM and put its environment's bin directory on PATH, or name its program itself: XEROTIER_AGENT_VLLM_PATH
"""


def main() -> None:
    """Become vLLM; returns only when there is none."""
    python = vllm_python()
    if python is None:
        sys.stderr.write(NOT_THERE)
        sys.exit(NOT_FOUND)
    os.execv(python, [python, str(LAUNCH), *sys.argv[1:]])


def is_wrapper(program: str) -> bool:
    """Whether `program` is this one, which stands for the vLLM that it would find."""
    return Path(program).name == NAME


def vllm_python() -> str | None:
    """The interpreter of the environment that has vLLM: this one's, else that of the `vllm` program on PATH."""
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    program = shutil.which("vllm")
    return None if program is None else interpreter_of(Path(program))


def interpreter_of(program: Path) -> str | None:
    """The Python that a console script runs with, `None` where it is none.

    From its first line; where that is a shell's, because the path is too long or has spaces, from its second one
    (`'''exec' "/the/python" "$0" "$@"`); else a Python beside the program.
    """
    try:
        with program.open("rb") as file:
            lines = [file.readline(4096).decode("utf-8", "replace") for _ in range(2)]
    except OSError:
        return None
    words = lines[0].removeprefix("#!").split() if lines[0].startswith("#!") else []
    quoted = lines[1].split('"') if lines[1].startswith("'''exec'") else []
    named = [words[0]] if words and "python" in Path(words[0]).name else []
    if len(words) > 1 and Path(words[0]).name == "env":
        named += [found for found in [shutil.which(words[1])] if found and "python" in words[1]]
    named += quoted[1:2]
    beside = [str(program.resolve().parent / name) for name in ("python3", "python")]
    return next((path for path in [*named, *beside] if os.access(path, os.X_OK)), None)
