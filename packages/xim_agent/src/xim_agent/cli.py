"""`xerotier-xim-agent`: enroll a node, run its agent, show its settings.

Flags are made from the table of settings; a mistake of the operator ends with a sentence, a remedy and a status, never
with a traceback: 1 for what the router or the node refuses, 2 for a wrong setting, and where `run` ends 3 for what
another start would only repeat.
"""

import asyncio
import io
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from xim_agent.joining import node_facts, version
from xim_agent.link.credentials import CredentialsError, CredentialStore
from xim_agent.link.enrollment import Enroller, EnrollmentFailed, NotEnrolled
from xim_agent.settings import AgentSettings, shown_value
from xim_agent.settings_check import SettingsInvalid, advice, load_settings, warnings
from xim_agent.settings_reference import SettingRow, help_text, rows
from xim_agent.settings_types import Group
from xim_agent.telemetry import logs
from xim_protocol.enrollment import JoinKey, JoinKeyError

log = logging.getLogger(__name__)

STANDARD_ERROR = 2
"""The last of the three descriptors that every program has."""


class OperatorError(click.ClickException):
    """A mistake that the operator can mend."""

    exit_code = 1

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy

    def show(self, file: Any = None) -> None:
        """The sentence, then what to do."""
        click.echo(f"Error: {self.message}", err=True)
        if self.remedy:
            click.echo(f"  {self.remedy}", err=True)


class SettingsError(OperatorError):
    """A setting that cannot be used."""

    exit_code = 2


class LastingError(OperatorError):
    """What ends `run`, and would end every further start of it."""

    exit_code = 3


def _option(row: SettingRow) -> Callable[[Any], Any]:
    """The flag of one setting."""
    help_words = row.description if not row.not_yet else f"{row.description} No effect in this version."
    names = (row.flag, row.field)
    if row.takes.endswith("true or false"):
        return click.option(*names, is_flag=True, default=None, help=help_words)
    if row.field in ("vllm_args", "vllm_env"):
        metavar = "KEY=VALUE" if row.field == "vllm_env" else "ARG"
        return click.option(*names, multiple=True, metavar=metavar, help=f"{help_words} May be given again.")
    return click.option(*names, metavar=row.unit.upper() or "VALUE", default=None, help=help_words)


def with_flags(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags that the table has for it."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for row in reversed(list(rows())):
            if command in row.commands:
                function = _option(row)(function)
        return function

    return decorate


def settings_from(flags: dict[str, Any]) -> AgentSettings:
    """The settings in force, with everything that is wrong or needs attention told.

    Raises:
        OperatorError: a value breaks its rule.
    """
    variables = {row.field: row.variable for row in rows()}
    given = {variables[field]: value for field, value in flags.items() if _is_given(value)}
    try:
        settings = load_settings(given)
    except SettingsInvalid as invalid:
        for sentence in warnings():  # what is wrong is told whole, not in two turns
            click.echo(f"Warning: {sentence}", err=True)
        lines = "".join(f"\n  {problem}" for problem in invalid.problems)
        raise SettingsError(f"settings cannot be used:{lines}", "") from None
    logs.configure(settings.log_level)
    return settings


def _is_given(value: Any) -> bool:
    """Whether a flag says something: an empty one counts as unset, as an empty variable does."""
    return value not in (None, (), "")


def tell_about(settings: AgentSettings) -> None:
    """Log what is not at its default and what will need attention."""
    log.info("settings not at their defaults", extra={"settings": settings.non_defaults()})
    for sentence in (*warnings(), *advice(settings)):
        log.warning(sentence)


def join_key_of(settings: AgentSettings, refused: type[OperatorError] = OperatorError) -> JoinKey | None:
    """The join key given, or None.

    Raises:
        OperatorError: it is not a whole key; of the class `refused`.
    """
    if settings.join_key is None:
        return None
    try:
        return JoinKey.parse(settings.join_key.get_secret_value())
    except JoinKeyError as error:
        raise refused(f"{error} [{error.code}]", error.remedy) from None


class _WithVariables(click.Command):
    """A command whose help ends with every variable, and that knows an option which is a variable alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; what is set by a variable alone is answered with that variable."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            field = error.option_name.lstrip("-").replace("-", "_")
            field = "initial_model_path" if field == "model" else field
            row = next((row for row in rows() if row.field == field), None)
            if row is None:
                raise
            message = f"No such option: {error.option_name}. It is set by the variable {row.variable}."
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The ceilings in force, then the table; written as it stands."""
        formatter.write(f"\n{ceilings()}\n\nEnvironment variables; a flag wins over its variable:\n{help_text()}\n")


class _Group(_WithVariables, click.Group):
    command_class = _WithVariables


def ceilings() -> str:
    """How long a start may take, with the settings in force here."""
    try:
        settings = load_settings({})
    except SettingsInvalid as invalid:
        return f"The settings in force here cannot be used:\n{invalid}"
    return (
        "Startup ceilings in force:\n"
        f"  a start of vLLM fails after {settings.vllm_startup_timeout_seconds} s, "
        f"or after {settings.vllm_startup_inactivity_grace_seconds} s without output\n"
        f"  a degraded engine has failed after {settings.degraded_to_failed_timeout_seconds} s"
    )


def _hold_standard_descriptors() -> None:
    """Put the null device in the place of standard input, output and error where whoever started this closed them.

    The next file that is opened would take the place, and be the engine's input or get what a library says.
    """
    opened = os.open(os.devnull, os.O_RDWR)
    while opened <= STANDARD_ERROR:
        opened = os.open(os.devnull, os.O_RDWR)
    os.close(opened)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version=version(), prog_name="xerotier-xim-agent")
