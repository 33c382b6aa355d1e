"""Jobs through hands and workers: what dies, splits, is canceled and is retried, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import msgspec

from batchrunner.adding import judge
from batchrunner.additions import NewAddition
from batchrunner.blobs.local import LocalBlobs
from batchrunner.jobs import InferenceType, Job, NewJob
from batchrunner.lifecycle import BatchStatus, JobStatus
from batchrunner.models import CLUB, LOCAL_TENANT, Attempt, BatchId, NewBatch, ShardCut, TenantId
from batchrunner.ports import Clock, TenantScope
from batchrunner.settings import Settings
from tests.e2e.harness import chat_line
from tests.pipeline.crews import ANA, Crew, _line, crew, good
from tests.pipeline.hands import LEASE_S, Hand, Place
from tests.unit.fanning import answered

QUEUED, PROCESSING, PROCESSED, FAILED, CANCELED = JobStatus


def submit(
    scope: TenantScope, folder: Path, lines: Sequence[bytes], *, clock: Clock, settings: Settings, tenant: TenantId
) -> BatchId:
    """Make a batch of jobs."""
    content = b"".join(lines)
    (folder / "jobs.jsonl").write_bytes(content)
    LocalBlobs(folder / "blobs").adopt("jobs", folder / "jobs.jsonl")
    new = NewBatch(
        id=BatchId("asked"),
        tenant=tenant,
        dialect=CLUB,
        endpoint=None,
        input_file_id=None,
        source="",
        completion_window=None,
        deadline_at=clock.now() + timedelta(days=14),
        is_open=True,
    )
    adding = NewAddition(first_line=1, source="jobs", id_hashes=b"", shards=judge(content, settings).shards, model="m")
    jobs = [NewJob(url="/v1/chat/completions", inference_type=InferenceType.LLM, model="m") for _ in lines]
    return scope.create_job_batch(new, adding, jobs).id


def begin(place: Place, hand: Hand, count: int) -> BatchId:
    lines = [chat_line(number) for number in range(1, count + 1)]
    scope = place.scope(hand)
    return submit(scope, place.folder, lines, clock=place.clock, settings=place.settings, tenant=LOCAL_TENANT)


def jobs_of(scope: TenantScope) -> list[Job]:
    return scope.jobs(limit=1000)[::-1]


def statuses(scope: TenantScope) -> list[JobStatus]:
    return [each.status for each in jobs_of(scope)]


def test_results_that_a_dead_holder_left_end_their_jobs(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    begin(place, one, 5)
    lost = one.take()
    one.answer(lost, 3)
    assert statuses(place.scope(one)) == [PROCESSING] * 5

    place.clock.advance(5.1)
    place.clock.advance(LEASE_S)
    taken = two.take()
    two.register(taken)

    assert statuses(place.scope(two)) == [PROCESSED] * 3 + [PROCESSING] * 2
    two.answer(taken)
    two.settle(taken)
    assert statuses(place.scope(two)) == [PROCESSED] * 5


def test_jobs_follow_their_lines_when_a_shard_is_split(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    begin(place, one, 8)
    run = one.take()
    cut = run.cut_tail(keep_lines=3)
    assert cut is not None
    run.drop_tail(*cut)
    one.store.split(run.claim.ref, *cut)

    one.answer(run)
    one.settle(run)
    assert statuses(place.scope(one)) == [PROCESSED] * 3 + [PROCESSING] * 5
    two.run_all()
    assert statuses(place.scope(one)) == [PROCESSED] * 8


def test_end_of_a_batch_saves_results_that_nobody_registered(place: Place) -> None:
    one, two = place.hand("one"), place.hand("two")
    batch_id = begin(place, one, 5)
    lost = one.take()
    one.answer(lost, 2)

    place.clock.advance(14 * 86_400)
    # A clock that jumps so far is believed the second time.
    for _ in range(2):
        two.store.sweep()
    batch = two.seal()

    assert statuses(place.scope(two)) == [PROCESSED] * 2 + [FAILED] * 3
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    seen = place.scope(two).batch(batch_id)
    assert (seen.total_count, seen.succeeded_count, seen.failed_count) == (5, 2, 3)


def begin_with(team: Crew, count: int) -> BatchId:
    lines = [_line("jobs", number) for number in range(1, count + 1)]
    return submit(team.store.scope(ANA), team.folder, lines, clock=team.clock, settings=team.settings, tenant=ANA)


def sent(team: Crew) -> list[int]:
    return [each.line for each in team.upstream.asked]


async def test_canceled_job_is_not_sent_and_one_under_way_is_left_to_end(tmp_path: Path) -> None:
    async with crew(tmp_path, good(5.0)) as team:
        scope = team.store.scope(ANA)
        team.hire(window=2)
        batch_id = begin_with(team, 5)
        await team.until(lambda: sent(team) == [1, 2])
        for job in (jobs_of(scope)[1], jobs_of(scope)[2], jobs_of(scope)[4]):
            assert scope.cancel_job(job.number).status is CANCELED

        await team.until(lambda: scope.batch(batch_id).status is BatchStatus.COMPLETED)

        assert sent(team) == [1, 2, 4]
        assert statuses(scope) == [PROCESSED, CANCELED, CANCELED, PROCESSED, CANCELED]
        await team.until(lambda: not any(worker._runs for worker in team.workers))
        assert sum(extent.count for extent in scope.extents(batch_id)) == 5


async def test_canceled_job_is_not_tried_again(tmp_path: Path) -> None:
    def script(request: dict[str, object], at_s: float) -> tuple[float, Attempt]:
        return (0.1, msgspec.structs.replace(answered(500, b"{}"), retry_after_s=30.0))

    async with crew(tmp_path, script) as team:
        scope = team.store.scope(ANA)
        team.hire()
        batch_id = begin_with(team, 1)
        await team.until(lambda: len(sent(team)) == 1)
        await team.advance(0.2)

        scope.cancel_jobs(batch_id)
        await team.until(lambda: not any(worker._runs for worker in team.workers))

        assert sent(team) == [1]
        (extent,) = scope.extents(batch_id)
        assert (extent.succeeded_count, extent.failed_count) == (0, 1)
        assert statuses(scope) == [CANCELED]


async def test_retried_job_is_sent_again_alone(tmp_path: Path) -> None:
    is_well = False

    def script(request: dict[str, object], at_s: float) -> tuple[float, Attempt]:
        return good(0.1)(request, at_s) if is_well or request["n"] != 2 else (0.1, answered(400, b"{}"))

    async with crew(tmp_path, script) as team:
        scope = team.store.scope(ANA)
        team.hire()
        batch_id = begin_with(team, 3)
        await team.until(lambda: scope.batch(batch_id).status is BatchStatus.COMPLETED)
        assert statuses(scope) == [PROCESSED, FAILED, PROCESSED]
        is_well = True
        first, second = (len(_line("jobs", number)) for number in (1, 2))
        content = (tmp_path / "jobs.jsonl").read_bytes()
        cut = judge(content[first : first + second], team.settings).shards[0]
        cut = ShardCut(
            byte_start=first,
            byte_end=first + second,
            first_line=1,
            first_index=0,
            line_count=1,
            checksum=cut.checksum,
        )

        scope.retry_job(jobs_of(scope)[1].number, cut, "jobs")
        await team.until(lambda: scope.batch(batch_id).status is BatchStatus.COMPLETED)

        assert statuses(scope) == [PROCESSED] * 3
        assert sent(team) == [1, 2, 3, 2]
        seen = scope.batch(batch_id)
        assert (seen.total_count, seen.succeeded_count) == (3, 3)


async def test_workers_share_the_jobs_of_a_batch(tmp_path: Path) -> None:
    async with crew(tmp_path, good(1.0)) as team:
        scope = team.store.scope(ANA)
        for _ in range(2):
            team.hire(window=4)
        batch_id = begin_with(team, 40)

        await team.until(lambda: scope.batch(batch_id).status is BatchStatus.COMPLETED)

        assert sorted(sent(team)) == list(range(1, 41))
        assert statuses(scope) == [PROCESSED] * 40
