"""The main rows of a run as one SVG: a bar per router, whiskers from the least to the most of the repeats."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bench.record import OURS, Results
from bench.scenario import Measurement

_WIDTH, _LABEL, _VALUES = 860, 150, 190
_BAR, _GAP, _HEAD, _FOOT = 16, 6, 34, 14
_CUT = 6.0
"""A bar this many times as long as the second longest is cut, or nothing else could be seen."""
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600}.small{font-size:11px;fill:#59636e}"
    ".bar{fill:#8c959f}.ours{fill:#0969da}.whisker{stroke:#1f2328;stroke-width:1.5}.cut{stroke:#fff;stroke-width:3}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One router's measurements of one thing, at least one."""

    name: str
    values: Sequence[float]

    @property
    def middle(self) -> float:
        """How long it is drawn: no bar is shorter than nothing."""
        return max(0.0, statistics.median(self.values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One thing that was measured of several routers."""

    title: str
    unit: str
    bars: list[Bar]


def svg(results: Results) -> str | None:
    """The picture of this run, or None if it has none of the main rows."""
    panels = panels_of(results)
    facts = results.facts
    foot = (
        f"Medians of {results.repeats} repeats, whiskers from the least to the most. "
        f"{facts['cores']} x {facts['cpu']}, {facts['date'][:10]}, commit {facts['commit']}"
    )
    if results.slow:
        foot += f". Streams of {', '.join(results.slow)}: a tenth of the chunks"
    return draw(panels, foot) if panels else None


def panels_of(results: Results) -> list[Panel]:
    """The main rows, those that this run has."""

    def cpu(measurement: Measurement) -> float | None:
        return measurement.cpu_us_per_unit("router")

    rows = [
        (
            f"CPU of the router per relayed chunk, {name}",
            "us",
            {r: results.series(name, r, cpu) for r in results.routers},
        )
        for name in ("128 streams, spread", "128 streams, lockstep", "256 streams, spread")
    ]
    name = "64 paced at 10 ms, lockstep"
    added = {router: results.added(name, router, lambda m: m.ttft_ms("p50")) for router in results.routers}
    rows.append(("Added time to first token, p50, 64 paced clients", "ms", added))
    name = "JSON answer of 1 kB, 64 clients"
    rates = {router: results.series(name, router, lambda m: m.rate) for router in results.routers}
    rows.append(("JSON answers per second, 64 clients (more is better)", "/s", rates))
    idle = {
        router: results.footprint(router, lambda f: f.per_idle_stream.get("router", 0.0) / 1024 or None)
        for router in dict.fromkeys(found.subject for found in results.footprints)
    }
    rows.append(("Memory of the router per idle stream", "KiB", idle))
    bars = [(title, unit, [Bar(name=r, values=v) for r, v in found.items() if v]) for title, unit, found in rows]
    return [Panel(title=title, unit=unit, bars=found) for title, unit, found in bars if found]


def draw(panels: list[Panel], foot: str) -> str:
    """All panels, one below the other, each to its own scale."""
    parts, top = [], 0
    for panel in panels:
        drawn, height = _panel(panel, top)
        parts += drawn
        top += height
    parts.append(f'<text class="small" x="8" y="{top + _FOOT}">{escape(foot)}</text>')
    height = top + 2 * _FOOT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">'
        f'<style>{_STYLE}</style><rect width="{_WIDTH}" height="{height}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def longest_shown(panel: Panel) -> float:
    """What the full width of the panel stands for: the most of all that is not cut."""
    middles = sorted(bar.middle for bar in panel.bars)
    cut = len(middles) > 1 and middles[-2] > 0 and middles[-1] > _CUT * middles[-2]
    shown = [bar for bar in panel.bars if not (cut and bar.middle == middles[-1])]
    return max(*(max(bar.values) for bar in shown), *(bar.middle for bar in shown), 0.0) * (2.0 if cut else 1.0) or 1.0


def _panel(panel: Panel, top: int) -> tuple[list[str], int]:
    scale = (_WIDTH - _LABEL - _VALUES) / longest_shown(panel)
    parts = [f'<text class="title" x="8" y="{top + 22}">{escape(panel.title)}, {escape(panel.unit)}</text>']
    for position, bar in enumerate(panel.bars):
        parts += _bar(bar, top + _HEAD + position * (_BAR + _GAP), scale)
    return parts, _HEAD + len(panel.bars) * (_BAR + _GAP) + _GAP


def _bar(bar: Bar, top: int, scale: float) -> list[str]:
    full = _WIDTH - _LABEL - _VALUES
    length = bar.middle * scale
    is_cut = length > full
    shown = min(length, full)
    kind = "bar ours" if bar.name.partition(",")[0] == OURS else "bar"
    base, middle = top + _BAR - 4, top + _BAR / 2
    least, most = (min(full, max(0.0, value) * scale) for value in (min(bar.values), max(bar.values)))
    parts = [
        f'<text x="{_LABEL - 8}" y="{base}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect class="{kind}" x="{_LABEL}" y="{top}" width="{shown:.1f}" height="{_BAR}"/>',
    ]
    end = shown
    if is_cut:
        parts.append(_line("cut", _LABEL + 0.9 * full, top + _BAR, _LABEL + 0.9 * full + 8, top))
    else:
        end = max(shown, most)
        parts.append(_line("whisker", _LABEL + least, middle, _LABEL + most, middle))
        parts += [_line("whisker", _LABEL + x, top + 4, _LABEL + x, top + _BAR - 4) for x in (least, most)]
    words = f"{_short(statistics.median(bar.values))} ({_short(min(bar.values))} - {_short(max(bar.values))})"
    parts.append(f'<text class="small" x="{_LABEL + end + 8:.1f}" y="{base}">{words}</text>')
    return parts


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _short(value: float) -> str:
    """Three digits are enough in a picture."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
