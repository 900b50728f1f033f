"""Opens the control plane's storage: data directory, keys, database, and the proof that they belong together."""

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from xim_router.control.database import Database
from xim_router.control.errors import SecretKeyMismatch
from xim_router.control.keys import RouterKeys, load_router_keys
from xim_router.control.store import Store
from xim_router.settings import RouterSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """An open database whose schema is current and whose secret key is ours."""

    database: Database
    store: Store
    keys: RouterKeys


@asynccontextmanager
async def open_storage(settings: RouterSettings) -> AsyncIterator[Storage]:
    """Open, and close at the end, what `settings` name; made where it is missing.

    Raises:
        KeyFileUnusable: a key file or the data directory cannot be used.
        DatabaseUrlInvalid: the database's URL names no server and no file.
        DatabaseUnavailable: the database does not answer.
        SchemaNotCurrent: the database is newer than this program.
        SecretKeyMismatch: the database was written with another secret key.
    """
    database = await Database.open(settings.resolved_database_url)
    try:
        store = Store(database)
        # A key made now could not be the one that a used database was written with.
        keys = await asyncio.to_thread(load_router_keys, settings, make=not await _is_bound(store))
        await prove_secret_key(store, keys)
        yield Storage(database=database, store=store, keys=keys)
    finally:
        await database.close()


async def prove_secret_key(store: Store, keys: RouterKeys) -> None:
    """Bind a new database to our secret key, or check that it is bound to it.

    Raises:
        SecretKeyMismatch: it is bound to another.
    """
    async with store.record() as transaction:
        stored = await transaction.canary()
        if stored is None:
            await transaction.set_canary(keys.canary)
        elif not hmac.compare_digest(stored, keys.canary):
            raise SecretKeyMismatch


async def _is_bound(store: Store) -> bool:
    async with store.record() as transaction:
        return await transaction.canary() is not None
