"""A claimed shard in memory: its bytes, which of its lines are still to do, and the journal that takes their results.

Everything a takeover must know is worked out here, off the event loop, before the first line is handed out. Sending is
somebody else's business.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import takewhile

from zlib_ng.zlib_ng import crc32

from batchrunner import crash
from batchrunner.assets import Assets
from batchrunner.doubt import doubtful_mark, unknown_mark, with_registered_marks
from batchrunner.errors import InputChanged, ReconciliationError
from batchrunner.frames import Salvaged, lost_count, salvage
from batchrunner.journal import Journal, copy_salvaged
from batchrunner.limits import Breaker
from batchrunner.lines import LineRules, is_blank, iter_lines, reparse
from batchrunner.models import (
    NO_USAGE,
    Batch,
    Claim,
    Held,
    LineCode,
    NewExtent,
    OnUnknown,
    Progress,
    RecordKind,
    Repair,
    RequestLine,
    Shard,
    ShardCut,
    Usage,
)
from batchrunner.ports import Blobs
from batchrunner.results import ResultLines
from batchrunner.shard_journal import ShardJournal

# Lines that a mark reserves ahead of the one handed out. A takeover counts every line up to the mark as possibly sent,
# so a longer reservation makes that bound looser, a shorter one makes hand-out wait for the disk more often.
_AHEAD_MIN, _AHEAD_MAX = 16, 512
# The same where the mark is a row in the store, which takes longer: half of it is asked for while there is still some.
_FAR_MIN, _FAR_MAX = 64, 1024

# A line that was open at this many deaths of its quarantined holder is given up.
_POISON_DEATHS = 2

_NEVER = sys.maxsize

_UNKNOWN = "The worker died while this request was under way; it may have been processed and may be sent only once."
_UNTOLD = "The run was stopped while this request was under way; it may have been processed and may be sent only once."
_UNWANTED = "This request was not executed because it was cancelled."
_POISON = "The worker died each time this request was under way; it is not sent again."


class ShardRun:
    """One claimed shard: hands out its lines in order, and knows when the last one has its record.

    Used by the event loop only, once `load` has returned. Lines are handed out up to the durable mark of the journal,
    up to the batch's hold, and in a quarantined or at-most-once shard up to the registered intent mark.
    """

    def __init__(self, claim: Claim, buffer: bytes, rules: LineRules, journal: ShardJournal, done: set[int]) -> None:
        assert claim.shard is not None
        self.claim = claim
        self.batch: Batch = claim.batch
        self.shard = claim.shard
        self.journal = journal
        self.results = ResultLines(claim.batch.id)
        # What Idempotency-Keys of its lines begin with. Batches of jobs have but a number, which every server gives.
        self.key_stem = claim.shard.source or claim.batch.id
        self.is_at_most_once = claim.batch.on_unknown is OnUnknown.FAIL
        self.is_quarantined = claim.shard.is_quarantined
        self.intent_mark: int | None = None
        self.intent_wanted = 0
        if self.is_at_most_once or self.is_quarantined:
            self.intent_mark = claim.shard.intent_mark
        # Deaths of holders, without a line done since, that may have had lines of this shard under way; and the last
        # line that any holder may have sent, None where that cannot be read any more.
        self.deaths_at_work = 0
        self.suspects_end: int | None = None
        # What earlier holders registered and a later damage took; the lines run again under this claim.
        self.repairs: tuple[Repair, ...] = ()
        self.re_executed_count = self.aborted_count = self.retry_count = 0
        self.in_flight_count = 0
        self.is_stopped = False
        self.cancelled: Collection[int] = claim.cancelled
        self.on_need: Callable[[], None] = nobody
        self.on_ending: Callable[[int], None] = nobody  # Told how many lines the next shard should have reserved.
        # What each upstream has said to lines of the batch, and the places of those that get no more of them; the
        # fan-out puts the batch's own in.
        self.breakers: Sequence[Breaker] = (Breaker(),)
        self.shut: Collection[int] = ()
        # Where its media answers go; there is none where none can come.
        self.assets: Assets | None = None
        # The keeper's own notes: when it last registered, what it still has to, and until when the shard may be left.
        self.registered_at_s = 0.0
        self.unregistered: list[NewExtent] = []
        self.leave_by_s: float | None = None
        self.is_left_for_good = False
        self._buffer = buffer
        self._rules = rules
        self._done = done
        self._skipped = frozenset(claim.shard.skipped)
        self._position = 0
        self._end = len(buffer)
        self._line_number = claim.shard.first_line - 1
        self._index = claim.shard.first_index
        self._left_count = claim.shard.line_count - len(done)
        self._begun_count = self._untouched_count = self._left_count
        self._hold_at = claim.batch.hold_at
        self._early_mark = _NEVER  # Behind it the next mark is asked for, so that hand-out need not wait.
        self._begin_marks()

    def _begin_marks(self) -> None:
        """Where marks are kept in the store the first goes there with the claim; intents are marks enough. A journal is
        asked with the first line.
        """
        if self.journal.keeps_marks:
            self._early_mark = self._line_number
        elif self.intent_mark is None:
            self.journal.reserve(self._line_number + _FAR_MIN)
        else:
            self.journal.mark_registered(self.intent_mark)

    @property
    def untouched_count(self) -> int:
        """Lines not handed out yet."""
        return self._untouched_count

    @property
    def done_count(self) -> int:
        """Lines that got their record under this claim."""
        return self._begun_count - self._left_count

    @property
    def is_touched(self) -> bool:
        """Whether any line was handed out under this claim."""
        return self._line_number >= self.shard.first_line

    @property
    def is_exhausted(self) -> bool:
        """Whether there is nothing more to hand out."""
        return self._untouched_count == 0

    @property
    def is_finished(self) -> bool:
        """Whether every line has its record, durable or not."""
        return self._left_count == 0

    @property
    def is_held(self) -> bool:
        """Whether the next line lies beyond the batch's hold."""
        return self._hold_at is not None and self._index >= self._hold_at and self._untouched_count > 0

    @property
    def last_line(self) -> int:
        """The last line number that an intent may cover; beyond the shard it is harmless."""
        return self.shard.first_line + self.shard.line_count + len(self.shard.skipped)

    @property
    def buffer_bytes(self) -> int:
        """Memory that the shard's bytes take."""
        return len(self._buffer)

    def drops(self, line: RequestLine) -> bool:
        """Whether nobody wants a line any more that was handed out and is about to be sent; it has ended then."""
        if line.line_number not in self.cancelled:
            return False
        self.refuse(line, LineCode.BATCH_CANCELLED, _UNWANTED)
        return True

    def follow(self, held: Held) -> None:
        """Follow a change of the batch's hold, and of what is not to be sent any more."""
        self._hold_at, self.cancelled = held.hold_at, held.cancelled

    def next_line(self) -> RequestLine | None:
        """Give the next line, or None when there is none, or none may be handed out now."""
        if self._untouched_count == 0 or self.is_stopped:
            return None
        while True:
            start = self._position
            if start >= self._end:
                raise ReconciliationError(
                    f"shard {self.shard.task_id}: {self._untouched_count} lines fewer than were validated"
                )
            number = self._line_number + 1
            if not self._may_send(number):
                return None
            end = self._buffer.find(b"\n", start, self._end)
            if end < 0:
                end = self._end
            self._position, self._line_number = end + 1, number
            raw = self._buffer[start:end]
            if number in self._skipped or is_blank(raw):
                continue
            self._index += 1
            if number in self._done:
                continue
            self._untouched_count -= 1
            line = reparse(raw, number, self._rules)
            if self._untouched_count == 0:
                self._buffer = b""
            return line

    def reserve_first(self, ahead: int = _AHEAD_MIN, *, is_early: bool = False) -> None:
        """Have the mark of the first lines made durable before they are asked for."""
        if self.intent_mark is None:
            self.journal.reserve(self._line_number + ahead, is_early=is_early)

    def _may_send(self, number: int) -> bool:
        if self._hold_at is not None and self._index >= self._hold_at:
            return False
        if self.intent_mark is not None and number > self.intent_mark:
            # In quarantine one line at a time: the next intent is asked for when the line before has its record.
            if not (self.is_quarantined and self.in_flight_count) and self.intent_wanted != number:
                self.intent_wanted = number
                self.on_need()
            return False
        if number > self.journal.durable_mark:
            self._ask_mark(number)
            return False
        if number > self._early_mark:
            self._ask_mark(number, is_early=True)
        return True

    def _ask_mark(self, number: int, *, is_early: bool = False) -> None:
        """Have a mark beyond this line made durable."""
        journal = self.journal
        if journal.keeps_marks:
            # Far enough that the next mark comes in time with a group that is written anyway.
            ahead = min(_AHEAD_MAX, max(_AHEAD_MIN, 2 * self.in_flight_count, 4 * journal.group_count))
            journal.reserve(number + ahead, is_early=is_early)
            self._early_mark = number + ahead // 4
            if number + ahead >= self.last_line:
                self.on_ending(ahead // 2)
        elif self.intent_mark is None and journal.wanted_mark <= journal.durable_mark:
            journal.reserve(number + min(_FAR_MAX, max(_FAR_MIN, 4 * self.in_flight_count)))
            self.on_need()

    def mark_to_register(self, window: int, *, lines_ahead: int) -> int | None:
        """Give the mark that must be in the store before more lines may go out, None where nobody waits for one.

        It covers as few unsent lines as it can where each may be sent once only, else as many as hand-out needs while
        the store is asked.
        """
        if self.intent_mark is None:
            journal = self.journal
            if journal.keeps_marks or journal.wanted_mark <= journal.durable_mark:
                return None
            return max(journal.wanted_mark, self._line_number + min(_FAR_MAX, lines_ahead))
        if self.intent_wanted <= self.intent_mark:
            return None
        ahead = 0 if self.is_quarantined else max(0, window - self.in_flight_count - 1)
        return min(self.intent_wanted + ahead, self.last_line)

    def mark_registered(self, mark: int) -> None:
        """Go on to the mark, which is in the store."""
        journal = self.journal
        if self.intent_mark is not None:
            self.intent_mark = mark
        if not journal.keeps_marks:
            before = journal.durable_mark
            journal.mark_registered(mark)
            self._early_mark = _NEVER if mark >= self.last_line else (max(before, self._line_number) + mark) // 2

    def record(self, line_number: int, kind: RecordKind, payload: bytes, usage: Usage) -> None:
        """Journal the final result of a line; it is durable after the next group commit."""
        self.journal.add(line_number, kind, usage, payload)
        self._left_count -= 1

    def break_off(self, line: RequestLine) -> None:
        """Note that this holder ended a line's exchange. In a batch that goes on, a line that may be sent only once has
        its result with that: no later holder could tell it from those that were never sent.
        """
        if self.is_at_most_once and not self.is_left_for_good:
            self._fail(line, LineCode.OUTCOME_UNKNOWN, _UNTOLD)
        self.in_flight_count -= 1

    def refuse(self, line: RequestLine, code: LineCode, message: str) -> None:
        """Record the error of a line that was handed out and is not to be sent."""
        self._fail(line, code, message)
        self.in_flight_count -= 1

    def progress(self, *, intent_mark: int | None = None) -> Progress:
        """Give what is durable and not registered yet; asked again before it is, the same and what came since."""
        self.unregistered.extend(self.journal.take_registrable())
        return Progress(
            extents=tuple(self.unregistered),
            repairs=self.repairs,
            intent_mark=intent_mark,
            re_executed_count=self.re_executed_count,
            retry_count=self.retry_count,
        )

    def last_progress(self) -> Progress:
        """Give all of a shard whose exchanges have ended: whole, unless answers wait for a journal that cannot write.

        Lines whose exchanges were broken off are sent again, but not if they may be sent only once or their batch has
        ended. Of a whole progress, the intent covers what was handed out and not what was only reserved.
        """
        progress = self.progress()
        if self.journal.waiting_records:
            return progress
        is_over = self.is_at_most_once or self.is_left_for_good
        again = progress.re_executed_count + (0 if is_over else self.aborted_count)
        mark = None if self.intent_mark is None else max(self.shard.intent_mark, self._line_number)
        return replace(progress, is_whole=True, re_executed_count=again, intent_mark=mark)

    def take_over(self, records: Salvaged, blobs: Blobs) -> None:
        """Copy what earlier holders left durable and unregistered into this claim's own journal. Blocks."""
        copy_salvaged(blobs, records.records, self.journal)
        numbers = {record.line_number for record in records.records}
        self._done |= numbers
        self._left_count -= len(numbers)
        self._begun_count -= len(numbers)
        self._untouched_count -= len(numbers)

    def end_open_line(self, line: RequestLine, code: LineCode, message: str) -> None:
        """Record the error of a line that is not handed out again."""
        self._fail(line, code, message)
        self._done.add(line.line_number)
        self._untouched_count -= 1

    def _fail(self, line: RequestLine, code: LineCode, message: str) -> None:
        payload = self.results.failed(line.line_number, line.custom_id, code=code, message=message)
        self.record(line.line_number, RecordKind.FAILED, payload, NO_USAGE)

    def open_lines(self, mark: int) -> list[RequestLine]:
        """The lines up to `mark` that have no record: those that an earlier holder may have sent."""
        lines = iter_lines(self._buffer, self.shard.first_line, self._skipped, self._rules)
        return [
            line
            for line in takewhile(lambda line: line.line_number <= mark, lines)
            if line.line_number not in self._done
        ]

    def cut_tail(self, *, keep_lines: int) -> tuple[ShardCut, ShardCut] | None:
        """Work out a split that leaves this holder `keep_lines` more untouched lines, None if too little would be left
        for either side.

        Lines beyond the split are not handed out from here on; `take_back_tail` undoes that.
        """
        if self._untouched_count - keep_lines < 1 or self._done or self.is_stopped:
            return None
        position, number, index, untouched = self._position, self._line_number, self._index, self._untouched_count
        kept = 0
        while kept < keep_lines or number < self.journal.wanted_mark:
            if position >= self._end:
                return None
            end = self._buffer.find(b"\n", position, self._end)
            end = self._end if end < 0 else end
            number += 1
            if number not in self._skipped and not is_blank(self._buffer[position:end]):
                kept += 1
                index += 1
            position = end + 1
        tail_lines = untouched - kept
        if tail_lines < 1 or position >= self._end:
            return None
        return self._cut_at(position, number, index, tail_lines)

    def _cut_at(self, position: int, number: int, index: int, tail_lines: int) -> tuple[ShardCut, ShardCut]:
        shard = self.shard
        split = shard.byte_start + position
        head = ShardCut(
            byte_start=shard.byte_start,
            byte_end=split,
            first_line=shard.first_line,
            first_index=shard.first_index,
            line_count=shard.line_count - tail_lines,
            checksum=crc32(memoryview(self._buffer)[:position]),
            skipped=tuple(skipped for skipped in shard.skipped if skipped <= number),
        )
        tail = ShardCut(
            byte_start=split,
            byte_end=shard.byte_end,
            first_line=number + 1,
            first_index=index,
            line_count=tail_lines,
            checksum=crc32(memoryview(self._buffer)[position : self._end]),
            skipped=tuple(skipped for skipped in shard.skipped if skipped > number),
        )
        return head, tail

    def cut_suspects(self) -> tuple[ShardCut, ShardCut] | None:
        """Work out a split behind the last line that any holder may have sent; None if no request lies beyond it."""
        if self.suspects_end is None or self.is_touched:
            return None
        position, kept = 0, 0
        for number in range(self.shard.first_line, self.suspects_end + 1):
            end = self._buffer.find(b"\n", position)
            if end < 0:
                return None
            if number not in self._skipped and not is_blank(self._buffer[position:end]):
                kept += 1
            position = end + 1
        tail_lines = self.shard.line_count - kept
        if kept < 1 or tail_lines < 1:
            return None
        return self._cut_at(position, self.suspects_end, self.shard.first_index + kept, tail_lines)

    def drop_tail(self, head: ShardCut, tail: ShardCut) -> None:
        """Forget the lines that a split gives away: what is left is the head, which may be split again."""
        self.shard = replace(
            self.shard,
            byte_end=head.byte_end,
            line_count=head.line_count,
            checksum=head.checksum,
            skipped=head.skipped,
        )
        self._end -= tail.byte_end - tail.byte_start
        self._left_count -= tail.line_count
        self._begun_count -= tail.line_count
        self._untouched_count -= tail.line_count

    def take_back_tail(self, whole: Shard, tail: ShardCut) -> None:
        """Undo `drop_tail`, so that the shard does not count as finished without these lines."""
        self.shard = whole
        self._end += tail.byte_end - tail.byte_start
        self._left_count += tail.line_count
        self._begun_count += tail.line_count
        self._untouched_count += tail.line_count


def nobody(*_: object) -> None:
    """Stands where nobody listens yet."""


def load(blobs: Blobs, journal: Journal, claim: Claim, rules: LineRules) -> ShardRun:
    """Read a claimed shard, check its bytes, take over what earlier holders left. Blocks.

    Successes that earlier epochs made durable without registering them are copied into this claim's own segment. In a
    batch with at-most-once lines, a line with an intent and no record becomes `outcome_unknown`; in a quarantined
    shard, the line that was open at two deaths becomes `poison_request`.

    Raises:
        InputChanged: the source's bytes are not those that were validated.
        ReconciliationError: a line has two registered records.
    """
    shard = claim.shard
    assert shard is not None
    buffer = read_checked(blobs, claim)
    first_mark = shard.first_line - 1
    tells_lines = claim.batch.has_jobs
    if not claim.earlier:
        own = journal.open(claim.batch.id, claim.ref, first_mark=first_mark, tells_lines=tells_lines)
        return ShardRun(claim, buffer, rules, own, set())
    # A holder that was frozen before a split may have answered lines that this shard no longer has.
    lines = range(shard.first_line, shard.first_line + buffer.count(b"\n") + 1)
    is_at_most_once = claim.batch.on_unknown is OnUnknown.FAIL
    found = salvage(blobs, claim, lines=lines, keep_failures=is_at_most_once)
    own = journal.open(claim.batch.id, claim.ref, first_mark=first_mark, tells_lines=tells_lines)
    if not own.keeps_marks:
        found = with_registered_marks(claim, found)
    run = ShardRun(claim, buffer, rules, own, set(found.registered))
    run.take_over(found, blobs)
    crash.point("salvage.copied")
    run.repairs = found.repairs
    if not found.damages:
        run.suspects_end = max(found.marks.values(), default=first_mark)
    if shard.deaths and not found.records:
        run.deaths_at_work = sum(epoch in found.marks for epoch, _ in claim.earlier[-shard.deaths :])
    if is_at_most_once:
        for line in run.open_lines(unknown_mark(claim, found)):
            run.end_open_line(line, LineCode.OUTCOME_UNKNOWN, _UNKNOWN)
    else:
        again = len(run.open_lines(doubtful_mark(claim, found))) + lost_count(found.repairs)
        run.re_executed_count = min(again, run.untouched_count)
    if shard.is_quarantined and shard.deaths >= _POISON_DEATHS:
        for line in run.open_lines(shard.intent_mark)[:1]:
            run.end_open_line(line, LineCode.POISON_REQUEST, _POISON)
    return run


def read_checked(blobs: Blobs, claim: Claim) -> bytes:
    """Read a shard's bytes from the source and compare them with the checksum that validation stored.

    Raises:
        InputChanged: they differ.
    """
    shard = claim.shard
    assert shard is not None
    source = shard.source if shard.source is not None else claim.batch.source
    buffer = blobs.read(source, shard.byte_start, shard.byte_end)
    if len(buffer) != shard.byte_end - shard.byte_start or crc32(buffer) != shard.checksum:
        raise InputChanged(f"lines {shard.first_line} and on: the input is not the one that was validated")
    return buffer
