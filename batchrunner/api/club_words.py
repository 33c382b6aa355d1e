"""inference.club's words for ours: errors, batches and jobs as its clients read them. Pure.

Source: inference.club's API pages, Batches and Async jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Self

import msgspec
from msgspec import UNSET, Raw, UnsetType

from batchrunner.api.envelope import UNPARSEABLE_JSON, ErrorBody, Refusal
from batchrunner.batch_object import RequestCounts
from batchrunner.grouping import read_failure
from batchrunner.jobs import InferenceType, Job
from batchrunner.lifecycle import ACTIVE_JOBS, TERMINAL, BatchStatus, JobStatus
from batchrunner.models import Batch, LineCode
from batchrunner.progress import seconds_of
from batchrunner.settings import Settings
from batchrunner.shared_object import label_of, rfc3339

ASYNC_DISABLED, CONFLICT, NO_PROVIDER = "async_disabled", "conflict", "no_provider"
TOO_LARGE, UPSTREAM_ERROR = "too_large", "upstream_error"
# Codes of ours that have a word of their own; of the others the status tells.
_CODES: Mapping[str, str] = MappingProxyType(
    {
        ASYNC_DISABLED: ASYNC_DISABLED,
        TOO_LARGE: TOO_LARGE,
        "model_not_found": NO_PROVIDER,
        "idempotency_running": CONFLICT,
    }
)
_STATUSES: Mapping[int, str] = MappingProxyType(
    {
        403: "forbidden",
        404: "not_found",
        409: CONFLICT,
        410: "not_found",
        413: TOO_LARGE,
        429: "rate_limited",
        500: "server_error",
        502: UPSTREAM_ERROR,
        503: "unavailable",
        504: UPSTREAM_ERROR,
    }
)

ClubStatus = Literal["PENDING", "PROCESSING", "DONE"]
# How a batch stands that was not made of jobs; where nothing of it has begun it is still pending.
STATUSES: Mapping[BatchStatus, ClubStatus] = MappingProxyType(
    {
        BatchStatus.VALIDATING: "PENDING",
        BatchStatus.IN_PROGRESS: "PROCESSING",
        BatchStatus.FINALIZING: "PROCESSING",
        BatchStatus.CANCELLING: "PROCESSING",
        BatchStatus.COMPLETED: "DONE",
        BatchStatus.FAILED: "DONE",
        BatchStatus.EXPIRED: "DONE",
        BatchStatus.CANCELLED: "DONE",
    }
)
_BEGINNING = frozenset({BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS})


class ClubMembers(msgspec.Struct, frozen=True):
    """What an error says."""

    message: str
    type: str


class ClubError(ErrorBody, frozen=True, kw_only=True):
    """The body of every answer that is an error: `detail` where nobody is known to have asked, or nothing that could be
    read; `error` otherwise.
    """

    error: ClubMembers | UnsetType = UNSET
    detail: str | UnsetType = UNSET

    @classmethod
    def of(cls, refusal: Refusal) -> Self:
        """Say what was refused."""
        if refusal.status == 401 or refusal.message == UNPARSEABLE_JSON:
            return cls(detail=refusal.message)
        kind = _CODES.get(refusal.code or "") or _STATUSES.get(refusal.status, "invalid_request")
        return cls(error=ClubMembers(refusal.message, kind))


def require_async(settings: Settings) -> None:
    """Raises: Refusal when the operator takes no jobs."""
    if not settings.async_enabled:
        message = "Async jobs are not enabled on this server."
        raise Refusal(message, status=503, kind=ASYNC_DISABLED, code=ASYNC_DISABLED)


class ClubBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch and how its jobs stand; the five others sum to `total` at every instant."""

    id: str
    label: str
    status: ClubStatus
    total: int
    queued: int
    processing: int
    processed: int
    failed: int
    created: int
    canceled: int
    created_at: int
    request_counts: RequestCounts
    object: Literal["batch"] = "batch"


class ClubBatchJob(msgspec.Struct, frozen=True):
    """A job of a batch; `/v1/jobs/{id}` has its result."""

    id: str
    status: JobStatus
    inference_type: InferenceType


class ClubBatchDetails(ClubBatch, frozen=True, kw_only=True):
    """A batch with its jobs, in the order of its requests; one that another dialect made has none."""

    jobs: tuple[ClubBatchJob, ...]


class ClubFailure(msgspec.Struct, frozen=True):
    """Why a job failed. `kind` is `upstream_error` for whatever the upstream answered, `no_provider`, or a code of a
    result line.
    """

    message: str
    kind: str


