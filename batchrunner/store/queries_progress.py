"""Statements of holders: the guard by epoch, registering extents, and the ways a task leaves its holder's hands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, delete, insert, select, update

from batchrunner.errors import Fenced, ReconciliationError
from batchrunner.lifecycle import BatchEvent, BatchStatus
from batchrunner.models import (
    NO_USAGE,
    Extent,
    NewExtent,
    OnUnknown,
    Progress,
    Repair,
    ShardCut,
    TaskKind,
    TaskRef,
    TaskState,
    Usage,
)
from batchrunner.store.moments import Moment
from batchrunner.store.queries_batches import lock_batch, move, set_blocked
from batchrunner.store.queries_jobs import end_jobs
from batchrunner.store.rows import extent_of
from batchrunner.store.tables import batches, extents, tasks

_ATTEMPTS_MAX = 10
_BACKOFF_MAX_S = 300.0
_ERROR_CHARS_MAX = 2000

_IN_HANDS = (TaskState.QUEUED, TaskState.LEASED, TaskState.PARKED)
_LET_GO: dict[str, object] = {"session": None, "lease_until": None, "taken_from": None, "orphaned_by_death": False}
_TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
_COUNTS = ("succeeded_count", "failed_count", *_TOKENS)

# Setting a column to itself takes the row's lock: with several writers a guard that only reads would not guard.
_GUARD = (
    update(tasks)
    .where(tasks.c.id == bindparam("g_id"), tasks.c.epoch == bindparam("g_epoch"))
    .values(epoch=tasks.c.epoch)
    .returning(*tasks.c)
)


def guard(conn: Connection, ref: TaskRef) -> RowMapping:
    """Take the task's row, first of all statements; guards that only the present epoch writes."""
    row = conn.execute(_GUARD, {"g_id": ref.task_id, "g_epoch": ref.epoch}).mappings().one_or_none()
    if row is None:
        raise Fenced(f"task {ref.task_id}: epoch {ref.epoch} is over")
    return row


def guard_held(conn: Connection, ref: TaskRef) -> RowMapping:
    """As `guard`; guards too that the task has not been ended under this very epoch."""
    row = guard(conn, ref)
    if row["state"] not in _IN_HANDS:
        raise Fenced(f"task {ref.task_id}: it is {row['state']} already")
    return row


# Named values become SET by themselves, and the statement is compiled once for each set of names.
_WRITE_TASK = update(tasks).where(tasks.c.id == bindparam("w_id"))


def write_task(conn: Connection, task: RowMapping, values: Mapping[str, object]) -> None:
    """Write how a task stands; guarded by the lock that `guard` took."""
    conn.execute(_WRITE_TASK, dict(values) | {"w_id": task["id"]})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fresh:
    """What of a progress is not registered yet, and the last row of each segment that it goes on from."""

    extents: tuple[NewExtent, ...]
    last: dict[tuple[str, int], RowMapping]
    is_repeat: bool

    def counts(self) -> dict[str, int]:
        """Sum outcomes and tokens."""
        usage = sum((each.usage for each in self.extents), NO_USAGE)
        succeeded = sum(each.succeeded_count for each in self.extents)
        failed = sum(each.failed_count for each in self.extents)
        return {"succeeded_count": succeeded, "failed_count": failed} | tokens_of(usage)


def tokens_of(usage: Usage) -> dict[str, int]:
    """Spread usage over the token columns."""
    return {name: getattr(usage, name) for name in _TOKENS}


_LAST_OF_SEGMENT = (
    select(extents)
    .where(
        extents.c.task_id == bindparam("e_task_id"),
        extents.c.epoch == bindparam("e_epoch"),
        extents.c.segment == bindparam("e_segment"),
        extents.c.session == bindparam("e_session"),
    )
    .order_by(extents.c.byte_end.desc())
    .limit(1)
)


