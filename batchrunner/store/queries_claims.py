"""Statements on sessions, leases and claims: who may take which task, and who has lost one."""

from __future__ import annotations

from functools import cache

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Boolean,
    ColumnElement,
    Connection,
    Float,
    FromClause,
    RowMapping,
    Select,
    Text,
    Update,
    and_,
    bindparam,
    case,
    delete,
    exists,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    union_all,
    update,
)

from batchrunner.lifecycle import SEALING, BatchStatus
from batchrunner.models import BatchId, Claim, Extent, Held, SessionId, TaskKind, TaskState, Watch
from batchrunner.store.moments import Moment
from batchrunner.store.queries_batches import lock_batch
from batchrunner.store.rows import batch_of, claim_of, extent_of
from batchrunner.store.tables import batches, claims, extents, sessions, tasks

_NO_HOLD = 2**62
_BOOT_S: BindParameter[float] = bindparam("m_boot_s", type_=Float)
_BOOT_ID: BindParameter[str] = bindparam("m_boot_id", type_=Text)
_SESSION: BindParameter[str] = bindparam("m_session", type_=Text)
_OPEN_KINDS = (TaskKind.SHARD, TaskKind.VALIDATE)


def _is_due(task: FromClause) -> ColumnElement[bool]:
    """Queued, and its backoff is over; a backoff of another boot is."""
    waited = or_(task.c.not_before.is_(None), task.c.boot_id != _BOOT_ID, task.c.not_before <= _BOOT_S)
    return and_(task.c.state == TaskState.QUEUED, waited)


def _is_live(task: FromClause) -> ColumnElement[bool]:
    """Leased, in this boot, and the lease has not run out."""
    return and_(task.c.state == TaskState.LEASED, task.c.boot_id == _BOOT_ID, task.c.lease_until >= _BOOT_S)


def _has_run_out(task: FromClause) -> ColumnElement[bool]:
    """Leased by another session and run out: of another boot, or late and the claimer may take leases."""
    late = and_(bindparam("m_is_steady", type_=Boolean), task.c.lease_until < _BOOT_S)
    return and_(task.c.state == TaskState.LEASED, or_(task.c.boot_id != _BOOT_ID, late), task.c.session != _SESSION)


def _steps(kinds: frozenset[TaskKind]) -> Select[tuple[int, int, int, int, int]]:
    """Validate, seal and notify tasks that may be taken now, each in the statuses that are its own."""
    holder = tasks.alias("holder")
    is_held = exists().where(holder.c.kind.in_(_OPEN_KINDS), holder.c.batch_id == batches.c.id, _is_live(holder))
    fits = or_(
        and_(tasks.c.kind == TaskKind.VALIDATE, batches.c.status == BatchStatus.VALIDATING),
        and_(tasks.c.kind == TaskKind.SEAL, batches.c.status.in_(SEALING), ~is_held.correlate(batches)),
        tasks.c.kind == TaskKind.NOTIFY,
    )
    open_states = tasks.c.state.in_((TaskState.QUEUED, TaskState.LEASED))
    return (
        select(tasks.c.id, literal(0), batches.c.priority, batches.c.deadline_at, literal(0))
        .join_from(tasks, batches, batches.c.id == tasks.c.batch_id)
        .where(tasks.c.kind.in_(sorted(kinds)), open_states, or_(_is_due(tasks), _has_run_out(tasks)), fits)
    )


def _runnable(task: FromClause, *, quarantined: bool) -> ColumnElement[bool]:
    return and_(
        task.c.kind == TaskKind.SHARD,
        task.c.is_quarantined.is_(true() if quarantined else false()),
        task.c.first_index < func.coalesce(batches.c.hold_at, literal(_NO_HOLD, BigInteger)),
        batches.c.status == BatchStatus.IN_PROGRESS,
        batches.c.paused_reason.is_(None),
    )


def _queued_shards(*, quarantined: bool) -> Select[tuple[int, int, int, int, int]]:
    """The first shard that is due of each running batch: one step in the index per batch, however many shards wait."""
    front = tasks.alias("front")
    first = (
        select(front.c.id)
        .where(front.c.batch_id == batches.c.id, _is_due(front), _runnable(front, quarantined=quarantined))
        .order_by(front.c.first_index)
        .limit(1)
        .correlate(batches)
        .scalar_subquery()
    )
    return (
        select(tasks.c.id, literal(1), batches.c.priority, batches.c.deadline_at, tasks.c.first_line)
        .join_from(batches, tasks, tasks.c.id == first)
        .where(batches.c.status == BatchStatus.IN_PROGRESS, batches.c.paused_reason.is_(None))
    )


