"""The signals that stop a router in order, and those of them that hurry a stop which has begun.

A second SIGTERM or SIGINT is somebody who does not want to wait. A second SIGHUP is not: a terminal that is closed may
send several, and a service manager one right behind its SIGTERM. To a worker a second SIGTERM is not either: a service
manager sends it one beside the one that its parent passes on, or beside its end. Its parent hurries it by SIGINT.
"""

import asyncio
import signal
from collections.abc import Callable

HURRY = signal.SIGINT
"""What a parent sends to a worker that is to stop at once."""


def on_stop_signals(
    loop: asyncio.AbstractEventLoop, stop: Callable[[signal.Signals], None], *, worker: bool = False
) -> None:
    """Call `stop` with each signal that asks for the end, and again with each that hurries it."""
    begins = {signal.SIGHUP, signal.SIGTERM} if worker else {signal.SIGHUP}
    asked = False

    def ask(signum: signal.Signals) -> None:
        nonlocal asked
        if not (asked and signum in begins):
            asked = True
            stop(signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # One that is ignored from the start (`nohup`) stays so.
        if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            loop.add_signal_handler(signum, ask, signum)