def _unregistered(conn: Connection, task: RowMapping, progress: Progress) -> _Fresh:
    """Leave out what an earlier, unanswered try has registered; guards that no byte of a segment is in two extents."""
    last: dict[tuple[str, int], RowMapping] = {}
    ends: dict[tuple[str, int], int] = {}
    fresh = []
    for new in progress.extents:
        key = (new.session, new.segment)
        if key not in ends:
            where = {"e_task_id": task["id"], "e_epoch": task["epoch"], "e_session": key[0], "e_segment": key[1]}
            row = conn.execute(_LAST_OF_SEGMENT, where).mappings().one_or_none()
            ends[key] = 0 if row is None else row["byte_end"]
            if row is not None:
                last[key] = row
        if new.byte_end <= ends[key]:
            continue
        if new.byte_start < ends[key]:
            place = f"task {task['id']}, segment {new.segment}"
            raise ReconciliationError(f"{place}: bytes {new.byte_start} to {ends[key]} are registered already")
        ends[key] = new.byte_end
        fresh.append(new)
    return _Fresh(extents=tuple(fresh), last=last, is_repeat=bool(progress.extents) and not fresh)


def _cut_out(conn: Connection, task: RowMapping, repair: Repair) -> bool:
    """Put the intact parts of a damaged extent in its place; guards that it is still there as it was seen, and lets
    itself be repeated.
    """
    damaged = repair.damaged
    if damaged.task_id != task["id"]:
        raise ReconciliationError(f"task {task['id']}: the damaged extent is of task {damaged.task_id}")
    last = damaged.sequence_from + damaged.count - 1
    place = (extents.c.batch_id == task["batch_id"], extents.c.sequence_from.between(damaged.sequence_from, last))
    rows = conn.execute(select(extents).where(*place).order_by(extents.c.sequence_from)).mappings().all()
    there = tuple(extent_of(row) for row in rows)
    if there == repair.parts:
        return False
    if there != (damaged,):
        raise ReconciliationError(f"task {task['id']}: the extent from {damaged.sequence_from} has changed")
    conn.execute(delete(extents).where(*place))
    if repair.parts:
        conn.execute(insert(extents), [_row_of(part) for part in repair.parts])
    return True


def _row_of(extent: Extent) -> dict[str, object]:
    row = {each.name: getattr(extent, each.name) for each in fields(Extent) if each.name != "usage"}
    return row | tokens_of(extent.usage)


def _lost(conn: Connection, task: RowMapping, repairs: Sequence[Repair]) -> dict[str, int]:
    """Cut damage out and sum what it took of the counts."""
    lost = dict.fromkeys(_COUNTS, 0)
    for repair in repairs:
        if _cut_out(conn, task, repair):
            for sign, extent in ((1, repair.damaged), *((-1, part) for part in repair.parts)):
                for name, value in _counts_of(extent).items():
                    lost[name] += sign * value
    return lost


_ADVANCE = ("next_sequence", *_COUNTS, "re_executed_count", "retry_count", "open_shards")
_ADVANCE_BATCH = (
    update(batches)
    .where(batches.c.id == bindparam("d_id"))
    .values({name: batches.c[name] + bindparam(f"d_{name}") for name in _ADVANCE})
    .returning(*batches.c)
)


def record(
    conn: Connection,
    task: RowMapping,
    progress: Progress,
    moment: Moment,
    *,
    ends: Mapping[str, object] | None = None,
    open_shards: int = 0,
) -> RowMapping | None:
    """Register what is fresh, take back what is damaged, write how the task stands then; gives the batch's row, None if
    nothing of it changed.

    Guards by the row locks of the task, taken before, and of the batch, taken by the update that draws the numbers.
    """
    fresh = _unregistered(conn, task, progress)
    counts = fresh.counts()
    count = counts["succeeded_count"] + counts["failed_count"]
    if progress.repairs:
        lost = _lost(conn, task, progress.repairs)
        counts = {name: counts[name] - lost[name] for name in _COUNTS}
    change = counts | {"next_sequence": count, "open_shards": open_shards}
    change["re_executed_count"] = 0 if fresh.is_repeat else progress.re_executed_count
    change["retry_count"] = 0 if fresh.is_repeat else progress.retry_count
    batch = None
    # Bytes without a result change no number, but they may let the last extent grow.
    if fresh.extents or any(change.values()):
        values = {f"d_{name}": change[name] for name in _ADVANCE} | {"d_id": task["batch_id"]}
        batch = conn.execute(_ADVANCE_BATCH, values).mappings().one()
    if batch is not None and fresh.extents:
        _write_extents(conn, task, fresh, sequence_from=batch["next_sequence"] - count)
        end_jobs(conn, task["batch_id"], fresh.extents, moment)
    values = dict(ends or {})
    if any(counts.values()):
        values |= {name: task[name] + counts[name] for name in _COUNTS}
    if count:
        values |= {"attempts": 0, "deaths": 0, "orphaned_by_death": False}
    if progress.intent_mark is not None:
        values.setdefault("intent_mark", max(task["intent_mark"], progress.intent_mark))
    if values:
        write_task(conn, task, values)
    return batch


