"""Runs the migrations on the connection that `control.database` opened and locked."""

from alembic import context

from xim_router.control.tables import metadata

# render_as_batch: SQLite alters a table by copying it.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
