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


def say(text: str) -> None:
    """One line, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def step(what: str, detail: Callable[[], str] = str) -> Iterator[None]:
    """Show `what` while the block runs, then how long it took, or that it failed.

    `detail` is asked twice a second on a terminal and stands beside the counter; elsewhere (a log, CI) there is one
    line at the start and one at the end.
    """
    started = time.monotonic()
    terminal = sys.stderr.isatty()
    ended = threading.Event()
    ticker = threading.Thread(target=_tick, args=(what, detail, started, ended), daemon=True)
    if terminal:
        ticker.start()
    else:
        say(f"{what} ...")
    outcome = "failed after"
    try:
        yield
        outcome = "done in"
    finally:
        ended.set()
        if terminal:
            ticker.join()
            sys.stderr.write("\r\x1b[2K")
        say(f"{what}: {outcome} {time.monotonic() - started:.1f} s")


def _tick(what: str, detail: Callable[[], str], started: float, ended: threading.Event) -> None:
    while not ended.wait(_TICK_S):
        line = f"{what} ... {time.monotonic() - started:.0f} s  {detail()}"
        # Cut to one row: a wrapped line could not be wiped by the next one.
        sys.stderr.write(f"\r\x1b[2K{line[: get_terminal_size().columns - 1]}")
        sys.stderr.flush()
