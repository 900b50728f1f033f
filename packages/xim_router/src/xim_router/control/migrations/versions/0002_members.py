"""The routers of the mesh."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table of members."""
    op.create_table(
        "members",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("control_address", sa.String(255), nullable=False),
        sa.Column("streaming_address", sa.String(255), nullable=False),
        sa.Column("curve_public_key", sa.LargeBinary(32), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_members"),
        sa.UniqueConstraint("curve_public_key", name="uq_members_curve_public_key"),
    )


def downgrade() -> None:
    """Drop it: routers of the older version know one router only."""
    op.drop_table("members")
