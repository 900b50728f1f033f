"""Ask one subject for one scenario, once, and read what it took."""

import asyncio
import gc
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import psutil

from bench.client import Answer, Connection, Tally, connections
from bench.process import cpu_s
from bench.scenario import CHUNK_BYTES, Kind, Measurement, Scenario, latency
from bench.subject import Subject

_SETTLE_S = 0.4
_SLOW_SETTLE_S = 1.5
_SLACK_S = 15.0
_BEGIN_S = 45.0
_ENDLESS_S = 90.0
_LOOK_S = 0.05
_SEEDS = 64
_CALM_SHARE = 0.05
_CALM_S = 0.2


async def measure(scenario: Scenario, subject: Subject, window_s: float, repeat: int = 0) -> Measurement:
    """Run the scenario once; the window is `window_s` long."""
    run = {Kind.STREAMS: _streams, Kind.REQUESTS: _requests, Kind.PACED: _paced}[scenario.kind]
    try:
        with _no_collector():
            return await run(scenario, subject, window_s, repeat)
    except (OSError, TimeoutError, psutil.Error) as error:
        # The subject has died or answers nothing any more: that is a result, and the others are still measured.
        fault = f"no measurement: {error!r}"
        return Measurement(
            subject=subject.name, scenario=scenario.name, repeat=repeat, window_s=window_s, faults=[fault]
        )


