"""The database's own clock, in SQL: the one clock that several routers share."""

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class unix_now(FunctionElement[float]):
    """The database's time as Unix seconds, when the statement runs."""

    type = Double()
    inherit_cache = True


@compiles(unix_now, "postgresql")
def _postgresql(element: unix_now, compiler: Any, **options: Any) -> str:
    # Not now(): that is the time at which the transaction began.
    return "extract(epoch FROM clock_timestamp())::double precision"


@compiles(unix_now, "sqlite")
def _sqlite(element: unix_now, compiler: Any, **options: Any) -> str:
    # 2440587.5 is the Julian day of 1970-01-01.
    return "((julianday('now') - 2440587.5) * 86400.0)"
