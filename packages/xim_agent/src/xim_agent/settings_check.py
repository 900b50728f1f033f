"""Tells the operator what is wrong with the settings: every problem at once, each with its remedy."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pydantic import SecretStr, ValidationError

from xim_agent.settings import (
    MASK,
    NOT_YET_EFFECTIVE,
    PREFIX,
    STRICT_SWITCHES,
    AgentSettings,
    default_of,
    environment,
    readable_switch,
    shown_value,
)

GONE = {
    "VLLM_MODEL": "The model is assigned by the router, or set by XEROTIER_AGENT_INITIAL_MODEL_PATH; unset VLLM_MODEL.",
}
"""Variables of earlier versions that are gone, and what to do instead."""

ELSEWHERE = frozenset({f"{PREFIX}BIN"})
"""Variables with the agent's prefix that start scripts read."""

FAMILY = "XEROTIER_"
NEAR = 0.87
"""How alike a misspelt prefix is to the right one: two slips of 15 characters. `XERO_AGENT_` is another word."""

_RULES = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "enum": "must be one of {expected}",
    "value_error": "{error}",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One setting that cannot be used."""

    variable: str
    value: str
    """As given; masked where it is a secret."""
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.variable}={self.value!r}: {self.rule}. {self.remedy}"


class SettingsInvalid(Exception):
    """Settings that stop the program; `problems` lists all of them."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def load_settings(flags: Mapping[str, object]) -> AgentSettings:
    """The settings in force; `flags` are by variable and win over the environment.

    Raises:
        SettingsInvalid: one or more values break their rule.
    """
    try:
        settings = AgentSettings(**dict(flags))  # type: ignore[arg-type]  # by alias; pydantic checks each
    except ValidationError as error:
        raise SettingsInvalid([_problem(details) for details in error.errors()]) from None
    _require_home(settings)
    return settings


def _require_home(settings: AgentSettings) -> None:
    """A user without a home, as a number without an entry in a container is one, has to name its directories."""
    try:
        _ = settings.config_directory, settings.cache_directory
    except RuntimeError:
        rule = "this user has no home directory, which would take its place"
        remedy = "Set it to an absolute path."
        raise SettingsInvalid([Problem(variable=f"{PREFIX}HOME", value="", rule=rule, remedy=remedy)]) from None


def warnings(variables: Mapping[str, str] | None = None) -> list[str]:
    """What in `variables` (the environment) has no effect, a sentence each; no value of a secret is in them."""
    variables = environment() if variables is None else variables
    given = {name: value for name, value in variables.items() if value}
    of_services = _of_services(given)
    found = [f"{name} is gone. {remedy}" for name, remedy in GONE.items() if name in given]
    known = _fields_by_variable()
    for name in sorted(given):
        if name in STRICT_SWITCHES and not readable_switch(name, given[name]):
            default = shown_value(AgentSettings.model_fields[known[name]].default)
            found.append(f"{name}={given[name]!r} is ignored: it takes exactly 0, 1, true or false; {default} holds.")
        elif name in known and known[name] in NOT_YET_EFFECTIVE:
            found.append(f"{name} has no effect in this version: {NOT_YET_EFFECTIVE[known[name]]}.")
        elif name not in known and name not in ELSEWHERE and name not in of_services:
            meant = _nearest(name, known) if name.startswith(PREFIX) else _meant(name.upper(), known)
            found += [] if meant is None else [f"{name} is not a setting; the nearest one is {meant}."]
    return found


def _of_services(names: Collection[str]) -> set[str]:
    """Those that Kubernetes makes for services, such as one that is called xerotier-agent."""
    services = [name.removesuffix("SERVICE_HOST") for name in names if name.endswith("_SERVICE_HOST")]
    return {name for name in names for each in services if name.startswith((f"{each}SERVICE_", f"{each}PORT"))}


def _nearest(name: str, known: Collection[str]) -> str:
    """The known variable that `name` most likely means: one that only has words before it, else the most similar."""
    longer = [each for each in known if each.endswith("_" + name.removeprefix(PREFIX))]
    return min(longer, key=len) if longer else difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _meant(name: str, known: Collection[str]) -> str | None:
    """The one that was meant where its prefix is misspelt or lacks the program; None where `name` is another's."""
    rests = {variable.removeprefix(PREFIX): variable for variable in known if variable.startswith(PREFIX)}
    for end in (at + 1 for at, character in enumerate(name) if character == "_"):
        head, rest = name[:end], name[end:]
        if head == FAMILY and rest in rests:
            return rests[rest]
        near = difflib.get_close_matches(rest, rests, n=1)
        if near and difflib.get_close_matches(head, [PREFIX], cutoff=NEAR):
            return rests[near[0]]
    return None


def advice(settings: AgentSettings) -> list[str]:
    """What in valid settings will need the operator's attention, a sentence each."""
    found: list[str] = []
    if settings.vllm_salt_secret is None:
        found.append(
            f"{PREFIX}VLLM_SALT_SECRET is not set: cache salts use a constant that everyone knows. "
            "Set it to a long random value before several tenants share this node."
        )
    if settings.lease_duration_ms < 2 * settings.lease_renewal_interval_ms:
        found.append(
            f"The lease ({settings.lease_duration_ms} ms) is shorter than two renewal intervals "
            f"({settings.lease_renewal_interval_ms} ms): one lost renewal expires it."
        )
    return found


def _fields_by_variable() -> dict[str, str]:
    return {str(info.alias): field for field, info in AgentSettings.model_fields.items()}


def _problem(details: object) -> Problem:
    """One pydantic error as a problem; only its type, context and input are used."""
    assert isinstance(details, dict)
    variable = str(details["loc"][0])
    info = AgentSettings.model_fields[_fields_by_variable()[variable]]
    secret = "SecretStr" in str(info.annotation) or variable == f"{PREFIX}VLLM_ENV"
    context = {key: str(value) for key, value in details.get("ctx", {}).items()}
    rule = _RULES.get(details["type"], "{message}").format_map({**context, "message": details["msg"]})
    default = default_of(info)
    remedy = f"The default is {default}; leave it empty to use it." if default else "Leave it empty for the default."
    given = details["input"]
    shown = MASK if secret or isinstance(given, SecretStr) else str(given)[:100]
    return Problem(variable=variable, value=shown, rule=rule, remedy=remedy)
