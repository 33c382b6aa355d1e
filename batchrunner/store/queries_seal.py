"""Transactions at both ends of a batch: what validation found, fence, salvage and publication, the repairing sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, bindparam, exists, insert, or_, select, update

from batchrunner.errors import Fenced, JournalCorrupt, ReconciliationError
from batchrunner.holdings import Swept
from batchrunner.lifecycle import SEALING, BatchEvent, BatchStatus, EndedBy
from batchrunner.models import (
    CLUB,
    Batch,
    BatchId,
    Claim,
    Extent,
    File,
    OnUnknown,
    Progress,
    Repair,
    SessionId,
    TaskKind,
    TaskRef,
    TaskState,
)
from batchrunner.outcomes import AcceptedInput, Publication, RejectedInput
from batchrunner.store.moments import Moment
from batchrunner.store.queries_additions import close_idle
from batchrunner.store.queries_batches import add_task, lock_batch, move
from batchrunner.store.queries_blobs import need_blob
from batchrunner.store.queries_claims import claims_by_task, end_leases_of_other_boots
from batchrunner.store.queries_files import add_file
from batchrunner.store.queries_jobs import end_jobs_of_batch
from batchrunner.store.queries_progress import (
    add_shards,
    end_task,
    guard,
    guard_held,
    record,
    register,
    write_task,
)
from batchrunner.store.rows import batch_of, claim_of, extent_of
from batchrunner.store.tables import batches, claims, extents, tasks

# A disk that damages results again after they were mended so often is not to be trusted with more.
_REPAIRS_MAX = 3
# How long a batch that does not come to its end is tried beyond its deadline.
_GIVE_UP_AFTER = timedelta(days=1)
_OPEN_STATES = (TaskState.QUEUED, TaskState.LEASED, TaskState.PARKED)


def accept_input(conn: Connection, ref: TaskRef, accepted: AcceptedInput, moment: Moment) -> bool:
    """Publish shards and counts with the move to in_progress; guards by the validate task and the status found now."""
    task = guard(conn, ref)
    batch = lock_batch(conn, task["batch_id"])
    if task["state"] not in _OPEN_STATES:
        return batch["in_progress_at"] is not None
    end_task(conn, task)
    if batch["status"] is not BatchStatus.VALIDATING:
        return False
    add_shards(conn, batch["id"], accepted.shards)
    counts: dict[str, object] = {
        "total_count": accepted.total_count,
        "refused_count": accepted.refused_count,
        # A refused line has its final result: an error line.
        "failed_count": accepted.refused_count,
        "open_shards": sum(1 for cut in accepted.shards if cut.line_count),
        "model": accepted.model,
        "input_sha256": accepted.input_sha256,
    }
    _write_problems(conn, batch, accepted, counts)
    move(conn, batch, BatchEvent.INPUT_ACCEPTED, moment)
    batch = lock_batch(conn, batch["id"])
    if batch["open_shards"] == 0 and not batch["is_open"]:
        move(conn, batch, BatchEvent.LINES_SETTLED, moment)
    return True


def reject_input(conn: Connection, ref: TaskRef, rejected: RejectedInput, moment: Moment) -> bool:
    """Publish the problems with the move to failed; guards as `accept_input` does."""
    task = guard(conn, ref)
    batch = lock_batch(conn, task["batch_id"])
    if task["state"] not in _OPEN_STATES:
        return batch["failed_at"] is not None
    end_task(conn, task)
    if batch["status"] is not BatchStatus.VALIDATING:
        return False
    _write_problems(conn, batch, rejected, {"input_sha256": rejected.input_sha256})
    return move(conn, batch, BatchEvent.INPUT_REJECTED, moment) is not None


def _write_problems(
    conn: Connection, batch: RowMapping, found: AcceptedInput | RejectedInput, more: dict[str, object]
) -> None:
    problems = {name: getattr(found, name) for name in ("problems", "problem_count", "problems_blob")}
    if found.problems_blob is not None:
        need_blob(conn, found.problems_blob)
    conn.execute(update(batches).where(batches.c.id == batch["id"]).values(problems | more))


def _guard_seal(conn: Connection, ref: TaskRef) -> RowMapping:
    task = guard_held(conn, ref)
    if task["kind"] is not TaskKind.SEAL:
        raise Fenced(f"task {ref.task_id} is a {task['kind']} task and seals nothing")
    return task


_FENCE = (
    update(tasks)
    .where(
        tasks.c.batch_id == bindparam("f_batch_id"),
        tasks.c.kind == TaskKind.SHARD,
        tasks.c.state != TaskState.FINAL,
        or_(tasks.c.fence_epoch.is_(None), tasks.c.fence_epoch != bindparam("f_epoch")),
    )
    .values(
        epoch=tasks.c.epoch + 1,
        state=TaskState.SEALED,
        taken_from=tasks.c.session,
        session=None,
        lease_until=None,
        not_before=None,
        fence_epoch=bindparam("f_epoch"),
    )
    .returning(tasks.c.id, tasks.c.epoch)
)


def fence(conn: Connection, ref: TaskRef) -> list[Claim]:
    """Bump every shard's epoch once per seal epoch; guards that from here on nobody but this sealer registers anything.

    A shard that is final stays as it is: an earlier sealer has salvaged it, and what it left behind may have been read.
    """
    seal = _guard_seal(conn, ref)
    own = select(claims.c.session).where(claims.c.task_id == ref.task_id, claims.c.epoch == ref.epoch)
    session = SessionId(conn.execute(own).scalar_one())
    bumped = conn.execute(_FENCE, {"f_batch_id": seal["batch_id"], "f_epoch": ref.epoch}).all()
    if bumped:
        rows = [{"task_id": row.id, "epoch": row.epoch, "session": session} for row in bumped]
        conn.execute(insert(claims), rows)
    return _fenced_shards(conn, seal, session)


def _fenced_shards(conn: Connection, seal: RowMapping, session: SessionId) -> list[Claim]:
    """Give the shards as claims; a final one has no earlier claims, for nothing unregistered counts any more."""
    batch = batch_of(lock_batch(conn, seal["batch_id"]))
    earlier = claims_by_task(conn, batch.id)
    registered: dict[int, list[Extent]] = {}
    query = select(extents).where(extents.c.batch_id == batch.id).order_by(extents.c.sequence_from)
    for row in conn.execute(query).mappings():
        registered.setdefault(row["task_id"], []).append(extent_of(row))
    shards = select(tasks).where(tasks.c.batch_id == batch.id, tasks.c.kind == TaskKind.SHARD)
    found = []
    for task in conn.execute(shards.order_by(tasks.c.first_line)).mappings():
        before = [each for each in earlier.get(task["id"], ()) if each[0] < task["epoch"]]
        if task["state"] is TaskState.FINAL:
            before = []
        own = registered.get(task["id"], [])
        found.append(claim_of(task, batch, session=session, earlier=before, extents=own))
    return found


def salvage_sealed(conn: Connection, ref: TaskRef, shard: TaskRef, progress: Progress, moment: Moment) -> None:
    """Register what was salvaged and make the shard final; guards by both epochs and by the shard's fence."""
    seal = _guard_seal(conn, ref)
    task = guard(conn, shard)
    if task["batch_id"] != seal["batch_id"]:
        raise Fenced(f"task {shard.task_id} belongs to another batch than the seal")
    if task["state"] is TaskState.FINAL:
        # Nothing new passes; what this sealer registered in an unanswered try does.
        register(conn, shard, progress, moment)
        return
    if task["state"] is not TaskState.SEALED or task["fence_epoch"] != ref.epoch:
        raise Fenced(f"task {shard.task_id} is {task['state']}, not sealed by this seal")
    record(conn, task, progress, moment, ends={"state": TaskState.FINAL})


