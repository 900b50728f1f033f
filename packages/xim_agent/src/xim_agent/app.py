"""The agent as a program: what it needs is looked up, the node enrolled and run, errors told with their remedy."""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from xim_agent.joining import node_facts
from xim_agent.link.credentials import CredentialStore
from xim_agent.link.enrollment import Enroller
from xim_agent.link.sockets import Transport
from xim_agent.node import Node
from xim_agent.settings import AgentSettings
from xim_agent.socket_buffers import raise_socket_buffers
from xim_agent.surroundings import look_around
from xim_protocol.join_key import JoinKey

log = logging.getLogger(__name__)

T = TypeVar("T")

FAILED = 1
"""Exit status of an end that another start may mend: a network, a disk, an engine."""
FAILED_FOR_GOOD = 3
"""Exit status of an end that only an operator mends; a service manager should leave it alone."""


def run(settings: AgentSettings, join_key: JoinKey | None) -> int:
    """Run the agent until a signal; the exit status: 0 after an orderly end, `FAILED` or `FAILED_FOR_GOOD` after an
    error, told with its remedy."""
    raise_file_limit()
    raise_socket_buffers()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serve(settings, join_key))
        except asyncio.CancelledError:
            log.warning("forced to stop")
            return FAILED
        except BaseExceptionGroup as group:
            return _told_of(group)
        except Exception as error:
            return _told_of(BaseExceptionGroup("the agent", [error]))
    return 0


async def serve(settings: AgentSettings, join_key: JoinKey | None) -> None:
    """Everything between the start and the end. Raises what an operator has to be told, with a `remedy`."""
    stop = StopRequest()
    surroundings = await stop.unless_asked(asyncio.to_thread(look_around, settings, stop.asked.is_set))
    if surroundings is None:
        return
    with CredentialStore(settings.config_directory) as store, Transport() as transport:
        enroller = Enroller(store, node_facts(settings), allow_insecure=settings.allow_insecure)
        stored = await stop.unless_asked(enroller.start(join_key))
        if stored is not None:
            settle_memory()
            try:
                await Node(settings, surroundings, transport, enroller, stop.asked).run()
            finally:
                if settings.vllm_socket_path is None:
                    forget_socket(surroundings.places.socket_path)


class StopRequest:
    """SIGTERM, SIGINT and SIGHUP: the first asks for an orderly end, a second one cancels the task that made this.

    A second SIGHUP does not: a terminal that closes may send several, its shell's and the kernel's. One that is ignored
    from the start (`nohup`) stays so.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        log.info("signal", extra={"signal": number.name, "again": self.asked.is_set()})
        if self.asked.is_set() and number is not signal.SIGHUP and self._task is not None:
            self._task.cancel()
        self.asked.set()

    async def unless_asked(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None when the end was asked for first."""
        working = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future(self.asked.wait())
        try:
            await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            working.cancel()
            waiting.cancel()
            await asyncio.wait({working, waiting})


def forget_socket(path: Path) -> None:
    """Take away the socket of an engine that has ended, and the directory that was made for it where it is empty."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def settle_memory() -> None:
    """Leave what has been made so far, modules above all, out of every garbage collection from here on.

    It is never garbage, and looking through it stops all streams: 68,000 objects, some 40 ms on a busy machine.
    """
    gc.collect()
    gc.freeze()
    # The next full collection waits for a quarter of what the last one left: let that be nothing.
    gc.collect()


def raise_file_limit() -> None:
    """Every stream is a connection to the engine: take as many files as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # macOS names an infinite hard limit and refuses it.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _told_of(group: BaseExceptionGroup[BaseException]) -> int:
    """Tell the operator of every error; the exit status."""
    errors = _leaves(group)
    for error in errors:
        remedy = getattr(error, "remedy", None)
        if remedy is None:
            log.error("the agent failed", exc_info=error)
            continue
        message = getattr(error, "message", None) or getattr(error, "reason", str(error))
        code = getattr(error, "code", None)
        print(f"Error: {message}{f' [{code}]' if code else ''}\n  {remedy}".rstrip(), file=sys.stderr)  # noqa: T201
    return FAILED_FOR_GOOD if any(getattr(error, "lasting", False) for error in errors) else FAILED


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
