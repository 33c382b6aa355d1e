"""Statements on jobs: how each line that is followed by a number stands, and what becomes of its batch with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
    update,
)

from batchrunner.additions import NewAddition
from batchrunner.errors import NotFound, TransitionRefused
from batchrunner.jobs import INTAKE_SHARE, JobBatchCounts, NewJob
from batchrunner.lifecycle import ACTIVE_JOBS, RETRYABLE_JOBS, TERMINAL, BatchStatus, JobStatus
from batchrunner.models import Batch, BatchId, NewBatch, NewExtent, RecordKind, TaskId, TenantId
from batchrunner.store.moments import Moment
from batchrunner.store.tables import batches, jobs, tasks

# So many lines, or so long, are enough for one intake: what is kept of it goes at one go.
_INTAKE_LINES_MAX = 50_000
_INTAKE_AGE_MAX = timedelta(days=1)

_JOB_OF_TENANT = select(jobs).where(jobs.c.number == bindparam("j_number"), jobs.c.tenant == bindparam("j_tenant"))
_ENDS = {RecordKind.SUCCEEDED: JobStatus.PROCESSED, RecordKind.FAILED: JobStatus.FAILED}


def next_number(conn: Connection) -> str:
    """Give the id of the next batch with jobs; guards by the writer's lock that it is given once."""
    return str(conn.execute(select(func.coalesce(func.max(batches.c.serial), 0) + 1)).scalar_one())


def intake_of_tenant(conn: Connection, new: NewBatch, moment: Moment) -> RowMapping | None:
    """Find the batch that a tenant's jobs join now, locked; None where they should rather join the `new` one."""
    age_max = _INTAKE_AGE_MAX
    if new.deadline_at is not None:
        # What joins late must not find the deadline near.
        age_max = min(age_max, (new.deadline_at - moment.wall) * INTAKE_SHARE)
    fresh = (batches.c.total_count < _INTAKE_LINES_MAX, batches.c.created_at > moment.wall - age_max)
    mine = (batches.c.tenant == new.tenant, batches.c.status == BatchStatus.IN_PROGRESS, batches.c.is_intake)
    query = select(batches).where(*mine, *fresh).order_by(batches.c.serial.desc()).limit(1)
    return conn.execute(query.with_for_update()).mappings().one_or_none()


def add_jobs(
    conn: Connection, batch: RowMapping, lines: NewAddition, asked: Sequence[NewJob], moment: Moment
) -> Sequence[RowMapping]:
    """Insert the jobs of lines that have just joined a batch, and read them, in line order."""
    common = {
        "tenant": batch["tenant"],
        "batch_id": batch["id"],
        "is_single": batch["is_intake"],
        "status": JobStatus.QUEUED,
        "created_at": moment.wall,
        "queued_at": moment.wall,
    }
    rows = [
        common | {"line_number": number, "url": each.url, "inference_type": each.inference_type, "model": each.model}
        for number, each in enumerate(asked, lines.first_line)
    ]
    conn.execute(insert(jobs), rows)
    last = lines.first_line + len(rows) - 1
    query = select(jobs).where(jobs.c.batch_id == batch["id"], jobs.c.line_number.between(lines.first_line, last))
    return conn.execute(query.order_by(jobs.c.line_number)).mappings().all()


def job_of_tenant(conn: Connection, tenant: TenantId, number: int) -> RowMapping:
    """Read a job; guards that another tenant's looks like a missing one."""
    row = conn.execute(_JOB_OF_TENANT, {"j_number": number, "j_tenant": tenant}).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no job {number}")
    return row


def jobs_of_tenant(
    conn: Connection,
    tenant: TenantId,
    *,
    limit: int,
    statuses: Collection[JobStatus],
    batch_id: BatchId | None,
    before: int | None,
) -> Sequence[RowMapping]:
    """List jobs, newest first."""
    query = select(jobs).where(jobs.c.tenant == tenant)
    if statuses:
        query = query.where(jobs.c.status.in_(sorted(statuses)))
    if batch_id is not None:
        query = query.where(jobs.c.batch_id == batch_id)
    if before is not None:
        query = query.where(jobs.c.number < before)
    return conn.execute(query.order_by(jobs.c.number.desc()).limit(limit)).mappings().all()


