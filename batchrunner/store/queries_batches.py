"""Statements on batches; `move` is the only one that writes a status."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields

from sqlalchemy import (
    Connection,
    RowMapping,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    update,
)

from batchrunner.errors import NameTaken, NotFound, OwnError, QuotaExceeded, TransitionRefused
from batchrunner.holdings import KeyLimits, OpenCounts, Replay
from batchrunner.lifecycle import ACTIVE_JOBS, ENDED_BY, SEALING, TERMINAL, BatchEvent, BatchStatus, next_status
from batchrunner.models import (
    CLUB,
    BatchId,
    File,
    LineProblem,
    NewBatch,
    Order,
    PauseReason,
    TaskKind,
    TaskState,
    TenantId,
)
from batchrunner.store.moments import Moment
from batchrunner.store.queries_blobs import UNFINISHED, drop_blob, need_blob
from batchrunner.store.queries_files import add_file, file_of_tenant, require_bytes
from batchrunner.store.queries_idempotency import note_made
from batchrunner.store.queries_webhooks import announce, is_wanted
from batchrunner.store.rows import batch_of
from batchrunner.store.tables import batches, extents, files, jobs, tasks
from batchrunner.webhooks import event_of

_BATCH = select(batches).where(batches.c.id == bindparam("b_id"))
_BATCH_OF_TENANT = _BATCH.where(batches.c.tenant == bindparam("b_tenant"))
_LOCKED_BATCH = _BATCH.with_for_update()
_LOCKED_BATCH_OF_TENANT = _BATCH_OF_TENANT.with_for_update()
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


def batch_of_tenant(
    conn: Connection, tenant: TenantId, batch_id: BatchId, *, even_deleted: bool = False, is_locked: bool = False
) -> RowMapping:
    """Read a batch, if it is wanted as `lock_batch` does; guards that another tenant's and a deleted one look like a
    missing one.
    """
    query = _LOCKED_BATCH_OF_TENANT if is_locked else _BATCH_OF_TENANT
    row = conn.execute(query, {"b_id": batch_id, "b_tenant": tenant}).mappings().one_or_none()
    if row is None or (row["deleted_at"] is not None and not even_deleted):
        raise NotFound(f"no batch {batch_id}")
    return row


def batches_of_tenant(conn: Connection, tenant: TenantId, *, limit: int, after: BatchId | None) -> Sequence[RowMapping]:
    """List a tenant's batches, newest first, behind a cursor that must be the tenant's own but may be deleted."""
    query = select(batches).where(batches.c.tenant == tenant, batches.c.deleted_at.is_(None), ~batches.c.is_intake)
    query = query.order_by(batches.c.serial.desc()).limit(limit)
    if after is not None:
        query = query.where(batches.c.serial < batch_of_tenant(conn, tenant, after, even_deleted=True)["serial"])
    return conn.execute(query).mappings().all()


def family_of_batch(conn: Connection, tenant: TenantId, batch_id: BatchId) -> list[RowMapping]:
    """List the batch that was first and all retries below it, oldest first, deleted ones too."""
    row = batch_of_tenant(conn, tenant, batch_id)
    while row["parent_id"] is not None:
        row = conn.execute(_BATCH, {"b_id": row["parent_id"]}).mappings().one()
    found: list[RowMapping] = []
    generation: Sequence[RowMapping] = [row]
    while generation:
        found += generation
        below = batches.c.parent_id.in_([each["id"] for each in generation])
        generation = conn.execute(select(batches).where(below)).mappings().all()
    return sorted(found, key=lambda each: each["serial"])


def open_counts(conn: Connection, tenant: TenantId) -> OpenCounts:
    """Count a tenant's unfinished batches and the lines in them that have no result; of one that is being validated the
    lines of its file.
    """
    done = batches.c.succeeded_count + batches.c.failed_count + batches.c.expired_count + batches.c.cancelled_count
    # What has jobs takes more for weeks: it is open while one of them is active.
    is_busy = exists().where(jobs.c.batch_id == batches.c.id, jobs.c.status.in_(ACTIVE_JOBS))
    is_counted = or_(batches.c.dialect != CLUB, and_(~batches.c.is_intake, is_busy))
    count = func.coalesce(func.sum(case((is_counted, 1), else_=0)), 0)
    query = select(count, func.coalesce(func.sum(batches.c.total_count - done), 0))
    row = conn.execute(query.where(batches.c.status.in_(UNFINISHED), batches.c.tenant == tenant)).one()
    is_new = (batches.c.status == BatchStatus.VALIDATING, batches.c.tenant == tenant, batches.c.parent_id.is_(None))
    uncounted = select(func.coalesce(func.sum(files.c.line_count), 0))
    uncounted = uncounted.join_from(batches, files, files.c.id == batches.c.input_file_id).where(*is_new)
    return OpenCounts(batches=row[0], lines=row[1] + conn.execute(uncounted).scalar_one())


def shards_of_batch(conn: Connection, batch_id: BatchId) -> Sequence[RowMapping]:
    """List a batch's shards by first_line."""
    return conn.execute(_SHARDS, {"b_id": batch_id}).mappings().all()