_GROW_EXTENT = update(extents).where(
    extents.c.batch_id == bindparam("w_batch_id"), extents.c.sequence_from == bindparam("w_sequence_from")
)


def _write_extents(conn: Connection, task: RowMapping, fresh: _Fresh, *, sequence_from: int) -> None:
    """Lay fresh extents behind the batch's last number, in order; a row grows only where bytes and numbers go on."""
    grown: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = []
    current = fresh.last.get((fresh.extents[0].session, fresh.extents[0].segment))
    row = None if current is None else dict(current)
    for new in fresh.extents:
        if row is not None and _goes_on(row, new, sequence_from):
            row |= {"byte_end": new.byte_end, "count": row["count"] + new.count}
            row |= {name: row[name] + value for name, value in _counts_of(new).items()}
            grown = row if not rows else grown
        elif new.count:
            row = _counts_of(new) | {
                "batch_id": task["batch_id"],
                "sequence_from": sequence_from,
                "task_id": task["id"],
                "count": new.count,
                "epoch": task["epoch"],
                "session": new.session,
                "segment": new.segment,
                "byte_start": new.byte_start,
                "byte_end": new.byte_end,
            }
            rows.append(row)
        sequence_from += new.count
    if grown is not None:
        key = {"w_batch_id": grown["batch_id"], "w_sequence_from": grown["sequence_from"]}
        conn.execute(_GROW_EXTENT, key | {name: grown[name] for name in ("byte_end", "count", *_COUNTS)})
    if rows:
        conn.execute(insert(extents), rows)


def _goes_on(row: Mapping[str, Any], new: NewExtent, sequence_from: int) -> bool:
    here = (row["session"], row["segment"], row["byte_end"], row["sequence_from"] + row["count"])
    return here == (new.session, new.segment, new.byte_start, sequence_from)


def _counts_of(new: NewExtent | Extent) -> dict[str, int]:
    return {"succeeded_count": new.succeeded_count, "failed_count": new.failed_count} | tokens_of(new.usage)


def register(conn: Connection, ref: TaskRef, progress: Progress, moment: Moment) -> None:
    """Make extents exist; guards by epoch, and that a settled shard gets nothing more but may repeat itself."""
    task = guard(conn, ref)
    if task["state"] in _IN_HANDS:
        record(conn, task, progress, moment)
    else:
        _require_repeat(conn, task, progress)


def _require_repeat(conn: Connection, task: RowMapping, progress: Progress) -> None:
    if _unregistered(conn, task, progress).extents:
        raise Fenced(f"task {task['id']}: it is {task['state']} and takes no more results")


def settle(conn: Connection, ref: TaskRef, progress: Progress, moment: Moment) -> bool:
    """Register and end a shard; guards with the counter in the batch's row that exactly one settle is the last."""
    task = guard(conn, ref)
    if task["state"] not in _IN_HANDS:
        _require_repeat(conn, task, progress)
        return False
    is_shard = task["kind"] is TaskKind.SHARD
    ends = _LET_GO | {"state": TaskState.SETTLED, "not_before": None}
    batch = record(conn, task, progress, moment, ends=ends, open_shards=-1 if is_shard else 0)
    if batch is None or batch["open_shards"] > 0 or batch["is_open"] or batch["status"] is not BatchStatus.IN_PROGRESS:
        return False
    return move(conn, batch, BatchEvent.LINES_SETTLED, moment) is not None


def end_task(conn: Connection, task: RowMapping) -> None:
    """Settle a task that is no shard, after its guard."""
    ends = _LET_GO | {"state": TaskState.SETTLED, "not_before": None}
    write_task(conn, task, ends)


