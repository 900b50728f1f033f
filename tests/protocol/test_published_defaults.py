"""Why there are two ledgers: the numbers of `docs/explanation/flow-control.md`, recomputed."""

import re
from pathlib import Path

import pytest

from xim_protocol.messages import FlowControl

PAGE = (Path(__file__).parents[2] / "docs/explanation/flow-control.md").read_text()
PUBLISHED = FlowControl()
ENOUGH_BYTES = 50_000_000


def sent_by_one_ledger(streams: int, chunk: int) -> int | None:
    """Bytes after which the published defaults, read literally, stop for good; None when they do not.

    Streams take turns, every client reads at once. One ledger: what a stream owes is granted back when it is
    `replenish_threshold` of its window, and all streams pause while the sum of what they owe is at the threshold.
    """
    owed = [0] * streams
    due = PUBLISHED.replenish_threshold * PUBLISHED.window_bytes
    total = 0
    while total < ENOUGH_BYTES:
        for stream in range(streams):
            if sum(owed) >= PUBLISHED.pause_threshold_bytes:
                return total
            total += chunk
            owed[stream] += chunk
            if owed[stream] >= due:
                owed[stream] = 0
    return None


DOCUMENTED = [
    (int(streams), int(chunk.replace(",", "")), outcome)
    for streams, chunk, outcome in re.findall(r"^\| (\d+) \| ([\d,]+) \| (.+?) \|$", PAGE, re.MULTILINE)
]


def test_the_page_shows_both_outcomes() -> None:
    assert {outcome == "goes on" for _, _, outcome in DOCUMENTED} == {True, False}


@pytest.mark.parametrize(("streams", "chunk", "outcome"), DOCUMENTED)
def test_a_row_of_the_page_is_what_one_ledger_does(streams: int, chunk: int, outcome: str) -> None:
    stopped = sent_by_one_ledger(streams, chunk)
    assert outcome == ("goes on" if stopped is None else f"stops for good after {stopped:,} bytes")


def test_the_published_numbers_of_the_page_are_the_defaults() -> None:
    for value in (PUBLISHED.window_bytes, PUBLISHED.pause_threshold_bytes, PUBLISHED.stall_timeout_ms // 1000):
        assert f"{value:,}" in PAGE


def test_four_sleeping_clients_hold_the_whole_pause_of_one_ledger() -> None:
    assert PUBLISHED.pause_threshold_bytes == 4 * PUBLISHED.window_bytes
