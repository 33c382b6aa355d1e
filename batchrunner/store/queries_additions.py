"""Statements on open batches, whose lines come after them, and on where single lines stand."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection, RowMapping, bindparam, delete, func, insert, select, update

from batchrunner.additions import NewAddition
from batchrunner.errors import NotFound, TransitionRefused
from batchrunner.holdings import KeyLimits
from batchrunner.lifecycle import BatchEvent, BatchStatus
from batchrunner.models import CLUB, BatchId, ShardCut, TaskId, TaskKind, TaskState, TenantId
from batchrunner.store.moments import Moment
from batchrunner.store.queries_batches import batch_of_tenant, lock_batch, move, require_lines
from batchrunner.store.queries_blobs import drop_blobs, need_blob
from batchrunner.store.queries_progress import add_shards
from batchrunner.store.tables import additions, batches, extents, tasks

# The shard leads to its extents by their index; their own key would lead through all of the batch.
_HOLDING = (
    select(tasks.c.id)
    .where(
        tasks.c.batch_id == bindparam("b_id"),
        tasks.c.kind == TaskKind.SHARD,
        tasks.c.first_line <= bindparam("b_line"),
    )
    .order_by(tasks.c.first_line.desc())
    .limit(1)
)
_EXTENTS_AT = (
    select(extents)
    .select_from(batches.outerjoin(extents, extents.c.task_id == _HOLDING.scalar_subquery()))
    .where(batches.c.id == bindparam("b_id"), batches.c.tenant == bindparam("b_tenant"), batches.c.deleted_at.is_(None))
    .order_by(extents.c.sequence_from)
)


def add_lines(
    conn: Connection, tenant: TenantId, batch_id: BatchId, new: NewAddition, moment: Moment, *, limits: KeyLimits
) -> bool:
    """Add shards, counts and the addition's row; guards, under the lock of the batch's row, that it is open and in
    progress, and that the lines take the very next numbers.
    """
    batch = batch_of_tenant(conn, tenant, batch_id, is_locked=True)
    if not batch["is_open"] or batch["dialect"] == CLUB:
        raise TransitionRefused(f"the batch {batch_id} takes no more requests")
    if batch["status"] is not BatchStatus.IN_PROGRESS:
        raise TransitionRefused(f"the batch {batch_id} is {batch['status']} and takes no more requests")
    if batch["total_count"] + 1 != new.first_line:
        return False
    require_lines(conn, tenant, new.line_count, limits)
    append(conn, batch, new, moment)
    return True


def append(conn: Connection, batch: RowMapping, new: NewAddition, moment: Moment) -> None:
    """Let lines with a blob of their own join a batch, behind all others; guarded by the lock of the batch's row."""
    need_blob(conn, new.source)
    row = {"batch_id": batch["id"], "line_count": new.line_count, "created_at": moment.wall}
    row |= {name: getattr(new, name) for name in ("first_line", "source", "id_hashes")}
    conn.execute(insert(additions).values(row))
    is_first = batch["total_count"] == 0
    values = {"model": new.model if is_first or batch["model"] == new.model else None, "closes_at": new.closes_at}
    append_shards(conn, batch, new.shards, source=new.source, **values)


def append_shards(
    conn: Connection, batch: RowMapping, cuts: Sequence[ShardCut], *, source: str, **values: object
) -> None:
    """Add shards and their counts; guarded as `append` is."""
    add_shards(conn, batch["id"], cuts, source=source)
    values["total_count"] = batch["total_count"] + sum(cut.line_count for cut in cuts)
    values["open_shards"] = batches.c.open_shards + len(cuts)
    conn.execute(update(batches).where(batches.c.id == batch["id"]).values(values))


def additions_of_batch(conn: Connection, batch_id: BatchId, *, from_line: int, limit: int) -> Sequence[RowMapping]:
    """List what joined from a line on."""
    query = select(additions).where(additions.c.batch_id == batch_id, additions.c.first_line >= from_line)
    return conn.execute(query.order_by(additions.c.first_line).limit(limit)).mappings().all()


