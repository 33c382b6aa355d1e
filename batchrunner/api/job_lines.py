"""Lines of a batch of jobs: which stand for a job now. One that was retried has left its former ones, and one that was
canceled shows no result.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchrunner.jobs import JOBS_MAX, Job
from batchrunner.lifecycle import JobStatus
from batchrunner.models import Batch
from batchrunner.ports import TenantScope


def request_id(place: int) -> str:
    """Name the request of a create that stands at a place, as its custom_id and in what is said of it."""
    return f"requests[{place}]"


def jobs_of(scope: TenantScope, batch: Batch) -> list[Job]:
    """Give the jobs of a batch, in the order of its requests. Blocks."""
    return scope.jobs(limit=JOBS_MAX, batch_id=batch.id)[::-1]


def job_counts_of(scope: TenantScope, batch: Batch) -> Mapping[JobStatus, int]:
    """Count the jobs of a batch by status, also when they are no longer kept. Blocks."""
    if batch.pending_count:
        return scope.job_counts(batch.id)
    return {
        JobStatus.QUEUED: 0,
        JobStatus.PROCESSING: 0,
        JobStatus.PROCESSED: batch.succeeded_count,
        JobStatus.FAILED: batch.failed_count,
        JobStatus.CANCELED: batch.cancelled_count,
    }


def jobs_by_line(scope: TenantScope, batch: Batch) -> Mapping[int, Job] | None:
    """Give the jobs of a batch by the numbers of their lines; None where lines are no jobs. Blocks."""
    return {each.line_number: each for each in jobs_of(scope, batch)} if batch.has_jobs else None


def shown_lines(scope: TenantScope, batch: Batch) -> frozenset[int] | None:
    """Give the numbers of lines whose results are shown; None where all are. Blocks."""
    jobs = jobs_by_line(scope, batch)
    if jobs is None:
        return None
    return frozenset(number for number, job in jobs.items() if job.status is not JobStatus.CANCELED)