def give_back(conn: Connection, ref: TaskRef, progress: Progress, moment: Moment) -> None:
    """Register and queue the task for anybody; guards that a task that has ended does not come back, and that only a
    whole progress lowers the intent.
    """
    task = guard_held(conn, ref)
    ends = _LET_GO | {"state": TaskState.QUEUED, "not_before": None}
    if progress.is_whole:
        ends |= {"whole_epoch": task["epoch"]}
        if progress.intent_mark is not None:
            ends |= {"intent_mark": progress.intent_mark}
    record(conn, task, progress, moment, ends=ends)


def fail_task(
    conn: Connection, ref: TaskRef, message: str, moment: Moment, *, progressed: bool, is_hopeless: bool
) -> bool:
    """Queue the task behind a backoff, or park it, at the latest at the tenth failure; guards as `give_back` does."""
    task = guard_held(conn, ref)
    attempts = 1 if progressed else task["attempts"] + 1
    is_parked = is_hopeless or attempts >= _ATTEMPTS_MAX
    message = message[:_ERROR_CHARS_MAX]
    values = _LET_GO | {
        "state": TaskState.PARKED if is_parked else TaskState.QUEUED,
        "attempts": attempts,
        "last_error": message,
        "not_before": moment.boot_s + min(_BACKOFF_MAX_S, 2.0 ** (attempts - 1)),
        "boot_id": moment.boot_id,
    }
    write_task(conn, task, values)
    if is_parked:
        set_blocked(conn, task["batch_id"], message)
    return is_parked


def block(conn: Connection, ref: TaskRef, blocked_by: str | None) -> None:
    """Show why the task's batch does not move on; guards that only the holder speaks for it."""
    task = guard_held(conn, ref)
    set_blocked(conn, task["batch_id"], blocked_by)


def quarantine(conn: Connection, ref: TaskRef) -> None:
    """Queue a shard for quarantined claims only; deaths count anew, so that they are deaths of lines sent alone."""
    task = guard_held(conn, ref)
    ends = _LET_GO | {"state": TaskState.QUEUED, "not_before": None, "is_quarantined": True}
    if not task["is_quarantined"]:
        ends |= {"deaths": 0}
        if lock_batch(conn, task["batch_id"])["on_unknown"] != OnUnknown.FAIL:
            # Where lines may be sent again a mark is no promise, and must not stand for the intents to come.
            ends |= {"intent_mark": 0}
    write_task(conn, task, ends)


def split(conn: Connection, ref: TaskRef, head: ShardCut, tail: ShardCut) -> None:
    """Cut a shard in two; guards that both halves together are the shard, and that a repeated cut changes nothing."""
    task = guard_held(conn, ref)
    if (task["byte_end"], task["line_count"]) == (head.byte_end, head.line_count):
        return
    _require_whole(task, head, tail)
    values = {"byte_end": head.byte_end, "line_count": head.line_count, "checksum": head.checksum}
    write_task(conn, task, values | {"skipped": head.skipped})
    lock_batch(conn, task["batch_id"])
    conn.execute(update(batches).where(batches.c.id == task["batch_id"]).values(open_shards=batches.c.open_shards + 1))
    add_shards(conn, task["batch_id"], (tail,), source=task["source"])


def _require_whole(task: RowMapping, head: ShardCut, tail: ShardCut) -> None:
    bytes_fit = (head.byte_start, head.byte_end, tail.byte_end) == (
        task["byte_start"],
        tail.byte_start,
        task["byte_end"],
    )
    lines_fit = head.line_count + tail.line_count == task["line_count"]
    index_fits = tail.first_index == task["first_index"] + head.line_count
    if not (task["kind"] is TaskKind.SHARD and bytes_fit and lines_fit and index_fits):
        raise ReconciliationError(f"shard {task['id']}: head and tail are not the shard")


def add_shards(conn: Connection, batch_id: str, cuts: Sequence[ShardCut], *, source: str | None = None) -> None:
    """Queue shards of a source; one without a line to run is settled from the start, and only its bytes are of
    interest.
    """
    rows = [
        {
            "batch_id": batch_id,
            "source": source,
            "kind": TaskKind.SHARD,
            "state": TaskState.QUEUED if cut.line_count else TaskState.SETTLED,
            "epoch": 0,
            "orphaned_by_death": False,
            "is_quarantined": False,
        }
        | {name: getattr(cut, name) for name in ShardCut.__struct_fields__}
        for cut in cuts
    ]
    if rows:
        conn.execute(insert(tasks), rows)
