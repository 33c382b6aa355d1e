"""A shard in memory: which of its lines are handed out, in what order, and what a split or a takeover leaves of it."""

from __future__ import annotations

import contextlib
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.blobs.local import LocalBlobs
from batchrunner.errors import InputChanged, ReconciliationError
from batchrunner.journal import Journal
from batchrunner.lifecycle import BatchStatus
from batchrunner.lines import LineRules, iter_lines
from batchrunner.models import (
    BatchId,
    Held,
    LineCode,
    OnUnknown,
    RecordKind,
    SessionId,
    ShardCut,
    TaskId,
    TaskRef,
    Usage,
)
from batchrunner.shards import ShardRun, load, read_checked
from tests.unit.fanning import PaperShardJournal, batch_of, claim_of, failures, raw_line, records, shard_of

BATCH = BatchId("batch_1")


def run_of(
    buffer: bytes, *, count: int, first_line: int = 1, done: set[int] | None = None, batch: Any = None, **shard: Any
) -> ShardRun:
    """A loaded shard over any bytes."""
    claim, _ = claim_of([first_line], buffer=buffer, batch=batch, line_count=count, **shard)
    journal: Any = PaperShardJournal()
    return ShardRun(claim, buffer, LineRules(), journal, done or set())


def held(hold_at: int | None = None, cancelled: tuple[int, ...] = ()) -> Held:
    """What the control poll tells of a shard."""
    status = BatchStatus.IN_PROGRESS
    return Held(
        task_id=TaskId(1), is_mine=True, status=status, paused_reason=None, hold_at=hold_at, cancelled=cancelled
    )


def handed_out(run: ShardRun) -> list[int]:
    """Take every line that may be had now; each must carry its own body."""
    numbers = []
    while (line := run.next_line()) is not None:
        assert json.loads(line.body)["n"] == line.line_number
        assert line.custom_id == f"id-{line.line_number}"
        numbers.append(line.line_number)
    return numbers


# -- handing out -----------------------------------------------------------------------------------------------------


def test_lines_are_handed_out_once_in_order_with_their_physical_numbers() -> None:
    buffer = b"\n" + raw_line(2) + b" \r\n" + raw_line(4).replace(b"\n", b"\r\n") + b"{refused\n" + raw_line(6)[:-1]
    run = run_of(buffer, count=3, skipped=(5,))

    assert handed_out(run) == [2, 4, 6]
    assert run.is_exhausted
    assert not run.is_finished
    assert run.next_line() is None
    assert run.buffer_bytes == 0


def test_lines_with_a_record_are_not_handed_out_again() -> None:
    run = run_of(b"".join(map(raw_line, range(1, 8))), count=7, done={1, 3, 7})

    assert run.untouched_count == 4
    assert handed_out(run) == [2, 4, 5, 6]


def test_shard_is_finished_when_its_last_line_has_its_record() -> None:
    run = shard_of([1, 2])
    for number in handed_out(run):
        assert not run.is_finished
        run.record(number, RecordKind.SUCCEEDED, b"{}\n", Usage(1, 0, 2, 0))

    assert run.is_finished
    assert records(run) == [(number, RecordKind.SUCCEEDED, b"{}\n", Usage(1, 0, 2, 0)) for number in (1, 2)]


def test_line_that_nobody_wants_any_more_ends_as_cancelled_and_is_not_sent() -> None:
    run = shard_of([1, 2])
    run.follow(held(cancelled=(2,)))
    first, second = run.next_line(), run.next_line()
    assert first is not None
    assert second is not None

    assert [run.drops(first), run.drops(second)] == [False, True]

    ((number, kind, payload, _),) = records(run)
    assert (number, kind) == (2, RecordKind.FAILED)
    assert json.loads(payload)["error"]["code"] == LineCode.BATCH_CANCELLED
    assert run.done_count == 1


def with_notes_of_reservations(run: ShardRun) -> list[tuple[int, bool]]:
    """Note which marks are asked for, and whether early; none becomes durable by that."""
    asked: list[tuple[int, bool]] = []
    journal: Any = run.journal
    journal.reserve = lambda line_number, *, is_early=False: asked.append((line_number, is_early))
    return asked


def test_line_beyond_the_durable_mark_waits_for_it() -> None:
    run = shard_of(range(1, 100))
    journal: Any = run.journal
    journal.durable_mark = 2
    asked = with_notes_of_reservations(run)

    assert handed_out(run) == [1, 2]
    assert asked == [(1 + 16, True), (3 + 16, False)]
    run.in_flight_count = 1000
    assert run.next_line() is None
    assert asked[2:] == [(3 + 512, False)]
    journal.durable_mark = 5
    assert handed_out(run) == [3, 4, 5]


