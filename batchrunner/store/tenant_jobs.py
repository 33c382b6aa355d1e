"""A tenant's jobs in an SQL store: which transaction answers which method."""

from __future__ import annotations

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
from batchrunner.store import queries_blobs, queries_jobs
from batchrunner.store.moments import Moment
from batchrunner.store.queries_additions import append, append_shards
from batchrunner.store.queries_batches import batch_of_tenant, create_batch, require_lines
from batchrunner.store.rows import batch_of, job_of
from batchrunner.store.tables import jobs as rows
from batchrunner.store.tenant_lines import SqlTenantLines


class _MadeBefore(Exception):
    """The same key has made a job already: nothing of the transaction may stay."""

    def __init__(self, number: str) -> None:
        super().__init__(number)
        self.number = number


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
        self,
        intake: NewBatch,
        lines: NewAddition,
        jobs: Sequence[NewJob],
        *,
        replay: Replay | None = None,
        limits: KeyLimits = NO_LIMITS,
    ) -> list[Job]:
        """See TenantJobs."""
        self._require_own(intake.tenant, intake.id)
        try:
            with self._store.writing() as conn:
                moment = self._store.moment()
                row = queries_jobs.intake_of_tenant(conn, self._tenant, moment)
                if row is None:
                    row = create_batch(conn, intake, moment, replay=None, limits=NO_LIMITS)
                added = self._let_in(conn, row, lines, jobs, moment=moment, limits=limits)
                number = str(added[0].number)
                if (made := self._made(conn, replay, number, moment)) != number:
                    raise _MadeBefore(made)
                return added
        except _MadeBefore as before:
            with self._store.writing() as conn:
                queries_blobs.abandon_blob(conn, lines.source)
                return [job_of(queries_jobs.job_of_tenant(conn, self._tenant, int(before.number)))]

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
            batch_of_tenant(conn, self._tenant, batch_id)
            return queries_jobs.cancel_jobs(conn, self._store.moment(), rows.c.batch_id == batch_id)

    def retry_job(self, number: int, cut: ShardCut, source: str) -> Job:
        """See TenantJobs."""
        with self._store.writing() as conn:
            row = queries_jobs.require_retryable(conn, self._tenant, number)
            batch = batch_of_tenant(conn, self._tenant, row["batch_id"], even_deleted=True, is_locked=True)
            if batch["status"] is not BatchStatus.IN_PROGRESS:
                raise TransitionRefused(f"the job {number} is too old: its requests are no longer kept")
            line_number = batch["total_count"] + 1
            moved = msgspec.structs.replace(cut, first_line=line_number, first_index=batch["total_count"])
            append_shards(conn, batch, [moved], source=source)
            queries_jobs.requeue_job(conn, number, line_number, self._store.moment())
            return job_of(queries_jobs.job_of_tenant(conn, self._tenant, number))

    def _told(self, conn: Connection, batch_id: BatchId) -> Batch:
        """Read a batch as it is shown. Raises: NotFound, also for one that takes in jobs."""
        row = batch_of_tenant(conn, self._tenant, batch_id)
        if row["is_intake"]:
            raise NotFound(f"no batch {batch_id}")
        (batch,) = queries_jobs.told(conn, [batch_of(row)])
        return batch
