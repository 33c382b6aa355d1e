"""What every Store promises of jobs: lines that are followed by a number, and the batches that they are in."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from batchrunner.additions import NewAddition
from batchrunner.errors import NotFound, QuotaExceeded, TransitionRefused
from batchrunner.holdings import KeyLimits, Replay
from batchrunner.jobs import InferenceType, JobBatchCounts, NewJob
from batchrunner.lifecycle import BatchStatus, JobStatus
from batchrunner.models import (
    CLUB,
    Batch,
    BatchId,
    Claim,
    NewBatch,
    NewExtent,
    Progress,
    RecordKind,
    ShardCut,
    TaskKind,
)
from tests.contract.worlds import BEN, NOTHING, STEPS, TWO, World, extent, shard_in

QUEUED, PROCESSING, PROCESSED, FAILED, CANCELED = JobStatus
CUT = ShardCut(byte_start=40, byte_end=60, first_line=1, first_index=0, line_count=1, checksum=7)


def new_batch(world: World, **changes) -> NewBatch:
    given = {
        "dialect": CLUB,
        "endpoint": None,
        "source": "",
        "is_open": True,
        "deadline_at": world.clock.wall + timedelta(days=14),
    }
    return world.new("asked", **given | changes)


def intake(world: World, **changes) -> NewBatch:
    return replace(new_batch(world, is_intake=True), **changes)


def lines(count: int, *, source: str = "add-1") -> NewAddition:
    cut = ShardCut(byte_start=0, byte_end=100, first_line=1, first_index=0, line_count=count, checksum=1)
    return NewAddition(first_line=1, source=source, id_hashes=b"", shards=(cut,), model="m")


def asked(count: int) -> list[NewJob]:
    return [NewJob(url="/v1/completions", inference_type=InferenceType.LLM, model=f"m{each}") for each in range(count)]


def batch_of_jobs(world: World, count: int = 3, *, source: str = "add-1", **changes) -> Batch:
    return world.scope.create_job_batch(new_batch(world, **changes), lines(count, source=source), asked(count))


def told(claim: Claim, start: int, *ends: tuple[int, RecordKind]) -> Progress:
    succeeded = sum(kind is RecordKind.SUCCEEDED for _, kind in ends)
    new = extent(claim.session, start, start + 10, succeeded=succeeded, failed=len(ends) - succeeded)
    return Progress(extents=(replace_lines(new, ends),))


def replace_lines(new: NewExtent, ends: tuple[tuple[int, RecordKind], ...]) -> NewExtent:
    return replace(new, lines=ends)


def statuses(world: World, batch_id: BatchId | None = None) -> list[JobStatus]:
    return [each.status for each in reversed(world.scope.jobs(limit=1000, batch_id=batch_id))]


def good(*numbers: int) -> tuple[tuple[int, RecordKind], ...]:
    return tuple((number, RecordKind.SUCCEEDED) for number in numbers)


def bad(*numbers: int) -> tuple[tuple[int, RecordKind], ...]:
    return tuple((number, RecordKind.FAILED) for number in numbers)


def test_batch_with_jobs_has_a_number_for_a_name_and_runs_at_once(world: World) -> None:
    world.created("other")
    batch = batch_of_jobs(world)

    assert batch.id == "2"
    assert (batch.status, batch.total_count, batch.pending_count) == (BatchStatus.IN_PROGRESS, 3, 3)
    jobs = world.scope.jobs(limit=10, batch_id=batch.id)
    assert [(each.line_number, each.model, each.is_single) for each in jobs] == [
        (3, "m2", False),
        (2, "m1", False),
        (1, "m0", False),
    ]
    assert {each.status for each in jobs} == {QUEUED}
    assert (jobs[0].created_at, jobs[0].queued_at, jobs[0].ended_at) == (world.clock.wall, world.clock.wall, None)
    assert shard_in(world.claim()).source == "add-1"


def test_batches_are_counted_by_what_their_jobs_do(world: World) -> None:
    assert world.scope.job_batch_counts() == JobBatchCounts(waiting=0, begun=0, over=0)
    world.scope.add_jobs(intake(world), lines(1), asked(1))
    world.created("other")
    batch_of_jobs(world, 2, source="add-2")
    gone = batch_of_jobs(world, 2, source="add-3")
    over = batch_of_jobs(world, 2, source="add-4")
    begun = batch_of_jobs(world, 2, source="add-5")
    for each in (gone, over):
        world.scope.cancel_jobs(each.id)
    world.scope.delete_batch(gone.id)
    world.scope.cancel_job(world.scope.jobs(limit=1, batch_id=begun.id)[0].number)

    assert world.scope.job_batch_counts() == JobBatchCounts(waiting=1, begun=1, over=1)
    assert world.store.scope(BEN).job_batch_counts() == JobBatchCounts(waiting=0, begun=0, over=0)


def test_jobs_begin_with_their_shard_and_end_with_their_records(world: World) -> None:
    batch = batch_of_jobs(world)
    claim = world.claim()
    assert statuses(world) == [PROCESSING] * 3

    world.store.register(claim.ref, told(claim, 0, *good(2), *bad(1)))
    world.store.register(claim.ref, told(claim, 0, *good(2), *bad(1)))

    assert statuses(world) == [FAILED, PROCESSED, PROCESSING]
    assert world.scope.job_counts(batch.id) == {QUEUED: 0, PROCESSING: 1, PROCESSED: 1, FAILED: 1, CANCELED: 0}
    assert world.scope.jobs(limit=9, statuses=[FAILED])[0].ended_at == world.clock.wall
    seen = world.batch(batch.id)
    assert (seen.total_count, seen.succeeded_count, seen.failed_count, seen.pending_count) == (3, 1, 1, 1)
    assert not world.store.settle(claim.ref, told(claim, 10, *good(3)))
    seen = world.batch(batch.id)
    assert (seen.status, seen.completed_at) == (BatchStatus.COMPLETED, world.clock.wall)
    assert world.claims_nothing()


def test_jobs_stay_begun_when_their_worker_dies(world: World) -> None:
    batch_of_jobs(world)
    claim = world.claim()

    world.store.release_session(claim.session, died=True)

    assert statuses(world) == [PROCESSING] * 3
    again = world.claim(TWO)
    world.store.settle(again.ref, told(again, 0, *good(1, 2, 3)))
    assert statuses(world) == [PROCESSED] * 3


def test_canceled_job_stays_so_whatever_its_line_has(world: World) -> None:
    batch = batch_of_jobs(world)
    first, second, _ = reversed(world.scope.jobs(limit=3))
    world.scope.cancel_job(first.number)
    claim = world.claim()
    assert claim.cancelled == (1,)
    assert world.scope.cancel_job(second.number).status is CANCELED
    (held,) = world.store.watch(claim.session).held
    assert held.cancelled == (1, 2)

    world.store.settle(claim.ref, told(claim, 0, *bad(1), *good(2, 3)))

    assert statuses(world) == [CANCELED, CANCELED, PROCESSED]
    seen = world.batch(batch.id)
    assert (seen.status, seen.succeeded_count, seen.cancelled_count) == (BatchStatus.COMPLETED, 1, 2)
    assert world.scope.cancel_job(second.number) == world.scope.job(second.number)


def test_cancel_leaves_what_is_over(world: World) -> None:
    batch = batch_of_jobs(world)
    claim = world.claim()
    world.store.register(claim.ref, told(claim, 0, *good(1), *bad(2)))
    number = world.scope.jobs(limit=1, statuses=[PROCESSED])[0].number

    assert world.scope.cancel_job(number).status is PROCESSED
    assert world.scope.cancel_jobs(batch.id) == 1

    assert statuses(world) == [PROCESSED, FAILED, CANCELED]
    assert world.scope.cancel_jobs(batch.id) == 0


def test_batch_that_was_cancelled_is_shown_so_until_one_of_its_jobs_is_retried(world: World) -> None:
    batch = batch_of_jobs(world)
    claim = world.claim()
    world.store.register(claim.ref, told(claim, 0, *good(1)))
    world.clock.advance(60)

    world.scope.cancel_jobs(batch.id)

    seen = world.batch(batch.id)
    assert (seen.status, seen.succeeded_count, seen.cancelled_count) == (BatchStatus.CANCELLED, 1, 2)
    assert (seen.cancelling_at, seen.cancelled_at, seen.completed_at) == (world.clock.wall, world.clock.wall, None)
    assert seen.version > batch.version
    assert world.scope.batches(limit=1) == [seen]
    world.store.settle(claim.ref, Progress())
    number = world.scope.jobs(limit=1, statuses=[CANCELED])[0].number

    world.scope.retry_job(number, CUT, "add-1")

    again = world.batch(batch.id)
    assert (again.status, again.cancelling_at, again.cancelled_at) == (BatchStatus.IN_PROGRESS, None, None)
    world.scope.cancel_job(number)
    assert world.batch(batch.id).status is BatchStatus.COMPLETED


def test_cancelled_batch_stays_so_when_its_time_is_over_and_one_that_was_done_before_does_not_become_so(
    world: World,
) -> None:
    cancelled, done = batch_of_jobs(world), batch_of_jobs(world, 1, source="add-2")
    world.scope.cancel_jobs(cancelled.id)
    for job in world.scope.jobs(limit=1, batch_id=done.id):
        world.scope.cancel_job(job.number)
    world.scope.cancel_jobs(done.id)
    before = world.batch(cancelled.id)

    world.clock.advance(15 * 86_400)
    # A clock that jumps so far is believed the second time.
    for _ in range(2):
        world.store.sweep()
    for _ in range(2):
        world.store.publish(world.claim(kinds=(TaskKind.SEAL,)).ref, NOTHING)

    after = world.batch(cancelled.id)
    assert (after.status, after.cancelled_at, after.completed_at) == (before.status, before.cancelled_at, None)
    assert (after.total_count, after.cancelled_count) == (3, 3)
    assert world.batch(done.id).status is BatchStatus.COMPLETED


@pytest.mark.parametrize("how", ["failed", "canceled"])
def test_retried_job_runs_again_as_another_line_and_its_batch_with_it(world: World, how: str) -> None:
    batch = batch_of_jobs(world)
    number = world.scope.jobs(limit=3)[1].number
    claim = world.claim()
    if how == "canceled":
        world.scope.cancel_job(number)
    world.store.settle(claim.ref, told(claim, 0, *good(1, 3), *bad(2)))
    world.clock.advance(60)

    job = world.scope.retry_job(number, CUT, "add-1")

    assert (job.status, job.line_number, job.retry_count, job.ended_at) == (QUEUED, 4, 1, None)
    assert (job.queued_at, job.created_at) == (world.clock.wall, world.clock.wall - timedelta(seconds=60))
    seen = world.batch(batch.id)
    assert (seen.status, seen.total_count, seen.pending_count) == (BatchStatus.IN_PROGRESS, 3, 1)
    again = world.claim()
    shard = shard_in(again)
    assert (shard.first_line, shard.first_index, shard.byte_start, shard.source) == (4, 3, 40, "add-1")
    assert again.cancelled == ()
    world.store.settle(again.ref, told(again, 0, *good(4)))
    assert world.scope.job(number).status is PROCESSED
    assert world.batch(batch.id).succeeded_count == 3


def test_last_word_on_a_line_does_not_reach_the_job_that_was_retried(world: World) -> None:
    batch_of_jobs(world, 1)
    claim = world.claim()
    (job,) = world.scope.jobs(limit=1)
    world.scope.cancel_job(job.number)
    world.scope.retry_job(job.number, CUT, "add-1")

    world.store.settle(claim.ref, told(claim, 0, *good(1)))

    assert world.scope.job(job.number).status is QUEUED


@pytest.mark.parametrize("status", [QUEUED, PROCESSING, PROCESSED])
def test_only_what_failed_or_was_canceled_is_retried(world: World, status: JobStatus) -> None:
    batch_of_jobs(world, 1)
    if status is not QUEUED:
        claim = world.claim()
        if status is PROCESSED:
            world.store.register(claim.ref, told(claim, 0, *good(1)))
    (job,) = world.scope.jobs(limit=1)
    before = world.backend.dump()

    with pytest.raises(TransitionRefused, match=status):
        world.scope.retry_job(job.number, CUT, "add-1")

    assert world.backend.dump() == before


def test_jobs_that_come_alone_join_one_intake_that_nobody_sees(world: World) -> None:
    (first,) = world.scope.add_jobs(intake(world), lines(1), asked(1))
    later = world.scope.add_jobs(intake(world, id=BatchId("not-needed")), lines(2, source="add-2"), asked(2))

    assert [each.batch_id for each in (first, *later)] == ["asked"] * 3
    assert [(each.line_number, each.is_single) for each in (first, *later)] == [(1, True), (2, True), (3, True)]
    assert [each.number for each in world.scope.jobs(limit=10)] == [3, 2, 1]
    assert [each.number for each in world.scope.jobs(limit=1, before=3)] == [2]
    assert [each.first_line for each in world.scope.shards(first.batch_id)] == [1, 2]
    assert world.scope.batches(limit=10) == []
    with pytest.raises(NotFound):
        world.batch(first.batch_id)


def test_intake_that_is_old_takes_no_more(world: World) -> None:
    world.scope.add_jobs(intake(world), lines(1), asked(1))
    world.clock.advance(25 * 3600)

    (job,) = world.scope.add_jobs(intake(world, id=BatchId("later")), lines(1, source="add-2"), asked(1))

    assert (job.batch_id, job.line_number) == ("later", 1)


def test_job_that_comes_late_does_not_join_an_intake_that_is_soon_over(world: World) -> None:
    def deadline() -> datetime:
        return world.clock.wall + timedelta(hours=1)

    world.scope.add_jobs(intake(world, deadline_at=deadline()), lines(1), asked(1))
    world.clock.advance(3 * 60)
    (soon,) = world.scope.add_jobs(intake(world, deadline_at=deadline()), lines(1, source="add-2"), asked(1))
    world.clock.advance(50 * 60)

    late = intake(world, id=BatchId("later"), deadline_at=deadline())
    (job,) = world.scope.add_jobs(late, lines(1, source="add-3"), asked(1))

    assert (soon.batch_id, job.batch_id) == ("asked", "later")


def test_tenants_have_intakes_of_their_own(world: World) -> None:
    world.scope.add_jobs(intake(world), lines(1), asked(1))
    stranger = world.store.scope(BEN)

    (theirs,) = stranger.add_jobs(intake(world, id=BatchId("bens"), tenant=BEN), lines(1, source="add-2"), asked(1))

    assert theirs.batch_id == "bens"
    assert [each.number for each in stranger.jobs(limit=10)] == [theirs.number]
    for ask in (stranger.job, stranger.cancel_job):
        with pytest.raises(NotFound):
            ask(1)
    with pytest.raises(NotFound):
        stranger.retry_job(1, CUT, "add-1")
    with pytest.raises(NotFound):
        stranger.cancel_jobs(BatchId("asked"))
    assert stranger.job_counts(BatchId("asked"))[QUEUED] == 0
    assert world.scope.job(1).status is QUEUED


def test_key_makes_one_job_and_one_batch(world: World) -> None:
    job_key, batch_key = (Replay(route=route, key="k", fingerprint=None) for route in ("job", "batch"))
    (job,) = world.scope.add_keyed_jobs(intake(world), lines(1), asked(1), [job_key])
    batch = world.scope.create_job_batch(new_batch(world), lines(1, source="add-2"), asked(1), replay=batch_key)
    world.store.register_blob("add-3", owner="me")
    world.store.register_blob("add-4", owner="me")

    again = world.scope.add_keyed_jobs(intake(world), lines(1, source="add-3"), asked(1), [job_key])
    same = world.scope.create_job_batch(new_batch(world), lines(1, source="add-4"), asked(1), replay=batch_key)

    assert again == [job]
    assert same.id == batch.id
    assert len(world.scope.jobs(limit=10)) == 2
    assert set(world.store.freeable_blobs(limit=10, in_use=())) == {"add-3", "add-4"}


def test_keys_that_made_jobs_before_give_them_and_the_others_of_the_group_make_none(world: World) -> None:
    known, fresh, other = (Replay(route="job", key=key, fingerprint=None) for key in ("k", "f", "o"))
    (job,) = world.scope.add_keyed_jobs(intake(world), lines(1), asked(1), [known])
    world.store.register_blob("add-2", owner="me")

    found = world.scope.add_keyed_jobs(intake(world), lines(3, source="add-2"), asked(3), [fresh, known, other])

    assert found == [None, job, None]
    assert world.scope.jobs(limit=10) == [job]
    assert set(world.store.freeable_blobs(limit=10, in_use=())) == {"add-2"}

    made = world.scope.add_keyed_jobs(intake(world), lines(2, source="add-3"), asked(2), [fresh, other])
    assert [each and each.line_number for each in made] == [2, 3]


def test_job_is_found_by_its_key_as_long_as_the_key_is_kept(world: World) -> None:
    key, other = (Replay(route="job", key=each, fingerprint=None) for each in ("k", "o"))
    (job,) = world.scope.add_keyed_jobs(intake(world), lines(1), asked(1), [key])

    assert world.scope.job_made(key) == job
    assert world.scope.job_made(other) is None
    assert world.scope.job_made(replace(key, route="batch")) is None
    assert world.store.scope(BEN).job_made(key) is None

    world.clock.advance(24 * 3600)
    assert world.scope.job_made(key) is None


def test_waiting_lines_of_a_key_are_limited(world: World) -> None:
    limits = KeyLimits(queued_lines_max=3)
    world.scope.add_jobs(intake(world), lines(2), asked(2), limits=limits)
    before = world.backend.dump()

    with pytest.raises(QuotaExceeded):
        world.scope.add_jobs(intake(world), lines(2, source="add-2"), asked(2), limits=limits)
    with pytest.raises(QuotaExceeded):
        world.scope.create_job_batch(new_batch(world), lines(2, source="add-2"), asked(2), limits=limits)

    assert world.backend.dump() == before


def test_batch_counts_as_unfinished_while_a_job_is_active(world: World) -> None:
    world.scope.add_jobs(intake(world), lines(1), asked(1))
    batch = batch_of_jobs(world, 1, source="add-2")
    assert (world.scope.open_counts().batches, world.scope.open_counts().lines) == (1, 2)

    world.scope.cancel_jobs(batch.id)

    assert world.scope.open_counts().batches == 0


def test_with_the_time_of_their_batch_jobs_without_a_result_have_failed(world: World) -> None:
    batch = batch_of_jobs(world)
    claim = world.claim()
    world.store.register(claim.ref, told(claim, 0, *good(1)))
    world.scope.cancel_job(world.scope.jobs(limit=3)[1].number)
    world.clock.advance(14 * 86_400)
    world.store.sweep()
    seal = world.claim(TWO, kinds=STEPS)
    (shard,) = world.store.fence(seal.ref)
    world.store.salvage_sealed(seal.ref, shard.ref, Progress())

    world.store.publish(seal.ref, NOTHING)

    assert statuses(world) == [PROCESSED, CANCELED, FAILED]
    seen = world.batch(batch.id)
    assert (seen.status, seen.total_count) == (BatchStatus.COMPLETED, 3)
    assert (seen.succeeded_count, seen.failed_count, seen.cancelled_count) == (1, 1, 1)
    assert world.scope.events(after=0, limit=10) == []
    with pytest.raises(TransitionRefused, match="too old"):
        world.scope.retry_job(world.scope.jobs(limit=1)[0].number, CUT, "add-1")
    world.clock.advance(2 * 86_400)
    world.store.expire()
    assert world.scope.jobs(limit=10) == []
    assert world.batch(batch.id) == replace(seen, journal_ended_at=world.clock.wall)


def test_nothing_else_joins_or_closes_a_batch_with_jobs(world: World) -> None:
    batch = batch_of_jobs(world)

    with pytest.raises(TransitionRefused):
        world.scope.add_lines(batch.id, replace(lines(1, source="add-2"), first_line=4))
    world.scope.close_batch(batch.id)

    assert world.batch(batch.id).is_open
    assert world.claim().kind is TaskKind.SHARD


def test_batch_whose_jobs_are_over_can_be_deleted(world: World) -> None:
    batch = batch_of_jobs(world)
    with pytest.raises(TransitionRefused):
        world.scope.delete_batch(batch.id)
    world.scope.cancel_jobs(batch.id)

    world.scope.delete_batch(batch.id)

    with pytest.raises(NotFound):
        world.batch(batch.id)
    assert world.scope.batches(limit=10) == []
    world.store.publish(world.claim(kinds=STEPS).ref, NOTHING)
    world.store.expire()
    assert world.scope.jobs(limit=10) == []


def test_batches_with_and_without_jobs_are_listed_together(world: World) -> None:
    world.running("plain")
    batch = batch_of_jobs(world)
    world.scope.cancel_jobs(batch.id)

    listed = world.scope.batches(limit=10)

    assert [(each.id, each.status) for each in listed] == [
        (batch.id, BatchStatus.CANCELLED),
        ("plain", BatchStatus.IN_PROGRESS),
    ]
    assert listed[0].cancelled_count == 3
