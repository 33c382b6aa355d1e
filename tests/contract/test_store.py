"""What every Store promises, on every implementation: guards, leases, sequence, fence, publication, sweep."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from batchrunner.errors import Fenced, NameTaken, NotFound, ReconciliationError, TransitionRefused
from batchrunner.lifecycle import SEALING, TERMINAL, BatchEvent, BatchStatus, EndedBy
from batchrunner.models import (
    BatchId,
    Claim,
    Extent,
    FileId,
    NewBatch,
    OnUnknown,
    Order,
    Progress,
    Repair,
    SessionId,
    ShardCut,
    TaskKind,
    TaskRef,
    TaskState,
    Usage,
)
from batchrunner.outcomes import Publication
from batchrunner.ports import Store, TenantScope
from tests.contract.worlds import (
    ANA,
    ANY,
    BEN,
    LEASE_S,
    MOMENT,
    NOTHING,
    ONE,
    REJECTED,
    STEPS,
    TWO,
    USAGE,
    World,
    accepted,
    bring_to,
    cuts,
    extent,
    file_of,
    progress,
    shard_in,
)

# -- files and batches -------------------------------------------------------------------------------------------------


def test_file_comes_back_as_it_was_added(world: World) -> None:
    file = replace(file_of("f1"), expires_at=MOMENT + timedelta(days=30))

    world.scope.add_file(file)
    world.scope.add_file(file)

    assert world.scope.file(FileId("f1")) == file


def test_file_id_names_one_file_only(world: World) -> None:
    world.scope.add_file(file_of("f1"))

    with pytest.raises(NameTaken):
        world.scope.add_file(replace(file_of("f1"), blob="other"))


def test_batch_begins_validating_with_all_it_was_given(world: World) -> None:
    world.scope.add_file(file_of("f1"))
    new = world.new(
        input_file_id=FileId("f1"),
        completion_window="24h",
        deadline_at=MOMENT,
        priority=3,
        hold_at=7,
        metadata={"a": "ü"},
        chosen_blob="chosen",
    )

    batch = world.scope.create_batch(new)

    assert batch == world.batch()
    assert {name: getattr(batch, name) for name in NewBatch.__dataclass_fields__} == {
        name: getattr(new, name) for name in NewBatch.__dataclass_fields__
    }
    assert (batch.status, batch.created_at, batch.next_sequence) == (BatchStatus.VALIDATING, world.clock.wall, 1)
    assert (batch.total_count, batch.pending_count, batch.ended_by, batch.problems) == (0, 0, None, ())


def test_create_batch_repeated_makes_no_second_task(world: World) -> None:
    first = world.created()

    assert world.created() == first

    world.claim(kinds=(TaskKind.VALIDATE,))
    assert world.claims_nothing()


def test_batches_are_listed_newest_first_in_pages(world: World) -> None:
    for number in range(5):
        world.created(f"b{number}")

    page = world.scope.batches(limit=2)
    rest = world.scope.batches(limit=10, after=page[-1].id)

    assert [each.id for each in page] == ["b4", "b3"]
    assert [each.id for each in rest] == ["b2", "b1", "b0"]
    with pytest.raises(NotFound):
        world.scope.batches(limit=1, after=BatchId("nobody"))


@pytest.mark.parametrize(
    "call",
    [
        lambda scope: scope.file(FileId("f1")),
        lambda scope: scope.batch(BatchId("b1")),
        lambda scope: scope.batches(limit=1, after=BatchId("b1")),
        lambda scope: scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED),
        lambda scope: scope.pause(BatchId("b1"), "operator"),
        lambda scope: scope.resume(BatchId("b1")),
        lambda scope: scope.adjust(BatchId("b1"), hold_at=0, order=Order.INPUT),
        lambda scope: scope.extents(BatchId("b1")),
        lambda scope: scope.shards(BatchId("b1")),
    ],
)
def test_another_tenants_rows_are_like_missing_ones(world: World, call: Callable[[TenantScope], object]) -> None:
    world.scope.add_file(file_of("f1"))
    world.running()
    before = world.backend.dump()

    with pytest.raises(NotFound):
        call(world.store.scope(BEN))

    assert world.store.scope(BEN).batches(limit=10) == []
    assert world.backend.dump() == before


def test_batch_cannot_be_made_from_what_another_tenant_owns(world: World) -> None:
    world.scope.add_file(file_of("f1"))
    world.created("parent")
    ben = world.store.scope(BEN)
    before = world.backend.dump()

    for wish in ({"input_file_id": FileId("f1")}, {"parent_id": BatchId("parent")}):
        with pytest.raises(NotFound):
            ben.create_batch(world.new("mine", tenant=BEN, **wish))
    with pytest.raises(NameTaken):
        ben.create_batch(world.new("parent", tenant=BEN))

    assert world.backend.dump() == before


# -- validation --------------------------------------------------------------------------------------------------------


def test_accept_input_puts_shards_and_counts_in_place(world: World) -> None:
    world.created()
    claim = world.claim(kinds=ANY)
    given = replace(accepted(shards=3, refused=2), problems=REJECTED.problems, problem_count=2, problems_blob="p")
    skipping = replace_cut(given.shards[0], skipped=(4, 9))

    assert world.store.accept_input(claim.ref, replace(given, shards=(skipping, *given.shards[1:])))

    batch = world.batch()
    assert (batch.status, batch.in_progress_at, batch.model) == (BatchStatus.IN_PROGRESS, world.clock.wall, "m")
    assert (batch.total_count, batch.refused_count, batch.open_shards) == (32, 2, 3)
    assert (batch.done_count, batch.pending_count) == (2, 30)
    assert (batch.problems, batch.problem_count, batch.problems_blob) == (REJECTED.problems, 2, "p")
    assert [(shard.first_line, shard.skipped, shard.state) for shard in world.shards()] == [
        (1, (4, 9), TaskState.QUEUED),
        (11, (), TaskState.QUEUED),
        (21, (), TaskState.QUEUED),
    ]


def replace_cut(cut: ShardCut, **changes) -> ShardCut:
    return ShardCut(**{name: changes.get(name, getattr(cut, name)) for name in ShardCut.__struct_fields__})


def test_accept_input_repeated_changes_nothing(world: World) -> None:
    world.created()
    claim = world.claim(kinds=ANY)
    world.store.accept_input(claim.ref, accepted())
    before = world.backend.dump()

    assert world.store.accept_input(claim.ref, accepted())

    assert world.backend.dump() == before


@pytest.mark.parametrize("shards", [(), (ShardCut(0, 100, 1, 0, 0, 7, (1, 2)),)])
def test_input_without_a_line_to_run_goes_on_to_its_seal(world: World, shards) -> None:
    world.created()
    claim = world.claim(kinds=ANY)

    assert world.store.accept_input(claim.ref, replace(accepted(lines=0, refused=2), shards=shards))

    batch = world.batch()
    assert (batch.status, batch.ended_by, batch.total_count) == (BatchStatus.FINALIZING, EndedBy.SETTLED, 2)
    assert (batch.in_progress_at, batch.version) == (world.clock.wall, 3)
    assert world.store.publish(world.claim(kinds=ANY).ref, NOTHING).status is BatchStatus.COMPLETED


def test_reject_input_fails_the_batch_and_announces_it(world: World) -> None:
    world.created()
    claim = world.claim(kinds=ANY)

    assert world.store.reject_input(claim.ref, REJECTED)
    assert world.store.reject_input(claim.ref, REJECTED)

    batch = world.batch()
    assert (batch.status, batch.failed_at, batch.total_count) == (BatchStatus.FAILED, world.clock.wall, 0)
    assert (batch.problems, batch.problem_count) == (REJECTED.problems, 1)
    assert world.backend.dump().count('"type":"batch.failed"') == 1
    assert world.claims_nothing()


@pytest.mark.parametrize("ends", [BatchEvent.CANCEL_REQUESTED, BatchEvent.DEADLINE_PASSED])
def test_batch_that_ended_while_validating_keeps_counts_of_zero(world: World, ends: BatchEvent) -> None:
    world.created()
    claim = world.claim(kinds=ANY)
    world.scope.send(BatchId("b1"), ends)
    seen = world.batch()

    assert world.claims_nothing(TWO), "the validator still holds its lease"
    assert not world.store.accept_input(claim.ref, accepted())

    assert world.batch() == seen
    assert world.shards() == []
    seal = world.claim(TWO, kinds=ANY)
    assert (seal.kind, world.store.fence(seal.ref)) == (TaskKind.SEAL, [])
    over = world.store.publish(seal.ref, NOTHING)
    assert over.status is (BatchStatus.CANCELLED if ends is BatchEvent.CANCEL_REQUESTED else BatchStatus.EXPIRED)
    assert over.total_count == 0


def test_reject_input_of_a_moved_batch_settles_the_task_only(world: World) -> None:
    world.created()
    claim = world.claim(kinds=ANY)
    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)
    seen = world.batch()

    assert not world.store.reject_input(claim.ref, REJECTED)

    assert world.batch() == seen
    assert world.claim(kinds=ANY).kind is TaskKind.SEAL


# -- moves -------------------------------------------------------------------------------------------------------------


def test_send_refuses_what_the_table_lacks_and_changes_nothing(world: World) -> None:
    world.created()
    before = world.backend.dump()

    with pytest.raises(TransitionRefused):
        world.scope.send(BatchId("b1"), BatchEvent.SEALED_WHOLE)

    assert world.backend.dump() == before


@pytest.mark.parametrize("status", list(BatchStatus))
def test_cancel_in_each_status(world: World, status: BatchStatus) -> None:
    bring_to(world, status)
    seen = world.batch()
    assert seen.status is status
    before = world.backend.dump()

    if status in TERMINAL or status is BatchStatus.CANCELLING:
        with pytest.raises(TransitionRefused):
            world.scope.send(seen.id, BatchEvent.CANCEL_REQUESTED)
        assert world.backend.dump() == before
        return
    assert world.scope.send(seen.id, BatchEvent.CANCEL_REQUESTED)

    batch = world.batch()
    was_finalizing = status is BatchStatus.FINALIZING
    assert (batch.status, batch.version) == (BatchStatus.CANCELLING, seen.version + 1)
    assert batch.cancelling_at == world.clock.wall
    assert batch.ended_by is (EndedBy.SETTLED if was_finalizing else EndedBy.CANCEL)
    seal = world.claim(kinds=ANY)
    assert seal.kind is TaskKind.SEAL
    assert world.claims_nothing(TWO), "there is one seal task"
    rest = batch.pending_count
    over = world.store.publish(seal.ref, replace(NOTHING, cancelled_count=rest))
    assert (over.status, over.pending_count, over.cancelled_count) == (BatchStatus.CANCELLED, 0, rest)


@pytest.mark.parametrize("status", [each for each in BatchStatus if each not in TERMINAL])
def test_operator_gives_up_a_batch_in_any_status_and_its_data_stays(world: World, status: BatchStatus) -> None:
    if status is BatchStatus.VALIDATING:
        world.created()
    else:
        world.running(shards=2)
        done = world.claim()
        world.store.settle(done.ref, progress(done, 0, 100, succeeded=10))
    if status in SEALING:
        event = BatchEvent.CANCEL_REQUESTED if status is BatchStatus.CANCELLING else BatchEvent.DEADLINE_PASSED
        world.scope.send(BatchId("b1"), event)
        world.store.fence(world.claim(TWO, kinds=(TaskKind.SEAL,)).ref)
    assert world.batch().status is status
    extents = world.extents()

    assert world.scope.send(BatchId("b1"), BatchEvent.GAVE_UP)

    batch = world.batch()
    assert (batch.status, batch.failed_at) == (BatchStatus.FAILED, world.clock.wall)
    assert [problem.code for problem in batch.problems] == ["internal_error"]
    assert batch.problem_count == 1
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert world.extents() == extents
    assert world.claims_nothing(kinds=ANY)
    assert world.claims_nothing(TWO, kinds=ANY)
    assert '"type":"batch.failed"' in world.backend.dump()
    with pytest.raises(TransitionRefused):
        world.scope.send(BatchId("b1"), BatchEvent.GAVE_UP)


def test_gave_up_ends_every_task_and_fences_its_holders(world: World) -> None:
    world.running(shards=2)
    held = world.claim()

    world.scope.send(BatchId("b1"), BatchEvent.GAVE_UP)

    before = world.backend.dump()
    with pytest.raises(Fenced):
        world.store.register(held.ref, progress(held, 0, 10))
    with pytest.raises(Fenced):
        world.store.settle(held.ref, Progress())
    assert world.claims_nothing(TWO)
    assert world.backend.dump() == before
    assert [held.is_mine for held in world.store.watch(ONE).held] == [False]


# -- claims ------------------------------------------------------------------------------------------------------------


def test_claim_gives_all_that_its_holder_needs(world: World) -> None:
    world.running(shards=2)

    claim = world.claim()

    assert (claim.kind, claim.session, claim.ref.epoch) == (TaskKind.SHARD, ONE, 1)
    assert claim.batch == world.batch()
    assert claim.shard == world.shards()[0]
    assert (claim.earlier, claim.extents, claim.attempts, claim.orphaned_by_death) == ((), (), 0, False)


def test_claim_lists_earlier_claims_and_extents(world: World) -> None:
    world.running()
    first = world.claim()
    world.store.give_back(first.ref, progress(first, 0, 40, succeeded=4))
    second = world.claim(TWO)
    world.store.give_back(second.ref, progress(second, 0, 10, failed=1, succeeded=0))

    third = world.claim()

    assert third.ref == TaskRef(task_id=first.ref.task_id, epoch=3)
    assert third.earlier == ((1, ONE), (2, TWO))
    assert [(each.epoch, each.session, each.sequence_from, each.count) for each in third.extents] == [
        (1, ONE, 1, 4),
        (2, TWO, 5, 1),
    ]
    assert third.extents == tuple(world.extents())


def test_claim_order_is_steps_then_batches_not_held_then_priority_then_deadline_then_first_line(world: World) -> None:
    day = timedelta(days=1)
    world.running("late", shards=2, deadline_at=world.clock.wall + 2 * day)
    world.running("soon", deadline_at=world.clock.wall + day)
    world.running("never", shards=2)
    world.running("vip", priority=1)
    world.created("step")

    order = [(claim.batch.id, shard_in(claim).first_line if claim.shard else 0) for claim in claims_all(world)]

    assert order == [("step", 0), ("vip", 1), ("soon", 1), ("late", 1), ("never", 1), ("late", 11), ("never", 11)]


def claims_all(world: World) -> list[Claim]:
    found = []
    while (claim := world.store.claim(ONE, lease_s=LEASE_S, kinds=ANY)) is not None:
        found.append(claim)
    return found


def test_claim_takes_only_the_kinds_asked_for(world: World) -> None:
    world.running("running")
    world.created("fresh")

    assert world.claims_nothing(kinds=(TaskKind.SEAL,))
    assert world.claims_nothing(kinds=())
    assert world.claim(kinds=(TaskKind.SHARD,)).kind is TaskKind.SHARD
    assert world.claim(kinds=(TaskKind.VALIDATE,)).kind is TaskKind.VALIDATE


def test_claim_leaves_paused_batches_until_resume(world: World) -> None:
    world.running()
    world.scope.pause(BatchId("b1"), "operator")

    assert world.claims_nothing()
    assert (world.batch().paused_reason, world.batch().paused_at) == ("operator", world.clock.wall)

    world.scope.resume(BatchId("b1"))
    assert world.claim().batch.paused_reason is None


def test_a_breakers_pause_does_not_replace_an_operators(world: World) -> None:
    world.running()
    world.scope.pause(BatchId("b1"), "authentication")
    world.scope.pause(BatchId("b1"), "operator")
    world.scope.pause(BatchId("b1"), "authentication")

    assert world.batch().paused_reason == "operator"


def test_claim_leaves_shards_beyond_the_hold(world: World) -> None:
    world.running(shards=3)
    world.scope.adjust(BatchId("b1"), hold_at=11, order=Order.INPUT)

    assert [shard_in(world.claim()).first_index, shard_in(world.claim()).first_index] == [0, 10]
    assert world.claims_nothing()

    world.scope.adjust(BatchId("b1"), hold_at=None, order=Order.INPUT)
    assert shard_in(world.claim()).first_index == 20


def test_order_may_change_while_a_batch_is_not_over(world: World) -> None:
    world.running()

    world.scope.adjust(BatchId("b1"), hold_at=None, order=Order.COMPLETION)

    assert world.batch().order is Order.COMPLETION


def test_adjust_leaves_a_batch_that_is_over(world: World) -> None:
    world.running()
    world.scope.send(BatchId("b1"), BatchEvent.GAVE_UP)

    world.scope.adjust(BatchId("b1"), hold_at=3, order=Order.COMPLETION)

    assert (world.batch().hold_at, world.batch().order) == (None, Order.INPUT)


def test_live_lease_is_not_taken_and_a_dead_one_is(world: World) -> None:
    world.running()
    first = world.claim()

    world.clock.advance(LEASE_S)
    assert world.claims_nothing(TWO)

    world.clock.advance(0.1)
    assert world.claims_nothing(ONE), "nobody takes from itself: it may renew"
    second = world.claim(TWO)
    assert second.ref == TaskRef(task_id=first.ref.task_id, epoch=2)
    assert (second.orphaned_by_death, shard_in(second).deaths) == (True, 1)


def test_renewal_keeps_a_lease_and_revives_one_that_ran_out(world: World) -> None:
    world.running()
    world.claim()
    renewer = world.store.renewer()

    world.clock.advance(LEASE_S + 60)
    renewer.renew(ONE, LEASE_S)
    world.clock.advance(LEASE_S)

    assert world.claims_nothing(TWO)
    renewer.close()


def test_renewal_cannot_take_a_task_back(world: World) -> None:
    world.running()
    world.claim(ONE)
    world.clock.advance(LEASE_S + 1)
    world.claim(TWO)
    renewer = world.store.renewer()

    renewer.renew(ONE, 1000)
    renewer.close()

    world.clock.advance(LEASE_S + 1)
    assert world.claim(ONE).ref.epoch == 3


def test_new_process_waits_before_it_takes_leases_that_ran_out(world: World) -> None:
    """After an outage all leases have run out: whoever is back first gives the others time to renew."""
    world.running(shards=2)
    world.claim(ONE)
    world.clock.advance(LEASE_S + 1)
    other = world.backend.open()

    queued = other.claim(TWO, lease_s=LEASE_S, kinds=ANY)
    early = other.claim(TWO, lease_s=LEASE_S, kinds=ANY)
    world.clock.advance(5.0)
    late = other.claim(TWO, lease_s=LEASE_S, kinds=ANY)

    assert queued is not None
    assert early is None
    assert late is not None


def test_host_that_slept_waits_before_it_takes_leases(world: World) -> None:
    world.running()
    world.claim(ONE)
    world.clock.suspend(8 * 3600)

    assert world.claims_nothing(TWO)

    world.clock.advance(5.0)
    assert world.claim(TWO).ref.epoch == 2


def test_lease_of_another_boot_is_over_and_no_death(world: World, clock) -> None:
    world.running()
    world.claim(ONE)
    clock.reboot()
    store = world.backend.open()

    claim = store.claim(TWO, lease_s=LEASE_S, kinds=ANY)

    assert claim is not None
    assert (claim.ref.epoch, shard_in(claim).deaths, claim.orphaned_by_death) == (2, 0, False)


@pytest.mark.parametrize("died", [True, False])
def test_release_session_puts_its_tasks_back_at_once(world: World, died: bool) -> None:
    world.running(shards=2)
    world.created("b2")
    for _ in range(3):
        world.claim(ONE, kinds=ANY)
    other = world.backend.open()

    assert other.release_session(ONE, died=died) == 3
    assert other.release_session(ONE, died=died) == 0
    assert other.sessions(host="here") == [TWO]

    step, *shards = [other.claim(TWO, lease_s=LEASE_S, kinds=ANY) for _ in range(3)]
    assert step.kind is TaskKind.VALIDATE
    assert [(shard_in(each).deaths, each.orphaned_by_death) for each in shards] == [(int(died), died)] * 2


def test_deaths_add_up_until_a_line_is_registered(world: World) -> None:
    world.running()
    for number in range(3):
        session = SessionId(f"s{number}")
        world.store.open_session(session, host="here", pid=1)
        assert shard_in(world.claim(session)).deaths == number
        world.store.release_session(session, died=True)
    claim = world.claim()
    assert (shard_in(claim).deaths, claim.orphaned_by_death) == (3, True)

    world.store.register(claim.ref, Progress(intent_mark=4))
    assert world.shards()[0].deaths == 3
    world.store.register(claim.ref, progress(claim, 0, 10))

    assert world.shards()[0].deaths == 0
    world.store.give_back(claim.ref, Progress())
    assert not world.claim().orphaned_by_death


def test_takeover_of_a_session_nobody_knows_is_no_death(world: World) -> None:
    world.running()
    world.claim(SessionId("stranger"))
    world.clock.advance(LEASE_S + 1)

    claim = world.claim(ONE)

    assert (shard_in(claim).deaths, claim.orphaned_by_death) == (0, False)


def test_threads_and_processes_claim_distinct_tasks(world: World) -> None:
    world.running(shards=60)
    stores = [world.store, world.backend.open()]
    start = threading.Barrier(6)

    def work(number: int) -> list[int]:
        start.wait()
        found = []
        while (claim := stores[number % 2].claim(ONE, lease_s=LEASE_S, kinds=ANY)) is not None:
            found.append(claim.ref.task_id)
        return found

    with ThreadPoolExecutor(6) as pool:
        claimed = [task for part in pool.map(work, range(6)) for task in part]

    assert len(claimed) == 60
    assert len(set(claimed)) == 60


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_sessions_are_known_by_host(world: World) -> None:
    world.store.open_session(SessionId("far"), host="there", pid=2)
    world.store.open_session(SessionId("far"), host="there", pid=2)

    assert world.store.sessions(host="here") == [ONE, TWO]
    assert world.store.sessions(host="there") == ["far"]


def test_watch_tells_what_is_held_and_what_was_taken(world: World) -> None:
    world.running(shards=3)
    kept, lost = world.claim(), world.claim()
    world.clock.advance(LEASE_S + 1)
    renewer = world.store.renewer()
    assert world.claim(TWO).ref.task_id == kept.ref.task_id
    renewer.renew(ONE, LEASE_S)
    renewer.close()
    world.scope.adjust(BatchId("b1"), hold_at=5, order=Order.INPUT)
    world.scope.pause(BatchId("b1"), "operator")

    seen = {held.task_id: held for held in world.store.watch(ONE).held}

    assert {task: held.is_mine for task, held in seen.items()} == {kept.ref.task_id: False, lost.ref.task_id: True}
    assert {(held.status, held.paused_reason, held.hold_at) for held in seen.values()} == {
        (BatchStatus.IN_PROGRESS, "operator", 5)
    }


def test_watch_shows_a_cancel_to_the_holder(world: World) -> None:
    world.running()
    world.claim()

    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)

    assert [held.status for held in world.store.watch(ONE).held] == [BatchStatus.CANCELLING]


def test_watch_without_tasks_still_tells_hunger_of_others(world: World) -> None:
    assert world.store.watch(ONE).held == ()
    world.store.set_hungry(ONE, is_hungry=True)
    assert not world.store.watch(ONE).is_anyone_hungry
    assert world.store.watch(TWO).is_anyone_hungry

    world.store.set_hungry(ONE, is_hungry=False)
    assert not world.store.watch(TWO).is_anyone_hungry
    world.store.set_hungry(ONE, is_hungry=True)
    world.store.release_session(ONE, died=True)
    assert not world.store.watch(TWO).is_anyone_hungry


# -- registering -------------------------------------------------------------------------------------------------------


def test_register_moves_shard_and_batch_by_the_same_difference(world: World) -> None:
    world.running()
    claim = world.claim()
    both = (extent(ONE, 0, 30, succeeded=3), extent(ONE, 0, 20, succeeded=1, failed=1, segment=2))

    world.store.register(claim.ref, Progress(extents=both, re_executed_count=2, retry_count=5, intent_mark=8))

    batch = world.batch()
    assert (batch.succeeded_count, batch.failed_count, batch.pending_count, batch.next_sequence) == (4, 1, 5, 6)
    assert (batch.usage, batch.re_executed_count, batch.retry_count) == (USAGE + USAGE, 2, 5)
    assert [(each.sequence_from, each.count, each.segment, each.byte_end) for each in world.extents()] == [
        (1, 3, 1, 30),
        (4, 2, 2, 20),
    ]
    assert world.shards()[0].intent_mark == 8
    assert batch.version == 2, "progress is no status move"


def test_contiguous_bytes_grow_the_last_extent(world: World) -> None:
    world.running()
    claim = world.claim()
    world.store.register(claim.ref, progress(claim, 0, 10))
    two = (extent(ONE, 10, 30, succeeded=2), extent(ONE, 30, 40, failed=1, succeeded=0))

    world.store.register(claim.ref, Progress(extents=two))

    (grown,) = world.extents()
    assert (grown.sequence_from, grown.count, grown.byte_start, grown.byte_end) == (1, 4, 0, 40)
    assert (grown.succeeded_count, grown.failed_count) == (3, 1)
    assert grown.usage == USAGE + USAGE + USAGE == world.batch().usage


def test_an_extent_does_not_grow_over_anothers_numbers_a_gap_or_a_new_epoch(world: World) -> None:
    world.running(shards=2)
    one, two = world.claim(ONE), world.claim(TWO)
    world.store.register(one.ref, progress(one, 0, 10))
    world.store.register(two.ref, progress(two, 0, 10))
    world.store.register(one.ref, progress(one, 10, 20))
    world.store.register(one.ref, progress(one, 25, 30))
    world.store.give_back(one.ref, Progress())
    again = world.claim(ONE)
    world.store.register(again.ref, progress(again, 30, 40))

    rows = [(each.sequence_from, each.epoch, each.session, each.byte_start, each.byte_end) for each in world.extents()]
    assert rows == [
        (1, 1, ONE, 0, 10),
        (2, 1, TWO, 0, 10),
        (3, 1, ONE, 10, 20),
        (4, 1, ONE, 25, 30),
        (5, 2, ONE, 30, 40),
    ]


def test_bytes_without_a_result_take_no_number(world: World) -> None:
    world.running()
    claim = world.claim()
    marks = extent(ONE, 0, 10, succeeded=0)

    world.store.register(claim.ref, Progress(extents=(replace(marks, usage=Usage()), extent(ONE, 10, 20))))
    world.store.register(claim.ref, Progress(extents=(replace(marks, usage=Usage(), byte_start=20, byte_end=30),)))

    assert [(each.sequence_from, each.count, each.byte_start, each.byte_end) for each in world.extents()] == [
        (1, 1, 10, 30)
    ]
    assert world.batch().next_sequence == 2


@pytest.mark.parametrize("verb", ["register", "settle"])
def test_registering_the_same_bytes_again_changes_nothing(world: World, verb: str) -> None:
    """A commit whose answer was lost is repeated."""
    world.running(shards=2)
    claim = world.claim()
    done = replace(progress(claim, 0, 100, succeeded=10), retry_count=1, re_executed_count=1)
    getattr(world.store, verb)(claim.ref, done)
    before = world.backend.dump()

    getattr(world.store, verb)(claim.ref, done)

    assert world.backend.dump() == before


def test_bytes_in_two_extents_are_loud_and_change_nothing(world: World) -> None:
    world.running()
    claim = world.claim()
    world.store.register(claim.ref, progress(claim, 0, 20))
    before = world.backend.dump()

    with pytest.raises(ReconciliationError):
        world.store.register(claim.ref, progress(claim, 10, 30))

    assert world.backend.dump() == before


def test_settled_shard_takes_no_more_results(world: World) -> None:
    world.running(shards=2)
    claim = world.claim()
    world.store.settle(claim.ref, progress(claim, 0, 10))
    before = world.backend.dump()

    for verb in (world.store.register, world.store.settle, world.store.give_back):
        with pytest.raises(Fenced):
            verb(claim.ref, progress(claim, 10, 20))

    assert world.backend.dump() == before


def test_sequence_is_gapless_under_many_shards_and_threads(world: World) -> None:
    world.running(shards=12)
    stores = [world.store, world.backend.open()]

    def work(number: int) -> int:
        store, session = stores[number % 2], SessionId(f"s{number}")
        moved = 0
        while (claim := store.claim(session, lease_s=LEASE_S, kinds=(TaskKind.SHARD,))) is not None:
            for start in range(0, 80, 20):
                store.register(claim.ref, progress(claim, start, start + 20, succeeded=2))
            moved += store.settle(claim.ref, progress(claim, 80, 100, failed=2, succeeded=0))
        return moved

    with ThreadPoolExecutor(4) as pool:
        moved = sum(pool.map(work, range(4)))

    batch, extents = world.batch(), world.extents()
    assert moved == 1
    assert (batch.status, batch.succeeded_count, batch.failed_count) == (BatchStatus.FINALIZING, 96, 24)
    following = 1
    for each in extents:
        assert each.sequence_from == following
        following += each.count
    assert following == batch.next_sequence == 121


def test_extents_are_read_from_any_number_on(world: World) -> None:
    world.running(shards=3)
    for claim in claims_all(world):
        world.store.register(claim.ref, progress(claim, 0, 30, succeeded=3))

    def firsts(**page) -> list[int]:
        return [each.sequence_from for each in world.extents(**page)]

    assert firsts() == firsts(after=2) == [1, 4, 7]
    assert firsts(after=3) == firsts(after=5) == [4, 7]
    assert firsts(after=8) == [7]
    assert firsts(after=9) == []
    assert firsts(after=1, limit=2) == [1, 4]


# -- the ways out of a holder's hands ----------------------------------------------------------------------------------


GUARDED: dict[str, Callable[[Store, TaskRef], object]] = {
    "register": lambda store, ref: store.register(ref, Progress(extents=(extent(ONE, 0, 10),))),
    "settle": lambda store, ref: store.settle(ref, Progress(extents=(extent(ONE, 0, 10),))),
    "give_back": lambda store, ref: store.give_back(ref, Progress()),
    "fail_task": lambda store, ref: store.fail_task(ref, "no", progressed=False),
    "split": lambda store, ref: store.split(ref, *cuts(shards=2, lines=5)),
    "quarantine": lambda store, ref: store.quarantine(ref),
    "accept_input": lambda store, ref: store.accept_input(ref, accepted()),
    "reject_input": lambda store, ref: store.reject_input(ref, REJECTED),
    "fence": lambda store, ref: store.fence(ref),
    "salvage_sealed": lambda store, ref: store.salvage_sealed(ref, ref, Progress()),
    "repair_sealed": lambda store, ref: store.repair_sealed(ref, []),
    "publish": lambda store, ref: store.publish(ref, NOTHING),
    "block": lambda store, ref: store.block(ref, "disk_full"),
}
KIND_OF = {
    "accept_input": "validate",
    "reject_input": "validate",
    "fence": "seal",
    "salvage_sealed": "seal",
    "repair_sealed": "seal",
    "publish": "seal",
}


@pytest.mark.parametrize("verb", sorted(GUARDED))
def test_stale_epoch_is_fenced_without_any_effect(world: World, verb: str) -> None:
    match KIND_OF.get(verb, "shard"):
        case "validate":
            world.created()
            claim = world.claim(kinds=ANY)
        case "seal":
            claim = world.sealing()
        case _:
            world.running(shards=2)
            claim = world.claim()
    world.clock.advance(LEASE_S + 1)
    assert world.claim(TWO, kinds=(claim.kind,)).ref == TaskRef(task_id=claim.ref.task_id, epoch=claim.ref.epoch + 1)
    before = world.backend.dump()

    with pytest.raises(Fenced):
        GUARDED[verb](world.store, claim.ref)

    assert world.backend.dump() == before


def test_every_guarded_method_of_the_contract_is_tried() -> None:
    promised = {
        name
        for name, method in vars(Store).items()
        if callable(method) and (method.__doc__ or "").startswith("Guarded")
    }

    assert promised == set(GUARDED)


def test_settles_interleaved_move_the_batch_once(world: World) -> None:
    world.running(shards=2)
    one, two = world.claim(ONE), world.claim(TWO)
    other = world.backend.open()

    world.store.register(one.ref, progress(one, 0, 50, succeeded=5))
    other.register(two.ref, progress(two, 0, 50, succeeded=5))
    first = world.store.settle(one.ref, progress(one, 50, 100, succeeded=5))
    between = world.batch()
    second = other.settle(two.ref, progress(two, 50, 100, succeeded=5))

    assert (first, between.status, between.open_shards) == (False, BatchStatus.IN_PROGRESS, 1)
    batch = world.batch()
    assert (second, batch.status, batch.ended_by, batch.open_shards) == (
        True,
        BatchStatus.FINALIZING,
        EndedBy.SETTLED,
        0,
    )
    assert batch.finalizing_at == world.clock.wall
    assert world.claim(kinds=ANY).kind is TaskKind.SEAL
    assert world.claims_nothing(TWO)


def test_settle_in_another_status_sends_no_event(world: World) -> None:
    world.running()
    claim = world.claim()
    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)

    assert not world.store.settle(claim.ref, progress(claim, 0, 100, succeeded=10))

    batch = world.batch()
    assert (batch.status, batch.open_shards, batch.succeeded_count) == (BatchStatus.CANCELLING, 0, 10)


def test_give_back_keeps_results_and_counts_nothing(world: World) -> None:
    world.running()
    claim = world.claim()
    world.store.fail_task(claim.ref, "once", progressed=False)
    world.clock.advance(1)
    claim = world.claim()

    world.store.give_back(claim.ref, Progress())

    again = world.claim(TWO)
    assert (again.attempts, shard_in(again).deaths, again.orphaned_by_death) == (1, 0, False)


def test_give_back_of_a_whole_progress_is_remembered_until_the_next(world: World) -> None:
    world.running()
    first = world.claim()
    assert first.whole_epoch == 0

    world.store.give_back(first.ref, Progress(is_whole=True, re_executed_count=3))
    second = world.claim(TWO)
    world.store.give_back(second.ref, Progress())
    third = world.claim()

    assert (second.whole_epoch, third.whole_epoch) == (first.ref.epoch, first.ref.epoch)
    assert world.batch().re_executed_count == 3


def test_only_a_whole_progress_lowers_the_intent(world: World) -> None:
    world.running()
    claim = world.claim()
    world.store.register(claim.ref, Progress(intent_mark=8))

    world.store.register(claim.ref, Progress(intent_mark=5))
    kept = world.shards()[0].intent_mark
    world.store.give_back(claim.ref, Progress(intent_mark=3))
    still = world.shards()[0].intent_mark
    claim = world.claim()
    world.store.give_back(claim.ref, Progress(is_whole=True, intent_mark=3))

    assert (kept, still, world.shards()[0].intent_mark) == (8, 8, 3)


def test_failed_task_backs_off_doubling_up_to_five_minutes(world: World) -> None:
    world.running()
    waits = []
    for _ in range(9):
        claim = world.claim()
        assert not world.store.fail_task(claim.ref, "boom", progressed=False)
        waited = 0
        while world.claims_nothing():
            world.clock.advance(1)
            waited += 1
        waits.append(waited)
        world.store.give_back(TaskRef(task_id=claim.ref.task_id, epoch=claim.ref.epoch + 1), Progress())

    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_tenth_failure_parks_the_task_until_resume(world: World) -> None:
    world.running()
    parked = fail_until_parked(world, (TaskKind.SHARD,))

    assert parked == [False] * 9 + [True]
    assert world.batch().blocked_by == "boom"
    world.clock.advance(1000)
    assert world.claims_nothing()
    assert world.shards()[0].state is TaskState.PARKED

    world.scope.resume(BatchId("b1"))

    claim = world.claim()
    assert (claim.attempts, claim.batch.blocked_by) == (0, None)


def test_hopeless_failure_parks_at_once(world: World) -> None:
    world.running()
    claim = world.claim()

    is_parked = world.store.fail_task(claim.ref, "boom", progressed=False, is_hopeless=True)

    assert is_parked
    assert world.batch().blocked_by == "boom"
    assert world.shards()[0].state is TaskState.PARKED


def fail_until_parked(world: World, kinds) -> list[bool]:
    parked = []
    for _ in range(10):
        claim = world.claim(kinds=kinds)
        parked.append(world.store.fail_task(claim.ref, "boom", progressed=False))
        world.clock.advance(301)
    return parked


def test_progress_sets_the_count_of_failures_back(world: World) -> None:
    world.running(lines=100)
    for number in range(25):
        claim = world.claim()
        if number % 5 == 0:
            world.store.register(claim.ref, progress(claim, 0, 10))
        assert not world.store.fail_task(claim.ref, "boom", progressed=number % 7 == 0)
        world.clock.advance(301)

    assert world.claim().attempts <= 5


def test_cancel_of_a_batch_with_a_parked_shard_can_be_sealed(world: World) -> None:
    world.running()
    fail_until_parked(world, (TaskKind.SHARD,))

    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)

    assert world.batch().blocked_by is None
    seal = world.claim(kinds=STEPS)
    assert [shard_in(claim).state for claim in world.store.fence(seal.ref)] == [TaskState.SEALED]


def test_parked_seal_stays_shown_when_only_the_word_changes(world: World) -> None:
    seal = world.sealing()
    world.store.give_back(seal.ref, Progress())
    fail_until_parked(world, STEPS)

    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)

    assert world.batch().blocked_by == "boom"
    assert world.claims_nothing()
    world.scope.resume(BatchId("b1"))
    assert world.claim(kinds=ANY).kind is TaskKind.SEAL


def test_block_shows_and_clears_a_reason(world: World) -> None:
    seal = world.sealing()

    world.store.block(seal.ref, "disk_full")
    assert world.batch().blocked_by == "disk_full"

    world.store.block(seal.ref, None)
    assert world.batch().blocked_by is None


def test_split_queues_the_tail_as_a_shard_of_its_own(world: World) -> None:
    world.running(shards=1, lines=10)
    claim = world.claim()
    head = ShardCut(0, 40, 1, 0, 4, 11, (2,))
    tail = ShardCut(40, 100, 6, 4, 6, 12, (7, 8))

    world.store.split(claim.ref, head, tail)
    world.store.split(claim.ref, head, tail)

    assert world.batch().open_shards == 2
    first, second = world.shards()
    assert (first.task_id, first.byte_end, first.line_count, first.checksum, first.skipped) == (
        claim.ref.task_id,
        40,
        4,
        11,
        (2,),
    )
    taken = world.claim(TWO)
    assert taken.shard == replace(second, state=TaskState.LEASED, epoch=1)
    assert (second.byte_start, second.byte_end, second.first_line, second.first_index) == (40, 100, 6, 4)
    assert not world.store.settle(claim.ref, progress(claim, 0, 40, succeeded=4))
    assert world.store.settle(taken.ref, progress(taken, 0, 60, succeeded=6))


def test_split_that_loses_or_doubles_a_line_is_refused(world: World) -> None:
    world.running()
    claim = world.claim()
    head, tail = ShardCut(0, 40, 1, 0, 4, 11), ShardCut(40, 100, 5, 4, 6, 12)
    before = world.backend.dump()

    for wrong in ({"byte_start": 41}, {"byte_end": 99}, {"line_count": 5}, {"first_index": 5}):
        with pytest.raises(ReconciliationError):
            world.store.split(claim.ref, head, replace_cut(tail, **wrong))

    assert world.backend.dump() == before


def test_quarantined_shard_is_claimed_only_when_asked_for(world: World) -> None:
    world.running(shards=2)
    world.claim(ONE)
    world.store.release_session(ONE, died=True)
    claim = world.claim(TWO)
    assert shard_in(claim).deaths == 1

    world.store.quarantine(claim.ref)

    assert shard_in(world.claim(TWO)).first_line == 11
    assert world.claims_nothing(TWO)
    assert world.claims_nothing(TWO, kinds=STEPS, quarantined=True)
    alone = world.claim(TWO, kinds=ANY, quarantined=True)
    assert (alone.ref.task_id, shard_in(alone).is_quarantined, shard_in(alone).deaths) == (claim.ref.task_id, True, 0)


@pytest.mark.parametrize(("on_unknown", "mark"), [(OnUnknown.RETRY, 0), (OnUnknown.FAIL, 8)])
def test_quarantine_begins_with_intents_of_its_own_unless_they_are_promises(
    world: World, on_unknown: OnUnknown, mark: int
) -> None:
    world.running(on_unknown=on_unknown)
    claim = world.claim(ONE)
    world.store.register(claim.ref, Progress(intent_mark=8))

    world.store.quarantine(claim.ref)

    assert shard_in(world.claim(TWO, kinds=ANY, quarantined=True)).intent_mark == mark


def test_quarantine_leaves_steps_alone(world: World) -> None:
    world.created()

    assert world.claims_nothing(kinds=ANY, quarantined=True)


# -- the seal ----------------------------------------------------------------------------------------------------------


def test_seal_waits_for_live_leases_of_shards(world: World) -> None:
    world.running(shards=2)
    holder = world.claim(ONE)
    world.scope.send(BatchId("b1"), BatchEvent.DEADLINE_PASSED)

    assert world.claims_nothing(TWO)
    world.store.give_back(holder.ref, progress(holder, 0, 10))

    assert world.claim(TWO, kinds=ANY).kind is TaskKind.SEAL


def test_seal_does_not_wait_for_a_lease_that_ran_out(world: World) -> None:
    world.running()
    world.claim(ONE)
    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)
    world.clock.advance(LEASE_S + 1)

    assert world.claim(TWO, kinds=ANY).kind is TaskKind.SEAL


def test_fence_freezes_every_shard_and_gives_it_to_the_sealer(world: World) -> None:
    world.running(shards=4)
    done, frozen, parked = world.claim(ONE), world.claim(ONE), world.claim(ONE)
    world.store.settle(done.ref, progress(done, 0, 100, succeeded=10))
    world.store.register(frozen.ref, progress(frozen, 0, 20, succeeded=2))
    world.store.give_back(parked.ref, Progress())
    world.clock.advance(LEASE_S + 1)
    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)
    seal = world.claim(TWO, kinds=ANY)

    fenced = world.store.fence(seal.ref)

    assert [shard_in(claim).first_line for claim in fenced] == [1, 11, 21, 31]
    assert [shard_in(claim).state for claim in fenced] == [TaskState.SEALED] * 4
    assert [claim.ref.epoch for claim in fenced] == [2, 2, 2, 1]
    assert {claim.session for claim in fenced} == {TWO}
    assert [claim.earlier for claim in fenced] == [((1, ONE),), ((1, ONE),), ((1, ONE),), ()]
    assert [sum(each.count for each in claim.extents) for claim in fenced] == [10, 2, 0, 0]
    before = world.backend.dump()
    for old in (done, frozen, parked):
        for verb in (world.store.register, world.store.settle, world.store.give_back):
            with pytest.raises(Fenced):
                verb(old.ref, progress(old, 100, 120))
    assert world.backend.dump() == before
    assert {held.task_id: held.is_mine for held in world.store.watch(ONE).held} == {frozen.ref.task_id: False}


def test_fence_repeated_under_the_same_epoch_bumps_nothing(world: World) -> None:
    seal = world.sealing(shards=2)
    first = world.store.fence(seal.ref)
    before = world.backend.dump()

    assert world.store.fence(seal.ref) == first
    assert world.backend.dump() == before


def test_fence_of_a_next_sealer_shuts_the_former_out(world: World) -> None:
    seal = world.sealing(shards=2)
    old = world.store.fence(seal.ref)
    world.store.salvage_sealed(seal.ref, old[0].ref, Progress())
    world.clock.advance(LEASE_S + 1)
    after = world.claim(TWO, kinds=ANY)
    with pytest.raises(Fenced):
        world.store.salvage_sealed(after.ref, old[1].ref, Progress())

    new = world.store.fence(after.ref)

    assert [shard_in(claim).state for claim in new] == [TaskState.FINAL, TaskState.SEALED]
    assert new[0].earlier == (), "nothing unregistered of a final shard counts any more"
    assert new[1].earlier == ((1, ONE), (2, ONE))
    assert new[1].ref.epoch == old[1].ref.epoch + 1
    for shard in old:
        with pytest.raises(Fenced):
            world.store.salvage_sealed(seal.ref, shard.ref, Progress())
    world.store.salvage_sealed(after.ref, new[0].ref, Progress())
    with pytest.raises(Fenced):
        world.store.salvage_sealed(after.ref, old[1].ref, Progress())
    world.store.salvage_sealed(after.ref, new[1].ref, Progress())
    assert world.store.publish(after.ref, NOTHING).status is BatchStatus.COMPLETED


def test_salvage_registers_under_the_sealers_epoch_and_makes_final(world: World) -> None:
    world.running()
    lost = world.claim(ONE)
    world.store.register(lost.ref, progress(lost, 0, 20, succeeded=2))
    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)
    world.clock.advance(LEASE_S + 1)
    seal = world.claim(TWO, kinds=ANY)
    (shard,) = world.store.fence(seal.ref)
    found = progress(shard, 0, 30, succeeded=3)

    world.store.salvage_sealed(seal.ref, shard.ref, found)

    assert [(each.sequence_from, each.epoch, each.session) for each in world.extents()] == [(1, 1, ONE), (3, 2, TWO)]
    assert (world.batch().succeeded_count, world.shards()[0].state) == (5, TaskState.FINAL)
    before = world.backend.dump()
    world.store.salvage_sealed(seal.ref, shard.ref, found)
    world.store.salvage_sealed(seal.ref, shard.ref, Progress())
    with pytest.raises(Fenced):
        world.store.salvage_sealed(seal.ref, shard.ref, progress(shard, 30, 40))
    assert world.backend.dump() == before


def test_salvage_needs_a_fence(world: World) -> None:
    world.running()
    claim = world.claim()
    world.store.settle(claim.ref, progress(claim, 0, 100, succeeded=10))
    seal = world.claim(kinds=ANY)
    before = world.backend.dump()

    with pytest.raises(Fenced):
        world.store.salvage_sealed(seal.ref, claim.ref, Progress())

    assert world.backend.dump() == before


def test_salvage_of_another_batchs_shard_is_fenced(world: World) -> None:
    ours = world.sealing("b1")
    theirs = world.sealing("b2")
    (shard,) = world.store.fence(theirs.ref)
    before = world.backend.dump()

    with pytest.raises(Fenced):
        world.store.salvage_sealed(ours.ref, shard.ref, Progress())

    assert world.backend.dump() == before


@pytest.mark.parametrize("verb", ["fence", "publish", "salvage_sealed"])
def test_only_a_seal_task_seals(world: World, verb: str) -> None:
    world.running()
    claim = world.claim()
    before = world.backend.dump()

    with pytest.raises(Fenced):
        GUARDED[verb](world.store, claim.ref)

    assert world.backend.dump() == before


# -- damage ------------------------------------------------------------------------------------------------------------


def repair_of(extent: Extent, *, lost: int = 1) -> Repair:
    """The first half of an extent of ten bytes a record stays; the records behind it are damaged, the last ones not."""
    kept = replace(extent, count=2, succeeded_count=2, failed_count=0, byte_end=extent.byte_start + 20)
    rest = extent.count - 2 - lost
    tail = replace(
        extent,
        sequence_from=extent.sequence_from + 2 + lost,
        count=rest,
        succeeded_count=rest - extent.failed_count,
        byte_start=extent.byte_end - rest * 10,
    )
    return Repair(damaged=extent, parts=(kept, replace(tail, usage=Usage(2, 1, 1, 1))))


def test_repair_takes_damage_out_of_extents_and_counts_in_one_transaction_with_what_is_new(world: World) -> None:
    world.running(shards=2)
    lost, other = world.claim(), world.claim(TWO)
    world.store.register(lost.ref, progress(lost, 0, 60, succeeded=5, failed=1))
    world.store.register(other.ref, progress(other, 0, 30, succeeded=3))
    world.store.release_session(ONE, died=True)
    world.store.open_session(ONE, host="here", pid=1)
    taken = world.claim()
    (damaged,) = taken.extents
    repair = repair_of(damaged, lost=2)

    fresh = replace(progress(taken, 0, 10, succeeded=1), repairs=(repair,), re_executed_count=2)
    world.store.register(taken.ref, fresh)

    batch = world.batch()
    assert [(each.sequence_from, each.count) for each in world.extents()] == [(1, 2), (5, 2), (7, 3), (10, 1)]
    assert (batch.succeeded_count, batch.failed_count, batch.re_executed_count) == (7, 1, 2)
    assert batch.succeeded_count == sum(each.succeeded_count for each in world.extents())
    assert batch.failed_count == sum(each.failed_count for each in world.extents())
    assert batch.usage == sum((each.usage for each in world.extents()), Usage())
    assert batch.next_sequence == 11
    before = world.backend.dump()
    world.store.register(taken.ref, fresh)
    assert world.backend.dump() == before, "a repair may be repeated"


def test_repair_of_what_is_not_there_any_more_is_loud_and_changes_nothing(world: World) -> None:
    world.running(shards=2)
    one, two = world.claim(ONE), world.claim(TWO)
    world.store.register(one.ref, progress(one, 0, 60, succeeded=6))
    world.store.register(two.ref, progress(two, 0, 60, succeeded=6))
    mine, other = world.extents()
    before = world.backend.dump()

    for wrong in (repair_of(other), repair_of(replace(mine, byte_end=70))):
        with pytest.raises(ReconciliationError):
            world.store.register(one.ref, Progress(repairs=(wrong,)))

    assert world.backend.dump() == before


def test_settled_batch_with_damage_goes_back_with_the_shards_that_lack_a_line(world: World) -> None:
    seal = world.sealing(shards=2)
    first, second = world.store.fence(seal.ref)
    for shard in (first, second):
        world.store.salvage_sealed(seal.ref, shard.ref, Progress())

    sent_back = world.store.repair_sealed(seal.ref, [(second.ref, [repair_of(second.extents[0])])])

    assert (sent_back.status, sent_back.ended_by) == (BatchStatus.IN_PROGRESS, None)
    assert (sent_back.succeeded_count, sent_back.open_shards, sent_back.re_executed_count) == (19, 1, 1)
    assert [shard.state for shard in world.shards()] == [TaskState.FINAL, TaskState.QUEUED]
    before = world.backend.dump()
    for late in (
        lambda: world.store.repair_sealed(seal.ref, []),
        lambda: world.store.publish(seal.ref, NOTHING),
        lambda: world.store.fence(seal.ref),
    ):
        with pytest.raises(Fenced):
            late()
    assert world.backend.dump() == before
    assert world.store.sweep().moved == ()
    again = world.claim(TWO, kinds=ANY)
    assert (again.ref.task_id, again.whole_epoch) == (second.ref.task_id, second.ref.epoch)
    assert world.store.settle(again.ref, progress(again, 0, 10, succeeded=1))
    resealed = world.claim(TWO, kinds=ANY)
    assert resealed.ref.task_id == seal.ref.task_id
    fenced = world.store.fence(resealed.ref)
    assert [shard_in(claim).state for claim in fenced] == [TaskState.FINAL, TaskState.SEALED]
    world.store.salvage_sealed(resealed.ref, fenced[1].ref, Progress())
    assert world.store.publish(resealed.ref, NOTHING).status is BatchStatus.COMPLETED


def test_repair_of_a_seal_wants_final_shards_of_its_own_batch(world: World) -> None:
    seal = world.sealing(shards=1)
    (shard,) = world.store.fence(seal.ref)
    world.running("b2")
    foreign = world.claim(TWO)
    before = world.backend.dump()

    for ref in (shard.ref, foreign.ref):
        with pytest.raises(Fenced):
            world.store.repair_sealed(seal.ref, [(ref, [])])

    assert world.backend.dump() == before


def test_publish_shows_files_counts_and_status_at_once(world: World) -> None:
    world.running(shards=2)
    claim = world.claim()
    world.store.settle(claim.ref, progress(claim, 0, 100, succeeded=9, failed=1))
    world.scope.send(BatchId("b1"), BatchEvent.DEADLINE_PASSED)
    seal = world.claim(kinds=ANY)
    world.clock.advance(3)

    over = world.store.publish(
        seal.ref, Publication(output=file_of("out"), error=file_of("err"), expired_count=10, cancelled_count=0)
    )

    assert over == world.batch()
    assert (over.status, over.expired_at, over.ended_by) == (BatchStatus.EXPIRED, world.clock.wall, EndedBy.DEADLINE)
    assert (over.output_file_id, over.error_file_id) == ("out", "err")
    assert (over.succeeded_count, over.failed_count, over.expired_count, over.pending_count) == (9, 1, 10, 0)
    assert world.scope.file(FileId("out")) == file_of("out")
    dump = world.backend.dump()
    assert dump.count('"type":"batch.expired"') == 1
    assert f'"created_at":{int(world.clock.wall.timestamp())},"data":{{"id":"b1",' in dump


def test_publish_repeated_gives_the_same_batch(world: World) -> None:
    seal = world.sealing()
    over = world.store.publish(seal.ref, NOTHING)
    before = world.backend.dump()

    assert world.store.publish(seal.ref, NOTHING) == over
    assert world.backend.dump() == before


def test_publish_picks_the_word_by_the_status_found_then(world: World) -> None:
    seal = world.sealing()
    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)

    over = world.store.publish(seal.ref, NOTHING)

    assert (over.status, over.ended_by, over.succeeded_count) == (BatchStatus.CANCELLED, EndedBy.SETTLED, 10)


@pytest.mark.parametrize("wrong", [replace(NOTHING, expired_count=1), replace(NOTHING, cancelled_count=9)])
def test_publish_whose_ledger_does_not_hold_is_loud_and_changes_nothing(world: World, wrong: Publication) -> None:
    seal = world.sealing()
    before = world.backend.dump()

    with pytest.raises(ReconciliationError):
        world.store.publish(seal.ref, replace(wrong, output=file_of("out")))

    assert world.backend.dump() == before


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_sweep_without_anything_to_mend_changes_nothing(world: World) -> None:
    world.sealing("sealing")
    world.running("running", shards=2, deadline_at=world.clock.wall + timedelta(hours=1))
    world.claim()
    world.created("fresh")
    before = world.backend.dump()

    swept = world.store.sweep()

    assert (swept.moved, swept.seals_added, swept.leases_ended) == ((), 0, 0)
    assert world.backend.dump() == before


def test_sweep_passes_deadlines_of_batches_that_still_take_answers(world: World) -> None:
    soon = world.clock.wall + timedelta(minutes=1)
    world.running("running", deadline_at=soon)
    world.created("fresh", deadline_at=soon)
    world.created("later", deadline_at=soon + timedelta(hours=1))
    world.created("never")
    world.scope.send(world.created("cancelled", deadline_at=soon).id, BatchEvent.CANCEL_REQUESTED)
    assert world.store.sweep().moved == ()
    world.clock.advance(60)

    swept = world.store.sweep()

    assert dict(swept.moved) == {"running": BatchEvent.DEADLINE_PASSED, "fresh": BatchEvent.DEADLINE_PASSED}
    assert world.batch("running").ended_by is EndedBy.DEADLINE
    assert [world.batch(name).status for name in ("running", "fresh", "later", "never", "cancelled")] == [
        BatchStatus.FINALIZING,
        BatchStatus.FINALIZING,
        BatchStatus.VALIDATING,
        BatchStatus.VALIDATING,
        BatchStatus.CANCELLING,
    ]
    assert world.store.sweep().moved == ()


def test_sweep_gives_up_what_is_still_stuck_a_day_after_its_deadline(world: World) -> None:
    soon = world.clock.wall + timedelta(minutes=1)
    for name in ("stuck", "full", "idle", "busy", "none"):
        world.running(name, deadline_at=None if name == "none" else soon)
    world.clock.advance(60)
    world.store.sweep()
    world.scope.send(BatchId("none"), BatchEvent.DEADLINE_PASSED)
    seals = {claim.batch.id: claim for claim in [world.claim(TWO, kinds=(TaskKind.SEAL,)) for _ in range(5)]}
    for name in ("stuck", "none"):
        world.store.fail_task(seals[BatchId(name)].ref, "journal_corrupt: no", progressed=False, is_hopeless=True)
    for name in ("full", "busy"):
        world.store.block(seals[BatchId(name)].ref, "disk_full")
    world.store.fail_task(seals[BatchId("full")].ref, "disk_full: no", progressed=True)
    world.store.give_back(seals[BatchId("idle")].ref, Progress())
    world.clock.advance(24 * 3600 - 1)
    assert world.store.sweep().moved == ()
    world.clock.advance(1)

    swept = world.store.sweep()

    assert dict(swept.moved) == {"stuck": BatchEvent.GAVE_UP, "full": BatchEvent.GAVE_UP}
    assert [problem.message for problem in world.batch("stuck").problems] == [
        "The batch could not be brought to its end: journal_corrupt: no. Its data is kept."
    ]
    assert world.batch("full").status is BatchStatus.FAILED
    assert {world.batch(name).status for name in ("idle", "busy", "none")} == {BatchStatus.FINALIZING}
    assert world.store.sweep().moved == ()


def test_sweep_after_a_day_away_expires_and_does_not_give_up(world: World) -> None:
    world.running(deadline_at=world.clock.wall + timedelta(minutes=1))
    world.clock.advance(3 * 24 * 3600)

    swept = world.store.sweep()

    assert dict(swept.moved) == {"b1": BatchEvent.DEADLINE_PASSED}
    assert world.store.sweep().moved == ()


@pytest.mark.parametrize("jump", [timedelta(hours=1), timedelta(hours=-1)])
def test_wall_clock_that_jumps_defers_deadlines_by_one_sweep(world: World, caplog, jump: timedelta) -> None:
    world.store.sweep()
    world.running(deadline_at=world.clock.wall + jump - timedelta(minutes=30))
    world.clock.wall += jump

    deferred, passed = world.store.sweep(), world.store.sweep()

    assert deferred.moved == ()
    assert dict(passed.moved) == {"b1": BatchEvent.DEADLINE_PASSED}
    assert [record.action for record in caplog.records] == ["wall_clock_jumped"]


def test_lid_closed_over_a_deadline_is_no_jump(world: World, caplog) -> None:
    world.running(deadline_at=world.clock.wall + timedelta(minutes=30))
    world.store.sweep()
    world.clock.suspend(3600)

    assert dict(world.store.sweep().moved) == {"b1": BatchEvent.DEADLINE_PASSED}
    assert caplog.records == []


def test_sweep_moves_a_batch_that_has_no_open_shard_left(world: World) -> None:
    world.running()
    world.backend.change("UPDATE tasks SET state = 'settled', session = NULL WHERE kind = 'shard'")

    assert dict(world.store.sweep().moved) == {"b1": BatchEvent.LINES_SETTLED}
    assert world.claim(kinds=ANY).kind is TaskKind.SEAL


def test_sweep_adds_a_seal_that_is_missing_once(world: World) -> None:
    world.running()
    world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)
    world.backend.change("DELETE FROM tasks WHERE kind = 'seal'")

    assert [world.store.sweep().seals_added, world.store.sweep().seals_added] == [1, 0]
    assert world.claim(kinds=ANY).kind is TaskKind.SEAL


def test_sweep_ends_leases_of_another_boot_without_a_death(world: World, clock) -> None:
    world.running()
    world.claim(ONE)
    clock.reboot()
    store = world.backend.open()

    assert store.sweep().leases_ended == 1
    assert store.sessions(host="here") == []
    store.open_session(TWO, host="here", pid=1)
    claim = store.claim(TWO, lease_s=LEASE_S, kinds=ANY)
    assert (shard_in(claim).deaths, claim.orphaned_by_death, claim.earlier) == (0, False, ((1, ONE),))


def test_backoff_of_another_boot_is_over(world: World, clock) -> None:
    world.running()
    world.store.fail_task(world.claim().ref, "boom", progressed=False)
    clock.reboot()

    assert world.backend.open().claim(ONE, lease_s=LEASE_S, kinds=ANY) is not None


def test_everything_is_there_after_a_restart(world: World) -> None:
    world.running(shards=2)
    claim = world.claim()
    world.store.register(claim.ref, progress(claim, 0, 10))
    seen = (world.batch(), world.shards(), world.extents())
    world.store.close()

    scope = world.backend.open().scope(ANA)

    assert (scope.batch(BatchId("b1")), scope.shards(BatchId("b1")), scope.extents(BatchId("b1"))) == seen
