"""PostgreSQL's word that the catalog changed: one connection that listens, and answers what is asked often.

A trigger on the catalog's version tells of every change, whoever made it. Not every connection hears of it: a pooler in
transaction mode passes no notifications, a server in recovery lets nobody listen. So a new connection is tried out, and
believed in once it has heard something. Whoever asks over the same connection learns with the answer that it lives.
"""

import asyncio
import contextlib
import logging
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # it comes without
from sqlalchemy import Select, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

log = logging.getLogger(__name__)

CHANNEL = "xim_catalog"
"""As in migration 0003."""
TRIAL_S = 5.0
"""A notification takes a millisecond; one that has not come by then does not arrive."""
_TRIAL = "trial"


class Notifications:
    """See the module's docstring. One caller at a time, on one event loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        # Without a transaction a query is a quarter of the work, and notifications are not held back.
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._connection: AsyncConnection | None = None
        self._news = asyncio.Event()
        self._verdict: asyncio.TimerHandle | None = None
        self._doubted = False
        self._told_of_silence = False
        self.arrive = False
        """What changes is heard of, as far as is known."""

    async def wait(self, within_s: float) -> bool:
        """True at the next news, a change or the connection's end; False after `within_s` seconds without any."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._news.wait()
        told = self._news.is_set()
        self._news.clear()
        return told

    def doubt(self) -> None:
        """A change was not told: a trial that arrives proves nothing any more, until a change is told."""
        self.arrive, self._doubted = False, True

    async def value(self, query: Select[Any]) -> Any:
        """The one value of a query, over the connection that listens; a new one where there is none.

        Raises:
            DBAPIError, OSError, TimeoutError: the database does not answer.
        """
        if self._connection is not None:
            try:
                return (await self._connection.execute(query)).scalar_one()
            except TimeoutError:
                await self.close()
                raise
            except (DBAPIError, OSError):
                # A server that was restarted, or a proxy that closed an idle connection, is no server that is away.
                await self.close()
        self._connection = await self._engine.connect()
        try:
            await self._listen(self._connection)
            # After it listens: a change before this query is in the answer, one after it is told.
            return (await self._connection.execute(query)).scalar_one()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Give the connection back; harmless without one."""
        connection, self._connection = self._connection, None
        self.arrive = False
        if self._verdict is not None:
            self._verdict.cancel()
        if connection is not None:
            await connection.invalidate()
            await connection.close()

    async def _listen(self, connection: AsyncConnection) -> None:
        """Listen, and have a word sent over another connection to see whether it arrives."""
        driver = (await connection.get_raw_connection()).driver_connection
        assert isinstance(driver, asyncpg.Connection)
        driver.add_termination_listener(self._on_end)
        # Whether the connection lives says the query that follows; without notifications it is asked more often.
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError, PoolTimeout):
            await driver.add_listener(CHANNEL, self._on_notification)
            async with self._engine.connect() as other:
                await other.execute(select(func.pg_notify(CHANNEL, _TRIAL)))
        self._verdict = asyncio.get_running_loop().call_later(TRIAL_S, self._judge)

    def _on_notification(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        if payload != _TRIAL:
            self.arrive, self._doubted = True, False
            self._news.set()
        elif not self._doubted:
            self.arrive = True

    def _on_end(self, _connection: object) -> None:
        self.arrive = False
        self._news.set()

    def _judge(self) -> None:
        if not self.arrive and not self._told_of_silence:
            self._told_of_silence = True
            remedy = "Let XEROTIER_ROUTER_DATABASE_URL name the server itself, or a pooler in session mode."
            log.info("no notifications from PostgreSQL, asking it four times a second", extra={"remedy": remedy})
