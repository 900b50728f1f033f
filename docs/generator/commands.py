"""The reference page of the command lines, walked from the two programs' click commands."""

from collections.abc import Iterator

import click

from docs.generator.markdown import code, page, sentence, table
from xim_agent.cli import main as agent
from xim_router.cli import main as router

_INTRO = """\
Two programs. Both take their settings from the environment ([router](router-settings.md),
[agent](agent-settings.md)). Every command has `--help`. Exit status: 0 when it was done, 1 when it was refused or
failed, 2 for a wrong argument or setting; the message on standard error says what to do. `xerotier-xim-agent run`
ends with 3 where another start would end the same way ([which is which](../howto/deploy-a-node.md#5-the-service))."""

_ROUTER = """\
All commands but `serve` and `settings` work on the database itself: before the first `serve`, and beside a running
one, which learns of a change within a quarter of a second. They need the same environment as `serve`, the secret
key included. `--json` writes JSON on standard output, for programs."""

_AGENT = """\
`xerotier-backend-agent` is another name of the same program. The first SIGTERM, SIGHUP or Ctrl-C drains: nothing new is
taken, what is in flight has 30 s, then the engine is stopped; a second SIGTERM or Ctrl-C
ends at once."""


def commands_page() -> str:
    """docs/reference/cli.md"""
    return page(
        "Commands",
        _INTRO,
        "## xerotier-router",
        _ROUTER,
        *_sections(router, "xerotier-router"),
        "## xerotier-xim-agent",
        _AGENT,
        *_sections(agent, "xerotier-xim-agent"),
    )


def _sections(program: click.Group, name: str) -> Iterator[str]:
    for context in _commands(click.Context(program, info_name=name)):
        command = context.command
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        yield f"### {context.command_path}"
        yield "\n\n".join(filter(None, [_text(command), f"```\n{usage}\n```", _options(context)]))


def _commands(context: click.Context) -> Iterator[click.Context]:
    """The contexts of all commands below `context` that do something, in the order of their help."""
    command = context.command
    if not isinstance(command, click.Group):
        yield context
        return
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        yield from _commands(click.Context(child, info_name=name, parent=context))


def _text(command: click.Command) -> str:
    return "\n\n".join(sentence(paragraph) for paragraph in (command.help or "").split("\n\n"))


def _options(context: click.Context) -> str:
    records = [
        parameter.get_help_record(context)
        for parameter in context.command.get_params(context)
        if isinstance(parameter, click.Option) and "--help" not in parameter.opts
    ]
    rows = [(code(names), text) for names, text in filter(None, records)]
    return table(("option", "what it does"), rows) if rows else ""
