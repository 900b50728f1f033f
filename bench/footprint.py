"""How long a router takes to start and how much memory it takes per open stream, each time in a fresh process.

A process that has held a thousand streams once keeps much of their memory: the next thousand would cost it nothing.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.client import Answer, Connection, Tally, connections
from bench.load import faults_of, until_begun
from bench.process import StartFailed, resident_bytes
from bench.scenario import CHUNK_BYTES
from bench.subject import Subject

NAME = "start-up and memory"
STREAMS = 1000
SLOW_STREAMS = 100
_INTERVAL_MS, _SPREAD_MS = 100.0, 70.0
_SETTLE_S = 1.0
_BATCH = 50
_WARM_UP_STREAMS = 20
_IDLE = {"chunk_bytes": CHUNK_BYTES, "chunks": 2, "hang_after": 1}
"""Begun, one chunk, and then a silent engine."""
_ACTIVE = {"chunk_bytes": CHUNK_BYTES, "chunks": 600, "interval_ms": _INTERVAL_MS, "spread_ms": _SPREAD_MS}

Start = Callable[[Path], AbstractAsyncContextManager[Subject]]
"""From a folder of its own to the running subject."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """One start of one subject. Memory in bytes, by part; `streams` are held for each of the two kinds."""

    subject: str
    repeat: int
    version: str = "-"
    start_s: float | None = None
    streams: int = 0
    empty: dict[str, int] = field(default_factory=dict)
    per_idle_stream: dict[str, float] = field(default_factory=dict)
    per_active_stream: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


async def footprint(name: str, start: Start, folder: Path, repeat: int) -> Footprint:
    """Start the subject, let it hold its streams, and end it."""
    try:
        async with start(folder) as subject:
            return await _of(subject, repeat)
    except (StartFailed, OSError, TimeoutError, psutil.Error) as error:
        return Footprint(subject=name, repeat=repeat, faults=[f"no measurement: {error!r}"])


async def _of(subject: Subject, repeat: int) -> Footprint:
    streams = SLOW_STREAMS if subject.slow else STREAMS
    await _warm_up(subject)
    empty = _resident(subject)
    async with connections(subject.target, streams, Tally()) as first:
        silent = await _begin(subject, first, _IDLE)
        await asyncio.sleep(_SETTLE_S)
        with_idle = _resident(subject)
        # On top of the first: what they hold is not free to be used again.
        async with connections(subject.target, streams, Tally()) as second:
            paced = await _begin(subject, second, _ACTIVE)
            await asyncio.sleep(_SETTLE_S)
            with_active = _resident(subject)
    return Footprint(
        subject=subject.name,
        repeat=repeat,
        version=subject.version,
        start_s=subject.start_s,
        streams=streams,
        empty=empty,
        per_idle_stream={part: (with_idle[part] - empty[part]) / streams for part in empty},
        per_active_stream={part: (with_active[part] - with_idle[part]) / streams for part in empty},
        faults=faults_of([*silent, *paced], stream=True, whole=False),
    )


async def _warm_up(subject: Subject) -> None:
    """What the first requests load and allocate for good belongs to the empty process."""
    async with connections(subject.target, _WARM_UP_STREAMS, Tally()) as opened:
        answers = [
            connection.ask(subject.target.request({**_ACTIVE, "chunks": 2}, stream=True), 0) for connection in opened
        ]
        await until_begun(answers)
    await asyncio.sleep(_SETTLE_S)


async def _begin(subject: Subject, opened: list[Connection], script: Mapping[str, object]) -> list[Answer]:
    """A stream on each connection, all of them begun; never many requests at once."""
    answers: list[Answer] = []
    for first in range(0, len(opened), _BATCH):
        batch = [
            connection.ask(subject.target.request({**script, "seed": seed}, stream=True), seed)
            for seed, connection in enumerate(opened[first : first + _BATCH])
        ]
        await until_begun(batch)
        answers += batch
    return answers


def _resident(subject: Subject) -> dict[str, int]:
    return {name: resident_bytes(part) for name, part in subject.parts.items()}
