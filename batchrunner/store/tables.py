"""The schema: which rows exist and what their columns mean. Times are Instants, leases are boot seconds."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    false,
    text,
)

from batchrunner.deliveries import DeliveryAttempt, DeliveryState, EventType, OldSecret
from batchrunner.holdings import KeyLimits, KeyScope, LiveShare, UploadStatus
from batchrunner.jobs import InferenceType
from batchrunner.lifecycle import BatchStatus, EndedBy, JobStatus
from batchrunner.models import LineProblem, OnInvalid, OnUnknown, Order, TaskKind, TaskState
from batchrunner.store.columns import Instant, Packed, RowNumber, word_of


class IdempotencyState(StrEnum):
    """How a request with an Idempotency-Key stands."""

    RUNNING = "running"
    DONE = "done"


class BlobState(StrEnum):
    """How a registered blob stands; one that is dead is never needed again."""

    PENDING = "pending"
    LIVE = "live"
    DEAD = "dead"


schema = MetaData()
stamp = MetaData()

alembic_version = Table(
    "alembic_version",
    stamp,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


def _number(name: str, *, default: int = 0) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=text(str(default)))


def _tokens() -> list[Column[int]]:
    return [_number(name) for name in ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")]


def _secrets() -> list[Column[Any]]:
    return [
        Column("secret", Text, nullable=False, comment="signs, so it is kept as it is"),
        Column(
            "old_secrets", Packed(tuple[OldSecret, ...]), nullable=False, comment="sign as well, each until its time"
        ),
    ]


def _index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    """An index of some rows only."""
    condition = text(where)
    return Index(name, *columns, unique=unique, sqlite_where=condition, postgresql_where=condition)


files = Table(
    "files",
    schema,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("blob", Text, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant),
    Column("deleted_at", Instant, comment="hidden since; the row stays as a place in lists"),
    Column("freed_at", Instant, comment="nothing may begin to need its blobs"),
    Column("line_count", BigInteger),
    Column("validation_blob", Text),
    Index("files_by_tenant", "tenant", "created_at", "id"),
    Index("files_by_blob", "blob"),
    _index("files_to_free", "deleted_at", "expires_at", where="freed_at IS NULL"),
    comment="Stored bytes with a purpose; a row means that its blob is whole until it is freed.",
)

batches = Table(
    "batches",
    schema,
    Column("serial", RowNumber, primary_key=True, autoincrement=True, comment="order of creation"),
    Column("id", Text, nullable=False, unique=True),
    Column("tenant", Text, nullable=False),
    Column("dialect", Text, nullable=False),
    Column("endpoint", Text),
    Column("input_file_id", Text, ForeignKey("files.id")),
    Column("source", Text, nullable=False),
    Column("completion_window", Text),
    Column("deadline_at", Instant),
    Column("on_invalid", word_of(OnInvalid, "batch_on_invalid"), nullable=False),
    Column("on_unknown", word_of(OnUnknown, "batch_on_unknown"), nullable=False),
    Column("order", word_of(Order, "batch_order"), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("hold_at", BigInteger, comment="only requests below this index run"),
    Column("metadata", Packed(dict[str, str]), nullable=False),
    Column("parent_id", Text, ForeignKey("batches.id")),
    Column("chosen_blob", Text),
    Column(
        "status", word_of(BatchStatus, "batch_status"), nullable=False, comment="moves by lifecycle.TRANSITIONS only"
    ),
    Column("version", BigInteger, nullable=False, comment="counts status moves and nothing else"),
    Column("ended_by", word_of(EndedBy, "batch_ended_by"), comment="set once, by the first end"),
    Column("is_open", Boolean, nullable=False, comment="may still get lines"),
    Column("paused_reason", Text, comment="claims of shards skip the batch"),
    Column("paused_at", Instant),
    Column("blocked_by", Text, comment="why it does not move on"),
    _number("total_count"),
    _number("succeeded_count"),
    _number("failed_count"),
    _number("refused_count"),
    _number("expired_count"),
    _number("cancelled_count"),
    _number("re_executed_count"),
    _number("retry_count"),
    *_tokens(),
    _number("next_sequence", default=1),
    _number("open_shards"),
    Column("model", Text),
    Column("problems_blob", Text),
    _number("problem_count"),
    Column("problems", Packed(tuple[LineProblem, ...]), nullable=False),
    Column("input_sha256", Text, comment="of the bytes that validation read"),
    Column("output_file_id", Text, ForeignKey("files.id")),
    Column("error_file_id", Text, ForeignKey("files.id")),
    Column("created_at", Instant, nullable=False),
    *(Column(f"{status}_at", Instant) for status in BatchStatus if status is not BatchStatus.VALIDATING),
    Column("input_name", Text, comment="the input as the caller named it"),
    Column("output_expires_after_s", BigInteger),
    Column("webhook_url", Text),
    Column("deleted_at", Instant, comment="hidden since; the row stays as a place in lists"),
    Column("probed_at", Instant, comment="when a paused one last gave out a shard to find out whether it may go on"),
    Column("journal_ended_at", Instant, comment="its extents are gone since"),
    Column("journal_freed_at", Instant, comment="and so are its segments"),
    Column("created_by", Text, comment="id of the key that asked for it"),
    Column("closes_at", Instant, comment="an open one that has nothing to do takes no more lines then"),
    Column("is_intake", Boolean, nullable=False, server_default=false(), comment="takes jobs that come alone"),
    CheckConstraint("open_shards >= 0", name="batch_open_shards"),
    Index("batches_by_status", "status", "deadline_at"),
    Index("batches_by_tenant", "tenant", "serial"),
    Index("batches_by_tenant_and_status", "tenant", "status"),
    Index("batches_by_parent", "parent_id"),
    Index("batches_by_output", "output_file_id"),
    _index("batches_with_journals", "journal_ended_at", "status", where="journal_freed_at IS NULL"),
    comment="One order. Counts are of registered records and change in the transaction that registers them.",
)

tasks = Table(
    "tasks",
    schema,
    Column("id", RowNumber, primary_key=True, autoincrement=True),
    Column("batch_id", Text, ForeignKey("batches.id"), nullable=False),
    Column("kind", word_of(TaskKind, "task_kind"), nullable=False),
    Column(
        "state",
        word_of(TaskState, "task_state"),
        nullable=False,
        comment="queued > leased > settled, queued or parked; the fence makes it sealed, salvage final",
    ),
    Column("epoch", BigInteger, nullable=False, comment="one more with every claim and fence; guards every write"),
    Column("session", Text, comment="the holder, only while leased"),
    Column("taken_from", Text, comment="the session that the last claim, fence or end took it from, if any"),
    Column("lease_until", Float, comment="boot seconds of boot_id"),
    Column("boot_id", Text, comment="the boot that lease_until and not_before count from"),
    _number("attempts"),
    Column("not_before", Float, comment="boot seconds of boot_id"),
    Column("last_error", Text),
    Column("orphaned_by_death", Boolean, nullable=False, comment="the last holder died and nothing happened since"),
    _number("deaths"),
    Column("is_quarantined", Boolean, nullable=False),
    Column("fence_epoch", BigInteger, comment="epoch of the seal task that fenced this shard last"),
    Column("byte_start", BigInteger),
    Column("byte_end", BigInteger),
    Column("first_line", BigInteger),
    Column("first_index", BigInteger),
    Column("line_count", BigInteger),
    Column("checksum", BigInteger),
    Column("skipped", Packed(tuple[int, ...])),
    _number("intent_mark"),
    _number("whole_epoch"),
    _number("succeeded_count"),
    _number("failed_count"),
    *_tokens(),
    Column("source", Text, comment="the blob with its bytes, null where that is the batch's"),
    # The front of a batch's queue: equal columns first, then the range, so that shards beyond a hold are not walked.
    Index("tasks_to_claim", "kind", "state", "batch_id", "is_quarantined", "first_index"),
    Index("tasks_by_batch", "batch_id", "kind", "first_line"),
    Index("tasks_by_session", "session"),
    Index("tasks_by_loser", "taken_from"),
    _index("one_seal_per_batch", "batch_id", where="kind = 'seal'", unique=True),
    # Journals are named by task id: a number is never given twice.
    sqlite_autoincrement=True,
    comment="What a worker may claim. Shard columns are null in other kinds.",
)

additions = Table(
    "additions",
    schema,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("first_line", BigInteger, primary_key=True),
    Column("line_count", BigInteger, nullable=False),
    Column("source", Text, nullable=False),
    Column("id_hashes", LargeBinary, nullable=False, comment="8 bytes for each custom_id"),
    Column("created_at", Instant, nullable=False),
    comment="Lines that joined an open batch together; gone with the batch's journal.",
)

jobs = Table(
    "jobs",
    schema,
    Column("number", RowNumber, primary_key=True, autoincrement=True),
    Column("tenant", Text, nullable=False),
    Column("batch_id", Text, ForeignKey("batches.id"), nullable=False),
    Column("line_number", BigInteger, nullable=False, comment="the line that stands for it now"),
    Column("is_single", Boolean, nullable=False, comment="its batch is an intake"),
    Column("status", word_of(JobStatus, "job_status"), nullable=False),
    Column("url", Text, nullable=False),
    Column("inference_type", word_of(InferenceType, "job_inference_type"), nullable=False),
    Column("model", Text),
    Column("created_at", Instant, nullable=False),
    Column("queued_at", Instant, nullable=False, comment="when its last try began to wait"),
    Column("ended_at", Instant),
    _number("retry_count"),
    Index("jobs_by_line", "batch_id", "line_number", unique=True),
    Index("jobs_by_tenant", "tenant", "number"),
    Index("jobs_by_status", "tenant", "status", "number"),
    sqlite_autoincrement=True,
    comment="Lines that are followed by a number; gone with their batch's journal.",
)

claims = Table(
    "claims",
    schema,
    Column("task_id", RowNumber, ForeignKey("tasks.id"), primary_key=True),
    Column("epoch", BigInteger, primary_key=True),
    Column("session", Text, nullable=False),
    comment="Who held a task under which epoch: where unregistered bytes may lie.",
)

extents = Table(
    "extents",
    schema,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("sequence_from", BigInteger, primary_key=True),
    Column("task_id", RowNumber, ForeignKey("tasks.id"), nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("session", Text, nullable=False),
    Column("segment", BigInteger, nullable=False),
    Column("byte_start", BigInteger, nullable=False),
    Column("byte_end", BigInteger, nullable=False),
    _number("succeeded_count"),
    _number("failed_count"),
    *_tokens(),
    CheckConstraint(
        "count = succeeded_count + failed_count AND count > 0 AND byte_end > byte_start", name="extent_count"
    ),
    Index("extents_by_task", "task_id", "epoch", "segment"),
    comment="Records that exist. Sequence numbers are gapless per batch and never change.",
)

sessions = Table(
    "sessions",
    schema,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("boot_id", Text, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("opened_at", Instant, nullable=False),
    Column("is_hungry", Boolean, nullable=False),
    Column("live", Packed(tuple[LiveShare, ...]), comment="what it reported last"),
    Column("live_at", Float, comment="boot seconds of boot_id"),
    comment="Workers that hold or may hold leases.",
)

uploads = Table(
    "uploads",
    schema,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False, comment="as announced"),
    Column("status", word_of(UploadStatus, "upload_status"), nullable=False, comment="pending > one of the others"),
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant, nullable=False),
    Column("expires_after_s", BigInteger, comment="how long the file is to live"),
    Column("file_id", Text, ForeignKey("files.id")),
    Index("uploads_by_status", "status", "expires_at"),
    comment="Files that come in parts.",
)

upload_parts = Table(
    "upload_parts",
    schema,
    Column("serial", RowNumber, primary_key=True, autoincrement=True, comment="order of arrival"),
    Column("id", Text, nullable=False, unique=True),
    Column("upload_id", Text, ForeignKey("uploads.id"), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("blob", Text, nullable=False),
    Column("created_at", Instant, nullable=False),
    Index("upload_parts_by_upload", "upload_id", "serial"),
    comment="Parts of pending uploads; the end of the upload removes them and drops their blobs.",
)

keys = Table(
    "keys",
    schema,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False, unique=True, comment="SHA-256 of the secret, which is kept nowhere"),
    Column("shown", Text, nullable=False, comment="the secret's first characters"),
    Column("scopes", Packed(tuple[KeyScope, ...]), nullable=False),
    Column("limits", Packed(KeyLimits), nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant),
    Column("revoked_at", Instant),
    comment="Who may ask for which tenant.",
)

idempotency = Table(
    "idempotency",
    schema,
    Column("tenant", Text, primary_key=True),
    Column("route", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", Text, comment="null while the request is being read"),
    Column("state", word_of(IdempotencyState, "idempotency_state"), nullable=False, comment="running > done"),
    Column("status", Integer, comment="of the answer"),
    Column("body", LargeBinary, comment="null where the process died between making the object and answering"),
    Column("object_id", Text, comment="what was made"),
    Column("created_at", Instant, nullable=False),
    Column("lease_until", Float, comment="boot seconds of boot_id"),
    Column("boot_id", Text, nullable=False),
    Index("idempotency_by_age", "created_at"),
    comment="Answers to requests that may be sent again.",
)

blobs = Table(
    "blobs",
    schema,
    Column("name", Text, primary_key=True),
    Column("state", word_of(BlobState, "blob_state"), nullable=False, comment="pending > live or dead; live > dead"),
    Column("created_at", Instant, nullable=False),
    Column("owner", Text, nullable=False),
    Index("blobs_by_state", "state", "created_at"),
    comment="Names in Blobs before a row needs them (pending), while one does (live), and until they are deleted.",
)

webhook_endpoints = Table(
    "webhook_endpoints",
    schema,
    Column("serial", RowNumber, primary_key=True, autoincrement=True, comment="order of creation"),
    Column("id", Text, nullable=False, unique=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("event_types", Packed(tuple[EventType, ...]), nullable=False),
    *_secrets(),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("failing_since", Instant, comment="the first failure since the last success"),
    Column("disabled_at", Instant, comment="is told nothing since"),
    Column("disabled_reason", Text),
    Column("deleted_at", Instant, comment="hidden since, without secrets; the row stays a month, as a place in lists"),
    Index("webhook_endpoints_by_tenant", "tenant", "serial"),
    _index("webhook_endpoints_by_deletion", "deleted_at", where="deleted_at IS NOT NULL"),
    comment="Receivers that a tenant registered.",
)

webhook_secrets = Table(
    "webhook_secrets",
    schema,
    Column("tenant", Text, primary_key=True),
    *_secrets(),
    comment="What signs for the URLs of a tenant's batches.",
)

webhook_events = Table(
    "webhook_events",
    schema,
    Column("serial", RowNumber, primary_key=True, autoincrement=True, comment="order in which they became true"),
    Column("id", Text, nullable=False, unique=True, comment="hash of batch and status: an end is told under one id"),
    Column("tenant", Text, nullable=False),
    Column("batch_id", Text, nullable=False),
    Column("type", word_of(EventType, "webhook_event_type"), nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", Instant, nullable=False),
    Index("webhook_events_by_tenant", "tenant", "serial"),
    Index("webhook_events_by_age", "created_at"),
    sqlite_autoincrement=True,
    comment="What happened to batches, written by the move itself.",
)

webhook_deliveries = Table(
    "webhook_deliveries",
    schema,
    Column("serial", RowNumber, primary_key=True, autoincrement=True, comment="order of creation"),
    Column("id", Text, nullable=False, unique=True, comment="hash of event and target"),
    Column("event_id", Text, ForeignKey("webhook_events.id"), nullable=False),
    Column("tenant", Text, nullable=False),
    Column("batch_id", Text, nullable=False),
    Column("type", word_of(EventType, "webhook_delivery_type"), nullable=False),
    Column("endpoint_id", Text, ForeignKey("webhook_endpoints.id"), comment="null: the batch's own URL"),
    Column("url", Text, nullable=False, comment="of an endpoint that it had when this was made or last tried"),
    Column("receiver", Text, nullable=False, comment="whom it reaches: these take turns"),
    Column("state", word_of(DeliveryState, "webhook_delivery_state"), nullable=False, comment="pending > one of both"),
    Column("reason", Text, comment="why it was given up"),
    Column("due_at", Instant, comment="of a pending one"),
    _number("attempt_count"),
    Column("first_at", Instant, comment="of the attempts that are counted"),
    Column("attempts", Packed(tuple[DeliveryAttempt, ...]), nullable=False),
    _number("epoch"),
    Column("session", Text, comment="the courier that holds it"),
    Column("lease_until", Float, comment="boot seconds of boot_id"),
    Column("boot_id", Text),
    Column("created_at", Instant, nullable=False),
    Column("ended_at", Instant),
    Index("webhook_deliveries_to_claim", "state", "receiver", "due_at", "serial"),
    _index("webhook_deliveries_by_session", "session", where="session IS NOT NULL"),
    Index("webhook_deliveries_by_tenant", "tenant", "serial"),
    Index("webhook_deliveries_by_endpoint", "endpoint_id", "state"),
    Index("webhook_deliveries_by_end", "ended_at"),
    Index("webhook_deliveries_by_event", "event_id"),
    sqlite_autoincrement=True,
    comment="One event to one receiver, made with the event, held by one courier at a time.",
)