def repair_sealed(
    conn: Connection, ref: TaskRef, repairs: Sequence[tuple[TaskRef, Sequence[Repair]]], moment: Moment
) -> Batch:
    """Take damage out of final shards, and send those that lack a line back to work if the batch may still work; guards
    by the epochs of the seal and of each shard, and by the status and the cause of the end found now.
    """
    seal = _guard_seal(conn, ref)
    damaged = [(guard(conn, shard), found) for shard, found in repairs]
    for task, found in damaged:
        if task["batch_id"] != seal["batch_id"] or task["state"] is not TaskState.FINAL:
            raise Fenced(f"task {task['id']} is {task['state']}, not final under this seal")
        record(conn, task, Progress(repairs=tuple(found)), moment)
    batch = lock_batch(conn, seal["batch_id"])
    tasks_now = select(tasks).where(tasks.c.id.in_([task["id"] for task, _ in damaged]))
    short = {
        task["id"]: task["line_count"] - done
        for task in conn.execute(tasks_now).mappings()
        if (done := task["succeeded_count"] + task["failed_count"]) < task["line_count"]
    }
    if short and batch["ended_by"] is EndedBy.SETTLED:
        if batch["status"] is BatchStatus.FINALIZING:
            _send_back(conn, seal, batch, short, moment)
        else:
            conn.execute(update(batches).where(batches.c.id == batch["id"]).values(ended_by=EndedBy.CANCEL))
    return batch_of(lock_batch(conn, batch["id"]))


