"""What was measured, as JSON (every single measurement) and as Markdown tables (medians and spread)."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.scenario import Measurement, Scenario, percentile
from bench.subject import ROOT, Subject

OURS, BASELINE, ALONE = "xim", "vllm-router", "engine alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """One run of the bench."""

    facts: dict[str, Any]
    subjects: list[str]
    scenarios: list[Scenario]
    measurements: list[Measurement]
    idle: dict[str, dict[str, float]]
    skipped: dict[str, str]

    def of(self, scenario: Scenario, subject: str) -> list[Measurement]:
        """All repeats of one scenario on one subject."""
        return [m for m in self.measurements if m.scenario == scenario.name and m.subject == subject]

    def median_us(self, scenario: Scenario, subject: str, part: str = "router") -> float | None:
        """Median over the repeats of the CPU per relayed event or answered request, in microseconds."""
        values = [value for m in self.of(scenario, subject) if (value := m.cpu_us_per_unit(part)) is not None]
        return statistics.median(values) if values else None


def facts(subjects: Sequence[Subject], configuration: dict[str, Any]) -> dict[str, Any]:
    """Machine, versions, commit and configuration of this run."""
    git = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    packages = ("uvicorn", "uvloop", "pyzmq", "msgpack", "httptools", "aiohttp")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or "unknown",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "subjects": {subject.name: subject.version for subject in subjects},
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "configuration": configuration,
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(results: Results, folder: Path) -> tuple[Path, Path]:
    """Both files, named by date and commit; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{results.facts['date'][:16].replace(':', '')}-{results.facts['commit']}"
    data = {
        "facts": results.facts,
        "idle_cpu_s_per_s": results.idle,
        "skipped": results.skipped,
        "measurements": [asdict(m) for m in results.measurements],
    }
    as_json, as_markdown = stem.with_suffix(".json"), stem.with_suffix(".md")
    as_json.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    as_markdown.write_text(markdown(results))
    return as_json, as_markdown


def markdown(results: Results) -> str:
    """All tables of the run."""
    routers = [name for name in results.subjects if name != ALONE]
    streams = [scenario for scenario in results.scenarios if scenario.streams]
    requests = [scenario for scenario in results.scenarios if scenario.requests]
    blocks = [_header(results.facts)]
    if streams:
        blocks += ["## CPU of the router per relayed chunk, in us", _cpu_table(results, streams, routers)]
        blocks += ["## Chunks delivered in the window, % of those due", _delivered_table(results, streams)]
    if requests:
        blocks += ["## CPU of the router per request, in us", _cpu_table(results, requests, routers)]
        timed = [scenario for scenario in requests if scenario.stream]
        blocks += ["## Time to first token, p50 / p99 over all repeats, in ms", _ttft_table(results, timed)]
    blocks += ["## CPU while idle, ms per s", _idle_table(results)]
    blocks += [f"Skipped: {name}: {reason}" for name, reason in results.skipped.items()]
    blocks += [f"Fault: {line}" for line in _faults(results)] or ["Every byte of every answer was the expected one."]
    return "\n\n".join(blocks) + "\n"


def _header(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in {**facts["subjects"], **facts["packages"]}.items())
    return (
        f"# Bench of {facts['date']}, commit {facts['commit']}\n\n"
        f"{facts['cores']} x {facts['cpu']}, {facts['memory_gib']} GiB, {facts['system']}, "
        f"Python {facts['python']}; {versions}.\n\n"
        f"Configuration: {json.dumps(facts['configuration'])}. Numbers are medians (least - most) of the repeats."
    )


def _cpu_table(results: Results, scenarios: list[Scenario], routers: list[str]) -> str:
    columns: list[tuple[str, Callable[[Scenario], str]]] = [
        (name, lambda scenario, name=name: _spread(results, scenario, name, "router"))  # type: ignore[misc]
        for name in routers
    ]
    if OURS in routers:
        columns += [(f"{OURS} / {BASELINE}", lambda scenario: _ratio(results, scenario, OURS, BASELINE))]
        for several in (name for name in routers if name.startswith(f"{OURS}, ")):
            columns += [(f"{several} / {OURS}", partial(_ratio, results, subject=several, baseline=OURS))]
        columns += [("our agent", lambda scenario: _spread(results, scenario, OURS, "agent"))]
    columns += [("the engine alone", lambda scenario: _spread(results, scenario, ALONE, "engine"))]
    rows = [[scenario.name, *(cell(scenario) for _, cell in columns)] for scenario in scenarios]
    return _table(["", *(name for name, _ in columns)], rows)


def _spread(results: Results, scenario: Scenario, subject: str, part: str) -> str:
    values = [value for m in results.of(scenario, subject) if (value := m.cpu_us_per_unit(part)) is not None]
    if not values:
        return "-"
    # A median of fewer runs than the header says must not pass for one of all of them.
    repeats = results.facts["configuration"]["repeats"]
    note = f" **{len(values)} of {repeats} runs**" if len(values) < repeats else ""
    return f"{statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f}){note}"


def _ratio(results: Results, scenario: Scenario, subject: str, baseline: str) -> str:
    ours, theirs = results.median_us(scenario, subject), results.median_us(scenario, baseline)
    measured = min(_runs(results, scenario, subject), _runs(results, scenario, baseline))
    # No ratio from an incomplete set: its two sides would be medians of different runs.
    complete = measured == results.facts["configuration"]["repeats"]
    return f"{ours / theirs:.2f}" if ours and theirs and complete else "-"


def _runs(results: Results, scenario: Scenario, subject: str) -> int:
    return sum(1 for m in results.of(scenario, subject) if m.units)


def _delivered_table(results: Results, scenarios: list[Scenario]) -> str:
    rows = []
    for scenario in scenarios:
        cells = [scenario.name]
        for name in results.subjects:
            shares = [m.units / m.expected_units for m in results.of(scenario, name) if m.expected_units]
            cells.append(f"{100 * statistics.median(shares):.0f}" if shares else "-")
        rows.append(cells)
    return _table(["", *results.subjects], rows)


def _ttft_table(results: Results, scenarios: list[Scenario]) -> str:
    rows = []
    for scenario in scenarios:
        cells = [scenario.name]
        for name in results.subjects:
            times = [1000 * ttft for m in results.of(scenario, name) for ttft in m.ttft_s]
            cells.append(f"{percentile(times, 50):.1f} / {percentile(times, 99):.1f}" if times else "-")
        rows.append(cells)
    return _table(["", *results.subjects], rows)


def _idle_table(results: Results) -> str:
    rows = [
        [f"{subject}, {part}", f"{1000 * share:.2f}"]
        for subject, parts in results.idle.items()
        for part, share in parts.items()
    ]
    return _table(["", "ms / s"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _faults(results: Results) -> list[str]:
    """One line per subject and kind of fault, with how often it was seen."""
    seen = Counter((m.subject, m.faults[0]) for m in results.measurements if m.faults)
    return [f"{subject}, in {count} measurements: {fault}" for (subject, fault), count in seen.items()]
