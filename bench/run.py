"""One whole run: every subject started, every scenario asked of each of them in turn, as often as told."""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from bench import footprint, record
from bench.footprint import Footprint, Start
from bench.load import idle, measure
from bench.peer import PEERS, NotInstalled, ensure_installed, peer_router
from bench.process import StartFailed, compile_bytecode
from bench.scenario import CHUNK_BYTES, INTERVAL_MS, Kind, Measurement, Scenario, all_scenarios
from bench.subject import ROOT, Subject, engine_alone
from bench.xim import name_of, xim

_IDLE_S = 10.0
"""As long as the longest time between two timers of ours, the renewal of a lease."""
_PAUSE_S = 0.3
IDLE = "CPU while idle"
"""Chosen or not like a scenario."""
_WARM_UP = Scenario(name="warm-up", kind=Kind.REQUESTS, clients=16, chunks=8)
ALL_NAMES = (footprint.NAME, IDLE, *(scenario.name for scenario in all_scenarios()))
"""What may be chosen."""
T = TypeVar("T")
KEPT_LOGS = ROOT / "build" / "bench"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be measured."""

    repeats: int
    window_s: float
    peers: list[str]
    workers: list[int]
    """For each of our own subjects, how many processes its router has."""
    chosen: Callable[[str], bool]
    """Whether the scenario of this name runs."""


def say(text: str) -> None:
    """One line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


async def run(plan: Plan) -> record.Results:
    """Measure everything, interleaved: what disturbs the machine for a while disturbs all of them."""
    scenarios = [scenario for scenario in all_scenarios() if plan.chosen(scenario.name)]
    skipped: dict[str, str] = {}
    footprints: list[Footprint] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        async with engine_alone(folder) as engine:
            routers = await _routers(plan, engine, skipped)
            facts = record.facts(_configuration(plan))
            # First, while nothing else runs: pages that two processes share would count by half.
            if plan.chosen(footprint.NAME):
                footprints = await _footprints(plan, routers, folder)
            if not scenarios and not plan.chosen(IDLE):
                routers = {}
            async with _started(routers, folder, skipped) as started:
                subjects = [engine, *started]
                await _warm_up(subjects)
                idle_shares = await _idle_shares(subjects) if plan.chosen(IDLE) else {}
                measurements = await _measurements(plan, scenarios, subjects)
    return record.Results(
        facts={**facts, "took_s": round(time.monotonic() - begun)},
        versions={found.subject: found.version for found in footprints} | {s.name: s.version for s in subjects},
        subjects=[subject.name for subject in subjects],
        scenarios=scenarios,
        measurements=measurements,
        footprints=footprints,
        idle=idle_shares,
        skipped=skipped,
        slow=[subject.name for subject in subjects if subject.slow],
    )


def _configuration(plan: Plan) -> dict[str, object]:
    return {
        "repeats": plan.repeats,
        "window_s": plan.window_s,
        "chunk_bytes": CHUNK_BYTES,
        "interval_ms": INTERVAL_MS,
    }


async def _routers(plan: Plan, engine: Subject, skipped: dict[str, str]) -> dict[str, Start]:
    """How each router is started; what cannot be installed here is named in `skipped`."""
    await compile_bytecode(sys.executable, Path(sys.prefix) / "lib", ROOT / "packages", ROOT / "tests" / "support")
    routers: dict[str, Start] = {name_of(workers): partial(xim, workers=workers) for workers in plan.workers}
    for name in plan.peers:
        say(f"{name}: the first time it is installed into an environment of its own")
        try:
            version = await ensure_installed(PEERS[name])
        except NotInstalled as error:
            skipped[name] = str(error)
            say(f"skipped {name}: {error}")
        else:
            routers[name] = partial(peer_router, PEERS[name], version, engine)
    return routers


@asynccontextmanager
async def _started(routers: dict[str, Start], folder: Path, skipped: dict[str, str]) -> AsyncIterator[list[Subject]]:
    """All routers, running; what does not start is named in `skipped`."""
    async with AsyncExitStack() as stack:
        started = []
        for name, start in routers.items():
            say(f"starting {name}")
            try:
                started.append(await stack.enter_async_context(start(_own(folder))))
            except StartFailed as error:
                if name not in PEERS:
                    raise
                skipped[name] = str(error)
                say(f"skipped {name}: {error}")
        yield started


def _own(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


async def _warm_up(subjects: list[Subject]) -> None:
    """Caches, connection pools and lazy imports, outside every measured window."""
    for subject in subjects:
        await measure(_WARM_UP, subject, 0.3)


async def _idle_shares(subjects: list[Subject]) -> dict[str, dict[str, float]]:
    """CPU per second of every part, of all subjects in the same seconds; one that has died has none."""
    say(IDLE)
    taken = await asyncio.gather(*(idle(subject, _IDLE_S) for subject in subjects), return_exceptions=True)
    shares = {}
    for subject, found in zip(subjects, taken, strict=True):
        if isinstance(found, BaseException):
            say(f"  {subject.name}: no measurement: {found!r}")
        else:
            shares[subject.name] = found
    return shares


async def _footprints(plan: Plan, routers: dict[str, Start], folder: Path) -> list[Footprint]:
    taken = []
    for repeat in range(plan.repeats):
        say(f"{footprint.NAME}, run {repeat + 1} of {plan.repeats}")
        for name in _in_turn(list(routers), repeat):
            found = await footprint.footprint(name, routers[name], _own(folder), repeat)
            taken.append(found)
            idle_kib = found.per_idle_stream.get("router", float("nan")) / 1024
            note = f", {found.faults[0]}" if found.faults else ""
            say(f"  {name:14} {found.start_s or float('nan'):6.2f} s, {idle_kib:6.1f} KiB per idle stream{note}")
    return taken


async def _measurements(plan: Plan, scenarios: list[Scenario], subjects: list[Subject]) -> list[Measurement]:
    taken = []
    for repeat in range(plan.repeats):
        say(f"run {repeat + 1} of {plan.repeats}")
        for scenario in scenarios:
            asked = [subject for subject in subjects if scenario.slow_too or not subject.slow]
            for subject in _in_turn(asked, repeat):
                measurement = await measure(scenario, subject, plan.window_s, repeat)
                taken.append(measurement)
                _report(measurement, subject)
                await asyncio.sleep(_PAUSE_S)
    return taken


def _in_turn(items: Sequence[T], repeat: int) -> list[T]:
    """Another one begins in each repeat: nobody always has the warmer machine."""
    turn = repeat % len(items) if items else 0
    return [*items[turn:], *items[:turn]]


def _report(measurement: Measurement, subject: Subject) -> None:
    part = "router" if "router" in subject.parts else "engine"
    cost = measurement.cpu_us_per_unit(part)
    note = f", {len(measurement.faults)} faulty answers" if measurement.faults else ""
    say(f"  {measurement.scenario:38} {subject.name:14} {cost or float('nan'):8.1f} us of {part}{note}")
    if measurement.faults:
        _keep_logs(subject)


def _keep_logs(subject: Subject) -> None:
    """Copy what the subject wrote to build/bench, where it outlives the run: a fault has to be explained."""
    KEPT_LOGS.mkdir(parents=True, exist_ok=True)
    for log in subject.logs:
        shutil.copy(log, KEPT_LOGS)
        say(f"  its log is kept: {KEPT_LOGS / log.name}")
