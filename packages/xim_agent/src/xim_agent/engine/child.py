"""One life of the engine: the guard, vLLM under it, and what they write."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from xim_agent.engine import guard
from xim_agent.planning.command import EngineCommand

log = logging.getLogger(__name__)

KEPT_LINES = 200
"""The cause of a failed start stands well above the last line: a traceback of two processes is over 100 lines."""
LINE_LENGTH = 2_000
GUARD_GRACE_S = 5.0
"""How long vLLM may take to stop when the agent is gone."""
GUARD_END_S = guard.KILL_WAIT_S + guard.LEFTOVER_GRACE_S + 1.0
"""After a kill the guard is gone within this time, whatever hangs."""
LAST_OUTPUT_S = 1.0
"""For what stands in the pipe when the guard has ended; a process that hangs in a driver may hold it open for ever."""

_LINE_END = re.compile(rb"[\r\n]+")


class EngineChild:
    """A running guard with its engine. Made by `spawn`; whoever made it awaits `exited` or `end`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        output: int,
        on_line: Callable[[str], None],
        on_output: Callable[[], None],
    ) -> None:
        self._process = process
        # A pipe of our own: asyncio waits with a process's exit until its pipes are closed, and what is left of an
        # engine whose guard was killed holds them open.
        self._output = output
        self._on_line = on_line
        self._on_output = on_output
        self.tail: deque[str] = deque(maxlen=KEPT_LINES)
        self.exited: asyncio.Task[int] = asyncio.create_task(self._run(), name="engine output")
        """Done when the engine and all it started have ended, with their exit status; below zero only when the
        guard itself was killed."""

    @classmethod
    async def spawn(
        cls, command: EngineCommand, on_line: Callable[[str], None], on_output: Callable[[], None]
    ) -> "EngineChild":
        """Start `command` under a guard; `on_line` gets every line of its output, `on_output` hears of any piece.

        A program that does not exist shows as exit status 127, not here.
        """
        output, written = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(Path(guard.__file__)), str(GUARD_GRACE_S), "--", *command.argv),
                stdin=asyncio.subprocess.PIPE,
                stdout=written,
                stderr=written,
                env=dict(command.environment),
                start_new_session=True,
            )
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(written)
        return cls(process, output, on_line, on_output)

    @property
    def pid(self) -> int:
        """Of the guard, which is the id of the engine's process group and session too."""
        return self._process.pid

    def terminate(self) -> None:
        """Ask the engine's main process to stop."""
        self._tell(b"T")

    async def end(self) -> int:
        """End the engine and everything it started, now; its exit status. May be called more than once."""
        self._tell(b"K")
        done, _ = await asyncio.wait({self.exited}, timeout=GUARD_END_S)
        if not done:
            log.error("engine does not end", extra={"process_group": self.pid})
            self._kill_group()
        return await asyncio.shield(self.exited)

    async def _run(self) -> int:
        """Pass on the output until the guard has ended."""
        output = asyncio.create_task(self._read_output(), name="engine lines")
        try:
            status = await self._process.wait()
            if status < 0:
                self._kill_group()
            await asyncio.wait({output}, timeout=LAST_OUTPUT_S)
        finally:
            output.cancel()
        return status

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _tell(self, word: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):  # it ended meanwhile
            self._process.stdin.write(word)

    async def _read_output(self) -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(self._output, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        rest = b""
        try:
            while data := await reader.read(65_536):
                self._on_output()
                *lines, rest = _LINE_END.split(rest + data)
                for line in lines:
                    self._line(line)
                if len(rest) > LINE_LENGTH:
                    self._line(rest)
                    rest = b""
            self._line(rest)
        finally:
            transport.close()

    def _line(self, raw: bytes) -> None:
        line = raw[:LINE_LENGTH].decode("utf-8", "replace").rstrip()
        if line:
            self.tail.append(line)
            self._on_line(line)
