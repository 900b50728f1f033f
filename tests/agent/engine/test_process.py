"""The engine's owner, with real processes."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from tests.agent.engine.engines import States, fake_vllm, policy, python
from tests.support.programs import PATIENCE_S, alive, eventually
from xim_agent.engine import guard, process
from xim_agent.engine.client import EngineClient
from xim_agent.engine.process import Engine, EngineFailed, EnginePolicy, EngineState, remove_socket
from xim_agent.engine.startup import StartupWatch
from xim_agent.planning.command import EngineCommand

S = EngineState


@asynccontextmanager
async def running(
    command: EngineCommand, limits: EnginePolicy | None = None
) -> AsyncIterator[tuple[Engine, States, "asyncio.Task[None]"]]:
    """An engine whose `run` is a task; cancelled at the end if it still runs."""
    states = States()
    async with EngineClient(command.socket_path) as client:
        engine = Engine(command, client, limits or policy(), states)
        task = asyncio.create_task(engine.run())
        try:
            yield engine, states, task
        finally:
            task.cancel()
            await asyncio.wait({task})


def family(engine: Engine) -> list[psutil.Process]:
    assert engine.process_group is not None
    return [psutil.Process(pid) for pid in guard.members_of(engine.process_group, guard.processes())]


def main_process(engine: Engine) -> psutil.Process:
    """vLLM itself: the guard's one child."""
    assert engine.process_group is not None
    return psutil.Process(engine.process_group).children()[0]


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "engine.sock"


@pytest.fixture
def left_behind(socket_path: Path) -> Path:
    """A path where an earlier engine left its socket."""
    socket_path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as earlier:
        earlier.bind(str(socket_path))
    return socket_path


async def test_it_is_ready_when_health_answers_and_stops_when_asked(socket_path: Path) -> None:
    async with running(fake_vllm(socket_path)) as (engine, states, task):
        await states.reach(S.READY)
        processes = family(engine)
        await engine.stop(10.0)
        await task
    assert states.seen == [S.STARTING, S.READY, S.STOPPING, S.STOPPED]
    assert processes
    assert not alive(processes)


async def test_a_socket_file_left_behind_is_removed_and_is_no_readiness(left_behind: Path) -> None:
    async with running(fake_vllm(left_behind)) as (_, states, _):
        await states.reach(S.READY)
    assert states.seen[:2] == [S.STARTING, S.READY]


async def test_a_killed_engine_is_started_again(socket_path: Path) -> None:
    async with running(fake_vllm(socket_path)) as (engine, states, _):
        await states.reach(S.READY)
        main_process(engine).kill()
        await states.reach(S.READY, times=2)
        assert engine.restarts == 1
    assert states.seen == [S.STARTING, S.READY, S.RESTARTING, S.STARTING, S.READY]
    assert "status 137" in states.reasons[2]