# What has no answer, and gets none any more.
EXPIRED = ClubFailure("It was not done within the time for which jobs are kept.", str(LineCode.BATCH_EXPIRED))


class ClubJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job. Once PROCESSED it has what the upstream answered, or where the media are that were made; all of them only
    where there are several. Once FAILED it says why.
    """

    id: str
    object: Literal["inference.job"] = "inference.job"
    status: JobStatus
    inference_type: InferenceType
    model: str | None
    created: int
    queued_at: str
    finished_at: str | UnsetType = UNSET
    batch_id: str | UnsetType = UNSET
    result: Raw | UnsetType = UNSET
    result_url: str | UnsetType = UNSET
    result_urls: list[str] | UnsetType = UNSET
    error: ClubFailure | UnsetType = UNSET


def inference_type_of(url: str) -> InferenceType:
    """Tell what an endpoint makes; what is none of the media is text, or about text."""
    match url.split("/")[2:]:
        case ["images", *_]:
            return InferenceType.IMAGE
        case ["videos", *_]:
            return InferenceType.VIDEO
        case ["music", *_]:
            return InferenceType.MUSIC
        case ["audio", "speech"]:
            return InferenceType.TTS
        case _:
            return InferenceType.LLM


def counts_of(batch: Batch, *, in_flight: int) -> Mapping[JobStatus, int]:
    """Count the lines of a batch that was not made of jobs as if they were some."""
    pending = batch.pending_count
    # What never ran of a batch that failed as a whole never will.
    unrun = pending if batch.status in TERMINAL else 0
    processing = min(pending - unrun, in_flight)
    return {
        JobStatus.QUEUED: pending - unrun - processing,
        JobStatus.PROCESSING: processing,
        JobStatus.PROCESSED: batch.succeeded_count,
        JobStatus.FAILED: batch.failed_count + batch.expired_count + unrun,
        JobStatus.CANCELED: batch.cancelled_count,
    }


def club_batch(batch: Batch, counts: Mapping[JobStatus, int]) -> ClubBatch:
    """Show a batch whose jobs stand so."""
    # Of a batch that was not made of jobs these are the counts of the other views, in which expired lines did not fail.
    failed = counts[JobStatus.FAILED] if batch.has_jobs else batch.failed_count
    return ClubBatch(
        id=batch.id,
        label=label_of(batch),
        status=_status_of(batch, counts),
        total=sum(counts.values()),
        queued=counts[JobStatus.QUEUED],
        processing=counts[JobStatus.PROCESSING],
        processed=counts[JobStatus.PROCESSED],
        failed=counts[JobStatus.FAILED],
        created=seconds_of(batch.created_at),
        canceled=counts[JobStatus.CANCELED],
        created_at=seconds_of(batch.created_at),
        request_counts=RequestCounts(sum(counts.values()), counts[JobStatus.PROCESSED], failed),
    )


def _status_of(batch: Batch, counts: Mapping[JobStatus, int]) -> ClubStatus:
    if counts[JobStatus.QUEUED] == sum(counts.values()) and batch.status in _BEGINNING:
        return "PENDING"
    if batch.has_jobs or batch.status is BatchStatus.FINALIZING:
        return "PROCESSING" if any(counts[each] for each in ACTIVE_JOBS) else "DONE"
    return STATUSES[batch.status]


def club_job(job: Job) -> ClubJob:
    """Show a job, without what came of it."""
    return ClubJob(
        id=str(job.number),
        status=job.status,
        inference_type=job.inference_type,
        model=job.model,
        created=seconds_of(job.created_at),
        queued_at=rfc3339(job.queued_at),
        finished_at=rfc3339(job.ended_at) if job.ended_at is not None else UNSET,
        batch_id=UNSET if job.is_single else job.batch_id,
    )


def failure_of(line: bytes) -> ClubFailure:
    """Say why a line failed."""
    failure = read_failure(msgspec.json.decode(line, type=dict[str, object]))
    if failure.status is not None:
        return ClubFailure(failure.message or f"The upstream answered HTTP {failure.status}.", UPSTREAM_ERROR)
    kind = NO_PROVIDER if failure.code == LineCode.MODEL_NOT_SERVED else failure.code
    return ClubFailure(failure.message or failure.code, kind)


def club_batch_job(job: Job) -> ClubBatchJob:
    """Show a job beside its batch."""
    return ClubBatchJob(str(job.number), job.status, job.inference_type)