def main() -> None:
    """The XIM agent: runs vLLM next to its GPU or CPU and serves a router's requests with it."""
    _hold_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may be of bytes that are no text
            stream.reconfigure(errors="backslashreplace")


@main.command()
@with_flags("enroll")
@click.option("--again", is_flag=True, help="Enroll anew although this node is enrolled; its keys are replaced.")
def enroll(again: bool, **flags: Any) -> None:
    """Exchange a join key for credentials and store them."""
    settings = settings_from(flags)
    for sentence in warnings():
        log.warning(sentence)
    asyncio.run(_enroll(settings, join_key_of(settings), again=again))


async def _enroll(settings: AgentSettings, join_key: JoinKey | None, *, again: bool) -> None:
    try:
        with CredentialStore(settings.config_directory) as store:
            enroller = Enroller(store, node_facts(settings), allow_insecure=settings.allow_insecure)
            stored = enroller.stored
            if stored is not None and not again:
                click.echo(f"This node is enrolled as agent {stored.enrollment.agent_id}; --again enrolls it anew.")
                return
            if join_key is None:
                raise NotEnrolled
            enrolled = await enroller.enroll(join_key)
            click.echo(f"enrollment successful: agent {enrolled.enrollment.agent_id}")
            if stored is not None:
                old = stored.enrollment.agent_id  # only the router's operator can end it: its keys are gone
                click.echo(f"The router still lists agent {old}. To end it there: xerotier-router agent revoke {old}")
    except EnrollmentFailed as failure:
        raise OperatorError(f"{failure.message} [{failure.code}]", failure.remedy) from None
    except CredentialsError as error:
        raise OperatorError(error.message, error.remedy) from None


@main.command()
@with_flags("run")
def run(**flags: Any) -> None:
    """Enroll if need be, start vLLM and serve until told to stop."""
    settings = settings_from(flags)
    from xim_agent.app import run as run_agent  # the other commands need neither ZeroMQ nor the engine

    join_key = join_key_of(settings, LastingError)  # a damaged key is told before anything else starts
    tell_about(settings)
    sys.exit(run_agent(settings, join_key))


@main.command()
@with_flags("run")
@click.option("--model", type=click.Path(path_type=Path), help="Directory of the model, or of its config.json alone.")
@click.option(
    "--hardware", type=click.Path(path_type=Path), help="File with a machine's description; default: this one."
)
@click.option("--served-name", default="model", show_default=True, help="Name that the endpoint would give it.")
@click.option("--task-mode", type=click.Choice(["generate", "embed", "score"]), default="generate", show_default=True)
@click.option("--endpoint-quantization", metavar="METHOD", help="Quantization that the endpoint would bring.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
def plan(
    model: Path | None,
    hardware: Path | None,
    served_name: str,
    task_mode: str,
    endpoint_quantization: str | None,
    form: str,
    **flags: Any,
) -> None:
    """Show how vLLM would be started, every decision with its reason; nothing is started."""
    from xim_agent.plan_command import shown_plan  # the other commands read neither models nor hardware
    from xim_agent.planning.decision import Wanted
    from xim_agent.surroundings import PlaceUnusable

    settings = settings_from(flags)
    for sentence in warnings():
        click.echo(f"Warning: {sentence}", err=True)
    wanted = Wanted(served_name=served_name, quantization=endpoint_quantization or None, task_mode=task_mode)
    try:
        text, usable = shown_plan(settings, hardware=hardware, model=model, wanted=wanted, json_form=form == "json")
    except PlaceUnusable as error:
        raise OperatorError(error.message, error.remedy) from None
    click.echo(text, nl=False)
    sys.exit(0 if usable else 1)


@main.command("settings")
@with_flags("run")
def show_settings(**flags: Any) -> None:
    """Show every setting with its value here and where that comes from: a flag, the environment, or the default."""
    settings = settings_from(flags)
    for sentence in warnings():
        click.echo(f"Warning: {sentence}", err=True)
    group: Group | None = None
    for row in rows():
        if row.group is not group:
            group = row.group
            click.echo(f"\n{group}:")
        value, origin = _value_and_origin(settings, row, given=_is_given(flags.get(row.field)))
        click.echo(f"  {row.variable}={value}  [{origin}]")
        click.echo(f"      {row.description}" + (f" No effect in this version: {row.not_yet}." if row.not_yet else ""))


def _value_and_origin(settings: AgentSettings, row: SettingRow, *, given: bool) -> tuple[str, str]:
    """What holds, secrets masked, and who said so."""
    if not settings.is_set(row.field):
        return _default_here(settings, row), "default"
    return shown_value(getattr(settings, row.field)), "flag" if given else "environment"


def _default_here(settings: AgentSettings, row: SettingRow) -> str:
    """The default, and where the table has words for what depends on this machine, what that is."""
    match row.field:
        case "name":
            return socket.gethostname()
        case "config_dir":
            return str(settings.config_directory)
        case "model_cache_path":
            return str(settings.model_cache_directory)
    return row.default