@pytest.mark.parametrize(("in_flight", "group", "ahead"), [(1, 0, 16), (30, 10, 60), (2, 50, 200), (9, 999, 512)])
def test_marks_are_asked_for_as_far_ahead_as_groups_are_large_and_long_before_they_are_reached(
    in_flight: int, group: int, ahead: int
) -> None:
    run = shard_of(range(1, 1001))
    journal: Any = run.journal
    journal.group_count, run.in_flight_count = group, in_flight
    asked = with_notes_of_reservations(run)

    assert handed_out(run) == list(range(1, 1001))
    assert asked == [(number + ahead, True) for number in range(1, 1001, ahead // 4 + 1)]


def test_end_of_a_shard_is_told_when_the_mark_reaches_it() -> None:
    run = shard_of(range(1, 101))
    told: list[int] = []
    run.on_ending = told.append
    run.in_flight_count = 10

    for _ in range(78):
        run.next_line()
    assert told == []
    assert handed_out(run) == list(range(79, 101))
    assert set(told) == {10}


def test_hold_stops_before_its_line_and_may_move() -> None:
    run = shard_of(range(1, 10), batch=batch_of(hold_at=3))

    assert handed_out(run) == [1, 2, 3]
    assert run.is_held
    run.follow(held(hold_at=5))
    assert not run.is_held
    assert handed_out(run) == [4, 5]
    run.follow(held(hold_at=None))
    assert handed_out(run) == [6, 7, 8, 9]
    assert not run.is_held


def test_hold_counts_requests_of_the_whole_batch_not_physical_lines() -> None:
    buffer = b"\n\n" + b"".join(map(raw_line, range(103, 108)))
    run = run_of(buffer, count=5, first_line=101, first_index=40, batch=batch_of(hold_at=42))

    assert handed_out(run) == [103, 104]


def test_shard_that_was_stopped_gives_out_nothing() -> None:
    run = shard_of(range(1, 10))
    run.is_stopped = True

    assert handed_out(run) == []


def test_bytes_with_fewer_lines_than_were_validated_are_loud() -> None:
    run = run_of(raw_line(1), count=2)

    assert run.next_line() is not None
    with pytest.raises(ReconciliationError):
        run.next_line()


def test_line_that_validation_cannot_have_accepted_is_loud() -> None:
    run = run_of(b"{}\n", count=1)

    with pytest.raises(InputChanged):
        run.next_line()


def test_intent_is_asked_for_once_and_opens_the_lines_up_to_it() -> None:
    run = shard_of(range(1, 10), batch=batch_of(on_unknown=OnUnknown.FAIL))
    asked = []
    run.on_need = lambda: asked.append(run.intent_wanted)

    assert handed_out(run) == []
    assert handed_out(run) == []
    assert asked == [1]
    run.intent_mark = 3
    assert handed_out(run) == [1, 2, 3]
    assert asked == [1, 4]


def test_quarantined_shard_asks_for_the_next_intent_when_nothing_is_under_way() -> None:
    run = shard_of(range(1, 4), is_quarantined=True)
    asked = []
    run.on_need = lambda: asked.append(run.intent_wanted)

    assert handed_out(run) == []
    run.intent_mark = 1
    run.in_flight_count = 1
    assert handed_out(run) == [1]
    assert asked == [1]
    run.in_flight_count = 0
    assert handed_out(run) == []
    assert asked == [1, 2]


# -- splits ----------------------------------------------------------------------------------------------------------

# What each physical line is: a request, a blank line, or one that was refused.
KINDS = st.lists(st.sampled_from("rrrrb-"), min_size=1, max_size=40)


def bytes_of(kinds: list[str], first_line: int) -> bytes:
    texts = {"b": lambda _: b"  \n", "-": lambda _: b"{refused\n", "r": raw_line}
    return b"".join(texts[kind](number) for number, kind in enumerate(kinds, first_line))


def numbers_of(kinds: list[str], kind: str, first_line: int) -> list[int]:
    return [number for number, each in enumerate(kinds, first_line) if each == kind]


@given(kinds=KINDS, taken=st.integers(0, 40), keep=st.integers(0, 40), reserved=st.integers(0, 45), ends=st.booleans())
def test_split_covers_every_line_exactly_once(
    kinds: list[str], taken: int, keep: int, reserved: int, ends: bool
) -> None:
    first = 501
    wanted, refused = numbers_of(kinds, "r", first), numbers_of(kinds, "-", first)
    if not wanted:
        return
    buffer = bytes_of(kinds, first)
    buffer = buffer if ends else buffer.removesuffix(b"\n")
    run = run_of(
        buffer, count=len(wanted), first_line=first, first_index=400, skipped=tuple(refused), byte_start=7000,
        byte_end=7000 + len(buffer),
    )  # fmt: skip
    before = [run.next_line() for _ in range(min(taken, len(wanted)))]
    journal: Any = run.journal
    journal.wanted_mark = first + reserved if reserved else 0

    cut = run.cut_tail(keep_lines=keep)

    if cut is None:
        assert [line.line_number for line in before if line] + handed_out(run) == wanted
        return
    head, tail = cut
    assert (head.byte_start, head.byte_end, tail.byte_end) == (7000, tail.byte_start, 7000 + len(buffer))
    assert head.line_count + tail.line_count == len(wanted)
    assert head.first_line == first
    assert tail.first_index == 400 + head.line_count
    assert tail.first_line > journal.wanted_mark
    assert head.skipped + tail.skipped == tuple(refused)
    assert all(number < tail.first_line for number in head.skipped)
    parts = {each: buffer[each.byte_start - 7000 : each.byte_end - 7000] for each in cut}
    assert [zlib.crc32(part) for part in parts.values()] == [head.checksum, tail.checksum]

    run.drop_tail(head, tail)
    kept = handed_out(run)
    other = reloaded(tail, parts[tail])
    assert [line.line_number for line in before if line] + kept + handed_out(other) == wanted
    assert len(kept) >= keep
    assert run.is_exhausted
    assert handed_out(reloaded(head, parts[head])) == [each for each in wanted if each < tail.first_line]


def reloaded(cut: ShardCut, buffer: bytes) -> ShardRun:
    """The shard that another worker claims from a cut."""
    claim, _ = claim_of([cut.first_line], buffer=buffer)
    assert claim.shard is not None
    names = ("byte_start", "byte_end", "first_line", "first_index", "line_count", "checksum", "skipped")
    shard = replace(claim.shard, **{name: getattr(cut, name) for name in names})
    journal: Any = PaperShardJournal()
    return ShardRun(replace(claim, shard=shard), buffer, LineRules(), journal, set())


def test_split_that_failed_is_taken_back_whole() -> None:
    run = shard_of(range(1, 10))
    assert run.next_line() is not None
    cut = run.cut_tail(keep_lines=2)
    assert cut is not None
    whole = run.shard
    run.drop_tail(*cut)
    run.take_back_tail(whole, cut[1])

    assert handed_out(run) == list(range(2, 10))
    assert not run.is_finished


def test_what_a_split_left_is_split_again_as_the_shard_that_it_is_now() -> None:
    run = shard_of(range(1, 21))
    first = run.cut_tail(keep_lines=12)
    assert first is not None
    run.drop_tail(*first)

    second = run.cut_tail(keep_lines=5)

    assert second is not None
    whole, (head, tail) = first[0], second
    assert (head.byte_start, head.byte_end, tail.byte_end) == (whole.byte_start, tail.byte_start, whole.byte_end)
    assert head.line_count + tail.line_count == whole.line_count == 12
    run.drop_tail(*second)
    assert handed_out(run) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("keep", [5, 6, 100])
def test_nothing_is_split_off_when_the_holder_keeps_all(keep: int) -> None:
    run = shard_of(range(1, 6))

    assert run.cut_tail(keep_lines=keep) is None


def test_shard_with_lines_of_an_earlier_holder_is_not_split() -> None:
    run = run_of(b"".join(map(raw_line, range(1, 8))), count=7, done={5})

    assert run.cut_tail(keep_lines=1) is None


# -- takeovers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    """A folder with an input of seven lines."""
    made = LocalBlobs(tmp_path / "blobs")
    writer = made.writer("input")
    writer.write(b"".join(map(raw_line, range(1, 8))))
    writer.commit()
    return made


def die_after(blobs: LocalBlobs, kinds: dict[int, RecordKind], *, mark: int) -> None:
    """Leave what a holder of epoch 1 made durable and never registered."""
    with contextlib.closing(Journal(blobs, SessionId("dead"), on_durable=lambda: None)) as journal:
        shard = journal.open(BATCH, TaskRef(task_id=TaskId(1), epoch=1), first_mark=0)
        shard.reserve(mark)
        for number, kind in kinds.items():
            shard.add(number, kind, Usage(number, 0, 0, 0), b'{"by":"the dead"}\n')
        shard.flush()


def taken_over(blobs: LocalBlobs, journal: Journal, *, whole_epoch: int = 0, **changes: Any) -> ShardRun:
    batch = batch_of(source="input", **{name: changes.pop(name) for name in ["on_unknown"] if name in changes})
    claim, _ = claim_of(range(1, 8), batch=batch, epoch=2, **changes)
    ref = replace(claim.ref, epoch=2)
    claim = replace(claim, ref=ref, earlier=((1, SessionId("dead")),), whole_epoch=whole_epoch)
    return load(blobs, journal, claim, LineRules())


def registrable(run: ShardRun) -> tuple[int, int, int]:
    extents = run.journal.take_registrable()
    succeeded = sum(extent.succeeded_count for extent in extents)
    return succeeded, sum(extent.failed_count for extent in extents), sum(each.usage.input_tokens for each in extents)


def test_takeover_keeps_durable_successes_and_runs_the_rest(blobs: LocalBlobs) -> None:
    die_after(blobs, {2: RecordKind.SUCCEEDED, 3: RecordKind.FAILED, 5: RecordKind.SUCCEEDED}, mark=6)

    with contextlib.closing(Journal(blobs, SessionId("heir"), on_durable=lambda: None)) as journal:
        run = taken_over(blobs, journal)
        run.journal.reserve(7)
        run.journal.flush()

        assert handed_out(run) == [1, 3, 4, 6, 7]
        assert run.re_executed_count == 4
        assert registrable(run) == (2, 0, 7)
        run.journal.close()


def test_takeover_from_a_holder_that_gave_back_whole_has_no_line_in_doubt(blobs: LocalBlobs) -> None:
    die_after(blobs, {2: RecordKind.SUCCEEDED}, mark=6)

    with contextlib.closing(Journal(blobs, SessionId("heir"), on_durable=lambda: None)) as journal:
        run = taken_over(blobs, journal, whole_epoch=1)

        assert run.re_executed_count == 0
        run.journal.close()


def test_takeover_of_lines_that_may_be_sent_once_ends_those_in_doubt(blobs: LocalBlobs) -> None:
    die_after(blobs, {1: RecordKind.SUCCEEDED, 3: RecordKind.FAILED}, mark=6)

    with contextlib.closing(Journal(blobs, SessionId("heir"), on_durable=lambda: None)) as journal:
        run = taken_over(blobs, journal, on_unknown=OnUnknown.FAIL, intent_mark=4)
        run.intent_mark = 7
        run.journal.reserve(7)
        run.journal.flush()

        assert handed_out(run) == [5, 6, 7]
        assert registrable(run)[:2] == (1, 3)
        assert run.re_executed_count == 0
        run.journal.close()


def test_line_open_at_two_deaths_in_quarantine_is_poison(blobs: LocalBlobs) -> None:
    die_after(blobs, {1: RecordKind.SUCCEEDED}, mark=2)

    with contextlib.closing(Journal(blobs, SessionId("heir"), on_durable=lambda: None)) as journal:
        run = taken_over(blobs, journal, is_quarantined=True, deaths=2, intent_mark=2)
        run.intent_mark = 7
        run.journal.reserve(7)
        run.journal.flush()

        assert handed_out(run) == [3, 4, 5, 6, 7]
        assert registrable(run)[:2] == (1, 1)
        run.journal.close()


def test_open_lines_are_those_up_to_the_mark_without_a_record() -> None:
    buffer = b"\n" + b"".join(map(raw_line, range(2, 8)))
    run = run_of(buffer, count=6, done={3, 6})

    assert [line.line_number for line in run.open_lines(0)] == []
    assert [line.line_number for line in run.open_lines(5)] == [2, 4, 5]
    assert [line.line_number for line in run.open_lines(100)] == [2, 4, 5, 7]


def test_line_that_is_ended_has_its_error_and_is_not_handed_out() -> None:
    run = shard_of(range(1, 4))
    run.end_open_line(run.open_lines(2)[1], LineCode.OUTCOME_UNKNOWN, "who knows")

    assert handed_out(run) == [1, 3]
    assert failures(run)[2]["error"] == {"code": "outcome_unknown", "message": "who knows"}
    assert failures(run)[2]["custom_id"] == "id-2"
    assert failures(run)[2]["response"] is None


def test_lines_are_read_without_blank_and_refused_ones() -> None:
    buffer = b"\n" + raw_line(12) + b"{refused\n" + raw_line(14)[:-1]

    assert [line.line_number for line in iter_lines(buffer, 11, (13,), LineRules())] == [12, 14]


class PaperBlobs:
    """One blob."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, _name: str, start: int, end: int) -> bytes:
        return self.content[start:end]


def test_bytes_are_compared_with_their_checksum_before_any_send() -> None:
    claim, buffer = claim_of(range(1, 4))
    blobs: Any = PaperBlobs(buffer)

    assert read_checked(blobs, claim) == buffer
    for changed in (buffer[:-1], buffer.replace(b'"n": 2', b'"n": 9'), b""):
        with pytest.raises(InputChanged) as refused:
            read_checked(PaperBlobs(changed), claim)  # type: ignore[arg-type]
        assert "lines 1 and on" in refused.value.message
