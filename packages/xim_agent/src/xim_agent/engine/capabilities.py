"""What the installed vLLM is and has: asked once, remembered until its program changes.

`vllm serve --help=all` imports most of vLLM and takes ten seconds and more, so the answer is kept in a file under the
program's path and time. Whatever cannot be asked is unknown, which stops nothing: the plan then passes every flag.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xim_agent.planning.engine_facts import PACKAGES_OF_INTEREST, EngineFacts, fits_context, flags_in
from xim_agent.wrapper import interpreter_of, is_wrapper, vllm_python

log = logging.getLogger(__name__)

FILE_NAME = "vllm-facts.json"
HELP_TIMEOUT_S = 120.0
"""The first import after an installation compiles 2 GB of packages: 22 s on two busy cores, more from a slow disk."""
PYTHON_TIMEOUT_S = 20.0
LOOK_S = 0.1
"""Whether an answer is still wanted is looked up so often while one is waited for."""
FORM = 1
"""Of the file; another one is not read."""
_LOOK = (
    "import importlib.metadata as m, importlib.util as u, json, sys\n"
    "def v():\n"
    "    try: return m.version('vllm')\n"
    "    except m.PackageNotFoundError: return None\n"
    "print(json.dumps([v(), [n for n in sys.argv[1:] if u.find_spec(n)]]))"
)
"""Runs in vLLM's Python and imports nothing of it."""


def remembered(executable: str, folder: Path) -> EngineFacts | None:
    """What an earlier question found, where the program is still the same; asks nothing."""
    try:
        stored = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        if stored["form"] != FORM:
            return None
        return _facts(stored["programs"][_key(executable)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


GivenUp = Callable[[], bool]
"""Whether nobody waits for the answer any more; asked from the thread that asks vLLM."""


def _never() -> bool:
    return False


def engine_facts(executable: str, folder: Path, environment: dict[str, str], given_up: GivenUp = _never) -> EngineFacts:
    """The facts of `executable`, from `folder` or by asking it. Blocks, for half a minute when it has to ask.

    `environment` is the one that the engine will be started with. Once `given_up` says so, what is running is killed
    and the rest is not asked.
    """
    known = remembered(executable, folder)
    if known is not None:
        return known
    log.info("asking vLLM for its flags; this happens once", extra={"executable": executable})
    asked = _ask(executable, environment, given_up)
    if given_up():
        return _facts(asked)
    if asked["flags"] is None:
        log.warning("vLLM did not tell its flags; every flag is passed", extra={"executable": executable})
    else:
        _remember(executable, folder, asked)
    return _facts(asked)


def _ask(executable: str, environment: dict[str, str], given_up: GivenUp) -> dict[str, Any]:
    version, packages = _look_into(executable, environment, given_up)
    if version is None:
        words = (_output([executable, "--version"], environment, HELP_TIMEOUT_S, given_up) or "").split()
        version = words[-1] if words else None
    # Without `=all` the help has only an overview; a vLLM from before the sections knows `--help` alone.
    for question in ("--help=all", "--help"):
        text = _output([executable, "serve", question], environment, HELP_TIMEOUT_S, given_up)
        if text is not None and "--max-model-len" in text:
            flags = sorted(flags_in(text))
            return {"version": version, "flags": flags, "fits_context": fits_context(text), "packages": packages}
    return {"version": version, "flags": None, "fits_context": False, "packages": packages}


def _look_into(executable: str, environment: dict[str, str], given_up: GivenUp) -> tuple[str | None, list[str] | None]:
    """Version and packages by the Python that runs it; (None, None) where that has no vLLM, or is not to be seen."""
    python = vllm_python() if is_wrapper(executable) else interpreter_of(Path(executable))
    if python is None:
        return None, None
    text = _output([python, "-c", _LOOK, *PACKAGES_OF_INTEREST], environment, PYTHON_TIMEOUT_S, given_up)
    try:
        version, packages = json.loads(text or "")
    except ValueError:
        return None, None
    return (None, None) if version is None else (version, packages)


def _output(argv: list[str], environment: dict[str, str], timeout_s: float, given_up: GivenUp) -> str | None:
    """What it writes to its standard output; `None` when it fails, takes too long, or is not wanted any more."""
    if given_up():
        return None
    try:
        process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None
    with process:
        answer = None
        try:
            answer = _answer(process, time.monotonic() + timeout_s, given_up)
        finally:
            if answer is None:  # all of it: a script's child would hold the pipe, and so this thread
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    return answer.decode("utf-8", "replace") if answer is not None and process.returncode == 0 else None


def _answer(process: "subprocess.Popen[bytes]", deadline: float, given_up: GivenUp) -> bytes | None:
    """All that it writes until it ends; `None` at the deadline."""
    while True:
        try:
            return process.communicate(timeout=LOOK_S)[0]
        except subprocess.TimeoutExpired:
            if given_up() or time.monotonic() >= deadline:
                return None


def _facts(asked: dict[str, Any]) -> EngineFacts:
    flags, packages = asked["flags"], asked["packages"]
    return EngineFacts(
        version=asked["version"],
        flags=None if flags is None else frozenset(flags),
        fits_context=bool(asked["fits_context"]),
        packages=None if packages is None else frozenset(packages),
    )


def _key(executable: str) -> str:
    """The link in an environment stays the same when the environment is made anew, hence the file's own time; the
    wrapper stays the same whatever vLLM is behind it, hence that one's."""
    program = shutil.which("vllm") if is_wrapper(executable) else None
    real = os.path.realpath(program or executable)
    return f"{executable} {real} {os.stat(real).st_mtime_ns}"


def _remember(executable: str, folder: Path, asked: dict[str, Any]) -> None:
    """Put it beside what is known of other programs; a folder that cannot be written is no error."""
    try:
        stored = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        programs = dict(stored["programs"]) if stored["form"] == FORM else {}
    except (OSError, ValueError, KeyError, TypeError):
        programs = {}
    # An earlier state of the same program is not asked for again.
    programs = {key: value for key, value in programs.items() if not key.startswith(f"{executable} ")}
    programs[_key(executable)] = asked
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump({"form": FORM, "programs": programs}, file)
        os.replace(file.name, folder / FILE_NAME)
    except OSError as error:
        log.info("vLLM's flags are not remembered", extra={"folder": str(folder), "error": str(error)})
