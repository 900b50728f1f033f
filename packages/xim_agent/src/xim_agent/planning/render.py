"""A plan as vLLM's command line and environment, and as text and JSON for a reader."""

import shlex
from collections.abc import Iterator
from typing import Any

from xim_agent.planning.accelerator import named
from xim_agent.planning.command import EngineCommand
from xim_agent.planning.memory import GIB
from xim_agent.planning.plan import EnginePlan
from xim_agent.settings import MASK, shown_words

COLUMN = 44
"""Longest value that keeps the table's columns; a longer one stands on a line of its own."""


def command_of(plan: EnginePlan) -> EngineCommand:
    """The command; the operator's arguments and variables come last and so win."""
    given = plan.given
    return EngineCommand(
        argv=(
            given.places.executable,
            *("serve", str(given.model.path)),
            *("--served-model-name", given.wanted.served_name),
            *("--uds", str(given.places.socket_path)),
            *(word for decision in plan.decisions for words in decision.arguments for word in words),
            *given.settings.vllm_args,
        ),
        environment={**given.inherited, **planned_environment(plan)},
        socket_path=given.places.socket_path,
        served_name=given.wanted.served_name,
    )


def planned_environment(plan: EnginePlan) -> dict[str, str]:
    """What the plan adds to the environment or changes in it."""
    planned = {name: value for decision in plan.decisions for name, value in decision.environment}
    return {**planned, **plan.given.settings.vllm_env}


def as_text(plan: EnginePlan) -> str:
    """Everything an operator may want to know, in lines of any length."""
    command = command_of(plan)
    sections = [
        list(_head(plan)),
        _table(plan),
        ["Memory of one GPU" if plan.budget.estimate and plan.budget.estimate.overhead_bytes else "Memory"]
        + [f"  {name:<22}{size}" for name, size in _memory(plan)],
        ["Command", *_command_lines(shown_words(command.argv))],
        ["Environment", *(f"  {name}={value}" for name, value in shown_environment(plan).items())],
        *([f"File {file.path}", *(f"  {line}" for line in file.shown.splitlines())] for file in plan.files),
    ]
    if plan.warnings:
        sections.append(["Warnings", *(f"  {sentence}" for sentence in plan.warnings)])
    if plan.problems:
        sections.append(["The engine cannot be started like this", *(f"  {each}" for each in plan.problems)])
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def as_json(plan: EnginePlan) -> dict[str, Any]:
    """The same for a program; `hardware` is a description that `--hardware` takes."""
    command = command_of(plan)
    estimate = plan.estimate
    return {
        "decisions": [
            {
                "option": decision.option,
                "value": decision.value,
                "source": decision.source.value,
                "reason": decision.reason,
                "arguments": [word for words in decision.arguments for word in words],
                "environment": dict(decision.environment),
            }
            for decision in plan.decisions
        ],
        "estimate_bytes": None if estimate is None else estimate.components(),
        "kv_budget_bytes": plan.budget.kv_bytes,
        "device_bytes": plan.budget.device_bytes,
        "max_concurrent": plan.max_concurrent,
        "command": shown_words(command.argv),
        "environment": shown_environment(plan),
        "files": {str(file.path): file.shown for file in plan.files},
        "warnings": list(plan.warnings),
        "problems": list(plan.problems),
        "engine_version": plan.given.engine.version,
        "hardware": plan.given.hardware.to_json(),
        "model": plan.given.model.to_json(),
    }


def shown_environment(plan: EnginePlan) -> dict[str, str]:
    """`planned_environment` without secrets: of the operator's own variables only those show their value that the
    plan has a decision on."""
    decided = {name for decision in plan.decisions for name, _ in decision.environment}
    return {name: value if name in decided else MASK for name, value in planned_environment(plan).items()}


def _head(plan: EnginePlan) -> Iterator[str]:
    """What the plan is for, in three lines."""
    given = plan.given
    model, hardware = given.model, given.hardware
    size = "size not known" if model.parameters is None else f"{model.parameters / 1e9:.2f}e9 parameters"
    kind = model.architectures[0] if model.architectures else model.model_type
    stored = model.dtype or "dtype not named"
    if model.quantization is not None:
        stored = f"{model.quantization.method}, {stored}"
    yield f"model    {model.path}: {kind}, {size}, {stored}"
    ram = "memory not known" if hardware.usable_ram_bytes is None else f"{hardware.usable_ram_bytes / GIB:.0f} GiB"
    cpus = "CPUs not known" if hardware.usable_cpus is None else f"{hardware.usable_cpus:g} CPUs"
    yield f"machine  {named(hardware.gpus) or 'no GPU'}; {hardware.cpu.model or 'CPU'}, {cpus}, {ram}"
    version = given.engine.version or "not asked: every flag is taken to be there, and the packages that it needs"
    yield f"vLLM     {version}"


def _table(plan: EnginePlan) -> list[str]:
    """Option, value, source and reason, under each other."""
    rows = [("decision", "value", "source", "reason")]
    rows += [(each.option, each.value, each.source.value, each.reason) for each in plan.decisions]
    first = max(len(row[0]) for row in rows)
    second = max(len(row[1]) for row in rows if len(row[1]) <= COLUMN)
    third = max(len(row[2]) for row in rows)
    lines = []
    for option, value, source, reason in rows:
        if len(value) > COLUMN:
            lines.append(f"{option:<{first}}  {value}")
            option = value = ""
        lines.append(f"{option:<{first}}  {value:<{second}}  {source:<{third}}  {reason}")
    return lines


def _memory(plan: EnginePlan) -> Iterator[tuple[str, str]]:
    """The estimate by component, and what stands against it."""
    estimate, budget = plan.estimate, plan.budget
    if estimate is None:
        yield "estimate", "not known: the model's files and config.json tell no size"
    else:
        tokens = f"{plan.max_concurrent} × {plan.typical_tokens} tokens at most"
        for name, size in estimate.components().items():
            yield name, _gib(size) + (f"  ({tokens})" if name == "KV cache" else "")
    if budget.device_bytes is not None:
        yield "there is", _gib(budget.device_bytes)
    if budget.kv_bytes is not None:
        yield "left for the KV cache", _gib(budget.kv_bytes)


def _gib(size: int) -> str:
    return f"{size / GIB:8.2f} GiB"


def _command_lines(words: list[str]) -> Iterator[str]:
    """One flag with its values a line."""
    line = ""
    for word in words:
        if word.startswith("--"):
            yield f"  {line} \\"
            line = "  "
        line += ("" if not line.strip() else " ") + shlex.quote(word)
    yield f"  {line}"
