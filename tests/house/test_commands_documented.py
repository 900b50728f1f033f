"""Pages name no command, option, module, file or shortened variable that does not exist."""

import re
from collections.abc import Iterator
from importlib import import_module

import click
import pytest

from tests.house.sources import ROOT, name_of, tracked
from xim_agent.cli import main as agent
from xim_agent.settings import AgentSettings
from xim_agent.telemetry.metrics import ROWS as AGENT_ROWS
from xim_router.cli import main as router
from xim_router.settings import declared
from xim_router.telemetry.rows import ROWS as ROUTER_ROWS

PAGES = [name for page in tracked("*.md") if not (name := name_of(page)).startswith("tests/")]
PROGRAMS = {"xerotier-router": router, "xerotier-xim-agent": agent}
VARIABLES = [
    *(setting.variable for setting in declared()),
    *(str(info.alias) for info in AgentSettings.model_fields.values()),
]
METRICS = {row.name for row in ROUTER_ROWS} | {row.name for row in AGENT_ROWS}
_COMMAND = re.compile(
    r"(?:^|`|sudo |&& |ExecStart=\S*/)((?:xerotier-router|xerotier-xim-agent) [^`\n#|;)]*)", re.MULTILINE
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def mistakes_of(line: str) -> Iterator[str]:
    """Words of a command line that its program does not know."""
    program, *words = line.split()
    command: click.Command = PROGRAMS[program]
    for word in words:
        if word.startswith("-"):
            # A program may be named with an option of its subcommands, as in `xerotier-xim-agent --insecure`.
            known = {option for each in _of(command) for parameter in each.params for option in parameter.opts}
            if word.split("=")[0].rstrip(",.") not in known | {"--help", "-h", "--version"}:
                yield word
        elif isinstance(command, click.Group):
            if word.rstrip(",.") not in command.commands:
                yield word
                return
            command = command.commands[word.rstrip(",.")]


def _of(command: click.Command) -> list[click.Command]:
    return [command, *command.commands.values()] if isinstance(command, click.Group) else [command]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_line_is_one(name: str) -> None:
    found = {line: list(mistakes_of(line)) for line in _COMMAND.findall(read(name))}
    assert {line: mistakes for line, mistakes in found.items() if mistakes} == {}


@pytest.mark.parametrize("name", PAGES)
def test_every_shortened_variable_is_the_end_of_one(name: str) -> None:
    shortened = set(re.findall(r"`(_[A-Z][A-Z0-9_]*[A-Z0-9])`", read(name)))
    assert {each for each in shortened if not any(variable.endswith(each) for variable in VARIABLES)} == set()


@pytest.mark.parametrize("name", PAGES)
def test_every_module_is_there(name: str) -> None:
    named = set(re.findall(r"`(xim_(?:protocol|router|agent)(?:\.[A-Za-z_]+)*)`", read(name))) - METRICS
    assert {each for each in named if not is_there(each)} == set()


def is_there(dotted: str) -> bool:
    """Whether it is a module, or a name in one."""
    module, _, attribute = dotted.rpartition(".")
    try:
        import_module(dotted)
    except ModuleNotFoundError:
        return bool(module) and is_there(module) and hasattr(import_module(module), attribute)
    return True


@pytest.mark.parametrize("name", PAGES)
def test_every_file_of_this_repository_is_there(name: str) -> None:
    folders = "tests|docs|demo|bench|packages|deploy|requirements"
    named = set(re.findall(rf"`((?:{folders})/[a-z0-9_./-]+)`", read(name)))
    assert {each for each in named if not (ROOT / each).exists()} == set()


def test_a_mistake_would_be_found() -> None:
    assert list(mistakes_of("xerotier-router agent remove ID")) == ["remove"]
    assert list(mistakes_of("xerotier-router key create --project demo --nmae app")) == ["--nmae"]
    assert list(mistakes_of("xerotier-xim-agent enroll --again --join-key xjk_...")) == []
    assert not is_there("xim_router.link.nothing")
