"""`python -m bench`: measure, print the tables, write them under bench/results. See bench/README.md."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from bench import picture, record
from bench.peer import PEERS
from bench.process import StartFailed
from bench.run import ALL_NAMES, Plan, run, say
from bench.subject import ROOT
from bench.tables import markdown


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of everything (default: 5)")
    parser.add_argument(
        "--window", type=float, default=1.5, metavar="S", help="seconds measured per scenario and run (default: 1.5)"
    )
    parser.add_argument("--quick", action="store_true", help="one run with a short window: under five minutes")
    parser.add_argument(
        "--peers", default=",".join(PEERS), help=f"comma list, or empty for none (default: {','.join(PEERS)})"
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
    parser.add_argument(
        "--skip", action="append", default=[], metavar="TEXT", help="no scenario whose name contains TEXT; repeatable"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where the tables go")
    args = parser.parse_args(argv)
    unknown = [name for name in _peers(args) if name not in PEERS]
    if unknown or args.repeats < 1 or args.window <= 0:
        parser.error(f"unknown peer {unknown[0]!r}" if unknown else "--repeats and --window must be above 0")
    if not 1 <= args.workers <= 16:
        parser.error("--workers must be 1 to 16")
    if args.quick:
        args.repeats, args.window = 1, min(args.window, 1.0)
    if not any(map(plan_of(args).chosen, ALL_NAMES)):
        parser.error("no scenario is left by --only and --skip; their names stand in the newest of bench/results/*.md")
    return args


def _peers(args: argparse.Namespace) -> list[str]:
    return [name for name in args.peers.split(",") if name]


def plan_of(args: argparse.Namespace) -> Plan:
    """What the command line asks for."""
    workers = [] if args.no_xim else sorted({1, args.workers})
    return Plan(
        repeats=args.repeats,
        window_s=args.window,
        peers=_peers(args),
        workers=workers,
        chosen=lambda name: args.only in name and not any(text in name for text in args.skip),
    )


async def _until_told(plan: Plan) -> record.Results:
    """`run`, which SIGTERM ends like Ctrl-C does: everything that was started is stopped."""
    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    return await run(plan)


def write(results: record.Results, folder: Path) -> list[Path]:
    """The files of this run, named by date and commit; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {".json": record.as_json(results), ".md": markdown(results)}
    drawn = picture.svg(results)
    if drawn is not None:
        contents[".svg"] = drawn
    paths = []
    for ending, content in contents.items():
        paths.append((folder / record.stem_of(results)).with_suffix(ending))
        paths[-1].write_text(content)
    return paths


def main() -> int:
    """Run the bench; 0 when every answer was the expected one, 1 otherwise or when it could not start."""
    args = arguments()
    try:
        results = uvloop.run(_until_told(plan_of(args)))
    except StartFailed as error:
        say(str(error))
        return 1
    except asyncio.CancelledError:
        say("stopped")
        return 143
    print(markdown(results))  # noqa: T201
    say("written: " + ", ".join(str(path) for path in write(results, args.results)))
    return 1 if results.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
