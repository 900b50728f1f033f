"""How the file descriptors of a router process are shared out: each client and each agent's connection takes one.

Clients get the most. Of the rest strangers at the agents' ports get a quarter, so that agents, the database, the
listener of metrics and what a process needs for itself (some 40) find theirs whoever comes.
"""

import contextlib
import resource
import sys

MOST_UNATTACHED = 512
"""More strangers are of no use, however many descriptors there are."""


def raise_limit() -> None:
    """Take as many as this process may; the soft limit of most systems is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit() -> int:
    """How many this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def for_clients(of: int) -> int:
    """How many connections of clients there may be: seven eighths, or less where there are few."""
    return sys.maxsize if of == resource.RLIM_INFINITY else of - _kept(of)


def for_unattached(of: int) -> int:
    """How many connections at the agents' ports may belong to no agent's link."""
    return MOST_UNATTACHED if of == resource.RLIM_INFINITY else min(_kept(of) // 4, MOST_UNATTACHED)


def _kept(of: int) -> int:
    """For others than clients."""
    return min(of // 2, max(128, of // 8))