@contextmanager
def _no_collector() -> Iterator[None]:
    """No garbage collection in this process meanwhile: the client keeps every byte, and it would walk all of them."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Window:
    """What is counted between its start and its end: CPU of all parts and of the client, events."""

    def __init__(self, subject: Subject, tally: Tally) -> None:
        self._subject, self._tally = subject, tally
        self._cpu, self._events, self._client = _cpu(subject), tally.events, time.process_time()
        self.start = self.end = time.monotonic()

    def close(self) -> None:
        """The window ends now."""
        after = _cpu(self._subject)
        self.end = time.monotonic()
        self.cpu_s = {part: after[part] - self._cpu[part] for part in after}
        self.events = self._tally.events - self._events
        self.client_share = (time.process_time() - self._client) / self.length_s

    @property
    def length_s(self) -> float:
        """Seconds from start to end."""
        return self.end - self.start


async def _streams(scenario: Scenario, subject: Subject, window_s: float, repeat: int) -> Measurement:
    scenario = scenario.paced_for(slow=subject.slow)
    # It takes long to begin so many streams, and how long is not known: they get no end, and are left.
    whole = not (subject.slow and scenario.clients > 1)
    length_s = window_s + 2 * _SETTLE_S if whole else _ENDLESS_S
    script = _script(scenario) | {"chunks": int(length_s * 1000 / scenario.interval_ms)}
    tally = Tally()
    async with connections(subject.target, scenario.clients, tally) as opened:
        answers = [
            connection.ask(subject.target.request({**script, "seed": seed}, stream=True), seed)
            for seed, connection in enumerate(opened)
        ]
        await asyncio.sleep(_SETTLE_S)
        if not whole:
            await until_begun(answers)
            await asyncio.sleep(_SLOW_SETTLE_S)
        window = _Window(subject, tally)
        await asyncio.sleep(window_s)
        window.close()
        if whole:
            await _until_done(answers, _SETTLE_S + _SLACK_S)
    if not whole:
        await _until_calm(subject)
    return Measurement(
        subject=subject.name,
        scenario=scenario.name,
        repeat=repeat,
        window_s=window.length_s,
        units=window.events,
        expected_units=window.length_s * 1000 / scenario.interval_ms * scenario.clients,
        cpu_s=window.cpu_s,
        client_share=window.client_share,
        gaps=latency([gap for answer in answers for gap in answer.gaps_s(window.start, window.end)]),
        faults=faults_of(answers, stream=True, whole=whole),
    )


async def _requests(scenario: Scenario, subject: Subject, window_s: float, repeat: int) -> Measurement:
    script: dict[str, object] = {"interval_ms": 0.0, "body_bytes": 1000}
    if scenario.stream:
        script = _script(scenario)
    length_s = scenario.chunks * scenario.interval_ms / 1000 if scenario.stream else 0.0
    tally = Tally()
    async with connections(subject.target, scenario.clients, tally) as opened:
        window = _Window(subject, tally)
        answers = await _closed_loop(
            opened, subject, scenario, script, ramp_s=length_s, until=window.start + window_s, pause_s=0.0
        )
        window.close()
    return Measurement(
        subject=subject.name,
        scenario=scenario.name,
        repeat=repeat,
        window_s=window.length_s,
        units=sum(answer.complete for answer in answers),
        cpu_s=window.cpu_s,
        client_share=window.client_share,
        ttft=latency([answer.ttft_s for answer in answers if answer.ttft_s is not None]),
        faults=faults_of(answers, stream=scenario.stream),
    )


async def _paced(scenario: Scenario, subject: Subject, window_s: float, repeat: int) -> Measurement:
    length_s = scenario.chunks * scenario.interval_ms / 1000
    tally = Tally()
    async with connections(subject.target, scenario.clients, tally) as opened:
        started = time.monotonic()
        clients = asyncio.create_task(
            _closed_loop(
                opened,
                subject,
                scenario,
                _script(scenario),
                ramp_s=length_s,
                until=started + length_s + window_s,
                # The engine reads requests between its steps. Who asks as soon as an answer has ended always asks at
                # the same moment of a step; after a pause of up to a step every moment is as likely, and the time that
                # a request waits for the engine is on average the same for whoever relays it.
                pause_s=scenario.interval_ms / 1000,
            )
        )
        try:
            await asyncio.sleep(length_s)
            window = _Window(subject, tally)
            await asyncio.sleep(window_s)
            window.close()
            answers = await clients
        finally:
            clients.cancel()
    fresh = [answer for answer in answers if window.start <= answer.sent_at <= window.end]
    return Measurement(
        subject=subject.name,
        scenario=scenario.name,
        repeat=repeat,
        window_s=window.length_s,
        units=window.events,
        cpu_s=window.cpu_s,
        client_share=window.client_share,
        ttft=latency([answer.ttft_s for answer in fresh if answer.ttft_s is not None]),
        gaps=latency([gap for answer in answers for gap in answer.gaps_s(window.start, window.end)]),
        faults=faults_of(answers, stream=True),
    )


async def _closed_loop(
    opened: list[Connection],
    subject: Subject,
    scenario: Scenario,
    script: dict[str, object],
    *,
    ramp_s: float,
    until: float,
    pause_s: float,
) -> list[Answer]:
    """Each client asks one request after the other until that time; all answers, ended."""
    answers: list[Answer] = []
    seeds = count()

    async def client(connection: Connection, position: int) -> None:
        # Clients that start together would stay together: every step would then see all of them begin.
        await asyncio.sleep(ramp_s * position / len(opened))
        chance = random.Random(position)
        while time.monotonic() < until:
            seed = next(seeds) % _SEEDS
            request = subject.target.request({**script, "seed": seed}, stream=scenario.stream)
            answer = connection.ask(request, seed)
            answers.append(answer)
            await answer.done
            if not answer.complete:
                return
            if pause_s:
                await asyncio.sleep(chance.uniform(0.0, pause_s))

    limit_s = until - time.monotonic() + ramp_s + _SLACK_S
    async with asyncio.timeout(limit_s), asyncio.TaskGroup() as clients:
        for position, connection in enumerate(opened):
            clients.create_task(client(connection, position))
    return answers


async def idle(subject: Subject, window_s: float) -> dict[str, float]:
    """CPU per second that each part takes while nothing is asked of it: part of every other number."""
    window = _Window(subject, Tally())
    await asyncio.sleep(window_s)
    window.close()
    return {part: cpu / window.length_s for part, cpu in window.cpu_s.items()}


async def _until_calm(subject: Subject) -> None:
    """What was left behind has been cleared away: the next measurement begins with an idle subject."""
    deadline = time.monotonic() + _SLACK_S
    while time.monotonic() < deadline:
        shares = await idle(subject, _CALM_S)
        if max(shares.values()) < _CALM_SHARE:
            return


def _script(scenario: Scenario) -> dict[str, object]:
    return {
        "chunks": scenario.chunks,
        "chunk_bytes": CHUNK_BYTES,
        "interval_ms": scenario.interval_ms,
        "spread_ms": scenario.spread_ms,
    }


def _cpu(subject: Subject) -> dict[str, float]:
    return {name: cpu_s(part) for name, part in subject.parts.items()}


async def until_begun(answers: list[Answer]) -> None:
    """Every answer has begun. Raises: TimeoutError."""
    async with asyncio.timeout(_BEGIN_S):
        for answer in answers:
            while answer.first_at is None and not answer.done.done():  # noqa: ASYNC110 - the client stays that cheap
                await asyncio.sleep(_LOOK_S)


async def _until_done(answers: list[Answer], timeout_s: float) -> None:
    """All streams have ended, or the time is over: then they count as cut off."""
    await asyncio.wait([answer.done for answer in answers], timeout=timeout_s)


def faults_of(answers: list[Answer], *, stream: bool, whole: bool = True) -> list[str]:
    faults = (answer.fault(stream=stream, whole=whole) for answer in answers)
    return [fault for fault in faults if fault is not None]
