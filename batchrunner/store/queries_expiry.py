"""Statements on what time ends: files, uploads, remembered answers, and the journals of batches that are over."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from sqlalchemy import ColumnElement, Connection, and_, delete, func, or_, select, update

from batchrunner.holdings import Expired
from batchrunner.lifecycle import TERMINAL, BatchStatus
from batchrunner.models import BatchId, TaskKind
from batchrunner.store.moments import Moment
from batchrunner.store.queries_additions import drop_additions
from batchrunner.store.queries_blobs import UNFINISHED, drop_assets, drop_forgotten
from batchrunner.store.queries_deliveries import drop_old as drop_old_deliveries
from batchrunner.store.queries_idempotency import drop_old
from batchrunner.store.queries_jobs import drop_jobs
from batchrunner.store.queries_uploads import expire_uploads
from batchrunner.store.tables import batches, claims, extents, files, tasks

_JOURNAL_KEPT_FOR = timedelta(hours=24)
_DELIVERIES_KEPT_FOR = timedelta(days=30)
# Other writers wait while rows go: a thousand lines are a handful of them.
_BATCHES_MAX = 20
_LINES_MAX = 5_000_000
_FILES_MAX = 5000


def expire(conn: Connection, moment: Moment, *, is_wall_trusted: bool) -> Expired:
    """End all that is past its time, unless the wall clock cannot be trusted now; every part may be repeated."""
    if not is_wall_trusted:
        return Expired(journals=_ended_journals(conn))
    late = and_(files.c.freed_at.is_(None), files.c.deleted_at.is_(None), files.c.expires_at <= moment.wall)
    some = select(files.c.id).where(late).limit(_FILES_MAX)
    hidden = conn.execute(update(files).where(files.c.id.in_(some)).values(deleted_at=moment.wall)).rowcount
    ended = expire_uploads(conn, moment)
    dropped = drop_old(conn, moment)
    drop_forgotten(conn, moment)
    drop_old_deliveries(conn, moment, kept_for=_DELIVERIES_KEPT_FOR)
    _end_journals(conn, moment)
    return Expired(files=hidden, uploads=ended, replays=dropped, journals=_ended_journals(conn))


def _end_journals(conn: Connection, moment: Moment) -> None:
    """Remove extents, claims and shards before any segment goes; guards that a batch that somebody gave up, whose
    results are in no file, keeps them until it is deleted.
    """
    # One that was given up has `failed_at`, which is not among these.
    ended_at = func.coalesce(batches.c.completed_at, batches.c.expired_at, batches.c.cancelled_at)
    due = or_(
        ended_at <= moment.wall - _JOURNAL_KEPT_FOR,
        and_(batches.c.deleted_at.is_not(None), batches.c.status.in_(TERMINAL)),
    )
    found = select(batches.c.id, batches.c.total_count)
    found = found.where(_has_journal(), batches.c.journal_ended_at.is_(None), due).limit(_BATCHES_MAX)
    ids: list[str] = []
    lines = 0
    for row in conn.execute(found.with_for_update()):
        if ids and lines + row.total_count > _LINES_MAX:
            break
        ids.append(row.id)
        lines += row.total_count
    if not ids:
        return
    shards = select(tasks.c.id).where(tasks.c.batch_id.in_(ids))
    conn.execute(delete(extents).where(extents.c.batch_id.in_(ids)))
    conn.execute(delete(claims).where(claims.c.task_id.in_(shards)))
    conn.execute(delete(tasks).where(tasks.c.batch_id.in_(ids), tasks.c.kind == TaskKind.SHARD))
    drop_additions(conn, ids)
    drop_jobs(conn, ids)
    conn.execute(update(batches).where(batches.c.id.in_(ids)).values(journal_ended_at=moment.wall))
    bare = select(batches.c.id).where(batches.c.id.in_(ids), batches.c.output_file_id.is_(None))
    for batch_id in conn.execute(bare).scalars().all():
        drop_assets(conn, batch_id, moment)


def _has_journal() -> ColumnElement[bool]:
    return batches.c.journal_freed_at.is_(None)


def _ended_journals(conn: Connection) -> tuple[BatchId, ...]:
    named = select(batches.c.id).where(_has_journal(), batches.c.journal_ended_at.is_not(None))
    found = conn.execute(named.order_by(batches.c.journal_ended_at, batches.c.serial).limit(_BATCHES_MAX))
    return tuple(BatchId(each) for each in found.scalars())


def unfinished_counts(conn: Connection) -> dict[BatchStatus, int]:
    """Count batches that are not over."""
    counted = select(batches.c.status, func.count().label("total")).where(batches.c.status.in_(UNFINISHED))
    found = {row.status: row.total for row in conn.execute(counted.group_by(batches.c.status))}
    return {status: found.get(status, 0) for status in UNFINISHED}


def forget_journals(conn: Connection, batch_ids: Collection[BatchId], moment: Moment) -> None:
    """Note that segments are deleted; guards that only batches without extents are."""
    ended = and_(batches.c.id.in_(batch_ids), batches.c.journal_ended_at.is_not(None))
    conn.execute(update(batches).where(ended).values(journal_freed_at=moment.wall))
