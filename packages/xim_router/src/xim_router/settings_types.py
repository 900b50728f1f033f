"""How the values of the router's settings are read and shown, and what is said of a wrong one."""

import re
import types
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import platformdirs
from annotated_types import Ge, Le
from pydantic import BeforeValidator, SecretStr
from pydantic.fields import FieldInfo


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
    """Where the XDG data home is.

    Raises:
        SettingsInvalid: the user has no home, as a number without an entry in a container has none.
    """
    try:
        return platformdirs.user_data_path("xerotier-router")
    except RuntimeError:
        rule = "this user has no home directory, in which it would be"
        remedy = "Set it to an absolute path."
        problem = Problem(variable="XEROTIER_ROUTER_DATA_DIR", value=None, rule=rule, remedy=remedy)
        raise SettingsInvalid([problem]) from None


HOST = r"^[A-Za-z0-9._:%*-]+$"
"""Names, IPv4 and IPv6 addresses (without brackets, with a zone where they need one), interfaces, `*`."""
TOLD_HOST = r"^(?:[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]{1,44})$"
"""What agents take in an address that they are told: a name of DNS, or an address without a zone."""
NOT_UTF8 = "is not UTF-8"
Flag = Annotated[bool, BeforeValidator(flag)]
Port = Annotated[int, Ge(1), Le(65_535)]


def extra(group: str, unit: str | None = None, default: str | None = None) -> dict[str, Any]:
    return {"group": group, "unit": unit, "default": default}


storage = partial(extra, "Storage")
listen = partial(extra, "Listening")
limits = partial(extra, "Limits")
logs = partial(extra, "Operation")


def as_shown(value: object) -> str:
    """A value as people read it; a secret is masked."""
    if value is None:
        return "none"
    if isinstance(value, SecretStr):
        return "********"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain_text(value: object) -> str:
    """A value as it was written, secrets too: for a check, never to be shown."""
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def is_utf8(text: str) -> bool:
    """Whether `text`, which the system gave as bytes, was UTF-8: what was not stands in it as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(text: str) -> str:
    """`text` with escapes for what was not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def plain_type(annotation: Any) -> Any:
    """The type itself, without None and without what is annotated to it."""
    if get_origin(annotation) in (types.UnionType, Union):
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def rule_of(info: FieldInfo, name: str) -> str:
    """What a value must be, for the variable that is called `name` without its prefix."""
    kind = plain_type(info.annotation)
    least = next((m.ge for m in info.metadata if isinstance(m, Ge)), None)
    most = next((m.le for m in info.metadata if isinstance(m, Le)), None)
    if kind in (int, float):
        return f"must be a {'whole ' if kind is int else ''}number from {least} to {most}"
    if kind is bool:
        return "must be 1, 0, true or false"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return f"must be one of {', '.join(kind)}"
    rules = {
        "secret_key": "64 hexadecimal digits",
        "enroll_url": "an http:// or https:// URL without query",
        "advertise_host": "a host name or address of at most 253 characters, without port or zone",
    }
    return f"must be {rules.get(name, 'a path' if kind is Path else 'a host' if 'host' in name else 'text')}"


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
        return self.variable if self.value is None else f"{self.variable}={readable(self.value)}"


class SettingsInvalid(Exception):
    """One or more variables cannot be used; the message lists all of them."""

    def __init__(self, problems: list[Problem]) -> None:
        lines = [f"  {p.shown}: {p.rule}. {p.remedy}" for p in problems]
        super().__init__("\n".join([f"{len(problems)} setting(s) cannot be used:", *lines]))
        self.problems = tuple(problems)
