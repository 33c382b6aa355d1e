"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_STAMPED = ("in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled")
_STATUSES = ("validating", *_STAMPED)
_ENDED_COUNTERS = ("expired_count", "cancelled_count", "re_executed_count", "retry_count")
_COUNTERS = ("total_count", "succeeded_count", "failed_count", "refused_count", *_ENDED_COUNTERS)


def upgrade() -> None:
    """Make all tables, those first that others point to."""
    for make in (_files, _sessions, _batches, _outbox, _tasks, _claims, _extents):
        make()


def _number(name: str, *, default: int = 0) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), server_default=sa.text(str(default)), nullable=False)


def _numbers(*names: str) -> list[sa.Column[int]]:
    return [_number(name) for name in names]


def _tokens() -> list[sa.Column[int]]:
    return _numbers("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")


def _points(column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target])


def _word(name: str, *words: str) -> sa.Enum:
    return sa.Enum(*words, name=name, native_enum=False, create_constraint=True, length=16)


def _files() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("blob", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id"),
    )


def _sessions() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("opened_at", sa.BigInteger(), nullable=False),
        sa.Column("is_hungry", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def _batches() -> None:
    op.create_table(
        "batches",
        sa.Column("serial", ROW_NUMBER, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("dialect", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text()),
        sa.Column("input_file_id", sa.Text()),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("completion_window", sa.Text()),
        sa.Column("deadline_at", sa.BigInteger()),
        sa.Column("on_invalid", _word("batch_on_invalid", "fail", "skip"), nullable=False),
        sa.Column("on_unknown", _word("batch_on_unknown", "retry", "fail"), nullable=False),
        sa.Column("order", _word("batch_order", "input", "completion"), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("hold_at", sa.BigInteger()),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.Text()),
        sa.Column("chosen_blob", sa.Text()),
        sa.Column("status", _word("batch_status", *_STATUSES), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("ended_by", _word("batch_ended_by", "settled", "deadline", "cancel")),
        sa.Column("is_open", sa.Boolean(), nullable=False),
        sa.Column("paused_reason", sa.Text()),
        sa.Column("paused_at", sa.BigInteger()),
        sa.Column("blocked_by", sa.Text()),
        *_numbers(*_COUNTERS),
        *_tokens(),
        _number("next_sequence", default=1),
        _number("open_shards"),
        sa.Column("model", sa.Text()),
        sa.Column("problems_blob", sa.Text()),
        _number("problem_count"),
        sa.Column("problems", sa.Text(), nullable=False),
        sa.Column("input_sha256", sa.Text()),
        sa.Column("output_file_id", sa.Text()),
        sa.Column("error_file_id", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        *(sa.Column(f"{each}_at", sa.BigInteger()) for each in _STAMPED),
        sa.CheckConstraint("open_shards >= 0", name="batch_open_shards"),
        _points("error_file_id", "files.id"),
        _points("input_file_id", "files.id"),
        _points("output_file_id", "files.id"),
        _points("parent_id", "batches.id"),
        sa.PrimaryKeyConstraint("serial"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("batches_by_status", "batches", ["status", "deadline_at"])
    op.create_index("batches_by_tenant", "batches", ["tenant", "serial"])


def _outbox() -> None:
    op.create_table(
        "outbox",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        _points("batch_id", "batches.id"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("outbox_by_state", "outbox", ["state", "created_at"])


def _tasks() -> None:
    op.create_table(
        "tasks",
        sa.Column("id", ROW_NUMBER, autoincrement=True, nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("kind", _word("task_kind", "validate", "shard", "seal", "notify"), nullable=False),
        sa.Column(
            "state", _word("task_state", "queued", "leased", "settled", "sealed", "final", "parked"), nullable=False
        ),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("session", sa.Text()),
        sa.Column("taken_from", sa.Text()),
        sa.Column("lease_until", sa.Float()),
        sa.Column("boot_id", sa.Text()),
        _number("attempts"),
        sa.Column("not_before", sa.Float()),
        sa.Column("last_error", sa.Text()),
        sa.Column("orphaned_by_death", sa.Boolean(), nullable=False),
        _number("deaths"),
        sa.Column("is_quarantined", sa.Boolean(), nullable=False),
        sa.Column("fence_epoch", sa.BigInteger()),
        sa.Column("byte_start", sa.BigInteger()),
        sa.Column("byte_end", sa.BigInteger()),
        sa.Column("first_line", sa.BigInteger()),
        sa.Column("first_index", sa.BigInteger()),
        sa.Column("line_count", sa.BigInteger()),
        sa.Column("checksum", sa.BigInteger()),
        sa.Column("skipped", sa.Text()),
        *_numbers("intent_mark", "whole_epoch", "succeeded_count", "failed_count"),
        *_tokens(),
        _points("batch_id", "batches.id"),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "one_seal_per_batch",
        "tasks",
        ["batch_id"],
        unique=True,
        sqlite_where=sa.text("kind = 'seal'"),
        postgresql_where=sa.text("kind = 'seal'"),
    )
    op.create_index("tasks_by_batch", "tasks", ["batch_id", "kind", "first_line"])
    op.create_index("tasks_by_loser", "tasks", ["taken_from"])
    op.create_index("tasks_by_session", "tasks", ["session"])
    op.create_index("tasks_to_claim", "tasks", ["kind", "state", "batch_id", "is_quarantined", "first_index"])


def _claims() -> None:
    op.create_table(
        "claims",
        sa.Column("task_id", ROW_NUMBER, nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("session", sa.Text(), nullable=False),
        _points("task_id", "tasks.id"),
        sa.PrimaryKeyConstraint("task_id", "epoch"),
    )


def _extents() -> None:
    op.create_table(
        "extents",
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("sequence_from", sa.BigInteger(), nullable=False),
        sa.Column("task_id", ROW_NUMBER, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("session", sa.Text(), nullable=False),
        sa.Column("segment", sa.BigInteger(), nullable=False),
        sa.Column("byte_start", sa.BigInteger(), nullable=False),
        sa.Column("byte_end", sa.BigInteger(), nullable=False),
        *_numbers("succeeded_count", "failed_count"),
        *_tokens(),
        sa.CheckConstraint(
            "count = succeeded_count + failed_count AND count > 0 AND byte_end > byte_start", name="extent_count"
        ),
        _points("batch_id", "batches.id"),
        _points("task_id", "tasks.id"),
        sa.PrimaryKeyConstraint("batch_id", "sequence_from"),
    )
    op.create_index("extents_by_task", "extents", ["task_id", "epoch", "segment"])
