"""A program that behaves towards others as `vllm serve` does, and generates nothing.

For tests: it is launched in vLLM's place (`tests/support/bin/fake-vllm`), speaks the same HTTP over a Unix socket
or TCP, and fails on request. For benchmarks: it is cheap enough to be the source of the load. Flags of vLLM that
do not matter here are accepted and ignored. What a request may ask for: fake_vllm_script.py.

The variable FAKE_VLLM_ARGS holds flags that come before those of the command line.
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvloop

from tests.support.fake_vllm_compute import Identity
from tests.support.fake_vllm_engine import Engine
from tests.support.fake_vllm_http import Connection
from tests.support.fake_vllm_routes import VERSION, Api
from tests.support.fake_vllm_script import Script

# Ten minutes: a child that a failing test leaves behind ends by itself.
_STUBBORN_CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
_TIMER_SLACK_NS = 1_000
_PR_SET_TIMERSLACK = 29


def parser() -> argparse.ArgumentParser:
    """The command line: the few flags of vLLM that matter here, and our own, which all begin with `--fake-`."""
    top = argparse.ArgumentParser(prog="fake_vllm", description="Behaves as vLLM's server does; generates nothing.")
    top.add_argument("--version", "-v", action="version", version=VERSION)
    serve = top.add_subparsers(dest="command", required=True).add_parser("serve", allow_abbrev=False)
    serve.add_argument("model_dir", nargs="?", default="model", help="only named in /v1/models")
    serve.add_argument("--served-model-name", nargs="+", help="names clients may ask for (default: the directory)")
    serve.add_argument("--uds", help="path of a Unix socket; must not exist, as with vLLM")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--api-key", help="bearer key that /v1 routes then need")
    serve.add_argument("--max-num-seqs", type=int, default=256, help="requests that run at once; the rest wait")
    serve.add_argument("--max-model-len", default="4096", help="only reported")
    pace = serve.add_argument_group("what a request gets that does not say (fake_vllm_script.py)")
    pace.add_argument("--fake-chunks", type=int, default=Script().chunks)
    pace.add_argument("--fake-chunk-bytes", type=int, default=Script().chunk_bytes)
    pace.add_argument("--fake-interval-ms", type=float, default=Script().interval_ms)
    pace.add_argument("--fake-spread-ms", type=float, default=Script().spread_ms)
    pace.add_argument("--fake-start-delay-ms", type=float, default=Script().first_ms, help="time to the first chunk")
    start = serve.add_argument_group("how the process starts and stops")
    start.add_argument("--fake-start-seconds", type=float, default=0.0, help="time to readiness, with a line a second")
    start.add_argument("--fake-start-silent", action="store_true", help="print nothing while starting")
    start.add_argument("--fake-start-fail", type=int, metavar="CODE", help="exit with CODE in place of serving")
    start.add_argument("--fake-ignore-sigterm", action="store_true", help="only SIGKILL ends it")
    start.add_argument("--fake-spawn-child", action="store_true", help="a second process, which ignores SIGTERM")
    return top


def flags_of_vllm() -> list[str]:
    """Every flag of the real `vllm serve`, as its help names them."""
    stored = Path(__file__).parents[1] / "agent" / "planning" / "vllm-0.32.0.json"
    flags: list[str] = json.loads(stored.read_text(encoding="utf-8"))["flags"]
    return flags


def log(message: str) -> None:
    """One line in the form of vLLM's log."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    line = f"(APIServer pid={os.getpid()}) INFO {stamp} [fake_vllm] {message}"
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def uvicorn_log(message: str) -> None:
    """One line in the form of the web server's log."""
    print(f"(APIServer pid={os.getpid()}) INFO:     {message}", file=sys.stderr, flush=True)  # noqa: T201


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    given = [*shlex.split(os.environ.get("FAKE_VLLM_ARGS", "")), *(sys.argv[1:] if argv is None else argv)]
    if "--help=all" in given:
        print("\n".join(f"  {flag} X" for flag in flags_of_vllm()))  # noqa: T201
        return 0
    # Flags of the variable belong to `serve`, which has to come first.
    words = [word for word in given if word == "serve"][:1] + [word for word in given if word != "serve"]
    args, _ignored = parser().parse_known_args(words)
    if args.fake_ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.fake_spawn_child:
        subprocess.Popen([sys.executable, "-c", _STUBBORN_CHILD])
    try:
        listener = listen(args)
    except OSError as error:
        print(f"OSError: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    start_up(args)
    if args.fake_start_fail is not None:
        print("RuntimeError: Engine core initialization failed.", file=sys.stderr, flush=True)  # noqa: T201
        return int(args.fake_start_fail)
    _make_short_sleeps_exact()
    uvloop.run(serve(args, listener))
    return 0


def listen(args: argparse.Namespace) -> socket.socket:
    """The bound socket; like vLLM's it exists long before anything answers on it."""
    if args.uds:
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(args.uds)
        return unix
    tcp = socket.socket(socket.AF_INET)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tcp.bind((args.host, args.port))
    return tcp


def start_up(args: argparse.Namespace) -> None:
    """Take `--fake-start-seconds` to start, saying so unless told to be silent."""
    say = (lambda _message: None) if args.fake_start_silent else log
    say(f"vLLM API server version {VERSION}")
    say(f"non-default args: {{'model': '{args.model_dir}'}}")
    ready_at = time.monotonic() + args.fake_start_seconds
    while (left_s := ready_at - time.monotonic()) > 0:
        say(f"Loading weights, {left_s:.0f} s left")
        time.sleep(min(1.0, left_s))


async def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then end: open streams are cut, as with vLLM's default."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, stopped.set)
    if not args.fake_ignore_sigterm:
        loop.add_signal_handler(signal.SIGTERM, stopped.set)
    engine = Engine(max(1, args.max_num_seqs))
    api = Api(engine, identity_of(args), defaults_of(args))

    def connection() -> Connection:
        return Connection(api.handle, engine.leave)

    if args.uds:
        server = await loop.create_unix_server(connection, sock=listener, backlog=2048)
    else:
        server = await loop.create_server(connection, sock=listener, backlog=2048)
    # vLLM prints the last line a moment before it listens; here whoever saw it can connect.
    if not args.fake_start_silent:
        uvicorn_log(f"Started server process [{os.getpid()}]")
        uvicorn_log("Waiting for application startup.")
        uvicorn_log("Application startup complete.")
    await stopped.wait()
    server.close()
    uvicorn_log("Shutting down")


def identity_of(args: argparse.Namespace) -> Identity:
    """What the command line says that the engine is."""
    length = str(args.max_model_len)
    return Identity(
        served_names=tuple(args.served_model_name or [args.model_dir]),
        model_path=args.model_dir,
        max_model_len=int(length) if length.isdigit() else Script().chunks,
        api_key=args.api_key,
    )


def defaults_of(args: argparse.Namespace) -> Script:
    """The script of a request that brings none."""
    return replace(
        Script(),
        chunks=args.fake_chunks,
        chunk_bytes=args.fake_chunk_bytes,
        interval_ms=args.fake_interval_ms,
        spread_ms=args.fake_spread_ms,
        first_ms=args.fake_start_delay_ms,
    )


def _make_short_sleeps_exact() -> None:
    """Linux lets a sleep end up to 50 us late, which is the whole distance between two of 128 spread writes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
