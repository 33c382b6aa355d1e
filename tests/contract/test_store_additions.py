"""What every Store promises of open batches, whose lines join them later, and of where single lines stand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from batchrunner.additions import NewAddition
from batchrunner.errors import NotFound, QuotaExceeded, TransitionRefused
from batchrunner.holdings import KeyLimits, Replay
from batchrunner.lifecycle import BatchEvent, BatchStatus
from batchrunner.models import Batch, BatchId, ShardCut, TaskKind, TaskState
from batchrunner.outcomes import Publication
from tests.contract.worlds import BEN, NOTHING, STEPS, TWO, World, accepted, bring_to, progress, shard_in

B1 = BatchId("b1")
HOUR = timedelta(hours=1)


def open_batch(world: World, name: str = "b1", **changes) -> Batch:
    given = {"endpoint": None, "source": "", "is_open": True, "closes_at": world.clock.wall + HOUR}
    return world.created(name, **given | changes)


def lines(world: World, first: int, count: int = 10, *, source: str = "add-1", **changes) -> NewAddition:
    cut = ShardCut(
        byte_start=0, byte_end=100, first_line=first, first_index=first - 1, line_count=count, checksum=first
    )
    plain = NewAddition(
        first_line=first,
        source=source,
        id_hashes=bytes(8 * count),
        shards=(cut,),
        model="m",
        closes_at=world.clock.wall + HOUR,
    )
    return replace(plain, **changes)


def finish(world: World, count: int = 10) -> bool:
    """Settle the next shard with all its lines."""
    claim = world.claim()
    return world.store.settle(claim.ref, progress(claim, 0, 100, succeeded=count))


def test_open_batch_is_in_progress_at_once_and_has_nothing_to_validate(world: World) -> None:
    batch = open_batch(world, created_by="key-1")

    assert (batch.status, batch.is_open, batch.created_by) == (BatchStatus.IN_PROGRESS, True, "key-1")
    assert batch.in_progress_at == batch.created_at
    assert world.claims_nothing()


def test_lines_join_in_order_with_a_source_of_their_own(world: World) -> None:
    open_batch(world)

    assert world.scope.add_lines(B1, lines(world, 1, 10))
    world.clock.advance(1)
    assert world.scope.add_lines(B1, lines(world, 11, 5, source="add-2"))

    batch = world.batch()
    assert (batch.total_count, batch.open_shards, batch.model) == (15, 2, "m")
    assert [(each.first_line, each.source) for each in world.shards()] == [(1, "add-1"), (11, "add-2")]
    assert [(each.first_line, each.line_count) for each in world.scope.additions(B1)] == [(1, 10), (11, 5)]
    (later,) = world.scope.additions(B1, from_line=11)
    assert [each.first_line for each in world.scope.additions(B1, limit=1)] == [1]
    assert (later.source, later.id_hashes, later.created_at) == ("add-2", bytes(40), world.clock.wall)
    assert shard_in(world.claim()).source == "add-1"


def test_lines_that_others_outpaced_join_nowhere(world: World) -> None:
    open_batch(world)
    world.scope.add_lines(B1, lines(world, 1, 10))
    before = world.backend.dump()

    assert not world.scope.add_lines(B1, lines(world, 1, 3, source="add-2"))
    assert not world.scope.add_lines(
        B1, lines(world, 5, 3, source="add-2"), replay=Replay(route="r", key="k", fingerprint="f")
    )

    assert world.backend.dump() == before


def test_of_many_adding_at_once_each_number_goes_to_one(world: World) -> None:
    open_batch(world)

    def add(number: int) -> None:
        source = f"add-{number}"
        while not world.scope.add_lines(B1, lines(world, world.batch().total_count + 1, 2, source=source)):
            continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(12)))

    assert [each.first_line for each in world.scope.additions(B1)] == list(range(1, 25, 2))
    assert world.batch().total_count == 24


def test_models_that_differ_leave_the_batch_without_one(world: World) -> None:
    open_batch(world)
    world.scope.add_lines(B1, lines(world, 1, 10))
    world.scope.add_lines(B1, lines(world, 11, 10, source="add-2", model="n"))
    assert world.batch().model is None

    world.scope.add_lines(B1, lines(world, 21, 10, source="add-3", model=None))

    assert world.batch().model is None


@pytest.mark.parametrize("status", [each for each in BatchStatus if each is not BatchStatus.IN_PROGRESS])
def test_only_an_open_batch_in_progress_takes_lines(world: World, status: BatchStatus) -> None:
    bring_to(world, status)
    before = world.backend.dump()

    with pytest.raises(TransitionRefused):
        world.scope.add_lines(B1, lines(world, 11))

    assert world.backend.dump() == before


@pytest.mark.parametrize("event", [BatchEvent.CANCEL_REQUESTED, BatchEvent.DEADLINE_PASSED])
def test_open_batch_that_ends_takes_no_more_lines(world: World, event: BatchEvent) -> None:
    open_batch(world)
    world.scope.add_lines(B1, lines(world, 1))

    world.scope.send(B1, event)

    assert not world.batch().is_open
    with pytest.raises(TransitionRefused):
        world.scope.add_lines(B1, lines(world, 11))


def test_another_tenants_batch_is_not_there(world: World) -> None:
    open_batch(world)
    stranger = world.store.scope(BEN)

    for ask in (
        lambda: stranger.add_lines(B1, lines(world, 1)),
        lambda: stranger.additions(B1),
        lambda: stranger.close_batch(B1),
        lambda: stranger.shards_from(B1, 1, limit=1),
        lambda: stranger.shards_of(B1, []),
        lambda: stranger.extents_at(B1, 1),
        lambda: stranger.task_counts(B1),
    ):
        with pytest.raises(NotFound):
            ask()

    assert world.batch().total_count == 0


def test_limit_of_waiting_lines_holds_for_lines_that_join(world: World) -> None:
    open_batch(world)
    limits = KeyLimits(queued_lines_max=15)
    world.scope.add_lines(B1, lines(world, 1), limits=limits)

    with pytest.raises(QuotaExceeded):
        world.scope.add_lines(B1, lines(world, 11, 6), limits=limits)

    assert world.scope.add_lines(B1, lines(world, 11, 5, source="add-2"), limits=limits)


def test_lines_that_joined_under_a_key_do_not_join_again(world: World) -> None:
    open_batch(world)
    key = Replay(route="POST add", key="k", fingerprint="same")

    assert world.scope.add_lines(B1, lines(world, 1), replay=key)
    assert world.scope.add_lines(B1, lines(world, 11, source="add-2"), replay=key)

    assert world.batch().total_count == 10


def test_settled_lines_end_no_open_batch(world: World) -> None:
    open_batch(world)
    world.scope.add_lines(B1, lines(world, 1))

    assert not finish(world)
    assert world.store.sweep().moved == ()

    batch = world.batch()
    assert (batch.status, batch.pending_count, batch.open_shards) == (BatchStatus.IN_PROGRESS, 0, 0)
    assert world.scope.add_lines(B1, lines(world, 11, source="add-2"))


def test_closing_moves_a_batch_whose_lines_are_settled(world: World) -> None:
    open_batch(world)
    world.scope.add_lines(B1, lines(world, 1))
    finish(world)

    world.scope.close_batch(B1)
    world.scope.close_batch(B1)

    assert world.batch().status is BatchStatus.FINALIZING
    world.store.publish(world.claim(kinds=STEPS).ref, NOTHING)
    assert world.batch().status is BatchStatus.COMPLETED


def test_the_last_settle_moves_a_batch_that_was_closed_before(world: World) -> None:
    open_batch(world)
    world.scope.add_lines(B1, lines(world, 1))

    world.scope.close_batch(B1)
    assert world.batch().status is BatchStatus.IN_PROGRESS

    assert finish(world)
    assert world.batch().status is BatchStatus.FINALIZING


def test_closing_one_that_never_was_open_changes_nothing(world: World) -> None:
    world.running()
    before = world.backend.dump()

    world.scope.close_batch(B1)

    assert world.backend.dump() == before


def test_idle_batch_closes_at_its_time_which_every_addition_puts_off(world: World) -> None:
    open_batch(world)
    world.clock.advance(3000)
    world.scope.add_lines(B1, lines(world, 1))
    finish(world)
    world.clock.advance(3000)
    assert world.store.sweep().moved == ()

    world.clock.advance(600)

    assert world.store.sweep().moved == ((B1, BatchEvent.LINES_SETTLED),)
    assert (world.batch().status, world.batch().is_open) == (BatchStatus.FINALIZING, False)


def test_batch_with_lines_to_run_is_not_idle(world: World) -> None:
    open_batch(world)
    world.scope.add_lines(B1, lines(world, 1))
    world.clock.advance(7200)

    assert world.store.sweep().moved == ()
    assert world.batch().is_open


def test_idle_batch_without_any_line_completes_empty(world: World) -> None:
    open_batch(world)
    world.clock.advance(3600)
    world.store.sweep()

    world.store.publish(world.claim(kinds=STEPS).ref, NOTHING)

    assert (world.batch().status, world.batch().total_count) == (BatchStatus.COMPLETED, 0)


def test_split_shard_keeps_its_source(world: World) -> None:
    open_batch(world)
    world.scope.add_lines(B1, lines(world, 1))
    claim = world.claim()
    whole = shard_in(claim)
    head = ShardCut(0, 40, 1, 0, 4, 1)
    tail = ShardCut(40, whole.byte_end, 5, 4, 6, 2)

    world.store.split(claim.ref, head, tail)

    assert [each.source for each in world.shards()] == ["add-1", "add-1"]


def test_shards_and_extents_are_found_by_line_and_by_shard(world: World) -> None:
    open_batch(world)
    for number in range(3):
        world.scope.add_lines(B1, lines(world, 10 * number + 1, source=f"add-{number}"))
    first, second = world.claim(), world.claim(TWO)
    world.store.settle(second.ref, progress(second, 0, 100, succeeded=10))
    world.store.settle(first.ref, progress(first, 0, 100, succeeded=10))

    assert [each.first_line for each in world.scope.shards_from(B1, 15, limit=5)] == [11, 21]
    assert [each.first_line for each in world.scope.shards_from(B1, 10, limit=2)] == [1, 11]
    last = world.scope.shards_from(B1, 99, limit=1)
    assert [each.first_line for each in last] == [21]
    wanted = [first.ref.task_id, second.ref.task_id]
    assert [each.first_line for each in world.scope.shards_of(B1, wanted)] == [1, 11]
    of_second = [each.sequence_from for each in world.scope.extents_at(B1, 11)]
    assert of_second == [each.sequence_from for each in world.scope.extents_at(B1, 20)] == [1]
    assert [each.sequence_from for each in world.scope.extents_at(B1, 10)] == [11]
    assert world.scope.extents_at(B1, 25) == []


def test_extents_of_a_line_come_in_the_order_in_which_they_were_registered(world: World) -> None:
    open_batch(world)
    world.scope.add_lines(B1, lines(world, 1))
    assert world.scope.extents_at(B1, 1) == []
    claim = world.claim()
    world.store.register(claim.ref, progress(claim, 0, 50, succeeded=4))
    world.store.register(claim.ref, progress(claim, 60, 90, succeeded=6))

    found = world.scope.extents_at(B1, 7)

    assert [(each.sequence_from, each.byte_start) for each in found] == [(1, 0), (5, 60)]
    assert found == world.scope.extents(B1)


def test_tasks_are_counted_by_kind_and_state(world: World) -> None:
    world.created()
    assert world.scope.task_counts(B1) == {TaskKind.VALIDATE: {TaskState.QUEUED: 1}}
    world.store.accept_input(world.claim(kinds=(TaskKind.VALIDATE,)).ref, accepted(shards=4))
    world.created("b2")

    settled, parked = world.claim(), world.claim()
    world.store.settle(settled.ref, progress(settled, 0, 100, succeeded=10))
    world.store.fail_task(parked.ref, "no", progressed=False, is_hopeless=True)
    claimed = world.claim()

    mine = {TaskState.SETTLED: 1, TaskState.PARKED: 1, TaskState.LEASED: 1, TaskState.QUEUED: 1}
    assert claimed.batch.id == B1
    assert world.scope.task_counts(B1) == {TaskKind.VALIDATE: {TaskState.SETTLED: 1}, TaskKind.SHARD: mine}


def test_sources_go_with_the_journal(world: World) -> None:
    open_batch(world)
    world.store.register_blob("add-1", owner="api")
    world.scope.add_lines(B1, lines(world, 1))
    finish(world)
    world.scope.close_batch(B1)
    world.store.publish(
        world.claim(kinds=(TaskKind.SEAL,)).ref,
        Publication(output=None, error=None, expired_count=0, cancelled_count=0),
    )
    world.store.expire()
    assert "add-1" not in world.store.freeable_blobs(limit=10)

    world.clock.advance(24 * 3600 + 1)
    world.store.expire()

    assert world.scope.additions(B1) == []
    assert world.scope.task_counts(B1) == {TaskKind.SEAL: {TaskState.SETTLED: 1}}
    assert "add-1" in world.store.freeable_blobs(limit=10)
