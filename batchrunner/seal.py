"""Turn the records of a finished batch into its output and error files, in input order, with flat memory, and prove the
ledger.

The bytes are a function of the input, the extents, `ended_by` and the batch's settings alone: no clock and no random
id, so that sealing again gives the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import msgspec

from batchrunner import crash
from batchrunner.errors import DiskFull, InputChanged, JournalCorrupt, NotFound, ReconciliationError, StoreUnavailable
from batchrunner.frames import Damage, Record, read_records, repairs_of, results_within, salvage, segment_of
from batchrunner.journal import Journal, copy_salvaged
from batchrunner.lifecycle import SEALING, EndedBy
from batchrunner.lines import LineRules, iter_lines
from batchrunner.models import (
    Batch,
    Claim,
    Extent,
    File,
    FileId,
    LineCode,
    LineProblem,
    Order,
    Progress,
    RecordKind,
    TaskId,
)
from batchrunner.outcomes import Publication
from batchrunner.ports import Blobs, Clock, Store
from batchrunner.read_ahead import Range, ReadAhead
from batchrunner.results import ResultLines
from batchrunner.room import Room
from batchrunner.shards import read_checked
from batchrunner.sink import Sink

logger = logging.getLogger(__name__)

_COPY_BYTES = 1 << 20
# Ranges of a shard up to this size are read at one go; larger ones are read record by record.
_WHOLE_BYTES = 16 << 20
_EXTENTS_PAGE = 1000
# Copying is tried this often; between two tries what is damaged is taken out.
_TRIES = 3

# A finished line in pieces.
_Line = Iterable[bytes | memoryview]
_Result = tuple[int, RecordKind, _Line]

_UNFINISHED = {
    EndedBy.DEADLINE: (
        LineCode.BATCH_EXPIRED,
        "This request could not be executed before the completion window expired.",
    ),
    EndedBy.CANCEL: (LineCode.BATCH_CANCELLED, "This request was not executed because the batch was cancelled."),
}

_LOST = (
    LineCode.INPUT_LOST,
    "The input could not be read any more when the batch ended, so that this request has lost its custom_id.",
)


@dataclass(slots=True)
class _Ledger:
    """What was written, by line number, so that a line twice or missing cannot go unseen."""

    succeeded: int = 0
    failed: int = 0
    refused: int = 0
    unfinished: int = 0


class Sealing:
    """One sealing of one batch, under one epoch of its seal task. Blocks; `beat` is called as it moves on."""

    def __init__(
        self,
        claim: Claim,
        *,
        store: Store,
        blobs: Blobs,
        journal: Journal,
        clock: Clock,
        rules: LineRules,
        beat: Callable[[], None],
        room: Room,
    ) -> None:
        self._claim = claim
        self._batch = claim.batch
        self._store = store
        self._blobs = blobs
        self._journal = journal
        self._clock = clock
        self._rules = rules
        self._beat = beat
        self._room = room
        self._wanted_bytes = 0
        self._results = ResultLines(claim.batch.id)
        self._lines_of: dict[TaskId, range] = {}
        self.damage_count = 0
        self._begin()

    def _begin(self) -> None:
        """Start the files and the ledger, before anything is written or anew after damage was met."""
        self._ledger = _Ledger()
        stem = f"files/{self._batch.id}/{self._claim.ref.epoch}-{self._claim.session}"
        register = partial(self._store.register_blob, owner=self._claim.session)
        self._output = Sink(self._blobs, f"{stem}-output.jsonl", register)
        self._errors = Sink(self._blobs, f"{stem}-errors.jsonl", register)

    def run(self) -> Batch:
        """Fence, salvage, copy, prove, publish; gives the batch that has ended. One whose results turn out damaged,
        although all its lines were settled, is sent back to run those again, and comes in progress.

        Where there is less room than the files need, it is waited for, and nothing is kept that would take some.

        Raises:
            DiskFull: there is no room, and nobody waits for it any more.
            ReconciliationError: the ledger does not hold; all data is kept.
            JournalCorrupt: registered bytes read differently every time; all data is kept.
            Fenced: a newer sealer is at work.
        """
        shards = self._store.fence(self._claim.ref)
        crash.point("seal.fenced")
        self._lines_of = _lines_by_task(shards)
        for shard in shards:
            self._salvage_tail(shard)
        if self._batch.has_jobs:
            # Each result is read where it stands, by its job.
            return self._store.publish(self._claim.ref, Publication(output=None, error=None))
        batch = self._room.until_done(partial(self._make_files, shards), is_there=self._has_room)
        if batch.status not in SEALING:
            return batch
        crash.point("seal.files_committed")
        published = self._room.until_done(lambda: self._store.publish(self._claim.ref, self._publication()))
        crash.point("seal.published")
        return published

    def _make_files(self, shards: list[Claim]) -> Batch:
        """Make both files durable, or leave nothing behind; gives the batch, which may have been sent back."""
        for tries_left in reversed(range(_TRIES)):
            self._batch = self._store.scope(self._batch.tenant).batch(self._batch.id)
            extents = self._extents()
            try:
                self._check_space(extents)
                self._write(shards, extents)
                break
            except DiskFull:
                self._show_blocked()
                raise
            except JournalCorrupt as error:
                logger.error("batch %s: %s", self._batch.id, error, extra={"action": "seal_met_damage"})  # noqa: TRY400
                if tries_left == 0:
                    raise
            batch = self._repair(shards, extents)
            if batch.status not in SEALING:
                return batch
        return self._batch

    # -- before reading ----------------------------------------------------------------------------------------------

    def _salvage_tail(self, shard: Claim) -> None:
        """Register what a fenced holder made durable without registering it."""
        assert shard.shard is not None
        self._beat()
        progress = Progress()
        registered = sum(extent.count for extent in shard.extents)
        if registered < shard.shard.line_count and shard.earlier:
            found = salvage(self._blobs, shard, lines=self._lines_of[shard.ref.task_id])
            self.damage_count += len(found.repairs)
            progress = Progress(repairs=found.repairs)
            if found.records:
                own = self._journal.open(self._batch.id, shard.ref, first_mark=0, tells_lines=self._batch.has_jobs)
                copy_salvaged(self._blobs, found.records, own)
                crash.point("seal.salvage_copied")
                progress = replace(progress, extents=own.take_registrable())
                own.close()
        self._store.salvage_sealed(self._claim.ref, shard.ref, progress)
        crash.point("seal.salvaged")

    def _extents(self) -> list[Extent]:
        scope = self._store.scope(self._batch.tenant)
        extents: list[Extent] = []
        while True:
            after = extents[-1].sequence_from + extents[-1].count - 1 if extents else 0
            page = scope.extents(self._batch.id, after=after, limit=_EXTENTS_PAGE)
            extents += page
            if len(page) < _EXTENTS_PAGE:
                return extents

    def _check_space(self, extents: list[Extent]) -> None:
        needed = sum(extent.byte_end - extent.byte_start for extent in extents)
        free = self._blobs.free_bytes()
        if free is not None and free < needed:
            self._wanted_bytes = needed
            raise DiskFull(f"sealing needs {needed:,} bytes, {free:,} are free")
        if self._batch.blocked_by is not None:
            self._store.block(self._claim.ref, None)
        # What fails all the same needs more than there was.
        self._wanted_bytes = (free or 0) + _COPY_BYTES

    def _has_room(self) -> bool:
        """Tell whether it is worth another try; where nothing tells of room, a try is all there is, and a dear one."""
        free = self._blobs.free_bytes()
        return free is not None and free >= self._wanted_bytes

    def _show_blocked(self) -> None:
        """Show in the store what is waited for, unless that is full as well."""
        if self._batch.blocked_by != DiskFull.code:
            with contextlib.suppress(DiskFull, StoreUnavailable):
                self._store.block(self._claim.ref, DiskFull.code)

    def _repair(self, shards: list[Claim], extents: list[Extent]) -> Batch:
        """Look through everything that is registered and take out of it what is damaged."""
        of_task = _by_task(extents)
        repairs = []
        for shard in shards:
            self._beat()
            if found := repairs_of(self._blobs, of_task.get(shard.ref.task_id, [])):
                repairs.append((shard.ref, found))
        self.damage_count += sum(len(found) for _, found in repairs)
        repaired = self._store.repair_sealed(self._claim.ref, repairs)
        crash.point("seal.repaired")
        return repaired

    # -- copying -----------------------------------------------------------------------------------------------------

    def _write(self, shards: list[Claim], extents: list[Extent]) -> None:
        """Make both files durable, or leave nothing behind."""
        self._begin()
        try:
            if self._batch.order is Order.COMPLETION:
                with ReadAhead(self._blobs, _ranges([each] for each in extents)) as ahead:
                    self._copy_in_sequence(extents, ahead)
            of_task = _by_task(extents)
            plan = _ranges(of_task.get(shard.ref.task_id, []) for shard in shards)
            with ReadAhead(self._blobs, plan) as ahead:
                self._copy_shards(shards, of_task, ahead)
            self._prove()
            self._output.commit()
            self._errors.commit()
        except BaseException:
            self._output.abort()
            self._errors.abort()
            raise

    def _copy_in_sequence(self, extents: list[Extent], ahead: ReadAhead) -> None:
        for extent in extents:
            self._beat()
            for _, kind, line in _read_results(self._blobs, [extent], ahead):
                self._put(kind, line)

    def _copy_shards(self, shards: list[Claim], of_task: dict[TaskId, list[Extent]], ahead: ReadAhead) -> None:
        refused = read_problems(self._blobs, self._batch.problems_blob)
        pending = next(refused, None)
        for shard in shards:
            self._beat()
            row = shard.shard
            assert row is not None
            results: dict[int, tuple[RecordKind, _Line]] = {}
            for number, kind, line in _read_results(self._blobs, of_task.get(row.task_id, []), ahead):
                if number in results:
                    raise ReconciliationError(f"line {number} has two results")
                results[number] = kind, line
            missing = self._missing(shard, results) if len(results) < row.line_count else {}
            for number in sorted([*results, *missing]):
                while pending is not None and (pending.line_number or 0) < number:
                    pending = self._put_refused(pending, refused)
                if number in missing:
                    self._put_unfinished(number, missing[number])
                elif self._batch.order is Order.INPUT:
                    self._put(*results[number])
        while pending is not None:
            pending = self._put_refused(pending, refused)

    def _put(self, kind: RecordKind, line: _Line) -> None:
        """Copy one finished line into the file that its kind names."""
        if kind is RecordKind.SUCCEEDED:
            sink = self._output
            self._ledger.succeeded += 1
        else:
            sink = self._errors
            self._ledger.failed += 1
        sink.line_count += 1
        for piece in line:
            sink.write(piece)

    def _put_unfinished(self, number: int, custom_id: str | None) -> None:
        ended_by = self._batch.ended_by
        if ended_by not in _UNFINISHED:
            raise ReconciliationError(f"line {number} has no result although every shard was settled")
        code, message = _UNFINISHED[ended_by] if custom_id is not None else _LOST
        self._ledger.unfinished += 1
        self._errors.add(self._results.failed(number, custom_id, code=code, message=message))

    def _put_refused(self, problem: LineProblem, rest: Iterator[LineProblem]) -> LineProblem | None:
        self._ledger.refused += 1
        self._errors.add(self._results.refused(problem))
        return next(rest, None)

    def _missing(self, shard: Claim, results: Mapping[int, object]) -> dict[int, str | None]:
        """The lines of a shard without a record, with their custom_ids where the input can still be read.

        Where it cannot, only their number is known: which of the shard's lines are blank, and so are no requests, is
        not, and the first that may be one stand for them.
        """
        row = shard.shard
        assert row is not None
        try:
            buffer = read_checked(self._blobs, shard)
        except (InputChanged, NotFound) as error:
            count = row.line_count - len(results)
            logger.error("%d lines lost: %s", count, error, extra={"action": "input_lost", "batch_id": self._batch.id})  # noqa: TRY400 - no bug
            open_numbers = (
                number for number in self._lines_of[row.task_id] if number not in results and number not in row.skipped
            )
            return dict.fromkeys(islice(open_numbers, count))
        lines = iter_lines(buffer, row.first_line, row.skipped, self._rules)
        return {line.line_number: line.custom_id for line in lines if line.line_number not in results}

    # -- the end -----------------------------------------------------------------------------------------------------

    def _prove(self) -> None:
        """Hold what was written against what the store counts.

        Raises:
            ReconciliationError: they differ.
        """
        batch, ledger = self._batch, self._ledger
        rows = (
            ("output lines", self._output.line_count, batch.succeeded_count),
            ("failed lines", ledger.failed + ledger.refused, batch.failed_count),
            ("lines altogether", self._output.line_count + self._errors.line_count, batch.total_count),
        )
        for what, written, counted in rows:
            if written != counted:
                raise ReconciliationError(
                    f"batch {batch.id}: {written} {what} were written, {counted} are in the ledger"
                )

    def _publication(self) -> Publication:
        is_cancel = self._batch.ended_by is EndedBy.CANCEL
        return Publication(
            output=self._file(self._output, "output"),
            error=self._file(self._errors, "error"),
            expired_count=0 if is_cancel else self._ledger.unfinished,
            cancelled_count=self._ledger.unfinished if is_cancel else 0,
        )

    def _file(self, sink: Sink, word: str) -> File | None:
        if sink.line_count == 0:
            return None
        return File(
            id=FileId(f"file-{hashlib.sha256(sink.name.encode()).hexdigest()[:24]}"),
            tenant=self._batch.tenant,
            purpose="batch_output",
            filename=f"{self._batch.id}_{word}.jsonl",
            size_bytes=sink.size_bytes,
            sha256=sink.sha256,
            blob=sink.name,
            created_at=self._clock.now(),
        )


def _lines_by_task(shards: Sequence[Claim]) -> dict[TaskId, range]:
    """The line numbers that each shard still has; a holder frozen before a split may have answered others."""
    firsts = [shard.shard.first_line for shard in shards if shard.shard is not None]
    ends = [*firsts[1:], sys.maxsize]
    return {shard.ref.task_id: range(first, end) for shard, first, end in zip(shards, firsts, ends, strict=False)}


def _by_task(extents: list[Extent]) -> dict[TaskId, list[Extent]]:
    of_task: dict[TaskId, list[Extent]] = defaultdict(list)
    for extent in extents:
        of_task[extent.task_id].append(extent)
    return of_task


class _FarPayload:
    """A finished line that is left where it is, and read a piece at a time when it is copied."""

    def __init__(self, blobs: Blobs, record: Record) -> None:
        self._blobs = blobs
        self._record = record

    def __iter__(self) -> Iterator[bytes]:
        start, end = self._record.payload_offset, self._record.end
        while start < end:
            stop = min(end, start + _COPY_BYTES)
            yield self._blobs.read(self._record.segment.blob, start, stop)
            start = stop


def _is_small(extents: list[Extent]) -> bool:
    return sum(extent.byte_end - extent.byte_start for extent in extents) <= _WHOLE_BYTES


def _ranges(groups: Iterable[list[Extent]]) -> Iterator[Range]:
    """Give what is read at one go, in the order in which it is read."""
    for extents in filter(_is_small, groups):
        for each in extents:
            yield Range(segment_of(each).blob, each.byte_start, each.byte_end)


def _read_results(blobs: Blobs, extents: list[Extent], ahead: ReadAhead) -> Iterator[_Result]:
    """Give line number, kind and finished line of each record, in sequence order, all verified.

    The lines of extents that are small together are held in memory, in one piece each.

    Raises:
        JournalCorrupt: registered bytes are damaged.
    """
    is_small = _is_small(extents)
    for extent in extents:
        segment, start, end = segment_of(extent), extent.byte_start, extent.byte_end
        if is_small:
            try:
                content = ahead.read(segment.blob, start, end)
            except NotFound as error:
                raise JournalCorrupt(f"{segment.blob} is registered and not there") from error
            if len(content) != end - start:
                raise JournalCorrupt(f"{segment.blob}: {end - start - len(content)} registered bytes are missing")
            for number, kind, payload in results_within(content, segment):
                yield number, kind, (payload,)
            continue
        for record in read_records(blobs, segment, start, end):
            if isinstance(record, Damage):
                raise JournalCorrupt(f"{segment.blob}: bytes {record.start} to {record.end} are damaged")
            yield record.line_number, record.kind, _FarPayload(blobs, record)


def refused_numbers(blobs: Blobs, name: str | None) -> frozenset[int | None]:
    """Read from a report of problems which lines were refused."""
    return frozenset(problem.line_number for problem in read_problems(blobs, name))


def read_problems(blobs: Blobs, name: str | None) -> Iterator[LineProblem]:
    """Read a report of problems, which stands in line order; none without a report."""
    if name is None:
        return
    rest, start, size = b"", 0, blobs.size_bytes(name)
    while start < size:
        chunk = blobs.read(name, start, start + _COPY_BYTES)
        start += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line, type=LineProblem)
