"""The page of the fields of a described machine, from the types that read one."""

import ast
import inspect
import json
from typing import Any

from pydantic import TypeAdapter

from docs.generator.markdown import code, page, table
from xim_agent.facts.hardware import FLAGS_OF_INTEREST, CpuFacts, GpuFacts, HardwareFacts, NumaNode

_INTRO = """\
`xerotier-xim-agent plan --hardware FILE` plans for a machine that is not at hand, from its description as JSON. On a
machine that is at hand, `xerotier-xim-agent plan --json` writes one: FILE may be its whole output or the part
`hardware` of it. Every field may be left out where the column does not say *needed*, and then counts as unknown; a
field that stands here for nothing, or a wrong value, is refused by name."""

_PARTS: tuple[tuple[str, type], ...] = (
    ("The machine", HardwareFacts),
    ("One entry of `gpus`", GpuFacts),
    ("`cpu`", CpuFacts),
    ("One entry of `cpu.numa_nodes`", NumaNode),
)

EXAMPLE = {
    "gpus": [
        {"name": "NVIDIA A30", "vendor": "nvidia", "memory_bytes": 25769803776, "compute_capability": "8.0"},
    ],
    "cpu": {"architecture": "x86_64", "physical_cores": 16, "logical_cpus": 32},
    "ram_bytes": 137438953472,
    "system": "Linux",
}


def machine_page() -> str:
    """docs/reference/described-machine.md"""
    written = json.dumps(EXAMPLE, indent=2)
    HardwareFacts.from_json(written)  # an example that is refused stops the page
    parts = [_INTRO, f"```json\n{written}\n```"]
    for title, kind in _PARTS:
        parts += [f"## {title}", table(("field", "takes", "what it is"), _rows(kind))]
    return page("A described machine", *parts)


def _rows(kind: type) -> list[tuple[str, str, str]]:
    schema = TypeAdapter(kind).json_schema()
    # A type that contains none of the others stands at the top, else in the definitions.
    described = schema if "properties" in schema else schema["$defs"][kind.__name__]
    needed = described.get("required", [])
    said = field_docstrings(kind)
    return [
        (code(name), _takes(value, schema.get("$defs", {})) + (", *needed*" if name in needed else ""), said[name])
        for name, value in described["properties"].items()
    ]


def field_docstrings(kind: type) -> dict[str, str]:
    """The text below each field of a class, in the words of JSON."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    said: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            words = str(below.value.value)  # type: ignore[attr-defined]  # as asked above
            words = words.replace("`FLAGS_OF_INTEREST`", ", ".join(code(flag) for flag in FLAGS_OF_INTEREST))
            said[field.target.id] = _capital(words.replace("`None`", "left out"))
    return said


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _takes(value: dict[str, Any], kinds: dict[str, Any]) -> str:
    """What a JSON schema takes, in words; `null` is not named, a field is left out instead."""
    if "anyOf" in value:
        value = next(each for each in value["anyOf"] if each != {"type": "null"})
    if "$ref" in value:
        named = kinds[value["$ref"].rpartition("/")[2]]
        return ", ".join(code(word) for word in named["enum"]) if "enum" in named else "an object"
    if value["type"] == "array":
        inside = value.get("items")
        several = {"integer": "whole numbers", "string": "text", None: "objects"}
        return (
            f"a list of {several[inside.get('type')]}"
            if inside
            else 'two numbers such as `[8, 0]`, or `8.0`, or `"8.0"`'
        )
    word = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "`true` or `false`"}
    bounds = {"exclusiveMinimum": " above {}", "minimum": " of at least {}"}
    return word[value["type"]] + "".join(text.format(value[name]) for name, text in bounds.items() if name in value)