def extents_after(conn: Connection, batch_id: BatchId, *, after: int, limit: int) -> Sequence[RowMapping]:
    """List the extents that hold a number above `after`."""
    return conn.execute(_EXTENTS_AFTER, {"b_id": batch_id, "b_after": after, "b_limit": limit}).mappings().all()


def create_batch(
    conn: Connection,
    new: NewBatch,
    moment: Moment,
    *,
    replay: Replay | None,
    limits: KeyLimits,
    file: File | None = None,
    family: Collection[BatchId] | None = None,
) -> RowMapping:
    """Insert a batch with its validate task; guards that what it refers to is the tenant's, that an Idempotency-Key
    makes one batch, that limits hold however many ask at once, and that no retry came that its maker has not seen. May
    be repeated.
    """
    found = conn.execute(_BATCH, {"b_id": new.id}).mappings().one_or_none()
    if found is not None and found["tenant"] != new.tenant:
        raise NameTaken(f"the batch id {new.id} is taken")
    if found is not None:
        return found
    if replay is not None and (made := note_made(conn, new.tenant, replay, new.id, moment)) is not None:
        return batch_of_tenant(conn, new.tenant, BatchId(made))
    _require_room(conn, new, limits, file)
    if file is not None:
        add_file(conn, file)
    _require_origin(conn, new, moment)
    if family is not None and new.parent_id is not None:
        _require_family(conn, new.tenant, new.parent_id, family)
    given = {each.name: getattr(new, each.name) for each in fields(NewBatch)}
    fresh = {
        "status": BatchStatus.VALIDATING,
        "version": 1,
        "problems": (),
        "created_at": moment.wall,
    }
    if new.chosen_blob is not None:
        need_blob(conn, new.chosen_blob)
    conn.execute(insert(batches).values(given | fresh))
    if new.is_open:
        move(conn, lock_batch(conn, new.id), BatchEvent.INPUT_ACCEPTED, moment)
    else:
        add_task(conn, new.id, TaskKind.VALIDATE)
    return conn.execute(_BATCH, {"b_id": new.id}).mappings().one()


def _require_room(conn: Connection, new: NewBatch, limits: KeyLimits, file: File | None) -> None:
    batches_max = limits.open_batches_max
    if batches_max is not None and (held := open_counts(conn, new.tenant).batches) >= batches_max:
        raise QuotaExceeded(f"{held} batches are unfinished, at most {batches_max}")
    require_lines(conn, new.tenant, _line_count(conn, new, file), limits)


def require_lines(conn: Connection, tenant: TenantId, count: int, limits: KeyLimits) -> None:
    """Guard that a tenant's waiting lines stay within the limits of its key; 0 stands for lines that nobody knows."""
    lines_max = limits.queued_lines_max
    if lines_max is None:
        return
    held = open_counts(conn, tenant).lines
    if held + max(count, 1) > lines_max:
        asked = f" and this batch has {count}" if count else ""
        raise QuotaExceeded(f"{held} lines wait for their results{asked}, at most {lines_max}")


def _line_count(conn: Connection, new: NewBatch, file: File | None) -> int:
    """How many lines a batch will have, 0 where that is not known before it is validated."""
    if file is not None:
        return file.line_count or 0
    if new.input_file_id is None or new.parent_id is not None:
        return 0
    counted = select(files.c.line_count).where(files.c.id == new.input_file_id, files.c.tenant == new.tenant)
    return conn.execute(counted).scalar_one_or_none() or 0


def _require_origin(conn: Connection, new: NewBatch, moment: Moment) -> None:
    """Check input and parent. A retry may read its parent's input although it was deleted, while its bytes are there:
    with the batch's row they cannot go any more.
    """
    parent = None
    if new.parent_id is not None:
        parent = batch_of_tenant(conn, new.tenant, new.parent_id)
    if new.input_file_id is None:
        return
    if parent is not None and parent["input_file_id"] == new.input_file_id:
        require_bytes(conn, new.input_file_id)
    else:
        file_of_tenant(conn, new.tenant, new.input_file_id, moment)


def _require_family(conn: Connection, tenant: TenantId, parent_id: BatchId, seen: Collection[BatchId]) -> None:
    known = frozenset(seen)
    for each in family_of_batch(conn, tenant, parent_id):
        if each["id"] not in known and each["deleted_at"] is None:
            raise TransitionRefused(f"the batch {parent_id} has been retried meanwhile, as {each['id']}")


