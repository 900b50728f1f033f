"""Every setting of both programs stands in `--help`, in its reference page and in the example environment."""

import re
from functools import cache

import click
import pytest
from click.testing import CliRunner

from tests.house.sources import ROOT
from xim_agent.cli import main as agent
from xim_agent.settings import NOT_YET_EFFECTIVE, AgentSettings
from xim_agent.settings_reference import SettingRow, rows
from xim_router.cli import main as router
from xim_router.settings import RouterSettings

ROUTER = {field: str(info.validation_alias) for field, info in RouterSettings.model_fields.items()}
AGENT = {field: str(info.alias) for field, info in AgentSettings.model_fields.items()}


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands there as a whole, not as the beginning of a longer variable."""
    return re.search(rf"(?<![A-Z0-9_]){re.escape(word)}(?![A-Z0-9_])", text) is not None


@cache
def help_of(program: click.Command, *words: str) -> str:
    return CliRunner().invoke(program, [*words, "--help"]).output


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("variable", ROUTER.values())
def test_a_variable_of_the_router_is_documented(variable: str) -> None:
    assert has_word(help_of(router, "serve"), variable)
    assert has_word(read("docs/reference/router-settings.md"), variable)
    assert has_word(read("deploy/env/router.env.example"), variable)


@pytest.mark.parametrize("variable", AGENT.values())
@pytest.mark.parametrize("command", [(), ("run",), ("enroll",)])
def test_a_variable_of_the_agent_stands_in_help(variable: str, command: tuple[str, ...]) -> None:
    assert has_word(help_of(agent, *command), variable)


@pytest.mark.parametrize(("field", "variable"), AGENT.items())
def test_a_variable_of_the_agent_is_documented(field: str, variable: str) -> None:
    assert has_word(read("docs/reference/agent-settings.md"), variable)
    assert has_word(read("deploy/env/agent.env.example"), variable) == (field not in NOT_YET_EFFECTIVE)


@pytest.mark.parametrize("row", [row for row in rows() if row.in_words], ids=lambda row: row.field)
def test_a_default_in_words_is_told_in_words_everywhere(row: SettingRow) -> None:
    line = next(line for line in read("docs/reference/agent-settings.md").splitlines() if f"`{row.variable}`" in line)
    assert line.split(" | ")[1] == row.default
    if not row.not_yet:
        assert f"#{row.variable}=\n" in read("deploy/env/agent.env.example")
    assert f"{row.variable}  [{row.default}" in help_of(agent, "run")


def test_settings_without_effect_stand_in_one_place_of_the_page() -> None:
    page = read("docs/reference/agent-settings.md")
    section = page.partition("## Without effect in this version")[2].partition("\n## ")[0]
    listed = {variable for variable in AGENT.values() if has_word(section, variable)}
    assert listed == {AGENT[field] for field in NOT_YET_EFFECTIVE}


def test_pages_name_no_variable_that_does_not_exist() -> None:
    known = {*ROUTER.values(), *AGENT.values(), "XEROTIER_AGENT_BIN"}
    pages = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        (page.name, found)
        for page in pages
        for found in re.findall(r"XEROTIER_[A-Z0-9_]*[A-Z0-9]", page.read_text(encoding="utf-8"))
    }
    prefixes = {"XEROTIER_AGENT", "XEROTIER_ROUTER", "XEROTIER"}
    assert {(page, found) for page, found in named if found not in known | prefixes} == set()
