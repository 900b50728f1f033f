"""Log set-up: JSON lines where a machine reads, text where a person does; the facts are in `extra` either way."""

import logging
import sys
import time
from typing import TextIO

import msgspec

# A tenth of what `json.dumps` takes, for one line per request; no ids or bodies are looked into.
_encode = msgspec.json.Encoder(enc_hook=str).encode

# What logging itself puts on a record; everything else came in `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


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
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    if worker is not None:

        def name_worker(record: logging.LogRecord) -> bool:
            record.worker = worker
            return True

        handler.addFilter(name_worker)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Not asked for what no line says (the logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # The database driver logs every statement at DEBUG, parameters included, and those hold hashes of secrets.
    for noisy in ("aiosqlite", "sqlalchemy", "asyncio", "alembic", "multipart"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))


def log_facts(logger: logging.Logger, level: int, message: str, facts: dict[str, object]) -> None:
    """As `logger.log(level, message, extra=facts)` for a line of every request: nobody looks for the calling line.

    `facts` must not be named as what logging itself puts on a record.
    """
    if logger.isEnabledFor(level):
        record = logging.LogRecord(logger.name, level, "", 0, message, None, None)
        vars(record).update(facts)
        logger.handle(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, then the facts."""

    def format(self, record: logging.LogRecord) -> str:
        """`record` as one line; a fact that JSON cannot hold is written as its text."""
        line: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in _facts(record).items() if name not in line}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _encode(line).decode()


class TextFormatter(logging.Formatter):
    """`12:00:01 INFO message  fact=value ...`, and the traceback below where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """`record` as a line for people."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        facts = "".join(f"  {name}={_word(value)}" for name, value in _facts(record).items())
        line = f"{clock} {record.levelname:<7} {record.getMessage()}{facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def _timestamp(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _word(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    # A fact from outside must not be able to write a line of its own.
    return text if text.isprintable() and " " not in text else _encode(text).decode()
