"""Log lines: JSON for machines, words for people."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from xim_agent.telemetry.logs import LEVELS, JsonFormatter, ReadableFormatter, configure


@pytest.fixture(autouse=True)
def root() -> Iterator[None]:
    """Leaves the root logger as it was."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_record_is_one_json_object_with_its_facts() -> None:
    stream = io.StringIO()
    configure("info", stream)
    logging.getLogger("x").warning("engine ended", extra={"status": 1, "output_tail": "a\nb"})
    logging.getLogger("x").debug("unseen")
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert {key: entry[key] for key in ("level", "logger", "message", "status", "output_tail")} == {
        "level": "warning",
        "logger": "x",
        "message": "engine ended",
        "status": 1,
        "output_tail": "a\nb",
    }
    assert entry["time"].endswith("+00:00")


def test_on_a_terminal_facts_follow_the_message_and_long_ones_stand_below() -> None:
    stream = Terminal()
    configure("trace", stream)
    logging.getLogger("x").log(LEVELS["trace"], "engine ended", extra={"status": 1, "output_tail": "a\nb"})
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("engine ended  status=1")
    assert "trace" in first
    assert rest == ["  output_tail:", "    a", "    b"]


@pytest.mark.parametrize("formatter", [JsonFormatter(), ReadableFormatter()])
def test_a_traceback_is_kept(formatter: logging.Formatter) -> None:
    try:
        raise ValueError("cause")
    except ValueError as error:
        kind, trace = type(error), error.__traceback__
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", None, (kind, error, trace))
    assert "ValueError: cause" in formatter.format(record)


def test_without_standard_error_nothing_is_written_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has none where whoever started the agent closed it, and a fault then could not even be told."""
    monkeypatch.setattr("sys.stderr", None)
    configure("info")
    logging.getLogger("x").warning("unheard")