def _send_back(conn: Connection, seal: RowMapping, batch: RowMapping, short: dict[int, int], moment: Moment) -> None:
    """Queue shards again for the lines that they lack; the seal task waits under a new epoch until the batch is back.

    A line that may be sent only once may have been sent: there, nobody has told of the former holder's lines.

    Raises:
        JournalCorrupt: the batch was sent back too often.
    """
    if seal["attempts"] >= _REPAIRS_MAX:
        raise JournalCorrupt(f"batch {batch['id']}: results were damaged again after {_REPAIRS_MAX} repairs")
    is_at_most_once = batch["on_unknown"] is OnUnknown.FAIL
    again: dict[str, object] = {"state": TaskState.QUEUED, "fence_epoch": None, "not_before": None, "attempts": 0}
    again |= {"deaths": 0, "orphaned_by_death": False, "whole_epoch": 0 if is_at_most_once else tasks.c.epoch}
    conn.execute(update(tasks).where(tasks.c.id.in_(short)).values(again))
    waits = {"state": TaskState.QUEUED, "epoch": seal["epoch"] + 1, "session": None, "lease_until": None}
    write_task(conn, seal, waits | {"taken_from": seal["session"], "attempts": seal["attempts"] + 1})
    counted = {
        "open_shards": batch["open_shards"] + len(short),
        "re_executed_count": batch["re_executed_count"] + (0 if is_at_most_once else sum(short.values())),
    }
    conn.execute(update(batches).where(batches.c.id == batch["id"]).values(counted))
    move(conn, batch, BatchEvent.RESULTS_DAMAGED, moment)
    # The batch is where it was before it was thought to be done: the next end is the one that counts.
    before = {"ended_by": None, "in_progress_at": batch["in_progress_at"], "finalizing_at": None}
    conn.execute(update(batches).where(batches.c.id == batch["id"]).values(before))


