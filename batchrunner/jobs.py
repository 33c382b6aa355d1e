"""Async jobs as a Store keeps them: single requests that a caller follows by number, alone or as items of a batch.

A job is a line of a batch: of the one that it was made with, or of an open intake batch that takes those that come
alone. Its result stands in the journal, as that of any line; the row only says how it stands.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from batchrunner.additions import NewAddition
from batchrunner.holdings import NO_LIMITS, KeyLimits, Replay
from batchrunner.lifecycle import JobStatus
from batchrunner.models import Batch, BatchId, NewBatch, ShardCut

# So many jobs a batch has at most. Source: inference.club's batches.
JOBS_MAX = 256
# Jobs join an intake batch in this part of its life only: the last to join has the rest of it.
INTAKE_SHARE = 1 / 15


class InferenceType(StrEnum):
    """What a job makes. Source: inference.club's inference types, those that can be asked for."""

    LLM = "LLM"
    IMAGE = "IMAGE"
    VIDEO = "VIDEO"
    MUSIC = "MUSIC"
    TTS = "TTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A request that asks to be a job; `url` is its line's."""

    url: str
    inference_type: InferenceType
    model: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(NewJob):
    """One job. `line_number` is the line that stands for it now, in the batch that it is in: a retry gives it another.

    One that `is_single` came alone, and its batch is shown to nobody. `queued_at` is when its last try began to wait.
    """

    number: int
    batch_id: BatchId
    line_number: int
    is_single: bool
    status: JobStatus
    created_at: datetime
    queued_at: datetime
    ended_at: datetime | None
    retry_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobBatchCounts:
    """Batches with jobs by how these stand: all of them queued, some not over yet, all over."""

    waiting: int
    begun: int
    over: int


class TenantJobs(Protocol):
    """The part of a TenantScope that knows jobs. `lines` of what is made number from 1, as do their shards, and have no
    hashes; line n is job n - 1. Raises in every method that takes a number or a batch: NotFound.
    """

    def create_job_batch(
        self,
        new: NewBatch,
        lines: NewAddition,
        jobs: Sequence[NewJob],
        *,
        replay: Replay | None = None,
        limits: KeyLimits = NO_LIMITS,
    ) -> Batch:
        """Make a batch that is in progress, with its lines and its jobs, in one transaction. Whatever `new` is called,
        its id is a decimal number. `replay` and `limits` as in `create_batch`.

        Raises:
            QuotaExceeded.
        """

    def add_jobs(
        self, intake: NewBatch, lines: NewAddition, jobs: Sequence[NewJob], *, limits: KeyLimits = NO_LIMITS
    ) -> list[Job]:
        """Let jobs that come alone join the tenant's present intake batch, or one made of `intake`, in one transaction.

        Raises:
            QuotaExceeded.
        """

    def add_keyed_jobs(
        self,
        intake: NewBatch,
        lines: NewAddition,
        jobs: Sequence[NewJob],
        replays: Sequence[Replay],
        *,
        limits: KeyLimits = NO_LIMITS,
    ) -> list[Job | None]:
        """Do as `add_jobs`, for jobs that are noted under keys, no two of them the same.

        Where jobs were made under some of the keys before, these come back in their places, and None in all others:
        then nothing is made, and the blob of `lines` is given up.

        Raises:
            QuotaExceeded.
        """

    def job_made(self, replay: Replay) -> Job | None:
        """Give the job that was made under a key, None where none was or it is not kept any more."""

    def job(self, number: int) -> Job:
        """Look one up."""

    def jobs(
        self,
        *,
        limit: int,
        statuses: Collection[JobStatus] = (),
        batch_id: BatchId | None = None,
        before: int | None = None,
    ) -> list[Job]:
        """List jobs with one of these statuses, any without, of one batch or of all: newest first, those older than
        `before`.
        """

    def job_counts(self, batch_id: BatchId | None = None) -> Mapping[JobStatus, int]:
        """Count the jobs of a batch, or all, by status; every status is there."""

    def job_batch_counts(self) -> JobBatchCounts:
        """Count the batches that were made with jobs."""

    def cancel_job(self, number: int) -> Job:
        """End a job that is active; on any other it has no effect. Its line is not sent any more; a request under way
        is left to end, and its answer is not shown.
        """

    def cancel_jobs(self, batch_id: BatchId) -> int:
        """End those of a batch that are active, as `cancel_job` does, and tell how many these were. If there were any,
        the batch is shown as cancelled until one of its jobs is retried.
        """

    def retry_job(self, number: int, cut: ShardCut, source: str) -> Job:
        """Queue a job again: its line, which `cut` tells in the blob `source`, comes behind all others of its batch.

        Raises:
            TransitionRefused: it neither failed nor was canceled, or its batch has ended.
        """
