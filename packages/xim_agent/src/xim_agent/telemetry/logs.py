"""Log setup: readable lines on a terminal, one JSON object per line elsewhere. Facts travel in `extra`."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

TRACE = 5
NOTICE = 25
LEVELS = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "notice": NOTICE,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
"""Every word of LOG_LEVEL; trace and notice are not among the standard library's."""

# What every record has; anything else came in by `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(level: str, stream: TextIO | None = None) -> None:
    """Log everything from `level` up to `stream` (standard error), replacing an earlier set-up."""
    stream = sys.stderr if stream is None else stream
    logging.addLevelName(TRACE, "TRACE")
    logging.addLevelName(NOTICE, "NOTICE")
    handler: logging.Handler = logging.NullHandler()
    if stream is not None:  # standard error may have been closed by whoever started this
        handler = logging.StreamHandler(stream)
        handler.setFormatter(ReadableFormatter() if stream.isatty() else JsonFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(LEVELS[level])
    # One line per HTTP request to the engine would be ours to write, not theirs.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def facts_of(record: logging.LogRecord) -> dict[str, object]:
    """The fields given by `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """One object per record: time (UTC), level, logger, message, then the facts."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **facts_of(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class ReadableFormatter(logging.Formatter):
    """Time, level and message, then the facts as name=value; long texts on lines of their own."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{time} {record.levelname.lower():8}{record.getMessage()}"
        blocks: list[str] = []
        for name, value in facts_of(record).items():
            text = str(value)
            if "\n" in text:
                blocks.append(f"\n  {name}:\n    " + text.replace("\n", "\n    "))
            else:
                line += f"  {name}={text}"
        if record.exc_info:
            blocks.append("\n" + self.formatException(record.exc_info))
        return line + "".join(blocks)
