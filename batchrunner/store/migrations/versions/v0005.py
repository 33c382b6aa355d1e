"""Async jobs, and the batches that take in those that come alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add a column with a default, so that no row is rewritten, and the new table."""
    op.add_column("batches", sa.Column("is_intake", sa.Boolean(), nullable=False, server_default=sa.false()))
    statuses = sa.Enum(
        "QUEUED", "PROCESSING", "PROCESSED", "FAILED", "CANCELED", name="job_status", native_enum=False,
        create_constraint=True, length=16,
    )  # fmt: skip
    types = sa.Enum(
        "LLM", "IMAGE", "VIDEO", "MUSIC", "TTS", name="job_inference_type", native_enum=False, create_constraint=True,
        length=16,
    )  # fmt: skip
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), sa.ForeignKey("batches.id"), nullable=False),
        sa.Column("line_number", sa.BigInteger(), nullable=False),
        sa.Column("is_single", sa.Boolean(), nullable=False),
        sa.Column("status", statuses, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("inference_type", types, nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("queued_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.Column("retry_count", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sqlite_autoincrement=True,
    )
    op.create_index("jobs_by_line", "jobs", ["batch_id", "line_number"], unique=True)
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "number"])
    op.create_index("jobs_by_status", "jobs", ["tenant", "status", "number"])