async def test_a_crash_loop_is_given_up_with_the_last_lines(
    socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(fake_vllm(socket_path, "--fake-start-fail", "1")) as (engine, states, task):
        with pytest.raises(EngineFailed) as failed:
            await task
        assert engine.state is S.FAILED
    assert states.seen.count(S.STARTING) == 3
    assert any("initialization failed" in line for line in failed.value.tail)
    ended = [record for record in caplog.records if record.message == "engine ended"]
    assert len(ended) == 3
    assert ended[0].levelno == logging.ERROR
    assert "initialization failed" in vars(ended[0])["output_tail"]


async def test_an_unknown_option_is_not_tried_again(socket_path: Path) -> None:
    async with running(fake_vllm(socket_path, "--fake-start-fail", "2")) as (_, states, task):
        with pytest.raises(EngineFailed, match="options"):
            await task
    assert states.seen == [S.STARTING, S.FAILED]


async def test_a_program_that_does_not_exist_is_named(socket_path: Path) -> None:
    command = EngineCommand(argv=("/nowhere/vllm",), environment={}, socket_path=socket_path, served_name="m")
    async with running(command) as (_, _, task):
        with pytest.raises(EngineFailed, match="does not exist") as failed:
            await task
    assert "/nowhere/vllm: no such program" in failed.value.tail


async def test_a_process_that_cannot_be_made_is_tried_again_and_given_up_with_a_remedy(socket_path: Path) -> None:
    """Here an argument is too long for the system; without memory or descriptors it is the same error."""
    async with running(fake_vllm(socket_path, "x" * 4_000_000)) as (engine, states, task):
        with pytest.raises(EngineFailed, match=r"no process could be made for vLLM: Argument list too long.*ulimit"):
            await task
    assert states.seen.count(S.STARTING) == 3
    assert engine.state is S.FAILED


async def test_a_start_without_output_is_stuck(socket_path: Path) -> None:
    silent = python(socket_path, "import signal; signal.pause()")
    async with running(silent, policy(inactivity_grace_s=0.2)) as (_, states, task):
        with pytest.raises(EngineFailed):
            await task
    assert any("no output for 0.2 s" in reason for reason in states.reasons)


async def test_a_line_without_an_end_is_a_sign_of_life(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = asyncio.Event()

    class Watch(StartupWatch):
        def heard(self, now: float) -> None:
            super().heard(now)
            heard.set()

    monkeypatch.setattr(process, "StartupWatch", Watch)
    code = "import os, signal; os.write(1, b'.'); signal.pause()"
    async with running(python(socket_path, code)), asyncio.timeout(PATIENCE_S):
        await heard.wait()


async def test_a_start_over_the_ceiling_has_failed_whatever_it_writes(socket_path: Path) -> None:
    chatty = python(socket_path, "while True: print('loading', flush=True)")
    async with running(chatty, policy(startup_timeout_s=0.5)) as (_, states, task):
        with pytest.raises(EngineFailed):
            await task
    assert any("not ready within 0.5 s" in reason for reason in states.reasons)


async def test_an_engine_that_hangs_is_degraded_and_recovers(socket_path: Path) -> None:
    limits = policy(health_failures=2, health_timeout_s=0.5)
    async with running(fake_vllm(socket_path), limits) as (engine, states, _):
        await states.reach(S.READY)
        hanging = main_process(engine)
        hanging.suspend()
        await states.reach(S.DEGRADED)
        hanging.resume()
        await states.reach(S.READY, times=2)
    assert states.seen == [S.STARTING, S.READY, S.DEGRADED, S.READY]


async def test_degraded_for_too_long_is_failed_and_started_again(socket_path: Path) -> None:
    limits = policy(health_failures=1, health_timeout_s=1.0, degraded_to_failed_s=0.2)
    async with running(fake_vllm(socket_path), limits) as (engine, states, _):
        await states.reach(S.READY)
        main_process(engine).suspend()
        await states.reach(S.READY, times=2)
    assert states.seen == [S.STARTING, S.READY, S.DEGRADED, S.FAILED, S.RESTARTING, S.STARTING, S.READY]


async def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace_with_its_child(socket_path: Path) -> None:
    stubborn = fake_vllm(socket_path, "--fake-ignore-sigterm", "--fake-spawn-child")
    async with running(stubborn) as (engine, states, task):
        await states.reach(S.READY)
        processes = family(engine)
        assert len(processes) >= 2
        await engine.stop(0.2)
        await task
    assert not alive(processes)


async def test_a_start_is_not_given_the_whole_grace(socket_path: Path) -> None:
    code = "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"
    async with running(python(socket_path, code)) as (engine, states, task):
        await states.reach(S.STARTING)
        async with asyncio.timeout(PATIENCE_S):
            await engine.stop(3600.0)
        await task
    assert states.seen == [S.STARTING, S.STOPPING, S.STOPPED]


async def test_a_second_stop_shortens_the_first(socket_path: Path) -> None:
    async with running(fake_vllm(socket_path, "--fake-ignore-sigterm")) as (engine, states, task):
        await states.reach(S.READY)
        patient = asyncio.create_task(engine.stop(3600.0))
        await states.reach(S.STOPPING)
        await engine.stop(0.0)
        await asyncio.gather(patient, task)
    assert states.seen[-1] is S.STOPPED


async def test_stopping_while_the_next_start_waits(socket_path: Path) -> None:
    limits = policy()
    slow = EnginePolicy(restart=type(limits.restart)(base_s=3600.0, cap_s=3600.0))
    async with running(fake_vllm(socket_path, "--fake-start-fail", "1"), slow) as (engine, states, task):
        await states.reach(S.RESTARTING)
        await engine.stop(10.0)
        await task
    assert states.seen == [S.STARTING, S.RESTARTING, S.STOPPING, S.STOPPED]


async def test_a_stop_before_the_run_lets_nothing_start(socket_path: Path) -> None:
    states = States()
    async with EngineClient(socket_path) as client:
        engine = Engine(fake_vllm(socket_path), client, policy(), states)
        await engine.stop(1.0)
        await engine.run()
    assert S.STARTING not in states.seen


async def test_cancelling_kills_the_engine(socket_path: Path) -> None:
    async with running(fake_vllm(socket_path, "--fake-ignore-sigterm")) as (engine, states, task):
        await states.reach(S.READY)
        processes = family(engine)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
    assert not alive(processes)


async def test_a_killed_guard_takes_the_engine_along(socket_path: Path) -> None:
    async with running(fake_vllm(socket_path, "--fake-spawn-child")) as (engine, states, _):
        await states.reach(S.READY)
        processes = family(engine)
        assert engine.process_group is not None
        os.kill(engine.process_group, signal.SIGKILL)
        await states.reach(S.READY, times=2)
        await eventually(lambda: not alive(processes), what="the first engine's processes end")


async def test_lines_of_any_length_and_encoding_are_read(socket_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    code = "import os; os.write(1, b'\\xff' * 5000 + b'\\r10%\\r100%\\n\\n' + b'y' * 200000); raise SystemExit(2)"
    async with running(python(socket_path, code)) as (_, _, task):
        with pytest.raises(EngineFailed) as failed:
            await task
    assert {"10%", "100%"} <= set(failed.value.tail)
    assert max(len(line) for line in failed.value.tail) <= 2000


def test_a_socket_directory_that_cannot_be_made_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineFailed, match="XEROTIER_AGENT_VLLM_SOCKET_PATH"):
        remove_socket(tmp_path / "file" / "engine.sock")


def test_a_socket_directory_that_others_can_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(EngineFailed, match="other users"):
        remove_socket(tmp_path / "open" / "engine.sock")


def test_a_socket_directory_that_another_user_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner could put a socket of his own there and read every prompt, sticky bit or not."""
    directory = tmp_path / "made-before-us"
    directory.mkdir()
    directory.chmod(0o1777)
    me = os.getuid()
    if me == 0:
        os.chown(directory, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(EngineFailed, match=f"other users: its owner is uid {directory.stat().st_uid}, its mode 1777"):
        remove_socket(directory / "engine.sock")


def test_a_socket_directory_may_be_a_link_of_our_own(left_behind: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(left_behind.parent)
    remove_socket(link / "engine.sock")
    assert not left_behind.exists()


def test_a_file_in_the_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("precious")
    with pytest.raises(EngineFailed, match=r"config\.json is there and is no socket.*XEROTIER_AGENT_VLLM_SOCKET_PATH"):
        remove_socket(file)
    assert file.read_text() == "precious"
