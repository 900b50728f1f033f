"""How the command line speaks: settings and errors at its border, tables and JSON as its output."""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from xim_router.control.accounts import Accounts
from xim_router.control.errors import ControlError
from xim_router.control.opening import open_storage
from xim_router.settings import RouterSettings, load_settings
from xim_router.settings_check import unknown_variables
from xim_router.settings_types import SettingsInvalid

_Result = TypeVar("_Result")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_YEAR_S = 365 * 86_400

json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")


class OperatorError(click.ClickException):
    """Something the operator can put right: said in one or two lines, without a traceback; exit code 1."""


class SettingsError(OperatorError):
    """One or more variables cannot be used; exit code 2, as for wrong arguments."""

    exit_code = 2


class Duration(click.ParamType[float]):
    """A time such as 90s, 30m, 24h or 7d, given on as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds that `value` stands for."""
        found = re.fullmatch(r"([0-9]{1,9})([smhd])", str(value).strip().lower())
        seconds = int(found[1]) * _UNITS_S[found[2]] if found else 0
        if not 1 <= seconds <= _YEAR_S:
            self.fail(f"{value!r} is not a time from 1s to 365d, such as 90s, 30m, 24h or 7d", param, ctx)
        return float(seconds)


def settings_or_exit(workers: int | None = None, *, warn: bool = True) -> RouterSettings:
    """The settings, or an error that lists every wrong one; with `warn` unknown variables are named on standard error.

    `workers` was given as an option, which goes before its variable.

    Raises:
        SettingsError: with every wrong value.
    """
    for variable, nearest in unknown_variables().items() if warn else ():
        hint = f"; did you mean {nearest}?" if nearest else ""
        click.echo(f"Warning: {variable} is no variable of the router{hint}", err=True)
    try:
        return load_settings(workers)
    except SettingsInvalid as error:
        raise SettingsError(str(error)) from error


def on_accounts(work: Callable[[Accounts], Awaitable[_Result]], settings: RouterSettings | None = None) -> _Result:
    """Do `work` on the database that the settings name, which is made or migrated where needed.

    They are read here where the command did not need them before.

    Raises:
        OperatorError: with the remedy.
    """
    settings = settings or settings_or_exit()

    async def opened() -> _Result:
        async with open_storage(settings) as storage:
            accounts = Accounts(storage.store, storage.keys, clock=time.time, entropy=secrets.token_bytes)
            return await work(accounts)

    return finished(opened())


def finished(work: Awaitable[_Result]) -> _Result:
    """The result of `work`, run to its end.

    Raises:
        OperatorError: with the remedy.
    """

    async def awaited() -> _Result:
        return await work

    try:
        return asyncio.run(awaited())
    except ControlError as error:
        raise OperatorError(f"{error}\n{error.remedy}") from error


def show_rows(rows: Sequence[Mapping[str, object]], as_json: bool, nothing: str) -> None:
    """A list, as JSON or as a table; `nothing` is said where it is empty."""
    if as_json:
        click.echo(json.dumps(list(rows), indent=2))
    elif not rows:
        click.echo(nothing)
    else:
        click.echo("\n".join(_table(rows)))


def show_record(record: Mapping[str, object], as_json: bool, text: str) -> None:
    """What was made, as JSON or as `text`."""
    click.echo(json.dumps(record) if as_json else text)


def day_and_time(unix_s: float | None) -> str:
    """A moment as people read it, in UTC."""
    return "-" if unix_s is None else time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(unix_s))


def _table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    titles = list(rows[0])
    cells = [[_cell(name, row[name]) for name in titles] for row in rows]
    widths = [max(len(title), *(len(line[n]) for line in cells)) for n, title in enumerate(titles)]
    lines = [[title.upper() for title in titles], *cells]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _cell(name: str, value: object) -> str:
    if name.endswith("_at") and isinstance(value, int | float):
        return day_and_time(value)
    if isinstance(value, list):
        return ",".join(str(each) for each in value)
    return "-" if value is None else str(value)