def delete_batch(conn: Connection, tenant: TenantId, batch_id: BatchId, moment: Moment) -> None:
    """Hide a batch; guards, under the lock of its row, that it is over."""
    row = batch_of_tenant(conn, tenant, batch_id, is_locked=True)
    if row["dialect"] == CLUB and row["status"] not in TERMINAL:
        _end_idle_jobs(conn, row, moment)
    elif row["status"] not in TERMINAL:
        raise TransitionRefused(f"the batch {batch_id} is {row['status']}: only one that is over can be deleted")
    conn.execute(update(batches).where(batches.c.id == batch_id).values(deleted_at=moment.wall))
    for blob in (row["problems_blob"], row["chosen_blob"]):
        if blob is not None:
            drop_blob(conn, blob, moment)


def _end_idle_jobs(conn: Connection, row: RowMapping, moment: Moment) -> None:
    """Have a batch end whose jobs are over, and with it what is kept of them."""
    active = exists().where(jobs.c.batch_id == row["id"], jobs.c.status.in_(ACTIVE_JOBS))
    if conn.execute(select(active)).scalar_one():
        raise TransitionRefused(f"the batch {row['id']} has active jobs: only one that is over can be deleted")
    move(conn, row, BatchEvent.DEADLINE_PASSED, moment)


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
    of all tasks and the event of a terminal one. `ended_by` is written once, by the first event that has one.
    """
    seen = batch["status"]
    target = next_status(seen, event)
    values = {"status": target, "version": batch["version"] + 1, f"{target}_at": moment.wall}
    if target in SEALING:
        # Results that turn out damaged bring it back to work, but not open.
        values["is_open"] = False
    if batch["ended_by"] is None and event in ENDED_BY:
        values["ended_by"] = ENDED_BY[event]
    # What blocks a seal still blocks it when only the word changes.
    if not (seen in SEALING and target in SEALING):
        values["blocked_by"] = None
    if event is BatchEvent.GAVE_UP:
        values |= _given_up(batch)
    mine = {"b_id": batch["id"], "b_status": seen, "b_version": batch["version"]}
    if conn.execute(_MOVE, values | mine).rowcount != 1:
        return None
    if target in SEALING:
        add_task(conn, batch["id"], TaskKind.SEAL)
    if target in TERMINAL:
        _end_tasks(conn, batch["id"])
    # Of jobs each is followed by itself, and may be retried when all are over.
    if (target in TERMINAL or event is BatchEvent.INPUT_ACCEPTED) and batch["dialect"] != CLUB:
        _announce(conn, batch["id"], moment)
    return target


def _given_up(batch: RowMapping) -> dict[str, object]:
    """Say in the batch's problems that it was not its input that failed it; journals and blobs stay."""
    cause = f": {batch['blocked_by']}" if batch["blocked_by"] else ""
    message = f"The batch could not be brought to its end{cause}. Its data is kept."
    problem = LineProblem(code=OwnError.code, message=message, param=None, line_number=None)
    return {"problems": (*batch["problems"], problem), "problem_count": batch["problem_count"] + 1}


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


def _announce(conn: Connection, batch_id: BatchId, moment: Moment) -> None:
    """Write the event of the status that was just reached, and whom to tell; that it began is told only to those who
    asked for it.
    """
    batch = batch_of(conn.execute(_BATCH, {"b_id": batch_id}).mappings().one())
    event = event_of(batch, moment.wall)
    assert event is not None
    if batch.status in TERMINAL:
        announce(conn, event, moment, url=batch.webhook_url)
    elif is_wanted(conn, batch.tenant, event.type):
        announce(conn, event, moment, url=None)


def send(conn: Connection, tenant: TenantId, batch_id: BatchId, event: BatchEvent, moment: Moment) -> bool:
    """Move a tenant's batch; guards that the event is judged by the status found in this transaction."""
    row = batch_of_tenant(conn, tenant, batch_id, is_locked=True)
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


def resume(conn: Connection, tenant: TenantId, batch_id: BatchId, *, only_if: Collection[str]) -> None:
    """Clear the pause and queue parked tasks; tasks before batch, the lock order. With `only_if` guards that a pause
    for another reason stays.
    """
    found = batch_of_tenant(conn, tenant, batch_id)
    if only_if and found["paused_reason"] not in only_if:
        return
    conn.execute(
        update(tasks)
        .where(tasks.c.batch_id == batch_id, tasks.c.state == TaskState.PARKED)
        .values(state=TaskState.QUEUED, attempts=0, not_before=None)
    )
    same = batches.c.paused_reason.in_(sorted(only_if)) if only_if else true()
    cleared = {"paused_reason": None, "paused_at": None, "probed_at": None, "blocked_by": None}
    conn.execute(update(batches).where(batches.c.id == batch_id, same).values(cleared))


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
