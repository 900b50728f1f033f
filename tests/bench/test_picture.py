"""The picture of a run: bars to scale, whiskers, and one very long bar cut."""

from xml.etree import ElementTree

import pytest

from bench.picture import Bar, Panel, draw, longest_shown, panels_of, svg
from tests.bench.results import cost, first_token, results

SVG = "{http://www.w3.org/2000/svg}"


def panel(**values: list[float]) -> Panel:
    return Panel(title="cost", unit="us", bars=[Bar(name=name, values=found) for name, found in values.items()])


def bars(text: str) -> list[ElementTree.Element]:
    return [found for found in ElementTree.fromstring(text).iter(f"{SVG}rect") if found.get("class")]


def lines(text: str, kind: str) -> list[ElementTree.Element]:
    return [found for found in ElementTree.fromstring(text).iter(f"{SVG}line") if found.get("class") == kind]


def test_bars_are_as_long_as_their_medians() -> None:
    ours, theirs = bars(draw([panel(xim=[9.0, 10.0, 11.0], other=[18.0, 20.0, 25.0])], "a foot"))
    assert float(theirs.attrib["width"]) == pytest.approx(2 * float(ours.attrib["width"]), abs=0.2)
    assert (ours.get("class"), theirs.get("class")) == ("bar ours", "bar")


def test_whiskers_go_from_the_least_to_the_most() -> None:
    text = draw([panel(xim=[5.0, 10.0, 20.0])], "")
    left, right = (float(lines(text, "whisker")[0].attrib[name]) for name in ("x1", "x2"))
    (bar,) = bars(text)
    start, width = float(bar.attrib["x"]), float(bar.attrib["width"])
    assert (left - start, right - start) == pytest.approx((width / 2, 2 * width), abs=0.2)


def test_a_very_long_bar_is_cut_and_the_others_can_be_seen() -> None:
    shown = panel(xim=[10.0], other=[20.0], heavy=[500.0])
    assert longest_shown(shown) == 40.0
    text = draw([shown], "")
    assert len(lines(text, "cut")) == 1
    assert "500 (500 - 500)" in text


def test_a_long_bar_that_fits_is_not_cut() -> None:
    shown = panel(xim=[10.0], other=[50.0])
    assert longest_shown(shown) == 50.0
    assert lines(draw([shown], ""), "cut") == []


@pytest.mark.parametrize("value", [0.0, -1.5])
def test_nothing_is_drawn_below_zero(value: float) -> None:
    (bar,) = bars(draw([panel(xim=[value])], ""))
    assert float(bar.attrib["width"]) == 0.0


def test_names_are_written_as_text() -> None:
    text = draw([Panel(title="a < b", unit="&", bars=[Bar(name="<x>", values=[1.0])])], "<foot>")
    words = [found.text for found in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert words == ["a < b, &", "<x>", "1.00 (1.00 - 1.00)", "<foot>"]


def test_a_run_has_a_panel_per_main_row() -> None:
    scenario = "64 paced at 10 ms, lockstep"
    run = results(
        [
            *cost("xim", "128 streams, spread", 10.0, 12.0),
            *first_token("engine alone", scenario, 1.0, 1.0),
            *first_token("xim", scenario, 3.0, 3.0),
        ]
    )
    found = {panel.title: [(bar.name, bar.middle) for bar in panel.bars] for panel in panels_of(run)}
    assert found == {
        "CPU of the router per relayed chunk, 128 streams, spread": [("xim", 11.0)],
        "Added time to first token, p50, 64 paced clients": [("xim", pytest.approx(2.0))],
    }
    assert ElementTree.fromstring(svg(run) or "").tag == f"{SVG}svg"


def test_a_run_without_main_rows_has_no_picture() -> None:
    assert svg(results(cost("xim", "1 stream", 1.0, 1.0))) is None


def test_the_foot_says_who_had_fewer_chunks() -> None:
    text = svg(results(cost("xim", "128 streams, spread", 1.0, 1.0)))
    assert text is not None
    assert "Streams of litellm: a tenth of the chunks" in text
