"""Who hands out the next line: tenants in turn, then batches by their share; and how batches age."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from batchrunner.lanes import Lanes
from batchrunner.models import BatchId, PauseReason, TenantId
from batchrunner.shards import ShardRun
from batchrunner.work import Waiting
from tests.unit.fanning import batch_of, shard_of

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def held(
    lanes: Lanes, name: str, *, lines: int = 1000, tenant: str = "ana", now: datetime = NOW, **changes
) -> ShardRun:
    run = shard_of(range(1, lines + 1), batch=batch_of(name, tenant=TenantId(tenant), **changes))
    lanes.add(run, now)
    return run


def handed_out(lanes: Lanes, count: int) -> list[str]:
    works = [lanes.next_work(0, Waiting()) for _ in range(count)]
    return [work.run.batch.id for work in works if work is not None]


def test_batches_take_turns_line_by_line() -> None:
    lanes = Lanes()
    held(lanes, "huge")
    held(lanes, "small", lines=3)

    order = handed_out(lanes, 10)

    assert order[:6].count("small") == 3
    assert order[6:] == ["huge"] * 4


def test_next_shard_is_reserved_when_hand_out_nears_the_end_of_the_one_before() -> None:
    lanes = Lanes()
    batch = held(lanes, "huge", lines=1000).batch
    after = [shard_of(range(first, first + 1000), batch=batch) for first in (1001, 2001)]
    reserved: list[tuple[int, int, bool]] = []
    for place, run in enumerate(after):
        lanes.add(run, NOW)
        journal: Any = run.journal
        journal.reserve = lambda number, *, is_early=False, place=place: reserved.append((place, number, is_early))

    handed_out(lanes, 300)
    too_early = list(reserved)
    handed_out(lanes, 600)

    assert too_early == []
    assert {(place, is_early) for place, _, is_early in reserved} == {(0, True)}
    assert max(number for _, number, _ in reserved) == 1000 + 256
    assert not any(run.is_touched for run in after)


def test_a_hundred_small_batches_share_with_one_huge() -> None:
    lanes = Lanes()
    held(lanes, "huge", lines=5000)
    for number in range(100):
        held(lanes, f"small-{number}", lines=20)

    shares = Counter(handed_out(lanes, 101 * 10))

    assert set(shares.values()) == {10}


def test_a_new_batch_has_its_turn_at_once() -> None:
    lanes = Lanes()
    for number in range(50):
        held(lanes, f"old-{number}")
    handed_out(lanes, 25)

    held(lanes, "new")

    assert handed_out(lanes, 1) == ["new"]


def test_frequent_newcomers_keep_nobody_from_its_turn() -> None:
    lanes = Lanes()
    for number in range(10):
        held(lanes, f"old-{number}")

    order = []
    for number in range(40):
        held(lanes, f"new-{number}", lines=1)
        order += handed_out(lanes, 2)

    assert {f"old-{number}" for number in range(10)} <= set(order)


def test_tenants_take_turns_however_many_batches_each_has() -> None:
    lanes = Lanes()
    for number in range(9):
        held(lanes, f"ana-{number}")
    held(lanes, "ben-0", tenant="ben")

    shares = Counter(name.split("-")[0] for name in handed_out(lanes, 100))

    assert shares == {"ana": 50, "ben": 50}


def test_each_step_of_priority_doubles_a_share() -> None:
    lanes = Lanes()
    held(lanes, "low")
    held(lanes, "high", priority=2)

    assert Counter(handed_out(lanes, 100)) == {"high": 80, "low": 20}


def test_even_the_highest_priority_leaves_others_their_lines() -> None:
    lanes = Lanes()
    held(lanes, "low")
    held(lanes, "high", priority=1000)

    assert Counter(handed_out(lanes, 130))["low"] == 2


def test_a_batch_rises_a_step_an_hour_up_to_those_above_it() -> None:
    lanes = Lanes()
    for name, priority in (("low", 0), ("high", 2)):
        held(lanes, name, priority=priority)

    lanes.rank(NOW + timedelta(hours=1))
    after_an_hour = Counter(handed_out(lanes, 90))
    lanes.rank(NOW + timedelta(hours=5))
    after_five = Counter(handed_out(lanes, 90))

    assert after_an_hour == {"high": 60, "low": 30}
    assert abs(after_five["high"] - after_five["low"]) <= 2


def test_age_does_not_put_a_batch_ahead_of_its_equals() -> None:
    lanes = Lanes()
    held(lanes, "old", now=NOW + timedelta(days=1))
    held(lanes, "young", created_at=NOW + timedelta(days=1), now=NOW + timedelta(days=1))

    assert Counter(handed_out(lanes, 100)) == {"old": 50, "young": 50}


def test_the_earlier_deadline_goes_first_in_a_round() -> None:
    lanes = Lanes()
    held(lanes, "never")
    held(lanes, "late", deadline_at=NOW + timedelta(days=2))
    held(lanes, "soon", deadline_at=NOW + timedelta(days=1))
    handed_out(lanes, 3)

    assert handed_out(lanes, 3) == ["soon", "late", "never"]


def test_what_gives_nothing_is_passed_over() -> None:
    lanes = Lanes()
    stopped = held(lanes, "stopped")
    held(lanes, "going", lines=5)
    stopped.is_stopped = True

    assert handed_out(lanes, 8) == ["going"] * 5
    assert lanes.next_work(0, Waiting()) is None


def test_a_lane_ends_with_its_last_shard_and_leaves_its_breaker() -> None:
    lanes = Lanes()
    first = held(lanes, "batch", lines=1)
    handed_out(lanes, 1)
    assert lanes.of(BatchId("batch")) is not None
    first.breakers[0].note(None, 1)

    lanes.remove(first)
    second = held(lanes, "batch")

    assert lanes.of(BatchId("batch")) is not None
    assert not second.breakers[0].is_undecided


def test_a_paused_batch_gives_out_one_line_until_it_may_go_on() -> None:
    lanes = Lanes()
    held(lanes, "paused", paused_reason=PauseReason.AUTHENTICATION.value)
    lane = lanes.of(BatchId("paused"))
    assert lane is not None

    assert handed_out(lanes, 3) == ["paused"]
    lane.go_on()
    assert handed_out(lanes, 3) == ["paused"] * 3


def test_a_tripped_batch_is_judged_anew() -> None:
    lanes = Lanes()
    run = held(lanes, "batch")
    lane = lanes.of(BatchId("batch"))
    assert lane is not None
    for line in range(5):
        run.breakers[0].note(PauseReason.AUTHENTICATION, line)

    lanes.trip(lane)
    lanes.remove(run)
    again = held(lanes, "batch")

    assert run.breakers[0].has_suspects
    assert not again.breakers[0].has_suspects


# -- newcomers ---------------------------------------------------------------------------------------------------------


def with_head_start() -> Lanes:
    lanes = Lanes()
    lanes.fit(64)
    return lanes


def test_newcomers_go_one_after_the_other_and_leave_every_fourth_line_to_others() -> None:
    lanes = with_head_start()
    held(lanes, "huge", lines=5000)
    handed_out(lanes, 100)
    for number in range(3):
        held(lanes, f"small-{number}", lines=12, deadline_at=NOW + timedelta(days=1, seconds=number))

    order = handed_out(lanes, 48)

    assert [order.index(f"small-{number}") for number in range(3)] == [0, 16, 32]
    assert Counter(order) == {"huge": 12, "small-0": 12, "small-1": 12, "small-2": 12}
    assert handed_out(lanes, 5) == ["huge"] * 5


def test_a_head_start_ends_after_a_window_of_lines() -> None:
    lanes = with_head_start()
    held(lanes, "huge", lines=5000)
    handed_out(lanes, 100)
    held(lanes, "large", lines=5000)

    shares = Counter(handed_out(lanes, 85)), Counter(handed_out(lanes, 100))

    assert shares == ({"large": 64, "huge": 21}, {"large": 50, "huge": 50})


def test_no_batch_is_new_again_with_a_later_shard() -> None:
    lanes = with_head_start()
    held(lanes, "huge", lines=5000)
    handed_out(lanes, 100)
    later = shard_of(range(1, 100), batch=batch_of("later", tenant=TenantId("ana")))
    later.shard = replace(later.shard, first_index=1000)
    lanes.add(later, NOW)

    assert Counter(handed_out(lanes, 100)) == {"huge": 50, "later": 50}


def test_a_newcomer_below_others_takes_its_turns() -> None:
    lanes = with_head_start()
    held(lanes, "vip", lines=5000, priority=2)
    handed_out(lanes, 100)
    held(lanes, "low", lines=20)

    assert Counter(handed_out(lanes, 50)) == {"vip": 40, "low": 10}


def test_newcomers_of_one_tenant_leave_others_their_turns() -> None:
    lanes = with_head_start()
    held(lanes, "ben-0", lines=5000, tenant="ben")
    for number in range(9):
        held(lanes, f"ana-{number}", lines=20)

    shares = Counter(name.split("-")[0] for name in handed_out(lanes, 100))

    assert shares == {"ana": 50, "ben": 50}


# -- lines that wait ---------------------------------------------------------------------------------------------------


def test_what_is_due_goes_first_in_the_turn_of_its_batch() -> None:
    lanes, waiting = Lanes(), Waiting()
    for name in ("one", "two"):
        held(lanes, name)
    works = [lanes.next_work(0, waiting) for _ in range(4)]
    for work in works:
        assert work is not None
        if work.run.batch.id == "one":
            waiting.put_due(work)

    again = [lanes.next_work(0, waiting) for _ in range(6)]

    assert sorted(work.line.line_number for work in again if work and work.run.batch.id == "one") == [1, 2, 3]
    assert sorted(work.line.line_number for work in again if work and work.run.batch.id == "two") == [3, 4, 5]
    assert len(waiting) == 0


def test_a_batch_with_too_many_waiting_lines_gives_no_fresh_one_and_others_do() -> None:
    lanes, waiting = Lanes(), Waiting()
    for name in ("stuck", "well"):
        held(lanes, name)
    waiting.fit(8, len(lanes))
    for _ in range(40):
        work = lanes.next_work(0, waiting)
        assert work is not None
        if work.run.batch.id == "stuck":
            waiting.put(work, due_s=100.0)

    assert len(waiting) == 2 * 4 + 1
    assert all(work.run.batch.id == "stuck" for work in waiting)


def test_dropped_lines_neither_wait_nor_count() -> None:
    lanes, waiting = Lanes(), Waiting()
    run = held(lanes, "batch")
    works = [work for _ in range(4) if (work := lanes.next_work(0, waiting)) is not None]
    waiting.put(works[0], due_s=1.0)
    waiting.put_due(works[1])
    waiting.put_alone(works[2])

    assert (len(waiting), waiting.alone_count, waiting.take_alone()) == (2, 1, None)
    assert waiting.drop(run) == 3
    assert (len(waiting), waiting.alone_count, waiting.is_any) == (0, 0, False)
    waiting.fit(1, 1)
    assert not waiting.is_crowded(run.batch.id)
