"""A tenant's jobs in an SQL store: which transaction answers which method."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import msgspec
from sqlalchemy import Connection, RowMapping

from batchrunner.additions import NewAddition
from batchrunner.errors import NotFound, TransitionRefused
from batchrunner.holdings import NO_LIMITS, KeyLimits, Replay
from batchrunner.jobs import Job, JobBatchCounts, NewJob
from batchrunner.lifecycle import BatchStatus, JobStatus
from batchrunner.models import Batch, BatchId, NewBatch, ShardCut
from batchrunner.store import queries_blobs, queries_idempotency, queries_jobs
from batchrunner.store.moments import Moment
from batchrunner.store.queries_additions import append, append_shards
from batchrunner.store.queries_batches import batch_of_tenant, create_batch, require_lines
from batchrunner.store.rows import batch_of, job_of
from batchrunner.store.tables import jobs as rows
from batchrunner.store.tenant_lines import SqlTenantLines


class _MadeBefore(Exception):
    """Keys have made jobs already, whose numbers these are by their places: nothing of the transaction may stay."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        super().__init__(numbers)
        self.numbers = numbers


class SqlTenantJobs(SqlTenantLines):
    """TenantJobs over the statements of this package."""

    def create_job_batch(
        self,
        new: NewBatch,
        lines: NewAddition,
        jobs: Sequence[NewJob],
        *,
        replay: Replay | None = None,
        limits: KeyLimits = NO_LIMITS,
    ) -> Batch:
        """See TenantJobs."""
        self._require_own(new.tenant, new.id)
        with self._store.writing() as conn:
            moment = self._store.moment()
            numbered = replace(new, id=BatchId(queries_jobs.next_number(conn)))
            row = create_batch(conn, numbered, moment, replay=replay, limits=limits)
            if row["id"] == numbered.id:
                self._let_in(conn, row, lines, jobs, moment=moment, limits=limits)
            else:
                queries_blobs.abandon_blob(conn, lines.source)
            return self._told(conn, row["id"])

    def add_jobs(
        self, intake: NewBatch, lines: NewAddition, jobs: Sequence[NewJob], *, limits: KeyLimits = NO_LIMITS
    ) -> list[Job]:
        """See TenantJobs."""
        self._require_own(intake.tenant, intake.id)
        with self._store.writing() as conn:
            return self._add_jobs(conn, intake, lines, jobs, moment=self._store.moment(), limits=limits)

    def add_keyed_jobs(
        self,
        intake: NewBatch,
        lines: NewAddition,
        jobs: Sequence[NewJob],
        replays: Sequence[Replay],
        *,
        limits: KeyLimits = NO_LIMITS,
    ) -> list[Job | None]:
        """See TenantJobs."""
        self._require_own(intake.tenant, intake.id)
        try:
            with self._store.writing() as conn:
                moment = self._store.moment()
                added = self._add_jobs(conn, intake, lines, jobs, moment=moment, limits=limits)
                self._note_keys(conn, added, replays, moment)
                return [*added]
        except _MadeBefore as before:
            with self._store.writing() as conn:
                queries_blobs.abandon_blob(conn, lines.source)
                known = {
                    place: job_of(queries_jobs.job_of_tenant(conn, self._tenant, number))
                    for place, number in before.numbers.items()
                }
            return [known.get(place) for place in range(len(jobs))]

    def _add_jobs(
        self,
        conn: Connection,
        intake: NewBatch,
        lines: NewAddition,
        jobs: Sequence[NewJob],
        *,
        moment: Moment,
        limits: KeyLimits,
    ) -> list[Job]:
        row = queries_jobs.intake_of_tenant(conn, intake, moment)
        if row is None:
            row = create_batch(conn, intake, moment, replay=None, limits=NO_LIMITS)
        return self._let_in(conn, row, lines, jobs, moment=moment, limits=limits)

    def _note_keys(self, conn: Connection, added: Sequence[Job], replays: Sequence[Replay], moment: Moment) -> None:
        """Note which job belongs to which key. Raises: _MadeBefore when some belong to others."""
        numbered = [(replay, str(job.number)) for job, replay in zip(added, replays, strict=True)]
        made = queries_idempotency.note_all_made(conn, self._tenant, numbered, moment)
        others = {place: int(number) for place, number in enumerate(made) if number is not None}
        if others:
            raise _MadeBefore(others)

    def _let_in(
        self,
        conn: Connection,
        row: RowMapping,
        lines: NewAddition,
        asked: Sequence[NewJob],
        *,
        moment: Moment,
        limits: KeyLimits,
    ) -> list[Job]:
        require_lines(conn, self._tenant, lines.line_count, limits)
        joining = lines.joining_at(row["total_count"] + 1)
        append(conn, row, joining, moment)
        return [job_of(each) for each in queries_jobs.add_jobs(conn, row, joining, asked, moment)]

    def job_made(self, replay: Replay) -> Job | None:
        """See TenantJobs."""
        with self._store.reading() as conn:
            number = queries_idempotency.made_before(conn, self._tenant, replay, self._store.moment())
            if number is None:
                return None
            with contextlib.suppress(NotFound):
                return job_of(queries_jobs.job_of_tenant(conn, self._tenant, int(number)))
        return None

    def job(self, number: int) -> Job:
        """See TenantJobs."""
        with self._store.reading() as conn:
            return job_of(queries_jobs.job_of_tenant(conn, self._tenant, number))

    def jobs(
        self,
        *,
        limit: int,
        statuses: Collection[JobStatus] = (),
        batch_id: BatchId | None = None,
        before: int | None = None,
    ) -> list[Job]:
        """See TenantJobs."""
        with self._store.reading() as conn:
            found = queries_jobs.jobs_of_tenant(
                conn, self._tenant, limit=limit, statuses=statuses, batch_id=batch_id, before=before
            )
            return [job_of(row) for row in found]

    def job_counts(self, batch_id: BatchId | None = None) -> Mapping[JobStatus, int]:
        """See TenantJobs."""
        mine = [rows.c.tenant == self._tenant]
        if batch_id is not None:
            mine.append(rows.c.batch_id == batch_id)
        with self._store.reading() as conn:
            return queries_jobs.count_jobs(conn, *mine)

    def job_batch_counts(self) -> JobBatchCounts:
        """See TenantJobs."""
        with self._store.reading() as conn:
            return queries_jobs.count_job_batches(conn, self._tenant)

    def cancel_job(self, number: int) -> Job:
        """See TenantJobs."""
        with self._store.writing() as conn:
            queries_jobs.cancel_jobs(conn, self._store.moment(), rows.c.tenant == self._tenant, rows.c.number == number)
            return job_of(queries_jobs.job_of_tenant(conn, self._tenant, number))

    def cancel_jobs(self, batch_id: BatchId) -> int:
        """See TenantJobs."""
        with self._store.writing() as conn:
            batch_of_tenant(conn, self._tenant, batch_id, is_locked=True)
            return queries_jobs.cancel_batch(conn, batch_id, self._store.moment())

    def retry_job(self, number: int, cut: ShardCut, source: str) -> Job:
        """See TenantJobs."""
        with self._store.writing() as conn:
            row = queries_jobs.require_retryable(conn, self._tenant, number)
            batch = batch_of_tenant(conn, self._tenant, row["batch_id"], even_deleted=True, is_locked=True)
            if batch["status"] is not BatchStatus.IN_PROGRESS:
                raise TransitionRefused(f"the job {number} is too old: its requests are no longer kept")
            line_number = batch["total_count"] + 1
            moved = msgspec.structs.replace(cut, first_line=line_number, first_index=batch["total_count"])
            append_shards(conn, batch, [moved], source=source, cancelling_at=None)
            queries_jobs.requeue_job(conn, number, line_number, self._store.moment())
            return job_of(queries_jobs.job_of_tenant(conn, self._tenant, number))

    def _told(self, conn: Connection, batch_id: BatchId) -> Batch:
        """Read a batch as it is shown. Raises: NotFound, also for one that takes in jobs."""
        row = batch_of_tenant(conn, self._tenant, batch_id)
        if row["is_intake"]:
            raise NotFound(f"no batch {batch_id}")
        (batch,) = queries_jobs.told(conn, [batch_of(row)])
        return batch