def _abandoned_shards(*, quarantined: bool) -> Select[tuple[int, int, int, int, int]]:
    """Shards whose lease ran out: never more than there are workers' hands."""
    return (
        select(tasks.c.id, literal(1), batches.c.priority, batches.c.deadline_at, tasks.c.first_line)
        .join_from(tasks, batches, batches.c.id == tasks.c.batch_id)
        .where(_has_run_out(tasks), _runnable(tasks, quarantined=quarantined))
    )


def _died() -> ColumnElement[bool]:
    """The row's holder is a session of this boot that nobody has closed: a reboot or a clean stop is no death."""
    known = exists().where(sessions.c.id == tasks.c.session, sessions.c.boot_id == _BOOT_ID).correlate(tasks)
    return and_(tasks.c.state == TaskState.LEASED, tasks.c.boot_id == _BOOT_ID, known)


@cache
def claim_statement(kinds: frozenset[TaskKind], *, quarantined: bool) -> Update:
    """Build the claim: one UPDATE of one row; guards by choosing it in the same statement, and by the epoch it bumps.

    Chosen by kind (steps before shards), priority, deadline, first line.
    """
    arms: list[Select[tuple[int, int, int, int, int]]] = []
    if steps := kinds - {TaskKind.SHARD}:
        arms.append(_steps(steps))
    if TaskKind.SHARD in kinds:
        arms += [_queued_shards(quarantined=quarantined), _abandoned_shards(quarantined=quarantined)]
    found = union_all(*arms).subquery("found")
    task_id, rank, priority, deadline_at, first_line = found.c
    chosen = select(task_id).order_by(rank, priority.desc(), deadline_at.is_(None), deadline_at, first_line, task_id)
    died = _died()
    return (
        update(tasks)
        .where(tasks.c.id == chosen.limit(1).scalar_subquery())
        .values(
            epoch=tasks.c.epoch + 1,
            state=TaskState.LEASED,
            session=_SESSION,
            taken_from=case((tasks.c.state == TaskState.LEASED, tasks.c.session), else_=None),
            lease_until=bindparam("m_lease_until"),
            boot_id=_BOOT_ID,
            not_before=None,
            deaths=tasks.c.deaths + case((and_(died, tasks.c.kind == TaskKind.SHARD), 1), else_=0),
            orphaned_by_death=case((tasks.c.state == TaskState.QUEUED, tasks.c.orphaned_by_death), else_=died),
        )
        .returning(*tasks.c)
    )


def claim(
    conn: Connection,
    session: SessionId,
    moment: Moment,
    *,
    lease_s: float,
    kinds: frozenset[TaskKind],
    quarantined: bool,
    is_steady: bool,
) -> Claim | None:
    """Take one task and record the claim; guards that the claim's row is there before its first segment can be."""
    wanted = kinds & {TaskKind.SHARD} if quarantined else kinds
    if not wanted:
        return None
    values = {
        "m_session": session,
        "m_boot_s": moment.boot_s,
        "m_boot_id": moment.boot_id,
        "m_lease_until": moment.boot_s + lease_s,
        "m_is_steady": is_steady,
    }
    task = conn.execute(claim_statement(wanted, quarantined=quarantined), values).mappings().one_or_none()
    if task is None:
        return None
    conn.execute(insert(claims), {"task_id": task["id"], "epoch": task["epoch"], "session": session})
    batch = batch_of(lock_batch(conn, task["batch_id"]))
    if task["epoch"] == 1:
        return claim_of(task, batch, session=session, earlier=(), extents=())
    return claim_of(task, batch, session=session, earlier=earlier_claims(conn, task), extents=extents_of(conn, task))


_EARLIER = (
    select(claims.c.epoch, claims.c.session)
    .where(claims.c.task_id == bindparam("c_task_id"), claims.c.epoch < bindparam("c_epoch"))
    .order_by(claims.c.epoch)
)
_EXTENTS_OF_TASK = select(extents).where(extents.c.task_id == bindparam("c_task_id")).order_by(extents.c.sequence_from)


def earlier_claims(conn: Connection, task: RowMapping) -> list[tuple[int, SessionId]]:
    """List the claims before a task's present epoch, oldest first."""
    found = conn.execute(_EARLIER, {"c_task_id": task["id"], "c_epoch": task["epoch"]})
    return [(row.epoch, row.session) for row in found]


def extents_of(conn: Connection, task: RowMapping) -> list[Extent]:
    """List a task's extents in sequence order."""
    return [extent_of(row) for row in conn.execute(_EXTENTS_OF_TASK, {"c_task_id": task["id"]}).mappings()]


_RENEW = (
    update(tasks)
    .where(tasks.c.session == _SESSION, tasks.c.state == TaskState.LEASED)
    .values(lease_until=bindparam("m_lease_until"), boot_id=_BOOT_ID)
)


