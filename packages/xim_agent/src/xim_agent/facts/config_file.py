"""Reading a model's JSON files: bounded, and every fault named with its file and what to do about it."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xim_agent.facts.model import ModelUnreadable

CONFIG_LIMIT_BYTES = 16 * 1024**2
"""No published config.json comes near it; a file of another kind under that name does."""
LARGEST = 2**53
"""No size in a config.json comes near it, and all that is computed from one stays a number."""
FETCH_AGAIN = "Fetch the model again, or name a directory that holds a complete one"


class Config:
    """The values of one JSON object, each asked for by every name that model families give it.

    A value of the wrong type is a fault of the file (`ModelUnreadable`); a missing one and `null` are `None`.
    """

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file, self._values = file, values

    def has(self, name: str) -> bool:
        """Whether `name` is there and not null."""
        return self._values.get(name) is not None

    def integer(self, *names: str) -> int | None:
        """The first of `names` that is there, a whole number of at least 0.

        Of a list, which has one for each layer (HunYuan) or each part (ERNIE-VL), the largest, so that nothing is
        underestimated; vLLM's `get_num_experts` and `get_num_experts_per_token` take such lists as well.
        """
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            numbers = value if isinstance(value, list) and value else [value]
            if not all(type(number) is int and 0 <= number <= LARGEST for number in numbers):
                raise self.fault(f"{name} is {_shown(value)}, which is not a whole number of at least 0")
            return int(max(numbers))
        return None

    def positive(self, *names: str) -> int | None:
        """The first of `names` that is there, a whole number; `None` where it is 0 or below (-1 often means none)."""
        for name in names:
            value = self._values.get(name)
            if isinstance(value, bool) or (value is not None and not isinstance(value, int)):
                raise self.fault(f"{name} is {_shown(value)}, which is not a whole number")
            if value is not None:
                return value if value > 0 else None
        return None

    def required(self, *names: str) -> int:
        """As `integer`, above 0, of a value without which nothing can be planned."""
        value = self.integer(*names)
        if not value:
            raise self.fault(f"it has no {' or '.join(names)} above 0")
        return value

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self._values.get(name)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != value
            or abs(value) == float("inf")
        ):
            raise self.fault(f"{name} is {_shown(value)}, which is not a number")
        return float(value)

    def text(self, *names: str) -> str | None:
        """The first of `names` that is there, a string."""
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            if not isinstance(value, str):
                raise self.fault(f"{name} is {_shown(value)}, which is not a string")
            return value
        return None

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A boolean."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fault(f"{name} is {_shown(value)}, which is not true or false")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where there is none."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise self.fault(f"{name} is not a list of strings")
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; empty where there is none."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(part, int) and part >= 0 for part in value):
            raise self.fault(f"{name} is not a list of whole numbers")
        return tuple(value)

    def inner(self, *names: str) -> "Config | None":
        """The first of `names` that holds an object, or nothing."""
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            if not isinstance(value, dict):
                raise self.fault(f"{name} is not an object")
            return Config(self.file, value)
        return None

    def inners(self) -> "list[Config]":
        """Every value that is itself an object."""
        return [Config(self.file, value) for value in self._values.values() if isinstance(value, dict)]

    def all_texts(self) -> set[str]:
        """Every value, all of which are strings."""
        values = set()
        for name, value in self._values.items():
            if not isinstance(value, str):
                raise self.fault(f"{name[:80]} is not a string")
            values.add(value)
        return values

    def over(self, defaults: Mapping[str, Any]) -> "Config":
        """These values, and those of `defaults` where one is missing or null."""
        return Config(
            self.file, {**defaults, **{name: value for name, value in self._values.items() if value is not None}}
        )

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Config":
        """These values, null included, and those of `defaults` that are not mentioned at all."""
        return Config(self.file, {**defaults, **self._values})

    def beneath(self, upper: "Config") -> "Config":
        """The values of `upper`, and these where it has none."""
        return upper.over(self._values)

    def fault(self, what: str) -> ModelUnreadable:
        """What is wrong with this file."""
        return ModelUnreadable(self.file, what, f"{FETCH_AGAIN}.")


def read_config(file: Path, limit_bytes: int = CONFIG_LIMIT_BYTES) -> Config:
    """The JSON object in `file`. Blocks.

    Raises:
        ModelUnreadable: it is missing, cannot be read, is too large, or is not a JSON object.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ModelUnreadable(file, "it is no file", f"{FETCH_AGAIN}.")
        size = found.st_size
        if size > limit_bytes:
            raise ModelUnreadable(
                file, f"it has {size} bytes, more than the {limit_bytes} such a file may have", f"{FETCH_AGAIN}."
            )
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelUnreadable(file, "it is not there", f"{FETCH_AGAIN}.") from None
    except OSError as error:
        raise ModelUnreadable(file, f"it cannot be read: {error.strerror}", "Let the agent's user read it.") from None
    except (ValueError, RecursionError) as error:
        raise ModelUnreadable(file, f"it is not JSON ({error})", f"{FETCH_AGAIN}.") from None
    if not isinstance(values, dict):
        raise ModelUnreadable(file, "it is not a JSON object", f"{FETCH_AGAIN}.")
    return Config(file, values)


def _shown(value: object) -> str:
    """A wrong value as a message quotes it."""
    return repr(value)[:80]
