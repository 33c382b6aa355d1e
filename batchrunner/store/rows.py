"""Rows into nouns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from sqlalchemy import RowMapping

from batchrunner.additions import Addition
from batchrunner.deliveries import Delivery, Secrets, WebhookEndpoint, WebhookEvent
from batchrunner.holdings import ApiKey, Replay, Upload, UploadPart
from batchrunner.jobs import Job
from batchrunner.models import Batch, Claim, Extent, File, SessionId, Shard, TaskKind, TaskRef, Usage

_ADDITION = tuple(each.name for each in fields(Addition))
_BATCH = tuple(each.name for each in fields(Batch) if each.name != "usage")
_DELIVERY = tuple(each.name for each in fields(Delivery))
_ENDPOINT = tuple(each.name for each in fields(WebhookEndpoint) if each.name != "secrets")
_EVENT = tuple(each.name for each in fields(WebhookEvent))
_EXTENT = tuple(each.name for each in fields(Extent) if each.name != "usage")
_JOB = tuple(each.name for each in fields(Job))
_FILE = tuple(each.name for each in fields(File))
_KEY = tuple(each.name for each in fields(ApiKey))
_PART = tuple(each.name for each in fields(UploadPart))
_REPLAY = tuple(each.name for each in fields(Replay))
_SHARD = tuple(each.name for each in fields(Shard) if each.name != "task_id")
_UPLOAD = tuple(each.name for each in fields(Upload))

Earlier = Sequence[tuple[int, SessionId]]


def usage_of(row: RowMapping) -> Usage:
    """Read the token columns that batches, tasks and extents share."""
    return Usage(row["input_tokens"], row["cached_tokens"], row["output_tokens"], row["reasoning_tokens"])


def batch_of(row: RowMapping) -> Batch:
    """Read a row of batches."""
    return Batch(usage=usage_of(row), **{name: row[name] for name in _BATCH})


def addition_of(row: RowMapping) -> Addition:
    """Read a row of additions."""
    return Addition(**{name: row[name] for name in _ADDITION})


def job_of(row: RowMapping) -> Job:
    """Read a row of jobs."""
    return Job(**{name: row[name] for name in _JOB})


def file_of(row: RowMapping) -> File:
    """Read a row of files."""
    return File(**{name: row[name] for name in _FILE})


def upload_of(row: RowMapping) -> Upload:
    """Read a row of uploads."""
    return Upload(**{name: row[name] for name in _UPLOAD})


def part_of(row: RowMapping) -> UploadPart:
    """Read a row of upload_parts."""
    return UploadPart(**{name: row[name] for name in _PART})


def key_of(row: RowMapping) -> ApiKey:
    """Read a row of keys."""
    return ApiKey(**{name: row[name] for name in _KEY})


def replay_of(row: RowMapping) -> Replay:
    """Read a row of idempotency that is done."""
    return Replay(**{name: row[name] for name in _REPLAY})


def shard_of(row: RowMapping) -> Shard:
    """Read a row of tasks that is a shard."""
    return Shard(task_id=row["id"], **{name: row[name] for name in _SHARD})


def extent_of(row: RowMapping) -> Extent:
    """Read a row of extents."""
    return Extent(usage=usage_of(row), **{name: row[name] for name in _EXTENT})


def secrets_of(row: RowMapping) -> Secrets:
    """Read the secret columns that receivers and tenants share."""
    return Secrets(secret=row["secret"], old=row["old_secrets"])


def endpoint_of(row: RowMapping) -> WebhookEndpoint:
    """Read a row of webhook_endpoints."""
    return WebhookEndpoint(secrets=secrets_of(row), **{name: row[name] for name in _ENDPOINT})


def event_of(row: RowMapping) -> WebhookEvent:
    """Read a row of webhook_events."""
    return WebhookEvent(**{name: row[name] for name in _EVENT})


def delivery_of(row: RowMapping) -> Delivery:
    """Read a row of webhook_deliveries."""
    return Delivery(**{name: row[name] for name in _DELIVERY})


def claim_of(
    task: RowMapping,
    batch: Batch,
    *,
    session: SessionId,
    earlier: Earlier,
    extents: Sequence[Extent],
    cancelled: tuple[int, ...] = (),
) -> Claim:
    """Put together what the holder of a task needs to start."""
    return Claim(
        ref=TaskRef(task_id=task["id"], epoch=task["epoch"]),
        kind=task["kind"],
        session=session,
        batch=batch,
        shard=shard_of(task) if task["kind"] is TaskKind.SHARD else None,
        earlier=tuple(earlier),
        extents=tuple(extents),
        attempts=task["attempts"],
        orphaned_by_death=task["orphaned_by_death"],
        whole_epoch=task["whole_epoch"],
        cancelled=cancelled,
    )
