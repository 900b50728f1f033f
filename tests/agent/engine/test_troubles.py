"""Every way in which an engine fails, each with a real child process: the state, what is told, and no orphan."""

import asyncio
import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.agent.engine.engines import ENVIRONMENT, States, fake_vllm, policy, python
from tests.support.programs import PATIENCE_S, alive
from xim_agent.engine.child import GUARD_GRACE_S
from xim_agent.engine.client import EngineClient
from xim_agent.engine.process import Engine, EngineFailed, EnginePolicy, EngineState
from xim_agent.planning.command import EngineCommand

S = EngineState
CGROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
FULL = Path("/dev/full")
LIMIT_BYTES = 64 * 1024 * 1024


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "engine.sock"


@pytest.fixture(autouse=True)
def no_orphan(socket_path: Path) -> Iterator[None]:
    """Nothing that names this test's socket, the guard with its engine included, runs after the test."""
    before = set(psutil.pids())
    yield
    left = [process for process in psutil.process_iter() if process.pid not in before]
    left = [process for process in left if is_an_engines(process, str(socket_path))]
    # The guard leaves a moment after what it guarded.
    _, staying = psutil.wait_procs(left, timeout=PATIENCE_S)
    assert staying == []


def is_an_engines(process: psutil.Process, socket_path: str) -> bool:
    """It names the socket, or is a guard or a one-liner whose parent is this process or nobody; and has not ended."""
    with contextlib.suppress(psutil.Error):
        words = " ".join(process.cmdline())
        is_one_liner = words.startswith(sys.executable) and " -c " in words
        started_here = process.ppid() in {os.getpid(), 1} and (is_one_liner or f"guard.py {GUARD_GRACE_S}" in words)
        return bool(alive([process])) and (socket_path in words or started_here)
    return False


async def given_up(command: EngineCommand, limits: EnginePolicy | None = None) -> tuple[EngineFailed, States]:
    """Run until the engine is given up."""
    states = States()
    async with EngineClient(command.socket_path) as client:
        engine = Engine(command, client, limits or policy(), states)
        with pytest.raises(EngineFailed) as failed:
            async with asyncio.timeout(PATIENCE_S):
                await engine.run()
    assert engine.state is S.FAILED
    assert states.seen[-1] is S.FAILED
    return failed.value, states


def dies(socket_path: Path, line: str, status: int = 1, *, after: int = 100) -> EngineCommand:
    """Writes `line` as a traceback's, then `after` more, and ends."""
    code = f"import sys; print({line!r}, file=sys.stderr); print('  more\\n' * {after}, end=''); sys.exit({status})"
    return python(socket_path, code)


FINAL = {
    "wrong path": (
        "Value error, Invalid repository ID or local directory specified: '/nowhere'",
        "XEROTIER_AGENT_INITIAL_MODEL_PATH",
    ),
    "corrupt weights": (
        "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata",
        "checksums",
    ),
    "no GPU": ("RuntimeError: Failed to infer device type, please set", "nvidia-smi"),
    "unwritable cache": ("PermissionError: [Errno 13] Permission denied: '/cache/vllm'", "chown"),
}


@pytest.mark.parametrize("name", FINAL)
async def test_what_another_start_would_repeat_is_given_up_at_once(socket_path: Path, name: str) -> None:
    line, remedy = FINAL[name]
    failed, states = await given_up(dies(socket_path, line))
    assert states.seen == [S.STARTING, S.FAILED]
    assert remedy in failed.remedy
    assert line in failed.tail


async def test_gpu_memory_is_tried_again_and_then_told_with_the_levers(socket_path: Path) -> None:
    line = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    failed, states = await given_up(dies(socket_path, line))
    assert states.seen.count(S.STARTING) == 3
    assert "3 times in a row" in failed.reason
    assert "the GPU ran out of memory" in failed.reason
    assert "XEROTIER_AGENT_GPU_MEMORY_UTILIZATION to 0.85" in failed.remedy
    assert any("the GPU ran out of memory" in reason for reason in states.reasons)


async def test_a_cause_beyond_the_kept_lines_is_not_claimed(socket_path: Path) -> None:
    failed, _ = await given_up(dies(socket_path, "RuntimeError: No CUDA GPUs are available", after=250))
    assert "GPU" not in failed.reason
    assert len(failed.tail) == 200


