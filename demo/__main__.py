"""`python -m demo`, which is `make demo`."""

import signal
import sys


def start() -> int:
    """Load the demo and run it; until it watches for Ctrl-C itself, that ends the program without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from demo.demo import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
