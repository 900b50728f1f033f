"""What was measured, as Markdown tables: medians and spread of the repeats."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from operator import methodcaller

from bench import aims
from bench.record import ALONE, BASELINE, OURS, Results
from bench.scenario import PERCENTILES, SLOW_INTERVAL_MS, Kind, Measurement, Scenario


def markdown(results: Results) -> str:
    """All tables of the run."""
    streams, requests, paced = (results.of_kind(kind) for kind in Kind)
    blocks = [_header(results)]
    if streams:
        blocks += ["## CPU of the router per relayed chunk, in us", _cpu_table(results, streams)]
        blocks += ["## Chunks delivered in the window, % of those due", _delivered_table(results, streams)]
    if paced:
        blocks += [
            "## Added time to first token, in ms",
            "Through the router less the engine alone in the same repeat. Each client has one paced stream after the "
            "other, with a pause of up to one step before each request.",
            _added_table(results, "ttft_ms", "requests"),
            "## Added time between two reads of a stream, in ms",
            _added_table(results, "gap_ms", "times"),
            "## Chunks delivered to paced clients, % of those that the engine alone delivered in the same repeat",
            _delivered_table(results, paced),
        ]
    if requests:
        blocks += ["## CPU of the router per request, in us", _cpu_table(results, requests)]
        timed = [scenario for scenario in requests if scenario.stream]
        blocks += [
            "## Time to first token in the closed loop, p50 and p99, in ms",
            "The next request follows at once on the end of the last, all streams in lockstep: what the way there and "
            "back takes in a crowd.",
            _closed_loop_table(results, timed),
        ]
    if answered := [scenario for scenario in requests if not scenario.stream]:
        blocks += ["## Answered requests per second, closed loop", _rate_table(results, answered)]
    if results.footprints:
        blocks += [
            "## Start-up and memory of the router, a fresh process each time",
            "Start-up: from the start of the process to its first good answer to a health check. Memory: PSS with "
            "streams less without, by their number. Idle: begun, one chunk, then a silent engine; active: a chunk per "
            "100 ms.",
            _footprint_table(results),
        ]
    if results.idle:
        blocks += [
            "## CPU while idle, ms per s",
            "Once, before the scenarios, over the same 10 s for all: one renewal of a lease, two checks of an engine.",
            _idle_table(results),
        ]
    if results.scenarios:
        blocks += ["## CPU of the client itself, % of one core, the most of all repeats", _client_table(results)]
    blocks += ["## What the project aims at, and what this run has of it", _aims_table(results)]
    blocks += _left_out(results)
    blocks += [f"Fault: {line}" for line in _faults(results)] or ["Every byte of every answer was the expected one."]
    return "\n\n".join(blocks) + "\n"


def _header(results: Results) -> str:
    facts = results.facts
    known = {name: v for name, v in {**results.versions, **facts["packages"]}.items() if v != "-"}
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    return (
        f"# Bench of {facts['date']}, commit {facts['commit']}\n\n"
        f"{facts['cores']} x {facts['cpu']}, {facts['memory_gib']} GiB, {facts['system']}, "
        f"Python {facts['python']}, load average {facts['load_before'][0]} before; {versions}.\n\n"
        f"Configuration: {json.dumps(facts['configuration'])}. Numbers are medians (least - most) of the repeats. "
        f"The whole run took {facts['took_s'] / 60:.0f} minutes."
    )


def spread(values: Sequence[float], repeats: int, digits: int = 1) -> str:
    """Median, least and most, as one cell; a median of fewer runs than `repeats` must not pass for one of all."""
    if not values:
        return "-"
    note = f" **{len(values)} of {repeats} runs**" if len(values) < repeats else ""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f}){note}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, all columns but the first aligned to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cpu_table(results: Results, scenarios: list[Scenario]) -> str:
    def cpu(scenario: Scenario, subject: str, part: str = "router") -> str:
        return spread(results.series(scenario.name, subject, lambda m: m.cpu_us_per_unit(part)), results.repeats)

    columns: list[tuple[str, Callable[[Scenario], str]]] = [
        (name, partial(cpu, subject=name)) for name in results.routers
    ]
    if OURS in results.routers:
        columns += [(f"{OURS} / {BASELINE}", partial(_ratio, results, subject=OURS, baseline=BASELINE))]
        for several in (name for name in results.routers if name.startswith(f"{OURS}, ")):
            columns += [(f"{several} / {OURS}", partial(_ratio, results, subject=several, baseline=OURS))]
        columns += [("our agent", partial(cpu, subject=OURS, part="agent"))]
    columns += [("the engine alone", partial(cpu, subject=ALONE, part="engine"))]
    rows = [[scenario.name, *(cell(scenario) for _, cell in columns)] for scenario in scenarios]
    return table(["", *(name for name, _ in columns)], rows)


def _ratio(results: Results, scenario: Scenario, subject: str, baseline: str) -> str:
    ours, theirs = (
        results.median(results.series(scenario.name, name, lambda m: m.cpu_us_per_unit("router")))
        for name in (subject, baseline)
    )
    return f"{ours / theirs:.2f}" if ours and theirs else "-"


def _delivered_table(results: Results, scenarios: list[Scenario]) -> str:
    def share(scenario: Scenario, subject: str) -> str:
        alone = {m.repeat: m.units for m in results.of(scenario.name, ALONE)}
        shares = [
            m.units / due
            for m in results.of(scenario.name, subject)
            if (due := m.expected_units or alone.get(m.repeat)) is not None and due > 0
        ]
        return f"{100 * statistics.median(shares):.0f}" if shares else "-"

    rows = [[scenario.name, *(share(scenario, name) for name in results.subjects)] for scenario in scenarios]
    return table(["", *results.subjects], rows)


def _added_table(results: Results, method: str, counted: str) -> str:
    rows = []
    for scenario, name in product(results.of_kind(Kind.PACED), PERCENTILES):
        of = methodcaller(method, name)
        added = (results.added(scenario.name, router, of) for router in results.routers)
        cells = [spread(values, results.repeats, 2) for values in added]
        alone = spread(results.series(scenario.name, ALONE, of), results.repeats, 2)
        latencies = (m.ttft if counted == "requests" else m.gaps for m in results.of(scenario.name, ALONE))
        least = min((found.count for found in latencies if found is not None), default=0)
        rows.append([f"{scenario.name}, {name}", *cells, alone, str(least)])
    return table(["added by", *results.routers, "the engine alone has", f"{counted} in each repeat"], rows)


def _closed_loop_table(results: Results, scenarios: list[Scenario]) -> str:
    rows = []
    for scenario, name in product(scenarios, PERCENTILES):
        of = partial(Measurement.ttft_ms, percentile=name)
        series = (results.series(scenario.name, subject, of) for subject in results.subjects)
        rows.append([f"{scenario.name}, {name}", *(spread(values, results.repeats) for values in series)])
    return table(["", *results.subjects], rows)


def _rate_table(results: Results, scenarios: list[Scenario]) -> str:
    rows = []
    for scenario in scenarios:
        rates = (results.series(scenario.name, subject, lambda m: m.rate) for subject in results.subjects)
        rows.append([scenario.name, *(spread(values, results.repeats, 0) for values in rates)])
    return table(["", *results.subjects], rows)


def _footprint_table(results: Results) -> str:
    parts = {found.subject: list(found.empty) for found in results.footprints if found.empty and not found.faults}
    rows = [_footprint_row(results, subject, part) for subject, names in parts.items() for part in names]
    head = ["", "start-up, s", "no stream, MiB", "per idle stream, KiB", "per active stream, KiB", "streams of each"]
    return table(head, rows)


def _footprint_row(results: Results, subject: str, part: str) -> list[str]:
    taken = [found for found in results.sound_footprints(subject) if part in found.empty]
    series = [
        ([found.start_s for found in taken if found.start_s is not None and part == "router"], 2),
        ([found.empty[part] / 2**20 for found in taken], 0),
        ([found.per_idle_stream[part] / 1024 for found in taken], 1),
        ([found.per_active_stream[part] / 1024 for found in taken], 1),
    ]
    cells = [spread(values, results.repeats, digits) for values, digits in series]
    return [f"{subject}, {part}", *cells, str(taken[0].streams)]


def _aims_table(results: Results) -> str:
    rows = [[found.what, found.limit, found.measured, found.verdict] for found in aims.judge(results)]
    return table(["", "limit", "measured", ""], rows)


def _idle_table(results: Results) -> str:
    rows = [
        [f"{subject}, {part}", f"{1000 * share:.2f}"]
        for subject, parts in results.idle.items()
        for part, share in parts.items()
    ]
    return table(["", "ms / s"], rows)


def _client_table(results: Results) -> str:
    rows = []
    for scenario in results.scenarios:
        shares = ([m.client_share for m in results.of(scenario.name, name)] for name in results.subjects)
        rows.append([scenario.name, *(f"{100 * max(found):.0f}" if found else "-" for found in shares)])
    return table(["", *results.subjects], rows)


def _left_out(results: Results) -> list[str]:
    """What was not measured, and why."""
    lines = [f"Skipped: {name}: {reason}" for name, reason in results.skipped.items()]
    names = "; ".join(scenario.name for scenario in results.scenarios if not scenario.slow_too)
    slower = "; ".join(s.name for s in results.scenarios if s.slow_too and s.paced_for(slow=True) != s)
    for name in results.slow:
        if slower:
            lines.append(
                f"{name} has one chunk per stream each {SLOW_INTERVAL_MS:.0f} ms, a tenth of what the others have, in: "
                f"{slower}."
            )
        if names:
            lines.append(f"Not asked of {name}, which cannot carry as many chunks per second: {names}.")
    return lines


def _faults(results: Results) -> list[str]:
    """One line per subject and kind of fault, with how often it was seen."""
    return [
        f"{subject}, in {count} measurements: {fault}" for (subject, fault), count in Counter(results.faults()).items()
    ]
