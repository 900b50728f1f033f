"""The fake engine itself: which requests run, which wait, and the one step that moves all streams.

A real engine makes one step for all running requests and its API server writes what came out, stream after stream.
So does this one: a `Stepper` per pace, never a timer per stream. All of it runs on one event loop.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from tests.support.fake_vllm_script import Script

DIED = 70
"""Exit code of a process that a script told to die."""


class Client(Protocol):
    """What the engine needs of a connection."""

    def write(self, data: bytes) -> None:
        """Write now, as far as the socket takes it."""
        ...

    def finish(self, data: bytes) -> None:
        """Write the end of the answer; the connection may then serve another request."""
        ...

    def reset(self) -> None:
        """Break the connection off."""
        ...

    def writable(self) -> bool:
        """False while the client reads too slowly."""
        ...


class Run:
    """One request on the engine: `head` first, then one of `parts` a step, `tail` with the last of them.

    An answer that is no stream has no parts: its tail is written when its time has come.
    """

    __slots__ = (
        "client",
        "finish_reason",
        "head",
        "left",
        "parts",
        "pause_s",
        "script",
        "sent",
        "stepper",
        "tail",
        "timer",
        "tokens",
    )

    def __init__(
        self, client: Client, script: Script, head: bytes, parts: Iterator[bytes], count: int, tail: bytes
    ) -> None:
        self.client, self.script, self.head, self.parts, self.left, self.tail = client, script, head, parts, count, tail
        # What does not stream takes as long as the stream would have taken.
        self.pause_s = (script.first_ms + (0.0 if count else script.chunks * script.interval_ms)) / 1000
        self.sent = 0
        # What the metrics count when the run has ended well; the tokens of a stream are counted as it goes.
        self.finish_reason, self.tokens = "", 0
        self.stepper: Stepper | None = None
        self.timer: asyncio.TimerHandle | None = None


class Engine:
    """All requests of the process, at most `slots` of them running; the rest wait in order of arrival."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.running: set[Run] = set()
        self.waiting: deque[Run] = deque()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0}
        self._steppers: dict[tuple[float, float], Stepper] = {}

    def submit(self, run: Run) -> None:
        """Start `run` now, or as soon as a slot is free."""
        if len(self.running) >= self.slots:
            self.waiting.append(run)
        else:
            self._start(run)

    def leave(self, run: Run) -> None:
        """Forget `run`: it has ended, or its client has gone."""
        if run.stepper is not None:
            run.stepper.runs.pop(run, None)
        if run.timer is not None:
            run.timer.cancel()
        if run in self.running:
            self.running.remove(run)
        elif run in self.waiting:
            self.waiting.remove(run)
        while self.waiting and len(self.running) < self.slots:
            self._start(self.waiting.popleft())

    def _start(self, run: Run) -> None:
        self.running.add(run)
        if run.script.hang:
            return
        if run.pause_s == 0.0:
            self._begin(run)
        else:
            if run.left:
                self._write_head(run)
            run.timer = asyncio.get_running_loop().call_later(run.pause_s, self._begin, run)

    def _begin(self, run: Run) -> None:
        """The first token is there: from now on the stepper of this pace moves the stream."""
        if not run.left:
            self._fault_due(run, whole=True)
            self._end(run, run.head + run.tail)
            return
        if self._fault_due(run):
            return
        self._write_head(run)
        if run.script.error_event_after == 0:
            self._end(run, run.tail)
            return
        self.step(run)
        if run.left and run in self.running:
            pace = (run.script.interval_ms / 1000, run.script.spread_ms / 1000)
            run.stepper = self._steppers.setdefault(pace, Stepper(self, *pace))
            run.stepper.add(run)

    def _write_head(self, run: Run) -> None:
        if run.head and run.script.die_after != 0 and run.script.reset_after != 0:
            run.client.write(run.head)
            run.head = b""

    def step(self, run: Run) -> None:
        """Write the next part of `run`, unless its client is slow or its script has come to a fault."""
        if not run.client.writable() or self._fault_due(run):
            return
        data = next(run.parts)
        run.sent += 1
        run.left -= 1
        self.generation_tokens += 1
        if run.left and run.script.error_event_after != run.sent:
            run.client.write(data)
        elif run.script.die_after == run.sent or run.script.reset_after == run.sent:
            run.client.write(data)
            self._fault_due(run)
        else:
            self._end(run, data + run.tail)

    def _fault_due(self, run: Run, *, whole: bool = False) -> bool:
        """Carry out the fault that the script has for this point, if any; then the run takes no more steps.

        A whole answer (`whole`) breaks at any `die_after` or `reset_after`, in place of its end.
        """
        script = run.script
        if script.die_after == run.sent or (whole and script.die_after is not None):
            os._exit(DIED)
        if script.reset_after == run.sent or (whole and script.reset_after is not None):
            run.client.reset()
            self.leave(run)
            return True
        if script.hang_after == run.sent:
            if run.stepper is not None:
                run.stepper.runs.pop(run, None)
            return True
        return False

    def _end(self, run: Run, data: bytes) -> None:
        if run in self.running:
            self.leave(run)
            self.generation_tokens += run.tokens
            if run.finish_reason:
                self.finished[run.finish_reason] += 1
            run.client.finish(data)


class Stepper:
    """Moves all streams of one pace: every `interval_s`, each by one part, spread over `spread_s` of it."""

    def __init__(self, engine: Engine, interval_s: float, spread_s: float) -> None:
        self.runs: dict[Run, None] = {}
        self._engine, self._interval_s, self._spread_s = engine, interval_s, spread_s
        self._timer: asyncio.Handle | None = None
        self._due = 0.0

    def add(self, run: Run) -> None:
        """Take `run` along from the next step on."""
        self.runs[run] = None
        if self._timer is None:
            self._due = asyncio.get_running_loop().time()
            self._arm()

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        if self._interval_s == 0.0:
            self._timer = loop.call_soon(self._step)
            return
        # A step that came late does not make the next ones come early.
        self._due = max(self._due, loop.time() - self._interval_s) + self._interval_s
        self._timer = loop.call_at(self._due, self._step)

    def _step(self) -> None:
        runs = list(self.runs)
        started = time.perf_counter()
        gap_s = self._spread_s / len(runs) if runs else 0.0
        for position, run in enumerate(runs):
            if position and gap_s:
                # Waiting here, on the loop, is meant: event loops have timers of a millisecond, 128 streams in
                # 7 ms are 55 us apart. A real API server is busy for as long between two writes.
                wait_s = started + position * gap_s - time.perf_counter()
                if wait_s > 0:
                    time.sleep(wait_s)
            self._engine.step(run)
        self._timer = None
        if self.runs:
            self._arm()
