"""Registered results that turn out damaged: their lines, and only theirs, run again, and every batch ends whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import pytest

from batchrunner import crash
from batchrunner.blobs.local import LocalBlobs
from batchrunner.errors import JournalCorrupt
from batchrunner.frames import Damage, Record, read_records, segment_of
from batchrunner.lifecycle import BatchEvent, BatchStatus, EndedBy
from batchrunner.models import LineCode, OnUnknown, Order, TaskKind, Usage
from tests.pipeline.hands import BATCH, Hand, Place


class DiedError(BaseException):
    """The process is gone: nothing in the code may catch this."""


def die() -> None:
    raise DiedError


def intact(place: Place) -> dict[int, tuple[int, Record]]:
    """Every readable registered record by line number, with its sequence number where its extent is whole."""
    blobs = LocalBlobs(place.folder / "blobs")
    found: dict[int, tuple[int, Record]] = {}
    for extent in place.scope(place.hands[-1]).extents(BATCH):
        sequence = extent.sequence_from
        for each in read_records(blobs, segment_of(extent), extent.byte_start, extent.byte_end):
            if isinstance(each, Damage):
                continue
            assert each.line_number not in found, f"line {each.line_number} is registered twice"
            found[each.line_number] = sequence, each
            sequence += 1
    return found


def flip(place: Place, *lines: int) -> None:
    """Flip a bit in the middle of the results of these lines; again, and they are as they were."""
    records = intact(place)
    for line in lines:
        flip_at(place, records[line][1])


def flip_at(place: Place, record: Record) -> None:
    path = LocalBlobs(place.folder / "blobs").path(record.segment.blob)
    content = bytearray(path.read_bytes())
    content[record.payload_offset + record.payload_length // 2] ^= 0x40
    path.write_bytes(content)


def truncate(place: Place, *lines: int) -> None:
    """Cut the segment off in the middle of the result of the first of these lines."""
    record = intact(place)[lines[0]][1]
    path = LocalBlobs(place.folder / "blobs").path(record.segment.blob)
    path.write_bytes(path.read_bytes()[: record.payload_offset + 5])


def remove(place: Place, *lines: int) -> None:
    """Lose the whole segment that holds these lines."""
    LocalBlobs(place.folder / "blobs").path(intact(place)[lines[0]][1].segment.blob).unlink()


@dataclass(frozen=True, slots=True)
class Harm:
    """A way to damage the results of `lost` in a batch of shards of ten lines."""

    harm: Callable[..., None]
    lost: tuple[int, ...]


HARMS = [
    pytest.param(Harm(flip, (13,)), id="flipped-byte"),
    pytest.param(Harm(flip, (11,)), id="flipped-first"),
    pytest.param(Harm(flip, (20,)), id="flipped-last"),
    pytest.param(Harm(flip, (12, 13, 17)), id="flipped-in-three-places"),
    pytest.param(Harm(flip, (3, 13, 32)), id="flipped-in-three-shards"),
    pytest.param(Harm(truncate, (15, 16, 17, 18, 19, 20)), id="truncated"),
    pytest.param(Harm(remove, tuple(range(11, 21))), id="missing-segment"),
]


def settled(place: Place, *, lines: int = 35, on_unknown: OnUnknown = OnUnknown.RETRY) -> Hand:
    """Bring a batch to its seal with every line answered."""
    hand = place.hand("one")
    place.begin(hand, lines=lines, on_unknown=on_unknown)
    hand.validate()
    hand.run_all()
    assert place.batch().status is BatchStatus.FINALIZING
    return hand


def check_ledger(place: Place) -> None:
    """The counts of the batch are those of its extents, and those of what can be read."""
    batch, extents = place.batch(), place.scope(place.hands[-1]).extents(BATCH)
    following = 1
    for extent in extents:
        assert extent.sequence_from >= following, "a sequence number is given twice"
        following = extent.sequence_from + extent.count

    assert batch.next_sequence >= following
    assert batch.succeeded_count == sum(extent.succeeded_count for extent in extents)
    assert batch.failed_count - batch.refused_count == sum(extent.failed_count for extent in extents)
    assert batch.usage == sum((extent.usage for extent in extents), Usage())
    assert batch.succeeded_count + batch.failed_count - batch.refused_count == len(intact(place))


def run_rest(hand: Hand) -> list[int]:
    """Answer and settle whatever shard there is; gives the lines that were sent."""
    sent: list[int] = []
    while (claim := hand.find(TaskKind.SHARD)) is not None:
        run = hand.pipeline.load_shard(claim)
        hand.store.register(claim.ref, run.progress())
        sent += hand.answer(run)
        run.journal.flush()
        hand.store.settle(claim.ref, run.progress())
    return sent


def codes(place: Place) -> dict[int, str]:
    """The codes of the error file by line."""
    lines = [json.loads(line) for line in place.files()[1].splitlines()]
    return {int(line["custom_id"].removeprefix("request-")): line["error"]["code"] for line in lines}


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("harm", HARMS)
def test_damage_after_the_last_settle_has_only_its_lines_run_again(
    place: Place, harm: Harm, order: Order, caplog: pytest.LogCaptureFixture
) -> None:
    hand = settled(place)
    place.scope(hand).adjust(BATCH, hold_at=None, order=order)
    before = intact(place)
    harm.harm(place, *harm.lost)

    sent_back = hand.seal()
    check_ledger(place)
    kept = intact(place)
    again = run_rest(hand)
    sealed = hand.seal()

    assert (sent_back.status, sent_back.ended_by, sent_back.finalizing_at) == (BatchStatus.IN_PROGRESS, None, None)
    assert sent_back.done_count == 35 - len(harm.lost)
    assert sorted(again) == list(harm.lost)
    assert kept == {line: before[line] for line in before if line not in harm.lost}, "a number was given anew"
    assert (sealed.status, sealed.succeeded_count, sealed.failed_count) == (BatchStatus.COMPLETED, 35, 0)
    assert sealed.re_executed_count == len(harm.lost)
    assert sealed.in_progress_at == sent_back.in_progress_at
    check_ledger(place)
    assert len(place.files()[0].splitlines()) == 35
    if order is Order.INPUT:
        place.check()
    assert "journal_damaged" in {getattr(each, "action", None) for each in caplog.records}
    assert hand.pipeline.damage_count >= 1


@pytest.mark.parametrize("harm", HARMS)
def test_damage_in_a_shard_in_work_has_only_its_lines_run_again(place: Place, harm: Harm) -> None:
    one, two = place.hand("one"), place.hand("two")
    place.begin(one, lines=40)
    one.validate()
    runs = [one.take() for _ in range(4)]
    for run in runs:
        one.answer(run, 10 if run is runs[1] else 9)
        one.register(run)
    harm.harm(place, *harm.lost)

    two.store.release_session(one.session, died=True)
    again = run_rest(two)
    check_ledger(place)
    sealed = two.seal()

    lost = set(harm.lost)
    assert set(again) == lost | {10, 30, 40}
    assert len(again) == len(set(again))
    assert sealed.status is BatchStatus.COMPLETED
    assert sealed.re_executed_count >= len(lost)
    place.check()


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    ("event", "code", "status"),
    [
        (BatchEvent.DEADLINE_PASSED, LineCode.BATCH_EXPIRED, BatchStatus.EXPIRED),
        (BatchEvent.CANCEL_REQUESTED, LineCode.BATCH_CANCELLED, BatchStatus.CANCELLED),
    ],
)
def test_damage_in_a_batch_that_was_ended_early_gets_the_code_of_unfinished_lines(
    place: Place, harm: Harm, event: BatchEvent, code: LineCode, status: BatchStatus
) -> None:
    hand = place.hand("one")
    place.begin(hand, lines=45)
    hand.validate()
    for _ in range(4):
        run = hand.take()
        hand.answer(run)
        hand.settle(run)
    harm.harm(place, *harm.lost)

    place.scope(hand).send(BATCH, event)
    sealed = hand.seal()

    assert sealed.status is status
    assert codes(place) == dict.fromkeys((*harm.lost, *range(41, 46)), code)
    assert hand.find(TaskKind.SHARD) is None
    check_ledger(place)
    place.check()


def test_damage_in_a_shard_that_the_deadline_left_open_is_taken_out_by_its_salvage(place: Place) -> None:
    hand = place.hand("one")
    place.begin(hand, lines=10)
    hand.validate()
    run = hand.take()
    hand.answer(run, 6)
    hand.register(run)
    flip(place, 2, 4)

    hand.store.release_session(hand.session, died=True)
    place.scope(hand).send(BATCH, BatchEvent.DEADLINE_PASSED)
    sealer = place.hand("two")
    sealer.seal()

    assert sorted(codes(place)) == [2, 4, 7, 8, 9, 10]
    check_ledger(place)
    place.check()


def test_damage_found_when_a_cancel_came_after_the_last_settle_is_cancelled(place: Place) -> None:
    hand = settled(place)
    place.scope(hand).send(BATCH, BatchEvent.CANCEL_REQUESTED)
    assert place.batch().ended_by is EndedBy.SETTLED
    flip(place, 13, 14)

    sealed = hand.seal()

    assert (sealed.status, sealed.ended_by, sealed.cancelled_count) == (BatchStatus.CANCELLED, EndedBy.CANCEL, 2)
    assert codes(place) == {13: LineCode.BATCH_CANCELLED, 14: LineCode.BATCH_CANCELLED}
    place.check()


@pytest.mark.parametrize("harm", HARMS)
def test_line_that_may_be_sent_once_is_not_sent_again_for_a_damaged_result(place: Place, harm: Harm) -> None:
    hand = settled(place, on_unknown=OnUnknown.FAIL)
    harm.harm(place, *harm.lost)

    hand.seal()
    again = run_rest(hand)
    sealed = hand.seal()

    assert again == []
    assert codes(place) == dict.fromkeys(harm.lost, LineCode.OUTCOME_UNKNOWN)
    assert (sealed.status, sealed.re_executed_count) == (BatchStatus.COMPLETED, 0)
    check_ledger(place)
    place.check()


def test_line_that_may_be_sent_once_is_not_sent_again_when_its_shard_was_given_back_whole(place: Place) -> None:
    """A clean stop tells that no open line is in doubt, but damage takes that word back."""
    one, two = place.hand("one"), place.hand("two")
    run = place.begin_once(one)
    one.answer(run, 5)
    one.store.give_back(run.claim.ref, run.last_progress())
    flip(place, 2)

    again = run_rest(two)
    two.seal()

    assert again == [6, 7, 8, 9, 10]
    assert codes(place) == {2: LineCode.OUTCOME_UNKNOWN}
    place.check()


def test_damage_that_heals_after_its_line_ran_again_doubles_nothing(place: Place) -> None:
    """A bad cable, or a folder that was not mounted: the old bytes read well again, but nobody takes them any more."""
    hand = settled(place)
    record = intact(place)[13][1]
    flip_at(place, record)

    hand.seal()
    run_rest(hand)
    flip_at(place, record)
    sealed = hand.seal()

    assert sealed.status is BatchStatus.COMPLETED
    check_ledger(place)
    place.check()


def test_damage_that_heals_before_its_line_runs_again_is_registered_once(place: Place) -> None:
    hand = settled(place)
    record = intact(place)[20][1]
    flip_at(place, record)

    hand.seal()
    flip_at(place, record)
    again = run_rest(hand)
    sealed = hand.seal()

    assert len(again) <= 1
    assert sealed.succeeded_count == 35
    check_ledger(place)
    place.check()


def test_sealer_that_dies_after_sending_back_leaves_a_batch_that_ends(place: Place) -> None:
    hand, other = settled(place), place.hand("two")
    flip(place, 13)

    crash.arm("seal.repaired", die)
    try:
        with pytest.raises(DiedError):
            hand.seal()
    finally:
        crash.arm("", die)
    other.store.release_session(hand.session, died=True)
    again = run_rest(other)
    other.seal()

    assert again == [13]
    place.check()


def test_deadline_that_passes_after_the_batch_was_sent_back_expires_the_damaged_lines(place: Place) -> None:
    hand = place.hand("one")
    place.begin(hand, lines=35, deadline_at=place.clock.now() + timedelta(hours=1))
    hand.validate()
    hand.run_all()
    flip(place, 13)
    hand.seal()

    place.clock.advance(3601)
    hand.store.sweep()
    sealed = hand.seal()

    assert (sealed.status, sealed.ended_by) == (BatchStatus.EXPIRED, EndedBy.DEADLINE)
    assert codes(place) == {13: LineCode.BATCH_EXPIRED}
    place.check()


def test_results_that_are_damaged_again_and_again_are_left_to_the_operator(place: Place) -> None:
    hand = settled(place)
    for _ in range(3):
        flip(place, 13)
        assert hand.seal().status is BatchStatus.IN_PROGRESS
        run_rest(hand)
    flip(place, 13)

    claim = hand.claim(TaskKind.SEAL)
    with pytest.raises(JournalCorrupt, match="3 repairs"):
        hand.pipeline.seal(claim, lambda: None)
    hand.store.fail_task(claim.ref, "journal_corrupt", progressed=False, is_hopeless=True)
    assert place.batch().status is BatchStatus.FINALIZING
    place.scope(hand).resume(BATCH)
    assert hand.seal().status is BatchStatus.IN_PROGRESS
    run_rest(hand)
    hand.seal()

    place.check()