def count_jobs(conn: Connection, *where: ColumnElement[bool]) -> dict[JobStatus, int]:
    """Count jobs by status."""
    query = select(jobs.c.status, func.count().label("total")).where(*where).group_by(jobs.c.status)
    found = {row.status: row.total for row in conn.execute(query)}
    return {status: found.get(status, 0) for status in JobStatus}


def count_job_batches(conn: Connection, tenant: TenantId) -> JobBatchCounts:
    """Count a tenant's batches by what their jobs do."""
    queued = func.sum(case((jobs.c.status == JobStatus.QUEUED, 1), else_=0)).label("queued")
    active = func.sum(case((jobs.c.status.in_(ACTIVE_JOBS), 1), else_=0)).label("active")
    mine = (jobs.c.tenant == tenant, ~jobs.c.is_single, batches.c.deleted_at.is_(None))
    each = select(queued, active, func.count().label("total")).join_from(jobs, batches, jobs.c.batch_id == batches.c.id)
    batch = each.where(*mine).group_by(jobs.c.batch_id).subquery()
    waits, is_over = batch.c.queued == batch.c.total, batch.c.active == 0
    waiting, over = (func.coalesce(func.sum(case((which, 1), else_=0)), 0) for which in (waits, is_over))
    row = conn.execute(select(waiting.label("waiting"), over.label("over"), func.count().label("total"))).one()
    return JobBatchCounts(waiting=row.waiting, begun=row.total - row.waiting - row.over, over=row.over)


def told(conn: Connection, found: Sequence[Batch]) -> list[Batch]:
    """Give batches as they are shown: what has jobs counts these, and is over as long as none of them is active."""
    named = [each.id for each in found if each.has_jobs and each.status not in TERMINAL]
    groups: dict[str, dict[JobStatus, int]] = {each: {} for each in named}
    last: dict[str, datetime] = {}
    query = select(jobs.c.batch_id, jobs.c.status, func.count().label("total"), func.max(jobs.c.ended_at).label("last"))
    query = query.where(jobs.c.batch_id.in_(named)).group_by(jobs.c.batch_id, jobs.c.status)
    for row in conn.execute(query) if named else ():
        groups[row.batch_id][row.status] = row.total
        if row.last is not None:
            last[row.batch_id] = max(row.last, last.get(row.batch_id, row.last))
    counted = (_told(each, groups[each.id], last.get(each.id)) if each.id in groups else each for each in found)
    return [_cancelled(each) if each.has_jobs and each.cancelling_at is not None else each for each in counted]


def _told(batch: Batch, counts: Mapping[JobStatus, int], last: datetime | None) -> Batch:
    is_over = not ACTIVE_JOBS & counts.keys()
    return replace(
        batch,
        **_counted(counts),
        status=BatchStatus.COMPLETED if is_over else batch.status,
        completed_at=last if is_over else None,
    )


def _cancelled(batch: Batch) -> Batch:
    """Show one that was cancelled as that, and not as completed, until a retry takes the mark away."""
    if batch.status is not BatchStatus.COMPLETED:
        return batch
    return replace(batch, status=BatchStatus.CANCELLED, cancelled_at=batch.cancelling_at, completed_at=None)


def _counted(counts: Mapping[JobStatus, int]) -> dict[str, Any]:
    return {
        "total_count": sum(counts.values()),
        "succeeded_count": counts.get(JobStatus.PROCESSED, 0),
        "failed_count": counts.get(JobStatus.FAILED, 0),
        "cancelled_count": counts.get(JobStatus.CANCELED, 0),
    }


def end_jobs_of_batch(conn: Connection, batch: RowMapping, moment: Moment) -> dict[str, Any]:
    """Fail the jobs of a batch whose time is over that have no result, and give the counts that it ends with."""
    mine = jobs.c.batch_id == batch["id"]
    ended = {"status": JobStatus.FAILED, "ended_at": moment.wall}
    conn.execute(update(jobs).where(mine, jobs.c.status.in_(ACTIVE_JOBS)).values(ended))
    return _counted(count_jobs(conn, mine))


