"""What is asked of each subject, and what is read while it answers.

Two kinds. *Streams*: so many streams run at a constant pace, and the CPU of a window in their middle is divided by
the events that arrived in it. *Requests*: so many clients ask again and again, and the CPU of the whole run is
divided by the answers.
"""

import asyncio
import statistics
import time
from dataclasses import dataclass, field
from itertools import count

import psutil

from bench.client import Answer, Connection, Tally, connections
from bench.process import cpu_s
from bench.subject import Subject

CHUNK_BYTES = 216
INTERVAL_MS = 10.0
SPREADS_MS = {"lockstep": 0.0, "spread": 7.0}
STREAM_COUNTS = (1, 64, 128, 256)
REQUEST_CHUNKS = 64
_SETTLE_S = 0.4
_SLACK_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One load. `requests` is the number of clients that ask in a closed loop, or 0 for constant streams."""

    name: str
    mode: str
    streams: int = 0
    requests: int = 0
    stream: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One scenario on one subject, once. Times in seconds; `units` are relayed events, or answered requests."""

    subject: str
    scenario: str
    window_s: float
    units: int
    expected_units: float | None
    cpu_s: dict[str, float]
    ttft_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def cpu_us_per_unit(self, part: str) -> float | None:
        """Microseconds of CPU that this part of the subject spent per relayed event or answered request."""
        return self.cpu_s[part] / self.units * 1e6 if self.units and part in self.cpu_s else None


def stream_scenarios() -> list[Scenario]:
    """Constant streams in both modes."""
    return [
        Scenario(name=f"{streams} streams, {mode}", mode=mode, streams=streams)
        for streams in STREAM_COUNTS
        for mode in SPREADS_MS
    ]


def request_scenarios() -> list[Scenario]:
    """Short requests in a closed loop. The streams among them give the time to first token."""
    return [
        Scenario(name=f"stream of {REQUEST_CHUNKS} chunks, 64 clients", mode="lockstep", requests=64),
        Scenario(name="JSON answer of 1 kB, 16 clients", mode="lockstep", requests=16, stream=False),
    ]


async def measure(scenario: Scenario, subject: Subject, window_s: float) -> Measurement:
    """Run the scenario once; the window is `window_s` long."""
    run = _constant_streams if scenario.streams else _closed_loop
    try:
        return await run(scenario, subject, window_s)
    except (OSError, TimeoutError, psutil.Error) as error:
        # The subject has died or answers nothing any more: that is a result, and the others are still measured.
        return Measurement(
            subject=subject.name,
            scenario=scenario.name,
            window_s=window_s,
            units=0,
            expected_units=None,
            cpu_s={},
            faults=[f"no measurement: {error!r}"],
        )


async def _constant_streams(scenario: Scenario, subject: Subject, window_s: float) -> Measurement:
    chunks = int((window_s + 2 * _SETTLE_S) * 1000 / INTERVAL_MS)
    script = {
        "chunks": chunks,
        "chunk_bytes": CHUNK_BYTES,
        "interval_ms": INTERVAL_MS,
        "spread_ms": SPREADS_MS[scenario.mode],
    }
    tally = Tally()
    async with connections(subject.target, scenario.streams, tally) as opened:
        answers = [
            connection.ask(subject.target.request({**script, "seed": seed}, stream=True), seed)
            for seed, connection in enumerate(opened)
        ]
        await asyncio.sleep(_SETTLE_S)
        before, events, started = _cpu(subject), tally.events, time.monotonic()
        await asyncio.sleep(window_s)
        after, units, elapsed_s = _cpu(subject), tally.events - events, time.monotonic() - started
        await _until_done(answers, _SETTLE_S + _SLACK_S)
    return Measurement(
        subject=subject.name,
        scenario=scenario.name,
        window_s=elapsed_s,
        units=units,
        expected_units=elapsed_s * 1000 / INTERVAL_MS * scenario.streams,
        cpu_s={part: after[part] - before[part] for part in after},
        faults=_faults(answers, stream=True),
    )


async def _closed_loop(scenario: Scenario, subject: Subject, window_s: float) -> Measurement:
    script: dict[str, object] = {"interval_ms": 0.0, "body_bytes": 1000}
    if scenario.stream:
        script = {"chunks": REQUEST_CHUNKS, "chunk_bytes": CHUNK_BYTES, "interval_ms": INTERVAL_MS}
    answers: list[Answer] = []
    seeds = count()
    async with connections(subject.target, scenario.requests, Tally()) as opened:
        before, started = _cpu(subject), time.monotonic()
        deadline = started + window_s

        async def client(connection: Connection, start_s: float) -> None:
            # Clients that start together would stay together: every step would then see all of them begin.
            await asyncio.sleep(start_s)
            while time.monotonic() < deadline:
                seed = next(seeds) % 64
                request = subject.target.request({**script, "seed": seed}, stream=scenario.stream)
                answer = connection.ask(request, seed)
                answers.append(answer)
                await answer.done
                if not answer.complete:
                    return

        length_s = REQUEST_CHUNKS * INTERVAL_MS / 1000 if scenario.stream else 0.0
        async with asyncio.timeout(window_s + length_s + _SLACK_S), asyncio.TaskGroup() as clients:
            for position, connection in enumerate(opened):
                clients.create_task(client(connection, length_s * position / scenario.requests))
        after, elapsed_s = _cpu(subject), time.monotonic() - started
    return Measurement(
        subject=subject.name,
        scenario=scenario.name,
        window_s=elapsed_s,
        units=sum(answer.complete for answer in answers),
        expected_units=None,
        cpu_s={part: after[part] - before[part] for part in after},
        ttft_s=[answer.ttft_s for answer in answers if answer.ttft_s is not None],
        faults=_faults(answers, stream=scenario.stream),
    )


async def idle(subject: Subject, window_s: float) -> dict[str, float]:
    """CPU per second that each part takes while nothing is asked of it: part of every other number."""
    before, started = _cpu(subject), time.monotonic()
    await asyncio.sleep(window_s)
    after, elapsed_s = _cpu(subject), time.monotonic() - started
    return {part: (after[part] - before[part]) / elapsed_s for part in after}


def percentile(values: list[float], percent: int) -> float:
    """The value that `percent` of the values are not above."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def _cpu(subject: Subject) -> dict[str, float]:
    return {name: cpu_s(part) for name, part in subject.parts.items()}


async def _until_done(answers: list[Answer], timeout_s: float) -> None:
    """All streams have ended, or the time is over: then they count as cut off."""
    await asyncio.wait([answer.done for answer in answers], timeout=timeout_s)


def _faults(answers: list[Answer], *, stream: bool) -> list[str]:
    faults = (answer.fault(stream=stream) for answer in answers)
    return [fault for fault in faults if fault is not None]
