"""The table of settings as text: for `--help`, for the reference page and for the Compose comments."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, get_args

from pydantic.fields import FieldInfo

from xim_agent.settings import NOT_YET_EFFECTIVE, AgentSettings, default_of, shown_value
from xim_agent.settings_types import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingRow:
    """One setting, in words."""

    field: str
    variable: str
    group: Group
    default: str
    in_words: bool
    """The default is a sentence, and no value that could be set."""
    unit: str
    takes: str
    """Range or words, such as `1 to 65535`; empty where any text will do."""
    description: str
    commands: tuple[str, ...]
    """Commands that have a flag for it."""
    not_yet: str
    """Why it has no effect in this version; empty when it has."""

    @property
    def flag(self) -> str:
        """Its flag, such as `--max-concurrent`, or nothing."""
        names = {"vllm_args": "vllm-arg", "vllm_quantization": "quantization", "allow_insecure": "insecure"}
        return "--" + names.get(self.field, self.field).replace("_", "-") if self.commands else ""


def rows() -> Iterator[SettingRow]:
    """Every setting, in the table's order."""
    for field, info in AgentSettings.model_fields.items():
        extra: dict[str, Any] = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        yield SettingRow(
            field=field,
            variable=str(info.alias),
            group=extra["group"],
            default=default_of(info) or "none",
            in_words=bool(extra["shown"]),
            unit=extra["unit"],
            takes=_takes(info, strict=extra["strict"]),
            description=str(info.description),
            commands=tuple(extra["flag"].split()),
            not_yet=NOT_YET_EFFECTIVE.get(field, ""),
        )


def help_text() -> str:
    """Every variable, by group, for the end of `--help`."""
    lines: list[str] = []
    group: Group | None = None
    for row in rows():
        if row.group is not group:
            group = row.group
            lines += ["", f"{group}:"]
        unit = f" {row.unit}" if row.unit and row.default.replace(".", "").isdigit() else ""
        limits = f"; {row.takes}" if row.takes else ""
        lines.append(f"  {row.variable}  [{row.default}{unit}{limits}]")
        lines.append(f"      {row.description}")
        if row.not_yet:
            lines.append(f"      No effect in this version: {row.not_yet}.")
    return "\n".join(lines)


def _takes(info: FieldInfo, *, strict: bool) -> str:
    """The rule of a value, read from its type and its bounds."""
    kinds = [kind for kind in (get_args(info.annotation) or (info.annotation,)) if kind is not type(None)]
    kind = kinds[0]
    if kind is bool:
        return "exactly 0, 1, true or false" if strict else "1, 0, true or false"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return ", ".join(word.value for word in kind)
    names = ("ge", "gt", "le", "lt")
    bounds = {name: getattr(each, name) for each in _metadata(info) for name in names if hasattr(each, name)}
    words = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    return " and ".join(words[name].format(shown_value(bound)) for name, bound in bounds.items())


def _metadata(info: FieldInfo) -> Iterator[object]:
    """Bounds of the field and, for an optional one, of the type inside."""
    yield from info.metadata
    for part in get_args(info.annotation):
        for each in getattr(part, "__metadata__", ()):
            yield from getattr(each, "metadata", ()) or (each,)
