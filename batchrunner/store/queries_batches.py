"""Statements on files, batches and the outbox; `move` is the only one that writes a status."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields

import msgspec
from sqlalchemy import Connection, RowMapping, bindparam, exists, func, insert, literal, or_, select, update

from batchrunner.errors import NameTaken, NotFound
from batchrunner.lifecycle import ENDED_BY, SEALING, TERMINAL, BatchEvent, BatchStatus, next_status
from batchrunner.models import BatchId, File, FileId, NewBatch, Order, PauseReason, TaskKind, TaskState, TenantId
from batchrunner.store.moments import Moment
from batchrunner.store.tables import batches, extents, files, outbox, tasks

_BATCH = select(batches).where(batches.c.id == bindparam("b_id"))
_BATCH_OF_TENANT = _BATCH.where(batches.c.tenant == bindparam("b_tenant"))
_LOCKED_BATCH = _BATCH.with_for_update()
_SHARDS = select(tasks).where(tasks.c.kind == TaskKind.SHARD, tasks.c.batch_id == bindparam("b_id"))
_SHARDS = _SHARDS.order_by(tasks.c.first_line)

# The extent that holds number after + 1 is the last that begins at or below it: two steps in the key instead of a walk.
_begins_at = select(func.max(extents.c.sequence_from)).where(
    extents.c.batch_id == bindparam("b_id"), extents.c.sequence_from <= bindparam("b_after") + 1
)
_EXTENTS_AFTER = (
    select(extents)
    .where(
        extents.c.batch_id == bindparam("b_id"),
        extents.c.sequence_from >= func.coalesce(_begins_at.scalar_subquery(), 0),
        extents.c.sequence_from + extents.c.count - 1 > bindparam("b_after"),
    )
    .order_by(extents.c.sequence_from)
    .limit(bindparam("b_limit"))
)


def lock_batch(conn: Connection, batch_id: BatchId) -> RowMapping:
    """Read a batch that the caller's task belongs to and keep others from moving it until the transaction ends."""
    return conn.execute(_LOCKED_BATCH, {"b_id": batch_id}).mappings().one()


def batch_of_tenant(conn: Connection, tenant: TenantId, batch_id: BatchId) -> RowMapping:
    """Read a batch; guards that another tenant's looks like a missing one."""
    row = conn.execute(_BATCH_OF_TENANT, {"b_id": batch_id, "b_tenant": tenant}).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no batch {batch_id}")
    return row


def batches_of_tenant(conn: Connection, tenant: TenantId, *, limit: int, after: BatchId | None) -> Sequence[RowMapping]:
    """List a tenant's batches, newest first, behind a cursor that must be the tenant's own."""
    query = select(batches).where(batches.c.tenant == tenant).order_by(batches.c.serial.desc()).limit(limit)
    if after is not None:
        query = query.where(batches.c.serial < batch_of_tenant(conn, tenant, after)["serial"])
    return conn.execute(query).mappings().all()


def shards_of_batch(conn: Connection, batch_id: BatchId) -> Sequence[RowMapping]:
    """List a batch's shards by first_line."""
    return conn.execute(_SHARDS, {"b_id": batch_id}).mappings().all()


def extents_after(conn: Connection, batch_id: BatchId, *, after: int, limit: int) -> Sequence[RowMapping]:
    """List the extents that hold a number above `after`."""
    return conn.execute(_EXTENTS_AFTER, {"b_id": batch_id, "b_after": after, "b_limit": limit}).mappings().all()


def add_file(conn: Connection, file: File) -> None:
    """Insert a file; guards that an id names one file for ever, and lets the same insert be repeated."""
    row = conn.execute(select(files).where(files.c.id == file.id)).mappings().one_or_none()
    if row is None:
        conn.execute(insert(files).values({each.name: getattr(file, each.name) for each in fields(File)}))
    elif (row["tenant"], row["blob"]) != (file.tenant, file.blob):
        raise NameTaken(f"the file id {file.id} is taken")


