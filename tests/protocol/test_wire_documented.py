"""The reference page names every kind, field, word and limit of the code, and nothing else."""

import inspect
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from xim_protocol import agent_outbox, agent_session, codec, grants, messages
from xim_protocol.codec import BATCH_KIND, ENTRY_SHAPES, KINDS, Shape
from xim_protocol.errors import FaultReason
from xim_protocol.messages import EntryKind, Verdict
from xim_protocol.routes import ROUTES

PAGE = (Path(__file__).parents[2] / "docs/reference/wire-protocol.md").read_text()
Row = tuple[str, str]


def tables() -> dict[str, list[Row]]:
    """For every heading of the page, the first two columns of the table under it."""
    found: dict[str, list[Row]] = {}
    for part in re.split(r"^#{2,4} ", PAGE, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        rows = re.findall(r"^\| `([^|]+)` \| ([^|]*?) \|", text, re.MULTILINE)
        found[heading.strip()] = [(name, re.sub(r"\[([^\]]+)\]\(#[^)]*\)", r"\1", form)) for name, form in rows]
    return found


TABLES = tables()


def describe(shape: Shape) -> str:
    """How the page writes a shape."""
    match shape.form, shape.parts:
        case "uint", (least, limit):
            return f"integer {least:,}..{limit:,}"
        case "number", (least, limit):
            return f"number {least:g}..{limit:g}"
        case "text", (limit,):
            return f"text, up to {limit:,} characters"
        case "raw", (least, limit):
            return f"{limit} bytes" if least == limit else f"{least:,} to {limit:,} bytes"
        case "flag", _:
            return "boolean"
        case "word", (kind,):
            return str(kind.__name__)
        case "verdict", _:
            return "Verdict"
        case "one_of", words:
            return " or ".join(f"`{word}`" for word in words)
        case _:
            return _describe_composed(shape)


def _describe_composed(shape: Shape) -> str:
    match shape.form, shape.parts:
        case "optional", (inner,):
            return f"{describe(inner)}, or nil"
        case "many", (inner, limit):
            return f"up to {limit:,} of {describe(inner)}"
        case "fields", inner:
            return f"({'; '.join(map(describe, inner))})"
        case "record", (cls, _):
            return str(cls.__name__)
        case form, _:
            raise NotImplementedError(f"no words for the form {form}")


def records_in(shape: Shape) -> dict[str, dict[str, Shape]]:
    """Every record that `shape` is made of, by its name."""
    if shape.form == "record":
        cls, inner = shape.parts
        found = {cls.__name__: inner}
        for part in inner.values():
            found |= records_in(part)
        return found
    return {name: row for part in shape.parts if isinstance(part, Shape) for name, row in records_in(part).items()}


RECORDS = {name: row for _, shape in KINDS.values() for name, row in records_in(shape).items()}
WORDS = {
    name: kind
    for name, kind in vars(messages).items()
    if inspect.isclass(kind) and issubclass(kind, StrEnum) and kind not in (StrEnum, messages.Channel)
}


def entry_fields() -> dict[int, list[str]]:
    """The names of an entry's fields, as the source of `EntryKind` states them."""
    stated = re.findall(r"`\((\d), ([\w, ]+)\)`", inspect.getsource(EntryKind))
    return {int(kind): names.split(", ") for kind, names in stated}


def heading_of(cls: str) -> str:
    kinds = {known.__name__: kind for kind, (known, _) in KINDS.items()}
    return f"{cls} ({kinds[cls]})" if cls in kinds else cls


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_a_message_stands_in_its_table_in_the_order_of_the_wire(name: str) -> None:
    assert TABLES[heading_of(name)] == [(field, describe(shape)) for field, shape in RECORDS[name].items()]


@pytest.mark.parametrize("kind", EntryKind)
def test_every_field_of_an_entry_stands_in_its_table(kind: EntryKind) -> None:
    names, shapes = entry_fields()[kind], ENTRY_SHAPES[kind].parts
    assert TABLES[f"{kind.name} ({kind.value})"] == [
        (name, describe(shape)) for name, shape in zip(names, shapes, strict=True)
    ]


def test_the_list_of_kinds_is_complete() -> None:
    expected = [(str(kind), cls.__name__) for kind, (cls, _) in KINDS.items()] + [(str(BATCH_KIND), "Batch")]
    assert TABLES["Kinds"] == expected


@pytest.mark.parametrize("name", WORDS)
def test_every_word_of_a_closed_set_stands_in_its_table(name: str) -> None:
    assert [word for word, _ in TABLES[name]] == [member.value for member in WORDS[name]]


def test_every_verdict_stands_in_its_table() -> None:
    assert TABLES["Verdict"] == [(str(verdict.value), verdict.name.lower().replace("_", " ")) for verdict in Verdict]


def test_every_fault_stands_in_its_table() -> None:
    assert [word for word, _ in TABLES["Faults"]] == [reason.value for reason in FaultReason]


def test_every_route_stands_in_its_table() -> None:
    assert [path for path, _ in TABLES["Routes"]] == [route.path for route in ROUTES]


def test_every_limit_stands_in_its_table_with_its_value() -> None:
    limits: dict[str, Any] = {}
    for module in (codec, grants, agent_session, agent_outbox):
        numbers = {name: value for name, value in vars(module).items() if isinstance(value, int | float)}
        named = {name: value for name, value in numbers.items() if name.isupper() and not name.endswith("_KIND")}
        assert all(limits.get(name, value) == value for name, value in named.items()), "one name, two limits"
        limits |= named
    limits.pop("PROTOCOL_VERSION")
    assert dict(TABLES["Limits"]) == {name: f"{value:,}" for name, value in limits.items()}


def test_every_message_stands_among_those_of_its_sender() -> None:
    parts = re.split(r"^## (Messages .*)$", PAGE.partition("\n## Entries")[0], flags=re.MULTILINE)[1:]
    senders = {"Messages from the agent": ("agent", "either"), "Messages from the router": ("router",)}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        stated = re.findall(r"^From: (\w+), (\w+)", text, re.MULTILINE)
        assert stated
        for sender, socket in stated:
            assert sender in senders.get(heading, ("agent", "router"))
            assert (socket == "streaming") is (heading == "Messages on streaming")


def test_the_page_has_no_table_that_the_code_does_not_know() -> None:
    known = {heading_of(name) for name in RECORDS} | {f"{kind.name} ({kind.value})" for kind in EntryKind}
    known |= {*WORDS, "Kinds", "Verdict", "Faults", "Routes", "Limits"}
    assert {heading for heading, rows in TABLES.items() if rows} <= known


def test_the_page_names_the_version_it_describes() -> None:
    assert f"protocol version {messages.PROTOCOL_VERSION}" in PAGE