async def test_a_kill_from_outside_names_memory_as_the_likely_cause(socket_path: Path) -> None:
    suicide = python(socket_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    failed, states = await given_up(suicide)
    assert states.seen.count(S.STARTING) == 3
    assert "SIGKILL" in failed.reason
    assert "KV_OFFLOAD_SIZE_GB" in failed.remedy


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A control group that holds 64 MiB; needs root and a writable hierarchy."""
    for root in CGROUPS:
        group = root / f"xim-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            for name in ("memory.limit_in_bytes", "memory.max"):
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    (group / name).write_text(str(LIMIT_BYTES))
                    yield group
                    group.rmdir()
                    return
            group.rmdir()
    pytest.skip("no control group can be made here: it takes root and a writable /sys/fs/cgroup")


async def test_the_kernels_kill_for_lack_of_memory_is_recognised(socket_path: Path, small_cgroup: Path) -> None:
    code = (
        "import os; from pathlib import Path\n"
        f"Path({str(small_cgroup / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
        "kept = [bytearray(os.urandom(1 << 20)) for _ in range(512)]"
    )
    failed, states = await given_up(python(socket_path, code))
    assert states.seen.count(S.STARTING) == 3
    assert "memory" in failed.reason
    assert "VLLM_CPU_KVCACHE_SPACE" in failed.remedy


async def test_a_hang_without_output_is_stuck_and_told(socket_path: Path) -> None:
    failed, states = await given_up(
        python(socket_path, "import signal; signal.pause()"), policy(inactivity_grace_s=0.2)
    )
    assert states.seen.count(S.STARTING) == 3
    assert "no output for 0.2 s" in failed.reason
    assert "SIGKILL" not in failed.reason  # that was our own


async def test_a_slow_start_that_talks_becomes_ready(socket_path: Path) -> None:
    states = States()
    talking = fake_vllm(socket_path, "--fake-start-seconds", "4.5")
    async with EngineClient(socket_path) as client:
        engine = Engine(talking, client, policy(inactivity_grace_s=4.0), states)
        task = asyncio.create_task(engine.run())
        await states.reach(S.READY)
        await engine.stop(10.0)
        await task
    assert states.seen == [S.STARTING, S.READY, S.STOPPING, S.STOPPED]


async def test_a_slow_start_that_is_silent_for_too_long_does_not(socket_path: Path) -> None:
    silent = fake_vllm(socket_path, "--fake-start-seconds", "30", "--fake-start-silent")
    failed, _ = await given_up(silent, policy(inactivity_grace_s=0.5))
    assert "no output" in failed.reason


async def test_a_crash_after_ready_is_started_again(socket_path: Path) -> None:
    states = States()
    async with EngineClient(socket_path) as client:
        engine = Engine(fake_vllm(socket_path), client, policy(), states)
        task = asyncio.create_task(engine.run())
        await states.reach(S.READY)
        assert engine.process_group is not None
        psutil.Process(engine.process_group).children()[0].terminate()  # it leaves with status 0, as vLLM does
        await states.reach(S.READY, times=2)
        await engine.stop(10.0)
        await task
    assert states.seen[:5] == [S.STARTING, S.READY, S.RESTARTING, S.STARTING, S.READY]
    assert "status 0" in states.reasons[2]


async def test_a_crash_loop_after_ready_is_given_up(socket_path: Path, tmp_path: Path) -> None:
    """Ready for a moment each time: without `settled_s` of service the ends count as in a row."""
    limits = policy()
    states = States()
    async with EngineClient(socket_path) as client:
        engine = Engine(fake_vllm(socket_path), client, limits, states)
        task = asyncio.create_task(engine.run())
        for time in range(1, limits.restart.attempts + 1):
            await states.reach(S.READY, times=time)
            assert engine.process_group is not None
            psutil.Process(engine.process_group).children()[0].terminate()
        with pytest.raises(EngineFailed, match=f"{limits.restart.attempts} times in a row"):
            await task
    assert states.seen[-1] is S.FAILED


async def test_a_stop_while_it_loads_ends_it_within_seconds(socket_path: Path) -> None:
    loading = fake_vllm(socket_path, "--fake-start-seconds", "600", "--fake-ignore-sigterm", "--fake-spawn-child")
    states = States()
    async with EngineClient(socket_path) as client:
        engine = Engine(loading, client, policy(), states)
        task = asyncio.create_task(engine.run())
        async with asyncio.timeout(PATIENCE_S):
            while not engine.progress:
                await asyncio.wait({task}, timeout=0.02)
        async with asyncio.timeout(PATIENCE_S):
            await engine.stop(3600.0)
            await task
    assert states.seen == [S.STARTING, S.STOPPING, S.STOPPED]


@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
async def test_a_full_disk_is_told(socket_path: Path) -> None:
    writes = python(socket_path, f"open({str(FULL)!r}, 'w').write('x' * 100000)")
    failed, states = await given_up(writes)
    assert states.seen.count(S.STARTING) == 3  # a disk may be cleared meanwhile
    assert "a disk is full" in failed.reason
    assert os.strerror(errno.ENOSPC) in "\n".join(failed.tail)


async def test_a_cache_directory_that_may_not_be_written_is_told(socket_path: Path, tmp_path: Path) -> None:
    """As a user who is not root, for whom permissions count."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    code = f"open({str(cache / 'x')!r}, 'w')"
    setpriv = shutil.which("setpriv")
    if os.getuid() == 0 and setpriv is None:
        pytest.skip("root may write everywhere, and there is no setpriv to be somebody else")
    become = (setpriv, "--reuid=65534", "--clear-groups", "--") if os.getuid() == 0 and setpriv else ()
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o001)
    command = EngineCommand(
        argv=(*become, "/usr/bin/env", "python3", "-c", code) if become else (sys.executable, "-c", code),
        environment=ENVIRONMENT,
        socket_path=socket_path,
        served_name="m",
    )
    failed, states = await given_up(command)
    assert states.seen == [S.STARTING, S.FAILED]
    assert str(cache) in failed.reason
    assert f"sudo chown -R {os.getuid()}:{os.getgid()}" in failed.remedy
