"""Open batches: lines that come after their batch, each with a source of its own; and who made a batch."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add columns that may be null, so that no row is rewritten, and the new table."""
    op.add_column("batches", sa.Column("created_by", sa.Text()))
    op.add_column("batches", sa.Column("closes_at", sa.BigInteger()))
    op.add_column("tasks", sa.Column("source", sa.Text()))
    op.create_table(
        "additions",
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("first_line", sa.BigInteger(), nullable=False),
        sa.Column("line_count", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("id_hashes", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"]),
        sa.PrimaryKeyConstraint("batch_id", "first_line"),
    )
