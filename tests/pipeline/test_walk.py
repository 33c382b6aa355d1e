"""The walk of the data without a worker: what each step leaves, whoever dies, freezes or interferes in between."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from batchrunner import crash
from batchrunner.blobs.local import LocalBlobs
from batchrunner.errors import Fenced, InputChanged
from batchrunner.lifecycle import BatchEvent, BatchStatus
from batchrunner.models import LineCode, Progress, TaskKind
from batchrunner.shards import ShardRun
from tests.pipeline.hands import BATCH, LEASE_S, Hand, Place


class DiedError(BaseException):
    """The process is gone: nothing in the code may catch this."""


def die() -> None:
    raise DiedError


def lose(place: Place, dead: Hand, finder: Hand) -> None:
    """Have a session's death noticed, as its lock tells."""
    finder.store.release_session(dead.session, died=True)


def test_lines_walk_through_to_their_files(place: Place) -> None:
    hand = place.hand("one")
    place.begin(hand, lines=35)

    hand.validate()
    hand.run_all()
    sealed = hand.seal()

    assert sealed.status is BatchStatus.COMPLETED
    assert (sealed.succeeded_count, sealed.total_count) == (35, 35)
    assert sealed.usage.total_tokens == 35 * 3
    assert len(place.check().succeeded) == 35