# Retried, a job has another line, so that no word on the former one reaches it.
_END_JOB = update(jobs).where(
    jobs.c.batch_id == bindparam("j_batch_id"),
    jobs.c.line_number == bindparam("j_line_number"),
    jobs.c.status != JobStatus.CANCELED,
)


def end_jobs(conn: Connection, batch_id: str, extents: Iterable[NewExtent], moment: Moment) -> None:
    """End the jobs whose results have just been registered; guards that one that was canceled stays so."""
    rows = [
        {"j_batch_id": batch_id, "j_line_number": number, "status": _ENDS[kind], "ended_at": moment.wall}
        for each in extents
        for number, kind in each.lines
    ]
    if rows:
        conn.execute(_END_JOB, rows)


def begin_jobs(conn: Connection, task: RowMapping) -> tuple[int, ...]:
    """Note that a worker has taken the lines of a shard, and name those that are not to be sent."""
    last = task["first_line"] + task["line_count"] - 1
    mine = (jobs.c.batch_id == task["batch_id"], jobs.c.line_number.between(task["first_line"], last))
    waiting = jobs.c.status == JobStatus.QUEUED
    conn.execute(update(jobs).where(*mine, waiting).values(status=JobStatus.PROCESSING))
    cancelled = select(jobs.c.line_number).where(*mine, jobs.c.status == JobStatus.CANCELED)
    return tuple(conn.execute(cancelled.order_by(jobs.c.line_number)).scalars())


def cancelled_lines(conn: Connection, task_ids: Collection[TaskId]) -> dict[TaskId, tuple[int, ...]]:
    """List the lines of shards that are not to be sent any more."""
    is_in = and_(
        jobs.c.batch_id == tasks.c.batch_id,
        jobs.c.line_number >= tasks.c.first_line,
        jobs.c.line_number < tasks.c.first_line + tasks.c.line_count,
    )
    query = select(tasks.c.id, jobs.c.line_number).join_from(tasks, jobs, is_in)
    found: dict[TaskId, tuple[int, ...]] = {}
    for row in conn.execute(query.where(tasks.c.id.in_(task_ids), jobs.c.status == JobStatus.CANCELED)):
        found[row.id] = (*found.get(row.id, ()), row.line_number)
    return found


def drop_jobs(conn: Connection, batch_ids: Collection[str]) -> None:
    """Forget the jobs of batches whose journals have ended."""
    conn.execute(delete(jobs).where(jobs.c.batch_id.in_(batch_ids)))


def cancel_jobs(conn: Connection, moment: Moment, *which: ColumnElement[bool]) -> int:
    """Cancel those of these jobs that are active; guards by their status that no other is touched."""
    ended = {"status": JobStatus.CANCELED, "ended_at": moment.wall}
    return conn.execute(update(jobs).where(*which, jobs.c.status.in_(ACTIVE_JOBS)).values(ended)).rowcount


def cancel_batch(conn: Connection, batch_id: BatchId, moment: Moment) -> int:
    """Cancel the active jobs of a batch, and mark it where there were any: such a batch has no status of its own that
    says so. Guarded by the lock of its row, as a retry is.
    """
    count = cancel_jobs(conn, moment, jobs.c.batch_id == batch_id)
    if count:
        mark = {"cancelling_at": moment.wall, "version": batches.c.version + 1}
        conn.execute(update(batches).where(batches.c.id == batch_id).values(mark))
    return count


def require_retryable(conn: Connection, tenant: TenantId, number: int) -> RowMapping:
    """Read a job that may be queued again."""
    row = job_of_tenant(conn, tenant, number)
    if row["status"] not in RETRYABLE_JOBS:
        raise TransitionRefused(f"the job {number} is {row['status']}: only one that failed or was canceled is retried")
    return row


def requeue_job(conn: Connection, number: int, line_number: int, moment: Moment) -> None:
    """Let a new line stand for a job; guarded by the locks under which the line joined."""
    again = {"status": JobStatus.QUEUED, "line_number": line_number, "queued_at": moment.wall, "ended_at": None}
    conn.execute(update(jobs).where(jobs.c.number == number).values(again | {"retry_count": jobs.c.retry_count + 1}))
