"""Statements on sessions, leases and claims: who may take which task, and who has lost one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TypeAlias

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
    Subquery,
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
    type_coerce,
    union_all,
    update,
)

from batchrunner.appetite import BREAKER_REASONS, LIGHT_BYTES_MAX, LIGHT_LINES_MAX, Appetite
from batchrunner.lifecycle import SEALING, BatchStatus
from batchrunner.models import CLUB, BatchId, Claim, Extent, Held, SessionId, TaskKind, TaskState, Watch
from batchrunner.store.moments import Moment
from batchrunner.store.queries_batches import lock_batch
from batchrunner.store.queries_jobs import begin_jobs, cancelled_lines
from batchrunner.store.rows import batch_of, claim_of, extent_of
from batchrunner.store.tables import batches, claims, extents, files, sessions, tasks

# What a claim chooses from: task id, rank, whether the batch is in the session's hands, tenant, priority, deadline,
# first line.
Candidate: TypeAlias = Select[tuple[int, int, int, str, int, datetime, int]]

_NO_HOLD = 2**62
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(9999, 1, 1, tzinfo=UTC)
_AGEING_STEP_US = 3_600_000_000
# A batch that runs for so long and was left to a session with less in hands may be taken by any.
_PATIENCE = timedelta(seconds=1)
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


def _mine() -> Select[tuple[str]]:
    """The batches of which the session holds a shard."""
    own = tasks.alias("own")
    held = (own.c.session == _SESSION, own.c.kind == TaskKind.SHARD, own.c.state == TaskState.LEASED)
    return select(own.c.batch_id).where(*held)


def _loads() -> Subquery:
    """How many shards each tenant has in anybody's hands: as many rows as there are hands, not shards."""
    hand, order = tasks.alias("hand"), batches.alias("order")
    return (
        select(order.c.tenant, func.count().label("count"))
        .join_from(hand, order, order.c.id == hand.c.batch_id)
        .where(hand.c.kind == TaskKind.SHARD, hand.c.state == TaskState.LEASED)
        .group_by(order.c.tenant)
        .subquery("loads")
    )


def _aged_priority() -> ColumnElement[int]:
    """A step more for each hour of a batch's age, so that whatever waits long enough comes first."""
    age_us = bindparam("m_wall_us", type_=BigInteger) - type_coerce(batches.c.created_at, BigInteger)
    return batches.c.priority + age_us // literal(_AGEING_STEP_US, BigInteger)


def _candidate(*, rank: int, is_mine: ColumnElement[bool] | None = None) -> Candidate:
    """A task with what it is ordered by; `rank` puts steps before shards."""
    first_line = func.coalesce(tasks.c.first_line, 0)
    mine = literal(0) if is_mine is None else case((is_mine, 1), else_=0)
    return select(
        tasks.c.id.label("task_id"),
        literal(rank).label("rank"),
        mine.label("is_mine"),
        batches.c.tenant.label("tenant"),
        _aged_priority().label("priority"),
        batches.c.deadline_at.label("deadline_at"),
        first_line.label("first_line"),
    )


def _is_light() -> ColumnElement[bool]:
    """The step is soon over: the input to validate, or the number of lines to seal, is no larger than a shard."""
    size = select(files.c.size_bytes).where(files.c.id == batches.c.input_file_id).correlate(batches).scalar_subquery()
    return case(
        (tasks.c.kind == TaskKind.VALIDATE, func.coalesce(size, 0) <= LIGHT_BYTES_MAX),
        else_=batches.c.total_count <= LIGHT_LINES_MAX,
    )


def _steps(kinds: frozenset[TaskKind]) -> Candidate:
    """Validate, seal and notify tasks that may be taken now, each in the statuses that are its own."""
    holder = tasks.alias("holder")
    is_held = exists().where(holder.c.kind.in_(_OPEN_KINDS), holder.c.batch_id == batches.c.id, _is_live(holder))
    fits = or_(
        and_(tasks.c.kind == TaskKind.VALIDATE, batches.c.status == BatchStatus.VALIDATING),
        and_(tasks.c.kind == TaskKind.SEAL, batches.c.status.in_(SEALING), ~is_held.correlate(batches)),
        tasks.c.kind == TaskKind.NOTIFY,
    )
    open_states = tasks.c.state.in_((TaskState.QUEUED, TaskState.LEASED))
    wanted = or_(tasks.c.kind.not_in(bindparam("m_light", expanding=True, type_=Text)), _is_light())
    return (
        _candidate(rank=0)
        .join_from(tasks, batches, batches.c.id == tasks.c.batch_id)
        .where(tasks.c.kind.in_(sorted(kinds)), open_states, or_(_is_due(tasks), _has_run_out(tasks)), fits, wanted)
    )


