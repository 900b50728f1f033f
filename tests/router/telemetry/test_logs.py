"""Log lines: JSON for machines, text for people, the facts in both."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from xim_router.telemetry.logs import configure_logging, log_facts


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_that_no_terminal_reads_is_json_with_its_facts() -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream)
    logging.getLogger("xim_router.test").warning(
        "stream stalled", extra={"stream": 7, "stalled_s": 30.0, "path": object, "level": "mine"}
    )
    line = json.loads(stream.getvalue())
    assert (line["message"], line["level"], line["logger"]) == ("stream stalled", "warning", "xim_router.test")
    assert (line["stream"], line["stalled_s"], line["path"]) == (7, 30.0, "<class 'object'>")
    assert line["time"].endswith("Z")


def test_a_terminal_gets_text_and_no_fact_can_forge_a_line() -> None:
    stream = Terminal()
    configure_logging("info", stream=stream)
    logging.getLogger("xim_router.test").info("agent enrolled", extra={"agent": "a\nERROR forged", "wait_s": 0.25})
    (line,) = stream.getvalue().splitlines()
    assert "INFO    agent enrolled" in line
    assert r'agent="a\nERROR forged"' in line
    assert "wait_s=0.25" in line


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_traceback_goes_with_its_line(log_format: str) -> None:
    stream = io.StringIO()
    configure_logging("info", log_format, stream)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("xim_router.test").exception("request failed")
    assert "ValueError: why" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1 or log_format == "text"


def test_the_level_holds_and_the_database_driver_never_tells_its_parameters() -> None:
    stream = io.StringIO()
    configure_logging("debug", stream=stream)
    logging.getLogger("xim_router.test").debug("shown")
    logging.getLogger("aiosqlite").debug("executing with parameters")
    assert "shown" in stream.getvalue()
    assert "parameters" not in stream.getvalue()


def test_the_short_way_writes_the_same_line() -> None:
    lines: list[dict[str, object]] = []
    for _ in range(2):
        stream = io.StringIO()
        configure_logging("info", stream=stream)
        logger, facts = logging.getLogger("xim_router.test"), {"request": "r", "status": 200, "level": "mine"}
        if lines:
            log_facts(logger, logging.INFO, "request", facts)
        else:
            logger.info("request", extra=facts)
        lines.append({name: value for name, value in json.loads(stream.getvalue()).items() if name != "time"})
    assert lines[0] == lines[1]


def test_the_short_way_keeps_to_the_level() -> None:
    stream = io.StringIO()
    configure_logging("warning", stream=stream)
    log_facts(logging.getLogger("xim_router.test"), logging.INFO, "request", {"request": "r"})
    assert stream.getvalue() == ""
