"""The parent of several workers, whose workers here are programs that write down what they are told; its signals."""

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.ports import free_block
from tests.support.programs import MARK, Program, clean_environment, eventually, marked
from xim_router.signals import on_stop_signals

PARENT = """
import signal, sys
from xim_router.settings import RouterSettings
from xim_router.supervisor import supervise
from xim_router.telemetry.logs import configure_logging

worker, port, ignored = sys.argv[1:]
if ignored:
    signal.signal(signal.Signals[ignored], signal.SIG_IGN)
sys.executable = worker
configure_logging("info", "json")
supervise(RouterSettings(workers=2, http_port=int(port)))
"""
WORKER = """#!{python} -IS
import signal, sys

told = open(f"{folder}/worker-{{sys.argv[-1]}}", "a", buffering=1)
signals = {{signal.SIGTERM, signal.SIGINT, signal.SIGHUP}}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
print("ready", file=told)
while True:
    heard = signal.sigwait(signals)
    print(heard.name, file=told)
    if heard.name == "{ends_at}":
        sys.exit(0)
"""


class Workers:
    """A parent and its two workers."""

    def __init__(self, folder: Path, *, ends_at: signal.Signals = signal.SIGTERM, ignored: str = "") -> None:
        self._folder = folder
        self._worker = WORKER.format(python=sys.executable, folder=folder, ends_at=ends_at.name)
        words = (sys.executable, "-c", PARENT, str(folder / "worker"), str(free_block(1)), ignored)
        self.parent = Program("parent", words, clean_environment(**{MARK: str(folder)}), folder / "parent.log")

    def install(self) -> None:
        """Put the workers' program in its place, whole."""
        made = self._folder / "made"
        made.write_text(self._worker)
        made.chmod(0o755)
        made.rename(self._folder / "worker")

    def told(self) -> list[list[str]]:
        """What each worker wrote down."""
        files = [self._folder / f"worker-{number}" for number in range(2)]
        return [each.read_text().split() if each.exists() else [] for each in files]

    async def until(self, *words: str) -> None:
        """Return when this, and no more, is what each wrote."""
        await eventually(lambda: self.told() == [list(words)] * 2 or not self.parent.running, what=f"they say {words}")
        assert self.told() == [list(words)] * 2, self.parent.tail()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Callable[..., Workers]]:
    """Makes a parent, which is started and whose workers are there."""
    made: list[Workers] = []

    def make(**how: object) -> Workers:
        made.append(Workers(tmp_path, **how))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        if each.parent.running:
            each.parent.send(signal.SIGKILL)
        each.parent.reap()
    for process in marked(str(tmp_path)):
        process.kill()


async def test_a_hangup_stops_the_workers_in_order(workers: Callable[..., Workers]) -> None:
    several = workers()
    several.install()
    several.parent.start()
    await several.until("ready")
    several.parent.send(signal.SIGHUP)
    assert await several.parent.ended() == 0, several.parent.tail()
    assert several.told() == [["ready", "SIGTERM"]] * 2
    assert several.parent.lines("stopped")


async def test_a_second_hangup_hurries_nobody_and_a_second_signal_does(workers: Callable[..., Workers]) -> None:
    several = workers(ends_at=signal.SIGINT)
    several.install()
    several.parent.start()
    await several.until("ready")
    several.parent.send(signal.SIGTERM)
    await several.until("ready", "SIGTERM")
    several.parent.send(signal.SIGHUP)
    several.parent.send(signal.SIGTERM)
    assert await several.parent.ended() == 0, several.parent.tail()
    assert several.told() == [["ready", "SIGTERM", "SIGINT"]] * 2
    assert [line["signal"] for line in several.parent.lines("stopping workers")] == ["SIGTERM", "SIGTERM"]


async def test_a_hangup_that_is_ignored_at_the_start_stays_so(workers: Callable[..., Workers]) -> None:
    several = workers(ignored="SIGHUP")
    several.install()
    several.parent.start()
    await several.until("ready")
    several.parent.send(signal.SIGHUP)
    several.parent.send(signal.SIGTERM)
    assert await several.parent.ended() == 0, several.parent.tail()
    assert [line["signal"] for line in several.parent.lines("stopping workers")] == ["SIGTERM"]


async def test_a_worker_that_cannot_be_started_is_tried_again_until_it_can(workers: Callable[..., Workers]) -> None:
    several = workers()
    several.parent.start()

    def refused(worker: int) -> list[float]:
        return [line["restart_s"] for line in several.parent.lines("worker cannot be started", worker=worker)]

    await eventually(
        lambda: min(len(refused(0)), len(refused(1))) >= 3 or not several.parent.running, what="three tries of each"
    )
    assert several.parent.running, several.parent.tail()
    assert refused(0)[:3] == refused(1)[:3] == [0.2, 0.4, 0.8]
    several.install()
    await several.until("ready")
    assert await several.parent.terminate() == 0, several.parent.tail()


@pytest.mark.parametrize(
    ("worker", "sent", "heard"),
    [
        (False, "TERM HUP TERM INT", "TERM TERM INT"),
        (False, "HUP HUP TERM HUP INT", "HUP TERM INT"),
        (True, "TERM TERM HUP INT", "TERM INT"),
        (True, "INT TERM INT", "INT INT"),
    ],
)
async def test_which_signals_begin_a_stop_and_which_hurry_it(worker: bool, sent: str, heard: str) -> None:
    loop = asyncio.get_running_loop()
    taken: list[signal.Signals] = []
    on_stop_signals(loop, taken.append, worker=worker)
    try:
        for name in sent.split():
            signal.raise_signal(signal.Signals[f"SIG{name}"])
        wanted = [signal.Signals[f"SIG{name}"] for name in heard.split()]
        await eventually(lambda: len(taken) >= len(wanted))
        assert taken == wanted
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(signum)
