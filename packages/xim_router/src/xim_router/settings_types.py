"""How the values of the router's settings are read (words, booleans, ports, keys), and what is said of a wrong one."""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from annotated_types import Ge, Le
from pydantic import BeforeValidator, SecretStr


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How a log line is written; `auto` is text on a terminal and JSON elsewhere."""

    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


def lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def flag(value: object) -> object:
    """Booleans take 1, 0, true and false in any case, and no other word."""
    if isinstance(value, str) and value.lower() not in ("1", "0", "true", "false"):
        raise ValueError("not a boolean")
    return value


def secret_key_digits(value: SecretStr) -> SecretStr:
    if re.fullmatch(r"[0-9A-Fa-f]{64}", value.get_secret_value()) is None:
        raise ValueError("not 64 hexadecimal digits")
    return value


def data_dir() -> Path:
    return platformdirs.user_data_path("xerotier-router")


HOST = r"^[A-Za-z0-9._:%*-]+$"
"""Names, IPv4 and IPv6 addresses (without brackets, with a zone where they need one), interfaces, `*`."""
Flag = Annotated[bool, BeforeValidator(flag)]
Port = Annotated[int, Ge(1), Le(65_535)]


def extra(group: str, unit: str | None = None, default: str | None = None) -> dict[str, Any]:
    return {"group": group, "unit": unit, "default": default}


storage = partial(extra, "Storage")
listen = partial(extra, "Listening")
limits = partial(extra, "Limits")
logs = partial(extra, "Operation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One wrong value."""

    variable: str
    value: str | None
    """None where it is wrong that there is none."""
    rule: str
    remedy: str

    @property
    def shown(self) -> str:
        """The variable, with its value where it has one."""
        return self.variable if self.value is None else f"{self.variable}={self.value}"


class SettingsInvalid(Exception):
    """One or more variables cannot be used; the message lists all of them."""

    def __init__(self, problems: list[Problem]) -> None:
        lines = [f"  {p.shown}: {p.rule}. {p.remedy}" for p in problems]
        super().__init__("\n".join([f"{len(problems)} setting(s) cannot be used:", *lines]))
        self.problems = tuple(problems)
