"""PostgreSQL tells of every new version of the catalog, whoever raised it. SQLite cannot."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the trigger; its notification is sent when the change is committed, once per transaction."""
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute(
        "CREATE FUNCTION xim_tell_of_change() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_notify('xim_catalog', ''); RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER xim_tell_of_change AFTER INSERT OR UPDATE OF catalog_version ON installation "
        "FOR EACH STATEMENT EXECUTE FUNCTION xim_tell_of_change()"
    )


def downgrade() -> None:
    """Drop it: routers of the older version ask."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER xim_tell_of_change ON installation")
        op.execute("DROP FUNCTION xim_tell_of_change()")
