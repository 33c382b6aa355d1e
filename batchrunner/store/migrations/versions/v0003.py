"""Webhooks: receivers, secrets, events and deliveries. The outbox before them held ends that nobody was ever told."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TYPES = ("batch.completed", "batch.failed", "batch.expired", "batch.cancelled", "batch.in_progress")
STATES = ("pending", "delivered", "undelivered")


def upgrade() -> None:
    """Add the new tables; an end of the past is not told any more."""
    op.drop_table("outbox")
    for make in (_endpoints, _tenant_secrets, _events, _deliveries):
        make()


def _word(name: str, *words: str) -> sa.Enum:
    return sa.Enum(*words, name=name, native_enum=False, create_constraint=True, length=max(16, *map(len, words)))


def _text(name: str, *, is_null: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Text(), nullable=is_null)


def _instant(name: str, *, is_null: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger(), nullable=is_null)


def _number(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger(), nullable=False, server_default=sa.text("0"))


def _serial() -> sa.Column[Any]:
    return sa.Column("serial", ROW_NUMBER, autoincrement=True, nullable=False)


def _secrets() -> list[sa.Column[Any]]:
    return [_text("secret"), _text("old_secrets")]


def _endpoints() -> None:
    op.create_table(
        "webhook_endpoints",
        _serial(),
        *(_text(name) for name in ("id", "tenant", "name", "url", "event_types")),
        *_secrets(),
        *(_instant(name, is_null=False) for name in ("created_at", "updated_at")),
        *(_instant(name) for name in ("failing_since", "disabled_at")),
        _text("disabled_reason", is_null=True),
        _instant("deleted_at"),
        sa.PrimaryKeyConstraint("serial"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("webhook_endpoints_by_tenant", "webhook_endpoints", ["tenant", "serial"])
    _partial_index("webhook_endpoints", "webhook_endpoints_by_deletion", "deleted_at")


def _tenant_secrets() -> None:
    op.create_table("webhook_secrets", _text("tenant"), *_secrets(), sa.PrimaryKeyConstraint("tenant"))


def _events() -> None:
    op.create_table(
        "webhook_events",
        _serial(),
        *(_text(name) for name in ("id", "tenant", "batch_id")),
        sa.Column("type", _word("webhook_event_type", *TYPES), nullable=False),
        _text("body"),
        _instant("created_at", is_null=False),
        sa.PrimaryKeyConstraint("serial"),
        sa.UniqueConstraint("id"),
        sqlite_autoincrement=True,
    )
    op.create_index("webhook_events_by_tenant", "webhook_events", ["tenant", "serial"])
    op.create_index("webhook_events_by_age", "webhook_events", ["created_at"])


def _deliveries() -> None:
    op.create_table(
        "webhook_deliveries",
        _serial(),
        *(_text(name) for name in ("id", "event_id", "tenant", "batch_id")),
        sa.Column("type", _word("webhook_delivery_type", *TYPES), nullable=False),
        _text("endpoint_id", is_null=True),
        *(_text(name) for name in ("url", "receiver")),
        sa.Column("state", _word("webhook_delivery_state", *STATES), nullable=False),
        _text("reason", is_null=True),
        _instant("due_at"),
        _number("attempt_count"),
        _instant("first_at"),
        _text("attempts"),
        _number("epoch"),
        _text("session", is_null=True),
        sa.Column("lease_until", sa.Float()),
        _text("boot_id", is_null=True),
        _instant("created_at", is_null=False),
        _instant("ended_at"),
        sa.ForeignKeyConstraint(["event_id"], ["webhook_events.id"]),
        sa.ForeignKeyConstraint(["endpoint_id"], ["webhook_endpoints.id"]),
        sa.PrimaryKeyConstraint("serial"),
        sa.UniqueConstraint("id"),
        sqlite_autoincrement=True,
    )
    _partial_index("webhook_deliveries", "webhook_deliveries_by_session", "session")
    for name, columns in (
        ("webhook_deliveries_by_tenant", ["tenant", "serial"]),
        ("webhook_deliveries_by_endpoint", ["endpoint_id", "state"]),
        ("webhook_deliveries_to_claim", ["state", "receiver", "due_at", "serial"]),
        ("webhook_deliveries_by_end", ["ended_at"]),
        ("webhook_deliveries_by_event", ["event_id"]),
    ):
        op.create_index(name, "webhook_deliveries", columns)


def _partial_index(table: str, name: str, column: str) -> None:
    filled = sa.text(f"{column} IS NOT NULL")
    op.create_index(name, table, [column], sqlite_where=filled, postgresql_where=filled)