def _is_running() -> ColumnElement[bool]:
    """In progress and not paused, or paused by a breaker and due to be probed; a claim that probes shifts that time."""
    probe_by = bindparam("m_probe_by", type_=batches.c.probed_at.type)
    # A clock that was set back must not keep a batch waiting until it has caught up.
    set_back = bindparam("m_set_back", type_=batches.c.probed_at.type)
    since = func.coalesce(batches.c.probed_at, batches.c.paused_at)
    is_due = or_(since <= probe_by, since > set_back)
    probed = and_(batches.c.paused_reason.in_(BREAKER_REASONS), is_due)
    return and_(batches.c.status == BatchStatus.IN_PROGRESS, or_(batches.c.paused_reason.is_(None), probed))


def _in_hands_of(session: ColumnElement[str]) -> ColumnElement[int]:
    """Of how many batches a session holds shards."""
    hand = tasks.alias()
    held = (hand.c.session == session, hand.c.kind == TaskKind.SHARD, hand.c.state == TaskState.LEASED)
    count = select(func.count(hand.c.batch_id.distinct())).where(*held)
    return count.correlate(sessions).scalar_subquery()


def _is_turn() -> ColumnElement[bool]:
    """No other session holds fewer batches: the one that looks most often must not get most of what is new, for each
    shares out only its own part of the window.
    """
    others = (sessions.c.id != _SESSION, sessions.c.boot_id == _BOOT_ID)
    fewest = select(func.min(_in_hands_of(sessions.c.id))).where(*others).scalar_subquery()
    patient_by = bindparam("m_patient_by", type_=batches.c.in_progress_at.type)
    mine_is_least = _in_hands_of(_SESSION) <= func.coalesce(fewest, _NO_HOLD)
    return or_(~bindparam("m_takes_turns", type_=Boolean), batches.c.in_progress_at <= patient_by, mine_is_least)


def _is_welcome() -> ColumnElement[bool]:
    """The session can take more of this batch. One without room takes no new batch but for a tenant that it holds
    nothing of.
    """
    is_sated = batches.c.id.in_(bindparam("m_sated", expanding=True, type_=Text))
    other = batches.alias("other")
    tenants = select(other.c.tenant).where(other.c.id.in_(_mine()))
    has_room = bindparam("m_has_room", type_=Boolean)
    is_new = and_(or_(has_room, batches.c.tenant.not_in(tenants)), _is_turn())
    return and_(~is_sated, or_(batches.c.id.in_(_mine()), is_new))


def _runnable(task: FromClause, *, quarantined: bool) -> ColumnElement[bool]:
    return and_(
        task.c.kind == TaskKind.SHARD,
        task.c.is_quarantined.is_(true() if quarantined else false()),
        task.c.first_index < func.coalesce(batches.c.hold_at, literal(_NO_HOLD, BigInteger)),
    )


def _queued_shards(*, quarantined: bool) -> Candidate:
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
        _candidate(rank=1, is_mine=batches.c.id.in_(_mine()))
        .join_from(batches, tasks, tasks.c.id == first)
        .where(_is_running(), _is_welcome())
    )


def _abandoned_shards(*, quarantined: bool) -> Candidate:
    """Shards whose lease ran out: never more than there are workers' hands."""
    return (
        _candidate(rank=1, is_mine=batches.c.id.in_(_mine()))
        .join_from(tasks, batches, batches.c.id == tasks.c.batch_id)
        .where(_has_run_out(tasks), _runnable(tasks, quarantined=quarantined), _is_running(), _is_welcome())
    )


@cache
def _found(kinds: frozenset[TaskKind], *, quarantined: bool) -> Subquery:
    """All tasks that a session could take."""
    arms: list[Candidate] = []
    if steps := kinds - {TaskKind.SHARD}:
        arms.append(_steps(steps))
    if TaskKind.SHARD in kinds:
        arms += [_queued_shards(quarantined=quarantined), _abandoned_shards(quarantined=quarantined)]
    return union_all(*arms).subquery("found")


def _died() -> ColumnElement[bool]:
    """The row's holder is a session of this boot that nobody has closed: a reboot or a clean stop is no death."""
    known = exists().where(sessions.c.id == tasks.c.session, sessions.c.boot_id == _BOOT_ID).correlate(tasks)
    return and_(tasks.c.state == TaskState.LEASED, tasks.c.boot_id == _BOOT_ID, known)


@cache
def claim_statement(kinds: frozenset[TaskKind], *, quarantined: bool) -> Update:
    """Build the claim: one UPDATE of one row; guards by choosing it in the same statement, and by the epoch it bumps.

    Chosen by kind (steps before shards), batches that the session holds nothing of before others, tenants with few
    shards in hands before others; then aged priority, deadline, first line.
    """
    found, loads = _found(kinds, quarantined=quarantined), _loads()
    chosen = (
        select(found.c.task_id)
        .join_from(found, loads, loads.c.tenant == found.c.tenant, isouter=True)
        .order_by(
            found.c.rank,
            found.c.is_mine,
            func.coalesce(loads.c.count, 0),
            found.c.priority.desc(),
            found.c.deadline_at.is_(None),
            found.c.deadline_at,
            found.c.first_line,
            found.c.task_id,
        )
    )
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