def test_two_holders_settle_and_the_last_one_moves_the_batch_once(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    place.begin(one, lines=20)
    one.validate()
    first, second = one.take(), two.take()
    one.answer(first)
    two.answer(second)

    moved = [one.settle(first), two.settle(second)]

    assert moved == [False, True]
    assert place.batch().status is BatchStatus.FINALIZING
    assert one.find(TaskKind.SHARD) is None
    two.seal()
    place.check()


def test_holder_dies_after_sync_and_its_successes_are_taken_over(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    place.begin(one, lines=10)
    one.validate()
    lost = one.take()
    one.answer(lost, 4)

    lose(place, one, two)
    taken = two.take()
    rest = two.answer(taken)
    two.settle(taken)
    two.seal()

    assert rest == [5, 6, 7, 8, 9, 10]
    place.check()


def test_frozen_holder_wakes_after_takeover_and_changes_nothing(place: Place) -> None:
    """Its answers were in the socket when it froze; it journals them after the takeover, and cannot register them."""
    one, two = place.hand("one"), place.hand("two")
    place.begin(one, lines=10)
    one.validate()
    frozen = one.take()
    one.answer(frozen, 3)
    in_flight = [one.next_line(frozen) for _ in range(3)]

    place.clock.advance(5.1)
    place.clock.advance(LEASE_S)
    taken = two.take()
    for line in in_flight:
        assert line is not None
        one.record(frozen, line)
    frozen.journal.flush()
    with pytest.raises(Fenced):
        one.register(frozen)
    rest = two.answer(taken)
    two.settle(taken)
    two.seal()

    assert rest == [4, 5, 6, 7, 8, 9, 10]
    assert place.batch().succeeded_count == 10
    place.check()


def test_shard_is_split_twice_by_one_holder(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    place.begin(one, lines=10)
    one.validate()
    run = one.take()
    for keep in (7, 4):
        cut = run.cut_tail(keep_lines=keep)
        assert cut is not None
        run.drop_tail(*cut)
        one.store.split(run.claim.ref, *cut)

    one.answer(run)
    one.settle(run)
    for _ in range(2):
        rest = two.take()
        two.answer(rest)
        two.settle(rest)
    two.seal()

    assert place.batch().succeeded_count == 10
    place.check()


def test_frozen_holder_cannot_settle_or_split_or_give_back(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    place.begin(one, lines=10)
    one.validate()
    frozen = one.take()
    one.answer(frozen)
    lose(place, one, two)
    two.take()

    with pytest.raises(Fenced):
        one.settle(frozen)
    with pytest.raises(Fenced):
        one.store.give_back(frozen.claim.ref, Progress())
    with pytest.raises(Fenced):
        one.store.fail_task(frozen.claim.ref, "late", progressed=False)

    assert place.batch().succeeded_count == 0
    assert place.batch().status is BatchStatus.IN_PROGRESS


def test_seal_fences_a_frozen_holder_and_salvages_what_it_had_durable(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    place.begin(one, lines=10)
    one.validate()
    frozen = one.take()
    one.answer(frozen, 4)
    late = one.next_line(frozen)
    assert late is not None

    place.scope(two).send(BATCH, BatchEvent.CANCEL_REQUESTED)
    assert two.find(TaskKind.SEAL) is None, "the holder's grace is not over"
    place.clock.advance(LEASE_S + 0.1)
    seal = two.claim(TaskKind.SEAL)
    crash.arm("seal.files_committed", die)
    with pytest.raises(DiedError):
        two.pipeline.seal(seal, lambda: None)
    crash.arm("", die)
    one.record(frozen, late)
    frozen.journal.flush()
    with pytest.raises(Fenced):
        one.register(frozen)
    lose(place, two, one)
    one.seal()

    assert place.batch().status is BatchStatus.CANCELLED
    checked = place.check()
    assert len(checked.succeeded) == 4
    assert checked.codes == {"batch_cancelled": 6}


@pytest.mark.parametrize(
    "point", ["seal.fenced", "seal.salvage_copied", "seal.salvaged", "seal.files_committed", "seal.published"]
)
def test_sealer_dies_at_point_and_the_next_one_makes_the_same_bytes(place: Place, point: str) -> None:
    one, two, three = place.hand("one"), place.hand("two"), place.hand("three")
    place.begin(one, lines=30)
    one.validate()
    for count in (10, 4, 6):
        run = one.take()
        one.answer(run, count)
        if count == 4:
            one.register(run)
    place.scope(one).send(BATCH, BatchEvent.CANCEL_REQUESTED)
    lose(place, one, two)
    crash.arm(point, die)
    with pytest.raises(DiedError):
        two.seal()
    crash.arm("", die)

    lose(place, two, three)
    if point != "seal.published":
        three.seal()

    batch = place.batch()
    assert batch.status is BatchStatus.CANCELLED
    assert (batch.succeeded_count, batch.cancelled_count, batch.total_count) == (20, 10, 30)
    checked = place.check()
    assert len(checked.succeeded) == 20
    assert three.find(TaskKind.SEAL) is None


def test_two_sealers_at_once_make_the_same_bytes_and_one_publishes(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    place.begin(one, lines=20)
    one.validate()
    one.run_all()
    slow = one.claim(TaskKind.SEAL)
    lose(place, one, two)

    sealed = two.seal()
    before = place.files()
    with pytest.raises(Fenced):
        one.pipeline.seal(slow, lambda: None)

    assert sealed.status is BatchStatus.COMPLETED
    assert place.files() == before
    place.check()


@pytest.mark.parametrize("status", [BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING])
def test_cancel_ends_a_batch_of_any_status_with_no_worker_alive(place: Place, status: BatchStatus) -> None:
    one = place.hand("one")
    place.begin(one, lines=10)
    if status is not BatchStatus.VALIDATING:
        one.validate()
    if status is BatchStatus.FINALIZING:
        one.run_all()
    assert place.batch().status is status

    assert place.scope(one).send(BATCH, BatchEvent.CANCEL_REQUESTED)
    two = place.hand("two")
    two.seal()

    batch = place.batch()
    assert batch.status is BatchStatus.CANCELLED
    match status:
        case BatchStatus.VALIDATING:
            assert (batch.total_count, batch.output_file_id, batch.error_file_id) == (0, None, None)
        case BatchStatus.IN_PROGRESS:
            assert place.check().codes == {"batch_cancelled": 10}
        case _:
            assert len(place.check().succeeded) == 10


def test_deadline_ends_what_is_left(place: Place) -> None:
    one = place.hand("one")
    place.begin(one, lines=20, deadline_at=place.clock.now() + timedelta(minutes=1))
    one.validate()
    run = one.take()
    one.answer(run, 7)
    one.register(run)

    place.clock.advance(61.0)
    one.store.sweep()
    assert place.batch().status is BatchStatus.FINALIZING
    one.store.give_back(run.claim.ref, Progress())
    one.seal()

    assert place.batch().status is BatchStatus.EXPIRED
    assert place.batch().expired_count == 13
    assert place.check().codes == {LineCode.BATCH_EXPIRED: 13}


@pytest.mark.parametrize("is_gone", [True, False])
def test_deadline_ends_what_is_left_of_an_input_that_cannot_be_read(place: Place, *, is_gone: bool) -> None:
    one = place.hand("one")
    place.begin(one, lines=20, deadline_at=place.clock.now() + timedelta(minutes=1))
    one.validate()
    run = one.take()
    one.answer(run, 7)
    one.store.give_back(run.claim.ref, Progress())
    if is_gone:
        place.input.unlink()
    else:
        place.input.write_bytes(b"")

    place.clock.advance(61.0)
    one.store.sweep()
    one.seal()

    batch = place.batch()
    errors = [json.loads(line) for line in error_lines(place, one)]
    assert (batch.status, batch.expired_count, batch.succeeded_count) == (BatchStatus.EXPIRED, 13, 7)
    assert [(each["custom_id"], each["error"]["code"]) for each in errors] == [(None, LineCode.INPUT_LOST)] * 13
    assert len({each["id"] for each in errors}) == 13


def error_lines(place: Place, hand: Hand) -> list[bytes]:
    """The lines of the sealed errors file."""
    file_id = place.batch().error_file_id
    assert file_id is not None
    file = place.scope(hand).file(file_id)
    content = LocalBlobs(place.folder / "blobs").read(file.blob, 0, file.size_bytes)
    return content.splitlines()


def test_changed_input_is_found_before_a_line_goes_out(place: Place) -> None:
    one = place.hand("one")
    place.begin(one, lines=20)
    one.validate()
    changed = place.input.read_bytes().replace(b"prompt 15", b"prompt 51")
    place.input.write_bytes(changed)

    untouched = one.take()
    with pytest.raises(InputChanged):
        one.take()

    assert len(one.answer(untouched)) == 10


def test_at_most_once_line_in_doubt_is_never_sent_again(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    run = place.begin_once(one)
    one.answer(run, 3)
    one.next_line(run)

    lose(place, one, two)
    taken = two.take()
    rest = two.answer(taken)
    two.settle(taken)
    two.seal()

    assert rest == [5, 6, 7, 8, 9, 10]
    checked = place.check()
    assert checked.codes == {LineCode.OUTCOME_UNKNOWN: 1}
    assert checked.failed == ["request-00004"]


def test_deaths_of_holders_that_had_sent_nothing_of_a_shard_do_not_count_against_it(place: Place) -> None:
    finder = place.hand("finder")
    place.begin(finder, lines=10)
    finder.validate()
    for death in range(4):
        victim = place.hand(f"victim-{death}")
        victim.take()
        lose(place, victim, finder)

    run = finder.take()

    assert run.shard.deaths == 4
    assert run.deaths_at_work == 0


def test_salvaged_results_clear_a_shard_of_the_deaths_before(place: Place) -> None:
    finder = place.hand("finder")
    place.begin(finder, lines=10)
    finder.validate()
    for death in range(3):
        victim = place.hand(f"victim-{death}")
        run = victim.take()
        victim.answer(run, 1 if death == 2 else 0)
        victim.next_line(run)
        lose(place, victim, finder)

    run = finder.take()

    assert run.shard.deaths == 3
    assert run.deaths_at_work == 0


def test_only_lines_that_may_have_been_sent_are_quarantined(place: Place) -> None:
    place.settings = replace(place.settings, shard_lines_max=100)
    finder = place.hand("finder")
    place.begin(finder, lines=100)
    finder.validate()
    for death in range(3):
        victim = place.hand(f"victim-{death}")
        run = victim.take()
        if death == 0:
            victim.answer(run, 2)
            victim.register(run)
        victim.next_line(run)
        lose(place, victim, finder)

    suspect = finder.take()
    cut = suspect.cut_suspects()
    assert cut is not None
    finder.store.split(suspect.claim.ref, *cut)
    finder.store.quarantine(suspect.claim.ref)
    rest = finder.take()
    finder.answer(rest)
    finder.settle(rest)

    assert suspect.deaths_at_work == 3
    assert suspect.suspects_end is not None
    assert 3 <= suspect.suspects_end < 100
    assert rest.shard.first_line == suspect.suspects_end + 1
    assert rest.shard.line_count == 100 - suspect.suspects_end
    assert finder.find(TaskKind.SHARD) is None
    assert finder.find(TaskKind.SHARD, quarantined=True) is not None


def test_line_that_kills_its_holder_again_and_again_is_given_up(place: Place) -> None:
    place.begin(place.hand("zero"), lines=5)
    place.hands[0].validate()
    finder = place.hand("finder")
    for death in range(3):
        victim = place.hand(f"victim-{death}")
        run = victim.take()
        while (line := victim.next_line(run)) is not None and line.line_number < 3:
            victim.record(run, line) if death == 0 else None
        if death == 0:
            run.journal.flush()
        lose(place, victim, finder)
    claim = finder.claim(TaskKind.SHARD)
    assert claim.shard is not None
    assert claim.shard.deaths >= 3
    finder.store.quarantine(claim.ref)
    for death in range(2):
        victim = place.hand(f"alone-{death}")
        run = victim.take(quarantined=True)
        line = victim.next_line(run)
        assert line is not None
        assert line.line_number == 3
        run.in_flight_count += 1
        assert victim.next_line(run) is None, "one line at a time"
        lose(place, victim, finder)

    last = finder.take(quarantined=True)
    rest = []
    while (line := finder.next_line(last)) is not None:
        last.in_flight_count += 1
        finder.record(last, line)
        last.in_flight_count -= 1
        rest.append(line.line_number)
    last.journal.flush()
    finder.settle(last)
    finder.seal()

    assert rest == [4, 5]
    assert place.check().codes == {LineCode.POISON_REQUEST: 1}


def stop(hand: Hand, run: ShardRun) -> None:
    """Stop cleanly: what came is durable, the shard goes back."""
    run.is_stopped = True
    run.journal.flush()
    hand.store.give_back(run.claim.ref, run.last_progress())


def reserve(hand: Hand, run: ShardRun, line_number: int) -> None:
    """Register an intent ahead of the lines that are sent."""
    hand.store.register(run.claim.ref, Progress(intent_mark=line_number))
    run.intent_mark = line_number
    run.journal.reserve(line_number)
    run.journal.flush()


def codes(place: Place) -> dict[str, str]:
    lines = [json.loads(line) for line in place.files()[1].splitlines()]
    return {line["custom_id"]: line["error"]["code"] for line in lines}


def test_lines_only_reserved_before_a_clean_stop_are_sent_by_the_next_holder(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    run = place.begin_once(one)
    reserve(one, run, 9)
    one.answer(run, 3)

    stop(one, run)
    (shard,) = place.scope(two).shards(BATCH)
    taken = two.take()
    rest = two.answer(taken)
    two.settle(taken)
    two.seal()

    assert shard.intent_mark == 3
    assert rest == [4, 5, 6, 7, 8, 9, 10]
    assert len(place.check().succeeded) == 10


def test_line_that_was_refused_before_a_clean_stop_is_sent_again(place: Place) -> None:
    """Below the last line that was sent there may be one that waited for its next try, or for a token."""
    one, two = place.hand("one"), place.hand("two")
    run = place.begin_once(one)
    one.answer(run, 2)
    assert one.next_line(run) is not None
    one.answer(run, 2)

    stop(one, run)
    taken = two.take()
    rest = two.answer(taken)
    two.settle(taken)
    two.seal()

    assert rest == [3, 6, 7, 8, 9, 10]
    assert len(place.check().succeeded) == 10


def test_line_under_way_when_a_stop_breaks_it_off_is_the_only_unknown_one(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    run = place.begin_once(one)
    reserve(one, run, 9)
    one.answer(run, 2)
    under_way = one.next_line(run)
    assert under_way is not None
    run.in_flight_count += 1

    run.break_off(under_way)
    stop(one, run)
    taken = two.take()
    rest = two.answer(taken)
    two.settle(taken)
    two.seal()

    assert rest == [4, 5, 6, 7, 8, 9, 10]
    assert codes(place) == {"request-00003": LineCode.OUTCOME_UNKNOWN}
    place.check()


def test_lines_of_a_dead_holder_are_unknown_up_to_its_intent_even_after_a_clean_stop(place: Place) -> None:
    one, two, three = place.hand("one"), place.hand("two"), place.hand("three")
    run = place.begin_once(one)
    one.answer(run, 3)
    stop(one, run)
    dying = two.take()
    reserve(two, dying, 5)
    assert two.next_line(dying) is not None

    lose(place, two, three)
    taken = three.take()
    rest = three.answer(taken)
    three.settle(taken)
    three.seal()

    assert rest == [6, 7, 8, 9, 10]
    assert codes(place) == dict.fromkeys(("request-00004", "request-00005"), LineCode.OUTCOME_UNKNOWN)
    place.check()
