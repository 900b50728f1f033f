"""One run of the bench: what was measured, on what, and how it is written down."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from bench.footprint import Footprint
from bench.scenario import Kind, Measurement, Scenario
from bench.subject import ROOT

OURS, BASELINE, ALONE = "xim", "vllm-router", "engine alone"
_PACKAGES = ("uvicorn", "uvloop", "pyzmq", "msgpack", "httptools", "aiohttp")

Value = Callable[[Measurement], float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """One run of the bench."""

    facts: dict[str, Any]
    versions: dict[str, str]
    subjects: list[str]
    scenarios: list[Scenario]
    measurements: list[Measurement]
    footprints: list[Footprint]
    idle: dict[str, dict[str, float]]
    skipped: dict[str, str]
    """From a subject that did not start to the reason."""
    slow: list[str] = field(default_factory=list)
    """Subjects that were not asked for every scenario."""

    @property
    def repeats(self) -> int:
        """How often everything was measured."""
        return int(self.facts["configuration"]["repeats"])

    @property
    def routers(self) -> list[str]:
        """All subjects but the engine alone."""
        return [name for name in self.subjects if name != ALONE]

    def of_kind(self, kind: Kind) -> list[Scenario]:
        """The scenarios of that kind."""
        return [scenario for scenario in self.scenarios if scenario.kind is kind]

    def of(self, scenario: str, subject: str) -> list[Measurement]:
        """All repeats of one scenario on one subject."""
        return [m for m in self.measurements if m.scenario == scenario and m.subject == subject]

    def series(self, scenario: str, subject: str, value: Value) -> list[float]:
        """That value of every repeat that has it, and in which nothing went wrong: what fails may be cheap."""
        return [found for m in self._sound(scenario, subject) if (found := value(m)) is not None]

    def added(self, scenario: str, subject: str, value: Value) -> list[float]:
        """That value less the engine's own in the same repeat, for every repeat that has both."""
        alone = {m.repeat: value(m) for m in self._sound(scenario, ALONE)}
        pairs = ((value(m), alone.get(m.repeat)) for m in self._sound(scenario, subject))
        return [through - direct for through, direct in pairs if through is not None and direct is not None]

    def footprint(self, subject: str, value: Callable[[Footprint], float | None]) -> list[float]:
        """That value of every start of the subject that has it."""
        return [number for found in self.sound_footprints(subject) if (number := value(found)) is not None]

    def sound_footprints(self, subject: str) -> list[Footprint]:
        """The starts of the subject in which nothing went wrong."""
        return [found for found in self.footprints if found.subject == subject and not found.faults]

    def _sound(self, scenario: str, subject: str) -> list[Measurement]:
        return [m for m in self.of(scenario, subject) if not m.faults]

    def faults(self) -> list[tuple[str, str]]:
        """Subject and first fault of everything that went wrong."""
        measured = [(m.subject, m.faults) for m in self.measurements]
        measured += [(found.subject, found.faults) for found in self.footprints]
        return [(subject, faults[0]) for subject, faults in measured if faults]

    def median(self, values: Sequence[float]) -> float | None:
        """Their median, or None if it is not one of all repeats: it would pass for that in a comparison."""
        return statistics.median(values) if len(values) == self.repeats else None


def facts(configuration: dict[str, Any]) -> dict[str, Any]:
    """Machine, commit and configuration of a run that begins now."""
    git = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or "unknown",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "load_before": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "configuration": configuration,
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def stem_of(results: Results) -> str:
    """The name of this run's files, without their endings: date and commit."""
    return f"{results.facts['date'][:16].replace(':', '')}-{results.facts['commit']}"


def as_json(results: Results) -> str:
    """Every single measurement."""
    data = {
        "facts": results.facts,
        "versions": results.versions,
        "idle_cpu_s_per_s": results.idle,
        "skipped": results.skipped,
        "footprints": [asdict(found) for found in results.footprints],
        "measurements": [asdict(m) for m in results.measurements],
    }
    return json.dumps(data, separators=(",", ":")) + "\n"
