"""What a person sees while something takes long: a line per step with its seconds, on a terminal a live counter.

Everything goes to standard error, so that standard output stays free for results.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from shutil import get_terminal_size

_TICK_S = 0.5
_LINE_S = 15.0  # where lines stay, as in a log


def say(text: str) -> None:
    """One line, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def step(what: str, detail: Callable[[], str] = str) -> Iterator[None]:
    """Show `what` while the block runs, then how long it took, or that it failed or was interrupted.

    `detail` is asked twice a second on a terminal and stands beside the counter; elsewhere (a log, CI) there is a line
    at the start, one every 15 seconds and one at the end.
    """
    started = time.monotonic()
    terminal = sys.stderr.isatty()
    ended = threading.Event()
    ticker = threading.Thread(target=_tick, args=(what, detail, started, ended, terminal), daemon=True)
    if not terminal:
        say(f"{what} ...")
    ticker.start()
    outcome = "failed after"
    try:
        yield
        outcome = "done in"
    except KeyboardInterrupt:
        outcome = "interrupted after"
        raise
    finally:
        ended.set()
        ticker.join()
        if terminal:
            sys.stderr.write("\r\x1b[2K")
        say(f"{what}: {outcome} {time.monotonic() - started:.1f} s")


def _tick(what: str, detail: Callable[[], str], started: float, ended: threading.Event, terminal: bool) -> None:
    while not ended.wait(_TICK_S if terminal else _LINE_S):
        line = f"{what} ... {time.monotonic() - started:.0f} s  {detail()}".rstrip()
        if not terminal:
            say(line[:400])
            continue
        # Cut to one row: a wrapped line could not be wiped by the next one.
        sys.stderr.write(f"\r\x1b[2K{line[: get_terminal_size().columns - 1]}")
        sys.stderr.flush()
