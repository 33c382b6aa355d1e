"""What a server keeps: tombstones, uploads, keys, remembered answers, names of blobs, what workers report."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_ADDED: dict[str, dict[str, sa.types.TypeEngine[Any]]] = {
    "files": {
        "deleted_at": sa.BigInteger(),
        "freed_at": sa.BigInteger(),
        "line_count": sa.BigInteger(),
        "validation_blob": sa.Text(),
    },
    "batches": {
        "input_name": sa.Text(),
        "output_expires_after_s": sa.BigInteger(),
        "webhook_url": sa.Text(),
        "deleted_at": sa.BigInteger(),
        "probed_at": sa.BigInteger(),
        "journal_ended_at": sa.BigInteger(),
        "journal_freed_at": sa.BigInteger(),
    },
    "sessions": {"live": sa.Text(), "live_at": sa.Float()},
}


def upgrade() -> None:
    """Add columns that may be null, so that no row is rewritten, and new tables."""
    for table, columns in _ADDED.items():
        for name, kind in columns.items():
            op.add_column(table, sa.Column(name, kind))
    _indexes()
    for make in (_uploads, _upload_parts, _keys, _idempotency, _blobs):
        make()


def _word(name: str, *words: str) -> sa.Enum:
    return sa.Enum(*words, name=name, native_enum=False, create_constraint=True, length=16)


def _partial_index(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def _indexes() -> None:
    op.create_index("files_by_tenant", "files", ["tenant", "created_at", "id"])
    op.create_index("files_by_blob", "files", ["blob"])
    _partial_index("files_to_free", "files", ["deleted_at", "expires_at"], "freed_at IS NULL")
    op.create_index("batches_by_tenant_and_status", "batches", ["tenant", "status"])
    op.create_index("batches_by_parent", "batches", ["parent_id"])
    op.create_index("batches_by_output", "batches", ["output_file_id"])
    _partial_index("batches_with_journals", "batches", ["journal_ended_at", "status"], "journal_freed_at IS NULL")


def _uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("mime_type", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", _word("upload_status", "pending", "completed", "cancelled", "expired"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_after_s", sa.BigInteger()),
        sa.Column("file_id", sa.Text()),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("uploads_by_status", "uploads", ["status", "expires_at"])


def _upload_parts() -> None:
    op.create_table(
        "upload_parts",
        sa.Column("serial", ROW_NUMBER, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("upload_id", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("blob", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"]),
        sa.PrimaryKeyConstraint("serial"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("upload_parts_by_upload", "upload_parts", ["upload_id", "serial"])


def _keys() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("shown", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("limits", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("digest"),
    )


def _idempotency() -> None:
    op.create_table(
        "idempotency",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text()),
        sa.Column("state", _word("idempotency_state", "running", "done"), nullable=False),
        sa.Column("status", sa.Integer()),
        sa.Column("body", sa.LargeBinary()),
        sa.Column("object_id", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.Float()),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "route", "key"),
    )
    op.create_index("idempotency_by_age", "idempotency", ["created_at"])


def _blobs() -> None:
    op.create_table(
        "blobs",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", _word("blob_state", "pending", "live", "dead"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_index("blobs_by_state", "blobs", ["state", "created_at"])