def close_batch(conn: Connection, tenant: TenantId, batch_id: BatchId, moment: Moment) -> None:
    """Close a tenant's batch; guards as `close` does."""
    close(conn, batch_of_tenant(conn, tenant, batch_id, is_locked=True), moment)


def close(conn: Connection, batch: RowMapping, moment: Moment) -> bool:
    """Let no more lines join, and tell whether that moved the batch; guards by the row's lock, which the caller took,
    that a settle either sees the batch closed or has told its last shard.
    """
    if not batch["is_open"] or batch["dialect"] == CLUB:
        return False
    conn.execute(update(batches).where(batches.c.id == batch["id"]).values(is_open=False))
    if batch["status"] is not BatchStatus.IN_PROGRESS or batch["open_shards"]:
        return False
    return move(conn, lock_batch(conn, batch["id"]), BatchEvent.LINES_SETTLED, moment) is not None


def close_idle(conn: Connection, moment: Moment) -> list[BatchId]:
    """Close batches to which nothing came for long and that have nothing to do, and name those that moved; guards as
    `close` does.
    """
    idle = (batches.c.status == BatchStatus.IN_PROGRESS, batches.c.is_open, batches.c.open_shards == 0)
    late = select(batches).where(*idle, batches.c.closes_at <= moment.wall).with_for_update()
    return [BatchId(row["id"]) for row in conn.execute(late).mappings().all() if close(conn, row, moment)]


def drop_additions(conn: Connection, batch_ids: Collection[str]) -> None:
    """Let the lines of batches go whose journals have ended."""
    gone = additions.c.batch_id.in_(batch_ids)
    drop_blobs(conn, select(additions.c.source).where(gone))
    conn.execute(delete(additions).where(gone))


def shards_from(conn: Connection, batch_id: BatchId, line_number: int, *, limit: int) -> Sequence[RowMapping]:
    """List shards from the one that holds a line on."""
    mine = (tasks.c.batch_id == batch_id, tasks.c.kind == TaskKind.SHARD)
    begins_at = select(func.max(tasks.c.first_line)).where(*mine, tasks.c.first_line <= line_number)
    query = select(tasks).where(*mine, tasks.c.first_line >= func.coalesce(begins_at.scalar_subquery(), 0))
    return conn.execute(query.order_by(tasks.c.first_line).limit(limit)).mappings().all()


def shards_of(conn: Connection, batch_id: BatchId, task_ids: Collection[TaskId]) -> Sequence[RowMapping]:
    """List these shards; guards that they are the batch's."""
    mine = (tasks.c.id.in_(task_ids), tasks.c.batch_id == batch_id, tasks.c.kind == TaskKind.SHARD)
    return conn.execute(select(tasks).where(*mine).order_by(tasks.c.first_line)).mappings().all()


def extents_at(conn: Connection, tenant: TenantId, batch_id: BatchId, line_number: int) -> list[RowMapping]:
    """List the extents of the shard that holds a line; guards as `batch_of_tenant` does."""
    asked = {"b_id": batch_id, "b_tenant": tenant, "b_line": line_number}
    found = conn.execute(_EXTENTS_AT, asked).mappings().all()
    if not found:
        raise NotFound(f"no batch {batch_id}")
    # A batch without any has one row, with nothing in it.
    return [row for row in found if row["task_id"] is not None]


def task_counts(conn: Connection, batch_id: BatchId) -> dict[TaskKind, dict[TaskState, int]]:
    """Count a batch's tasks by kind and state."""
    query = select(tasks.c.kind, tasks.c.state, func.count()).where(tasks.c.batch_id == batch_id)
    counts: dict[TaskKind, dict[TaskState, int]] = {}
    for kind, state, count in conn.execute(query.group_by(tasks.c.kind, tasks.c.state)):
        counts.setdefault(kind, {})[state] = count
    return counts