@cache
def work_statement(kinds: frozenset[TaskKind], *, quarantined: bool) -> Select[tuple[bool]]:
    """Build the question whether a claim would take anything."""
    return select(exists(select(_found(kinds, quarantined=quarantined).c.task_id)))


def _values(session: SessionId, moment: Moment, appetite: Appetite, *, is_steady: bool) -> dict[str, object]:
    every_s = appetite.probe_every_s
    probe_by = _NEVER if every_s is None else moment.wall - timedelta(seconds=every_s)
    return {
        "m_session": session,
        "m_boot_s": moment.boot_s,
        "m_boot_id": moment.boot_id,
        "m_wall_us": int(moment.wall.timestamp() * 1_000_000),
        "m_probe_by": probe_by,
        "m_set_back": _LATEST if every_s is None else moment.wall,
        "m_patient_by": moment.wall - _PATIENCE,
        "m_takes_turns": appetite.takes_turns,
        "m_sated": sorted(appetite.sated),
        "m_has_room": appetite.has_room,
        "m_light": sorted(appetite.light),
        "m_is_steady": is_steady,
    }


def claim(
    conn: Connection,
    session: SessionId,
    moment: Moment,
    *,
    lease_s: float,
    kinds: frozenset[TaskKind],
    quarantined: bool,
    appetite: Appetite,
    is_steady: bool,
) -> Claim | None:
    """Take one task and record the claim; guards that the claim's row is there before its first segment can be, and
    that of all sessions one probes a paused batch.
    """
    wanted = kinds & {TaskKind.SHARD} if quarantined else kinds
    if not wanted:
        return None
    values = _values(session, moment, appetite, is_steady=is_steady) | {"m_lease_until": moment.boot_s + lease_s}
    task = conn.execute(claim_statement(wanted, quarantined=quarantined), values).mappings().one_or_none()
    if task is None:
        return None
    conn.execute(insert(claims), {"task_id": task["id"], "epoch": task["epoch"], "session": session})
    batch = batch_of(lock_batch(conn, task["batch_id"]))
    if task["kind"] is TaskKind.SHARD and batch.paused_reason is not None:
        conn.execute(update(batches).where(batches.c.id == batch.id).values(probed_at=moment.wall))
    cancelled = begin_jobs(conn, task) if task["kind"] is TaskKind.SHARD and batch.has_jobs else ()
    is_first = task["epoch"] == 1
    earlier = () if is_first else earlier_claims(conn, task)
    own = () if is_first else extents_of(conn, task)
    return claim_of(task, batch, session=session, earlier=earlier, extents=own, cancelled=cancelled)


def has_work(
    conn: Connection,
    session: SessionId,
    moment: Moment,
    *,
    kinds: frozenset[TaskKind],
    quarantined: bool,
    appetite: Appetite,
    is_steady: bool,
) -> bool:
    """Tell whether `claim` would take something; writes nothing and guards nothing."""
    wanted = kinds & {TaskKind.SHARD} if quarantined else kinds
    if not wanted:
        return False
    values = _values(session, moment, appetite, is_steady=is_steady)
    return bool(conn.execute(work_statement(wanted, quarantined=quarantined), values).scalar_one())


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
        (batches.c.dialect == CLUB).label("has_jobs"),
    )
    .join_from(tasks, batches, batches.c.id == tasks.c.batch_id)
    .where(or_(tasks.c.session == _SESSION, tasks.c.taken_from == _SESSION))
    .subquery("watched")
)
_WATCH = select(_hunger.c.is_anyone_hungry, *_watched.c).join_from(_hunger, _watched, true(), isouter=True)


def watch(conn: Connection, session: SessionId, moment: Moment) -> Watch:
    """Read in one statement what a session holds, what was taken from it, and whether another one is hungry; in a
    second, if it holds jobs, which of these were canceled.
    """
    found = conn.execute(_WATCH, {"m_session": session, "m_boot_id": moment.boot_id}).all()
    with_jobs = [row.task_id for row in found if row.has_jobs]
    cancelled = cancelled_lines(conn, with_jobs) if with_jobs else {}
    held = tuple(
        Held(
            task_id=row.task_id,
            is_mine=bool(row.is_mine),
            status=row.status,
            paused_reason=row.paused_reason,
            hold_at=row.hold_at,
            cancelled=cancelled.get(row.task_id, ()),
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