def publish(conn: Connection, ref: TaskRef, publication: Publication, moment: Moment) -> Batch:
    """Show files, counts, status and outbox row; guards by the seal's epoch, the status found now and the ledger."""
    task = guard(conn, ref)
    batch = lock_batch(conn, task["batch_id"])
    if task["kind"] is TaskKind.SEAL and task["state"] is TaskState.SETTLED:
        return batch_of(batch)
    _guard_seal(conn, ref)
    has_jobs = batch["dialect"] == CLUB
    values: dict[str, object] = {
        "expired_count": publication.expired_count,
        "cancelled_count": publication.cancelled_count,
    }
    if has_jobs:
        values |= end_jobs_of_batch(conn, batch, moment)
    else:
        _require_ledger(batch, publication)
    end_task(conn, task)
    for column, file in (("output_file_id", publication.output), ("error_file_id", publication.error)):
        if file is not None:
            add_file(conn, _expiring(file, batch))
            values[column] = file.id
    conn.execute(update(batches).where(batches.c.id == batch["id"]).values(values))
    # Nobody asks any more how these stand: they would only lengthen every answer of the control poll.
    lost = (tasks.c.batch_id == batch["id"], tasks.c.taken_from.is_not(None))
    conn.execute(update(tasks).where(*lost).values(taken_from=None))
    # Jobs end one by one: with the time of their batch those that were not done have failed.
    is_whole = batch["ended_by"] is EndedBy.SETTLED or has_jobs
    move(conn, batch, BatchEvent.SEALED_WHOLE if is_whole else BatchEvent.SEALED_PARTIAL, moment)
    return batch_of(lock_batch(conn, batch["id"]))


def _expiring(file: File, batch: RowMapping) -> File:
    """Give the file the end that its batch asks for, counted from the file's own creation."""
    kept_s = batch["output_expires_after_s"]
    return file if kept_s is None else replace(file, expires_at=file.created_at + timedelta(seconds=kept_s))


def _require_ledger(batch: RowMapping, publication: Publication) -> None:
    done = batch["succeeded_count"] + batch["failed_count"] + publication.expired_count + publication.cancelled_count
    if done != batch["total_count"]:
        raise ReconciliationError(f"batch {batch['id']}: {batch['total_count']} lines, but {done} results")


def sweep(conn: Connection, moment: Moment, *, expires: bool) -> Swept:
    """Mend what a crash or the passing of time left; each part is guarded like what it stands in for."""
    ended = end_leases_of_other_boots(conn, moment)
    moved: list[tuple[BatchId, BatchEvent]] = []
    if expires:
        late = and_(
            batches.c.status.in_((BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)),
            batches.c.deadline_at <= moment.wall,
        )
        moved += _move_all(conn, late, BatchEvent.DEADLINE_PASSED, moment)
        moved += _move_all(conn, _is_hopeless(moment), BatchEvent.GAVE_UP, moment)
    unsettled = exists().where(
        tasks.c.kind == TaskKind.SHARD, tasks.c.state.in_(_OPEN_STATES), tasks.c.batch_id == batches.c.id
    )
    through = and_(batches.c.status == BatchStatus.IN_PROGRESS, batches.c.is_open.is_(False), ~unsettled)
    moved += _move_all(conn, through, BatchEvent.LINES_SETTLED, moment)
    if expires:
        moved += [(batch_id, BatchEvent.LINES_SETTLED) for batch_id in close_idle(conn, moment)]
    seal = exists().where(tasks.c.batch_id == batches.c.id, tasks.c.kind == TaskKind.SEAL)
    bare = conn.execute(select(batches.c.id).where(batches.c.status.in_(SEALING), ~seal)).scalars().all()
    added = sum(add_task(conn, batch_id, TaskKind.SEAL) for batch_id in bare)
    return Swept(leases_ended=ended, moved=tuple(moved), seals_added=added)


def _is_hopeless(moment: Moment) -> ColumnElement[bool]:
    """A day over its deadline, and known to be stuck: a day that nobody was there to try its seal gives up nothing."""
    waits = exists().where(
        tasks.c.batch_id == batches.c.id,
        tasks.c.kind == TaskKind.SEAL,
        tasks.c.state.in_((TaskState.QUEUED, TaskState.PARKED)),
    )
    is_late = batches.c.deadline_at <= moment.wall - _GIVE_UP_AFTER
    return and_(batches.c.status.in_(SEALING), is_late, batches.c.blocked_by.is_not(None), waits)


def _move_all(
    conn: Connection, found: ColumnElement[bool], event: BatchEvent, moment: Moment
) -> list[tuple[BatchId, BatchEvent]]:
    rows = conn.execute(select(batches).where(found).with_for_update()).mappings().all()
    return [(BatchId(row["id"]), event) for row in rows if move(conn, row, event, moment) is not None]
