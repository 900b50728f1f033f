"""Log set-up: JSON lines where a machine reads, text where a person does; the facts are in `extra` either way."""

import logging
import sys
import time
from typing import TextIO

import msgspec

# A tenth of what `json.dumps` takes, for one line per request; no ids or bodies are looked into.
_encode = msgspec.json.Encoder(enc_hook=str).encode

# What logging itself puts on a record; everything else came in `extra`.
_KNOWN = "known_facts"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", _KNOWN}


def configure_logging(
    level: str, log_format: str = "auto", stream: TextIO | None = None, *, worker: int | None = None
) -> None:
    """Send every record of at least `level` to `stream` (standard error), replacing what was configured before.

    `log_format` is `text`, `json`, or `auto`: text when `stream` is a terminal. `worker` stands in every line where
    several processes write to one log.
    """
    target = sys.stderr if stream is None else stream
    text = log_format == "text" or (log_format == "auto" and target.isatty())
    handler = logging.StreamHandler(target)
    everywhere: dict[str, object] = {} if worker is None else {"worker": worker}
    handler.setFormatter(TextFormatter(everywhere) if text else JsonFormatter(everywhere))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Not asked for what no line says (the logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # The database driver logs every statement at DEBUG, parameters included, and those hold hashes of secrets.
    for noisy in ("aiosqlite", "sqlalchemy", "asyncio", "alembic", "multipart"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))


def log_facts(
    logger: logging.Logger, level: int, message: str, facts: dict[str, object], *, at: float | None = None
) -> None:
    """As `logger.log(level, message, extra=facts)` for a line of every request: nobody looks for the calling line.

    The line is of the Unix time `at`, in seconds, where it tells of something earlier. `facts` must not be named as
    what logging itself puts on a record.
    """
    if logger.isEnabledFor(level):
        record = logging.LogRecord(logger.name, level, "", 0, message, None, None)
        if at is not None:
            record.created, record.msecs = at, at % 1.0 * 1000
        known = vars(record)
        known.update(facts)
        # What a formatter need not look for among the record's forty other attributes.
        known[_KNOWN] = facts
        logger.handle(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, then the facts."""

    def __init__(self, everywhere: dict[str, object] | None = None) -> None:
        """`everywhere` are facts that stand in every line."""
        super().__init__()
        self._everywhere = everywhere or {}
        self._second = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        """`record` as one line; a fact that JSON cannot hold is written as its text."""
        own: dict[str, object] = {
            "time": self._timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        # First by their place, and last by their values: no fact may say when a line was written.
        line = own | _facts(record) | self._everywhere | own
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _encode(line).decode()

    def _timestamp(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second[0]:
            self._second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._second[1]}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """`12:00:01 INFO message  fact=value ...`, and the traceback below where there is one."""

    def __init__(self, everywhere: dict[str, object] | None = None) -> None:
        """`everywhere` are facts that stand in every line."""
        super().__init__()
        self._everywhere = everywhere or {}

    def format(self, record: logging.LogRecord) -> str:
        """`record` as a line for people."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        facts = "".join(f"  {name}={_word(value)}" for name, value in (_facts(record) | self._everywhere).items())
        line = f"{clock} {record.levelname:<7} {record.getMessage()}{facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _facts(record: logging.LogRecord) -> dict[str, object]:
    known: dict[str, object] | None = vars(record).get(_KNOWN)
    if known is not None:
        return known
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def _word(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    # A fact from outside must not be able to write a line of its own.
    return text if text.isprintable() and " " not in text else _encode(text).decode()
