"""What the control plane's regular work leaves in memory: nothing that waits for the garbage collector."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.blocks import blocks_kept_by
from xim_protocol.ids import AgentId
from xim_router.control.database import Database
from xim_router.control.store import Store
from xim_router.dispatch.reports import AgentSeen

TIMES = 400
LEFT_BY_ONE = 2.0
"""Above what the driver and its thread keep once, and far below what one statement that is made anew leaves."""


async def seen(store: Store, *, departed: bool) -> None:
    """As once a second while agents report or lose links."""
    async with store.record() as transaction:
        await transaction.agents_seen([AgentSeen(agent=AgentId("agent"), seen_at=1.0, departed=departed)])


async def renewed(store: Store) -> None:
    """As every five seconds in a mesh."""
    async with store.record() as transaction:
        await transaction.extend_member("member", 15.0)
        await transaction.drop_expired_members()


async def changed(store: Store) -> None:
    """As with every change of the catalog."""
    async with store.change():
        pass


@pytest.mark.parametrize(
    "work",
    [
        lambda store: seen(store, departed=False),
        lambda store: seen(store, departed=True),
        lambda store: store.version(),
        renewed,
        changed,
    ],
    ids=["seen", "left", "version", "renewed", "changed"],
)
async def test_a_turn_of_regular_work_leaves_nothing(
    work: Callable[[Store], Awaitable[object]], tmp_path: Path
) -> None:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'router.db'}")
    store = Store(database)
    kept = await blocks_kept_by(lambda: work(store), TIMES)
    await database.close()
    assert kept < LEFT_BY_ONE