def renew(conn: Connection, session: SessionId, moment: Moment, *, lease_s: float) -> None:
    """Extend all leases of a session, run out or not; guards by the session column, which every loss changes."""
    conn.execute(_RENEW, {"m_session": session, "m_lease_until": moment.boot_s + lease_s, "m_boot_id": moment.boot_id})


def open_session(conn: Connection, session: SessionId, moment: Moment, *, host: str, pid: int) -> None:
    """Insert a session; lets itself be repeated."""
    conn.execute(delete(sessions).where(sessions.c.id == session))
    row = {"id": session, "host": host, "boot_id": moment.boot_id, "pid": pid, "opened_at": moment.wall}
    conn.execute(insert(sessions), row | {"is_hungry": False})


def sessions_of_host(conn: Connection, host: str) -> list[SessionId]:
    """List the sessions of a host, oldest first."""
    query = select(sessions.c.id).where(sessions.c.host == host).order_by(sessions.c.opened_at, sessions.c.id)
    return [SessionId(each) for each in conn.execute(query).scalars()]


def release_session(conn: Connection, session: SessionId, *, died: bool) -> int:
    """Queue all tasks of a session and forget it; needs no epoch: the next claim's bump fences whoever still lives."""
    mine = and_(tasks.c.session == session, tasks.c.state == TaskState.LEASED)
    deaths = (
        case((tasks.c.kind == TaskKind.SHARD, tasks.c.deaths + 1), else_=tasks.c.deaths) if died else tasks.c.deaths
    )
    released = conn.execute(
        update(tasks)
        .where(mine)
        .values(state=TaskState.QUEUED, session=None, lease_until=None, deaths=deaths, orphaned_by_death=died)
    ).rowcount
    conn.execute(delete(sessions).where(sessions.c.id == session))
    return released


def end_leases_of_other_boots(conn: Connection, moment: Moment) -> int:
    """Queue tasks held since before a reboot and forget the sessions; guards by the boot id of each lease."""
    ended = conn.execute(
        update(tasks)
        .where(tasks.c.kind.in_(TaskKind), tasks.c.state == TaskState.LEASED, tasks.c.boot_id != moment.boot_id)
        .values(state=TaskState.QUEUED, session=None, lease_until=None, orphaned_by_death=False)
    ).rowcount
    conn.execute(delete(sessions).where(sessions.c.boot_id != moment.boot_id))
    return ended


def set_hungry(conn: Connection, session: SessionId, *, is_hungry: bool) -> None:
    """Say that a session could take more."""
    conn.execute(update(sessions).where(sessions.c.id == session).values(is_hungry=is_hungry))


_others_hunger = exists().where(sessions.c.id != _SESSION, sessions.c.is_hungry, sessions.c.boot_id == _BOOT_ID)
_hunger = select(select(_others_hunger).scalar_subquery().label("is_anyone_hungry")).subquery("hunger")
_watched = (
    select(
        tasks.c.id.label("task_id"),
        (tasks.c.session == _SESSION).label("is_mine"),
        batches.c.status,
        batches.c.paused_reason,
        batches.c.hold_at,
    )
    .join_from(tasks, batches, batches.c.id == tasks.c.batch_id)
    .where(or_(tasks.c.session == _SESSION, tasks.c.taken_from == _SESSION))
    .subquery("watched")
)
_WATCH = select(_hunger.c.is_anyone_hungry, *_watched.c).join_from(_hunger, _watched, true(), isouter=True)


def watch(conn: Connection, session: SessionId, moment: Moment) -> Watch:
    """Read in one statement what a session holds, what was taken from it, and whether another one is hungry."""
    found = conn.execute(_WATCH, {"m_session": session, "m_boot_id": moment.boot_id}).all()
    held = tuple(
        Held(
            task_id=row.task_id,
            is_mine=bool(row.is_mine),
            status=row.status,
            is_paused=row.paused_reason is not None,
            hold_at=row.hold_at,
        )
        for row in found
        if row.task_id is not None
    )
    return Watch(held=held, is_anyone_hungry=bool(found[0].is_anyone_hungry))


def claims_by_task(conn: Connection, batch_id: BatchId) -> dict[int, list[tuple[int, SessionId]]]:
    """Group the claims of a batch's shards by task, oldest first: one statement instead of one per shard."""
    query = (
        select(claims)
        .join_from(claims, tasks, tasks.c.id == claims.c.task_id)
        .where(tasks.c.batch_id == batch_id, tasks.c.kind == TaskKind.SHARD)
        .order_by(claims.c.task_id, claims.c.epoch)
    )
    found: dict[int, list[tuple[int, SessionId]]] = {}
    for row in conn.execute(query):
        found.setdefault(row.task_id, []).append((row.epoch, row.session))
    return found