def file_of_tenant(conn: Connection, tenant: TenantId, file_id: FileId) -> RowMapping:
    """Read a file; guards that another tenant's looks like a missing one."""
    row = conn.execute(select(files).where(files.c.id == file_id, files.c.tenant == tenant)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no file {file_id}")
    return row


def create_batch(conn: Connection, new: NewBatch, moment: Moment) -> RowMapping:
    """Insert a batch with its validate task; guards that what it refers to is the tenant's. May be repeated."""
    found = conn.execute(_BATCH, {"b_id": new.id}).mappings().one_or_none()
    if found is not None and found["tenant"] != new.tenant:
        raise NameTaken(f"the batch id {new.id} is taken")
    if found is not None:
        return found
    if new.input_file_id is not None:
        file_of_tenant(conn, new.tenant, new.input_file_id)
    if new.parent_id is not None:
        batch_of_tenant(conn, new.tenant, new.parent_id)
    given = {each.name: getattr(new, each.name) for each in fields(NewBatch)}
    fresh = {
        "status": BatchStatus.VALIDATING,
        "version": 1,
        "is_open": False,
        "problems": (),
        "created_at": moment.wall,
    }
    conn.execute(insert(batches).values(given | fresh))
    add_task(conn, new.id, TaskKind.VALIDATE)
    return conn.execute(_BATCH, {"b_id": new.id}).mappings().one()


def add_task(conn: Connection, batch_id: BatchId, kind: TaskKind) -> bool:
    """Queue a task that a batch has once; guards, under the lock of the batch's row, that there is no second one."""
    row = {"batch_id": batch_id, "kind": kind, "state": TaskState.QUEUED, "epoch": 0}
    row |= {"orphaned_by_death": False, "is_quarantined": False}
    there = exists().where(tasks.c.batch_id == batch_id, tasks.c.kind == kind)
    values = select(*(literal(value, tasks.c[name].type) for name, value in row.items())).where(~there)
    return conn.execute(insert(tasks).from_select(list(row), values)).rowcount == 1


_MOVE = update(batches).where(
    batches.c.id == bindparam("b_id"),
    batches.c.status == bindparam("b_status"),
    batches.c.version == bindparam("b_version"),
)


def move(conn: Connection, batch: RowMapping, event: BatchEvent, moment: Moment) -> BatchStatus | None:
    """Move a batch by compare-and-set on the status and version of `batch`; None when somebody else was first.

    What belongs to the new status comes in the same transaction: the seal task of finalizing and cancelling; the end
    of all tasks and the outbox row of a terminal one. `ended_by` is written once, by the first event that has one.
    """
    seen = batch["status"]
    target = next_status(seen, event)
    values = {"status": target, "version": batch["version"] + 1, f"{target}_at": moment.wall}
    if batch["ended_by"] is None and event in ENDED_BY:
        values["ended_by"] = ENDED_BY[event]
    # What blocks a seal still blocks it when only the word changes.
    if not (seen in SEALING and target in SEALING):
        values["blocked_by"] = None
    mine = {"b_id": batch["id"], "b_status": seen, "b_version": batch["version"]}
    if conn.execute(_MOVE, values | mine).rowcount != 1:
        return None
    if target in SEALING:
        add_task(conn, batch["id"], TaskKind.SEAL)
    if target in TERMINAL:
        _end_tasks(conn, batch["id"])
        _announce(conn, batch["id"], target, moment)
    return target


def _end_tasks(conn: Connection, batch_id: BatchId) -> None:
    """End what a finished batch still has queued or in hands; the bumped epoch guards against last words."""
    unfinished = tasks.c.state.in_((TaskState.QUEUED, TaskState.LEASED, TaskState.PARKED))
    conn.execute(
        update(tasks)
        .where(tasks.c.batch_id == batch_id, unfinished)
        .values(
            state=TaskState.SETTLED, epoch=tasks.c.epoch + 1, session=None, lease_until=None, taken_from=tasks.c.session
        )
    )


def _announce(conn: Connection, batch_id: BatchId, status: BatchStatus, moment: Moment) -> None:
    """Write the event of an end; its id follows from batch and status, so that it cannot be announced twice."""
    event_id = "evt_" + hashlib.sha256(f"{batch_id}:{status}".encode()).hexdigest()[:32]
    event = f"batch.{status}"
    body = {
        "id": event_id,
        "object": "event",
        "type": event,
        "created_at": int(moment.wall.timestamp()),
        "data": {"id": batch_id},
    }
    row = {"id": event_id, "batch_id": batch_id, "event": event, "body": msgspec.json.encode(body).decode()}
    conn.execute(insert(outbox).values(row | {"created_at": moment.wall}))


def send(conn: Connection, tenant: TenantId, batch_id: BatchId, event: BatchEvent, moment: Moment) -> bool:
    """Move a tenant's batch; guards that the event is judged by the status found in this transaction."""
    locked = _BATCH_OF_TENANT.with_for_update()
    row = conn.execute(locked, {"b_id": batch_id, "b_tenant": tenant}).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no batch {batch_id}")
    return move(conn, row, event, moment) is not None


def pause(conn: Connection, tenant: TenantId, batch_id: BatchId, reason: str, moment: Moment) -> None:
    """Pause a batch that is not over; guards that a breaker, which resumes by itself, cannot replace an operator."""
    batch_of_tenant(conn, tenant, batch_id)
    weaker = or_(batches.c.paused_reason.is_(None), batches.c.paused_reason != PauseReason.OPERATOR)
    conn.execute(
        update(batches)
        .where(batches.c.id == batch_id, weaker, batches.c.status.not_in(TERMINAL))
        .values(
            paused_reason=reason,
            paused_at=func.coalesce(batches.c.paused_at, literal(moment.wall, batches.c.paused_at.type)),
        )
    )


def resume(conn: Connection, tenant: TenantId, batch_id: BatchId) -> None:
    """Clear the pause and queue parked tasks; tasks before batch, the lock order."""
    batch_of_tenant(conn, tenant, batch_id)
    conn.execute(
        update(tasks)
        .where(tasks.c.batch_id == batch_id, tasks.c.state == TaskState.PARKED)
        .values(state=TaskState.QUEUED, attempts=0, not_before=None)
    )
    conn.execute(
        update(batches).where(batches.c.id == batch_id).values(paused_reason=None, paused_at=None, blocked_by=None)
    )


def adjust(conn: Connection, tenant: TenantId, batch_id: BatchId, *, hold_at: int | None, order: Order) -> None:
    """Set the hold, which claims compare with the first index of each shard, and the order; guards that a batch that
    is over stays as it was sealed.
    """
    batch_of_tenant(conn, tenant, batch_id)
    conn.execute(
        update(batches)
        .where(batches.c.id == batch_id, batches.c.status.not_in(TERMINAL))
        .values(hold_at=hold_at, order=order)
    )


def set_blocked(conn: Connection, batch_id: BatchId, blocked_by: str | None) -> None:
    """Show or clear why a batch does not move on; guards that nothing is shown on one that is over."""
    conn.execute(
        update(batches).where(batches.c.id == batch_id, batches.c.status.not_in(TERMINAL)).values(blocked_by=blocked_by)
    )
