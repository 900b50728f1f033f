"""Finds variables that have no effect because their names are misspelt; their values are never looked at."""

import difflib
from collections.abc import Collection, Mapping

from xim_router.settings import PREFIX, declared, environment

FAMILY = "XEROTIER_"
PREFIXES = (PREFIX, f"{FAMILY}SINGLE_")
OTHERS = f"{FAMILY}AGENT_"
"""The agent's, which tells of them itself."""
NEAR = 0.87
"""How alike a misspelt prefix is to the right one: two slips of 15 characters. `XERO_ROUTER_` is another word."""


def unknown_variables(variables: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Names in `variables` (the environment) that look like the router's and are none, each with the nearest one."""
    variables = environment() if variables is None else variables
    known = {setting.variable for setting in declared()}
    given = {name for name, value in variables.items() if value}
    found: dict[str, str | None] = {}
    for name in sorted(given - _of_services(given)):
        spelt = name.upper()  # as the settings are read
        if spelt in known or spelt.startswith(OTHERS):
            continue
        meant = _nearest(spelt, known) if spelt.startswith(PREFIXES) else _meant(spelt, known)
        if meant is not None or spelt.startswith(PREFIXES):
            found[name] = meant
    return found


def _of_services(names: Collection[str]) -> set[str]:
    """Those that Kubernetes makes for services, such as one that is called xerotier-router."""
    services = [name.removesuffix("SERVICE_HOST") for name in names if name.endswith("_SERVICE_HOST")]
    return {name for name in names for each in services if name.startswith((f"{each}SERVICE_", f"{each}PORT"))}


def _nearest(name: str, known: Collection[str]) -> str | None:
    # Compared without what all of them begin with, or everything would be near to everything.
    rests = {variable.removeprefix(PREFIX): variable for variable in known}
    near = difflib.get_close_matches(name.removeprefix(PREFIX), rests, n=1)
    return rests[near[0]] if near else None


def _meant(name: str, known: Collection[str]) -> str | None:
    """The one that was meant where its prefix is misspelt or lacks the program; None where `name` is another's."""
    for prefix in PREFIXES:
        rests = {variable.removeprefix(prefix): variable for variable in known if variable.startswith(prefix)}
        for end in (at + 1 for at, character in enumerate(name) if character == "_"):
            head, rest = name[:end], name[end:]
            if head == FAMILY and rest in rests:
                return rests[rest]
            near = difflib.get_close_matches(rest, rests, n=1)
            if near and difflib.get_close_matches(head, [prefix], cutoff=NEAR):
                return rests[near[0]]
    return None
