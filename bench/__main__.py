"""`python -m bench`: measure, print the tables, write them under bench/results. See bench/README.md."""

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import uvloop

from bench import record
from bench.load import idle, measure
from bench.peer import PEERS, NotInstalled, ensure_installed, peer_router
from bench.process import StartFailed
from bench.scenario import CHUNK_BYTES, INTERVAL_MS, Kind, Measurement, Scenario, all_scenarios
from bench.subject import ROOT, Subject, engine_alone
from bench.tables import markdown
from bench.xim import xim

_IDLE_S = 2.0
_PAUSE_S = 0.3
_WARM_UP = Scenario(name="warm-up", kind=Kind.REQUESTS, clients=16, chunks=8)
KEPT_LOGS = ROOT / "build" / "bench"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of everything (default: 5)")
    parser.add_argument("--window", type=float, default=2.0, metavar="S", help="seconds measured per scenario and run")
    parser.add_argument("--quick", action="store_true", help="one run with a short window: under three minutes")
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        help=f"comma list, or empty for none (default: {','.join(PEERS)})",
    )
    parser.add_argument("--no-xim", action="store_true", help="measure only the peers and the engine alone")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="measure `serve --workers N` too, on PostgreSQL (default: 1)",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only scenarios whose name contains TEXT")
    parser.add_argument("--skip", default="", metavar="TEXT", help="no scenario whose name contains TEXT")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where the tables go")
    args = parser.parse_args()
    unknown = [name for name in _peers(args) if name not in PEERS]
    if unknown or args.repeats < 1 or args.window <= 0:
        parser.error(f"unknown peer {unknown[0]!r}" if unknown else "--repeats and --window must be above 0")
    if not 1 <= args.workers <= 16:
        parser.error("--workers must be 1 to 16")
    if args.quick:
        args.repeats, args.window = 1, min(args.window, 1.0)
    return args


def chosen(name: str, args: argparse.Namespace) -> bool:
    """Whether the scenario of this name runs."""
    return args.only in name and not (args.skip and args.skip in name)


def _peers(args: argparse.Namespace) -> list[str]:
    return [name for name in args.peers.split(",") if name]


def say(text: str) -> None:
    """One line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


@asynccontextmanager
async def subjects(args: argparse.Namespace, work: Path, skipped: dict[str, str]) -> AsyncIterator[list[Subject]]:
    """Everything that is measured, running; what cannot run here is named in `skipped`."""
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(engine_alone(work))
        started = [engine]
        if not args.no_xim:
            say("starting router and agent")
            started.append(await stack.enter_async_context(xim(work)))
            if args.workers > 1:
                started.append(await stack.enter_async_context(xim(work, args.workers)))
        for name in _peers(args):
            say(f"starting {name} (the first time it is installed into an environment of its own)")
            try:
                version = await ensure_installed(PEERS[name])
                started.append(await stack.enter_async_context(peer_router(PEERS[name], version, engine, work)))
            except (NotInstalled, StartFailed) as error:
                skipped[name] = str(error)
                say(f"skipped {name}: {error}")
        yield started


async def run(args: argparse.Namespace) -> record.Results:
    """All scenarios on all subjects, interleaved: what disturbs the machine for a while disturbs all of them."""
    scenarios = [scenario for scenario in all_scenarios() if chosen(scenario.name, args)]
    skipped: dict[str, str] = {}
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        async with subjects(args, Path(folder), skipped) as started:
            await _warm_up(started)
            idle_shares = {subject.name: await idle(subject, _IDLE_S) for subject in started}
            for repeat in range(args.repeats):
                say(f"run {repeat + 1} of {args.repeats}")
                measurements += await _one_run(scenarios, started, repeat, args.window)
            configuration = {
                "repeats": args.repeats,
                "window_s": args.window,
                "chunk_bytes": CHUNK_BYTES,
                "interval_ms": INTERVAL_MS,
            }
            return record.Results(
                facts=record.facts(started, configuration),
                subjects=[subject.name for subject in started],
                scenarios=scenarios,
                measurements=measurements,
                idle=idle_shares,
                skipped=skipped,
                slow=[subject.name for subject in started if subject.slow],
            )


async def _warm_up(started: list[Subject]) -> None:
    """Caches, connection pools and lazy imports, outside every measured window."""
    for subject in started:
        await measure(_WARM_UP, subject, 0.3)


async def _one_run(
    scenarios: list[Scenario], started: list[Subject], repeat: int, window_s: float
) -> list[Measurement]:
    taken = []
    for scenario in scenarios:
        # Another one begins in each run: nobody always has the warmer machine.
        turn = repeat % len(started)
        for subject in started[turn:] + started[:turn]:
            if subject.slow and not scenario.slow_too:
                continue
            measurement = await measure(scenario, subject, window_s, repeat)
            taken.append(measurement)
            part = "router" if "router" in subject.parts else "engine"
            cost = measurement.cpu_us_per_unit(part)
            note = f", {len(measurement.faults)} faulty answers" if measurement.faults else ""
            if measurement.faults:
                _keep_logs(subject)
            say(f"  {scenario.name:38} {subject.name:14} {cost or float('nan'):8.1f} us of {part}{note}")
            await asyncio.sleep(_PAUSE_S)
    return taken


def _keep_logs(subject: Subject) -> None:
    """Copy what the subject wrote to build/bench, where it outlives the run: a fault has to be explained."""
    KEPT_LOGS.mkdir(parents=True, exist_ok=True)
    for log in subject.logs:
        shutil.copy(log, KEPT_LOGS)
        say(f"  its log is kept: {KEPT_LOGS / log.name}")


async def _until_told(args: argparse.Namespace) -> record.Results:
    """`run`, which SIGTERM ends like Ctrl-C does: everything that was started is stopped."""
    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    return await run(args)


def write(results: record.Results, folder: Path) -> list[Path]:
    """The files of this run, named by date and commit; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / record.stem_of(results)
    contents = {".json": record.as_json(results), ".md": markdown(results)}
    for ending, content in contents.items():
        stem.with_suffix(ending).write_text(content)
    return [stem.with_suffix(ending) for ending in contents]


def main() -> int:
    """Run the bench; 0 when every answer was the expected one, 1 otherwise or when it could not start."""
    args = arguments()
    try:
        results = uvloop.run(_until_told(args))
    except StartFailed as error:
        say(str(error))
        return 1
    except asyncio.CancelledError:
        say("stopped")
        return 143
    print(markdown(results))  # noqa: T201
    say("written: " + ", ".join(str(path) for path in write(results, args.results)))
    return 1 if any(m.faults for m in results.measurements) else 0


if __name__ == "__main__":
    sys.exit(main())
