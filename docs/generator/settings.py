"""The reference pages of the settings, and the example files of the environment, from the two settings models."""

from itertools import groupby

from docs.generator.markdown import code, page, table
from xim_agent.settings import AgentSettings, shown_value
from xim_agent.settings_check import GONE
from xim_agent.settings_reference import SettingRow
from xim_agent.settings_reference import rows as agent_rows
from xim_router.settings import RouterSettings, Setting
from xim_router.settings import declared as router_rows

_ROUTER_INTRO = """\
The router reads the variables below and nothing else: no file, and of `serve` no flag but `--workers`. An empty
variable counts as unset. Wrong values stop the program with status 2 and one message that lists all of them; a
variable that looks like one of these and is none is named with the nearest known one. `xerotier-router settings`
shows what is in force and where each value comes from, secrets masked; `xerotier-router serve --help` shows this
page."""

_AGENT_INTRO = """\
A flag wins over its variable, a variable over the default. An empty variable counts as unset, because Compose files
pass empty strings. Wrong values stop the program with status 2 and one message that lists all of them.
`xerotier-xim-agent settings` shows what is in force, secrets masked; `xerotier-xim-agent run --help` shows this
page.

Flags belong to the commands `run` or `enroll`, as the last column says. A flag without a value switches its setting
on."""

_STRICT = """\
A switch that takes *exactly* `0`, `1`, `true` or `false` keeps its default on any other word, and a warning names
the variable; the other switches take the four words in any case and refuse every other."""


def router_page() -> str:
    """docs/reference/router-settings.md"""
    parts = [_ROUTER_INTRO]
    for group, rows in groupby(router_rows(), key=lambda row: row.group):
        parts.append(f"## {group}")
        parts.append(table(("variable", "default", "takes", "what it does"), (_router_row(row) for row in rows)))
    return page("Router settings", *parts)


def agent_page() -> str:
    """docs/reference/agent-settings.md"""
    parts = [_AGENT_INTRO, _STRICT]
    for group, rows in groupby(agent_rows(), key=lambda row: row.group):
        parts.append(f"## {group.value}")
        titles = ("variable", "default", "takes", "what it does", "flag")
        parts.append(table(titles, (_agent_row(row) for row in rows)))
    parts += ["## Without effect in this version", _without_effect(), "## Gone", _gone()]
    return page("Agent settings", *parts)


def router_environment() -> str:
    """deploy/env/router.env.example"""
    lines = _head("xerotier-router", "router-settings")
    for group, rows in groupby(router_rows(), key=lambda row: row.group):
        lines += ["", f"# --- {group}"]
        for row in rows:
            value = _router_value(row)
            facts = f"It {row.rule}. Default: {_words(value, row.default, row.unit or '')}."
            lines += ["", *_comment(f"{row.description} {facts}"), f"#{row.variable}={value}"]
    return "\n".join(lines) + "\n"


def agent_environment() -> str:
    """deploy/env/agent.env.example; settings that have no effect yet are left out."""
    lines = _head("xerotier-xim-agent", "agent-settings")
    for group, rows in groupby((row for row in agent_rows() if not row.not_yet), key=lambda row: row.group):
        lines += ["", f"# --- {group.value}"]
        for row in rows:
            takes = f" Takes {row.takes}." if row.takes else ""
            value = _agent_value(row)
            text = f"{row.description} Default: {_words(value, row.default, row.unit)}.{takes}"
            lines += ["", *_comment(text), f"#{row.variable}={value}"]
    return "\n".join(lines) + "\n"


def _router_row(row: Setting) -> tuple[str, ...]:
    takes = row.rule.removeprefix("must be ")
    return code(row.variable), _default(_router_value(row), row.default, row.unit or ""), takes, row.description


def _agent_row(row: SettingRow) -> tuple[str, ...]:
    what = row.description if not row.not_yet else f"{row.description} *No effect yet.*"
    flag = f"{code(row.flag)} ({', '.join(row.commands)})" if row.flag else ""
    return code(row.variable), _default(_agent_value(row), row.default, row.unit), row.takes, what, flag


def _default(value: str, words: str, unit: str) -> str:
    """A value as code with its unit; a default that the model describes in words stays words."""
    return f"{code(value)} {unit}".strip() if value else words


def _router_value(row: Setting) -> str:
    """The default as an operator would write it; nothing where there is none, or where it depends on the machine."""
    extra = RouterSettings.model_fields[row.field].json_schema_extra
    assert isinstance(extra, dict)
    return "" if row.secret or extra["default"] or row.default == "none" else row.default


def _agent_value(row: SettingRow) -> str:
    """As `_router_value`."""
    return "" if row.in_words else shown_value(AgentSettings.model_fields[row.field].default)


def _words(value: str, words: str, unit: str) -> str:
    return f"{value} {unit}".strip() if value else words


def _without_effect() -> str:
    intro = (
        "These are read and checked, so that an environment written for a later version is not refused; a warning at "
        "the start names each one that is set."
    )
    rows = [(code(row.variable), row.not_yet) for row in agent_rows() if row.not_yet]
    return f"{intro}\n\n{table(('variable', 'what holds until then'), rows)}"


def _gone() -> str:
    return table(("variable", "instead"), [(code(name), text) for name, text in GONE.items()])


def _head(program: str, reference: str) -> list[str]:
    return [
        f"# Environment of {program}. Take the sign before a line away to set it; an empty value counts as unset.",
        f"# Written by `make docs` from the code. All of it, with units: docs/reference/{reference}.md",
    ]


def _comment(text: str, width: int = 118) -> list[str]:
    """`text` as comment lines; words are never split, a default may hold a path."""
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) + 1 > width:
            lines.append(f"# {line}")
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, f"# {line}"]
