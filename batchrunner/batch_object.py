"""A Batch as it stands on the wire: one total mapping, its keys in the order in which OpenAI prints them.

Source: the Batch object of the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Literal

import msgspec

from batchrunner.errors import OwnError
from batchrunner.holdings import LiveShare
from batchrunner.lifecycle import BatchStatus
from batchrunner.models import Batch, LineProblem, OnInvalid, OnUnknown, Order, Usage
from batchrunner.progress import Progress, code_of, is_paused, progress_of, seconds_of

# Every status of ours by its word on the wire.
STATUSES: Mapping[BatchStatus, str] = MappingProxyType(
    {
        BatchStatus.VALIDATING: "validating",
        BatchStatus.IN_PROGRESS: "in_progress",
        BatchStatus.FINALIZING: "finalizing",
        BatchStatus.CANCELLING: "cancelling",
        BatchStatus.COMPLETED: "completed",
        BatchStatus.FAILED: "failed",
        BatchStatus.EXPIRED: "expired",
        BatchStatus.CANCELLED: "cancelled",
    }
)
_GAVE_UP = "The server could not finish this batch; what is done is kept."


class BatchError(msgspec.Struct, frozen=True):
    """One entry of `errors.data`; `line` counts from 1 and is null where the whole file is meant."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed."""

    object: Literal["list"] = "list"
    data: tuple[BatchError, ...]


class RequestCounts(msgspec.Struct, frozen=True):
    """Lines; expired and cancelled ones are in neither `completed` nor `failed`."""

    total: int
    completed: int
    failed: int


class InputDetails(msgspec.Struct, frozen=True):
    """A part of the input tokens."""

    cached_tokens: int


class OutputDetails(msgspec.Struct, frozen=True):
    """A part of the output tokens."""

    reasoning_tokens: int


class BatchUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the upstream reported them."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as OpenAI shows it: instants are whole seconds since 1970, what is not there is null."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class ExtendedBatch(BatchObject, frozen=True, kw_only=True):
    """A batch with everything that there is to see; what OpenAI does not have stands behind what it has."""

    parent_id: str | None
    on_invalid: OnInvalid
    on_unknown: OnUnknown
    order: Order
    priority: int
    webhook_url: str | None
    paused_reason: str | None
    paused_at: int | None
    blocked_by: str | None
    progress: Progress


def batch_object(batch: Batch, shares: Sequence[LiveShare], now: datetime) -> ExtendedBatch:
    """Map a batch to the wire."""
    return ExtendedBatch(
        id=batch.id,
        endpoint=batch.endpoint or "",
        model=batch.model,
        errors=_errors(batch),
        input_file_id=batch.input_name or batch.input_file_id or "",
        completion_window=batch.completion_window or "",
        status=STATUSES[batch.status],
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=seconds_of(batch.created_at),
        in_progress_at=seconds_of(batch.in_progress_at),
        expires_at=_expires_at(batch),
        finalizing_at=seconds_of(batch.finalizing_at),
        completed_at=seconds_of(batch.completed_at),
        failed_at=seconds_of(batch.failed_at),
        expired_at=seconds_of(batch.expired_at),
        cancelling_at=seconds_of(batch.cancelling_at),
        cancelled_at=seconds_of(batch.cancelled_at),
        request_counts=RequestCounts(batch.total_count, batch.succeeded_count, batch.failed_count),
        usage=_usage(batch.usage),
        metadata=batch.metadata or None,
        parent_id=batch.parent_id,
        on_invalid=batch.on_invalid,
        on_unknown=batch.on_unknown,
        order=batch.order,
        priority=batch.priority,
        webhook_url=batch.webhook_url,
        paused_reason=batch.paused_reason if is_paused(batch) else None,
        paused_at=seconds_of(batch.paused_at) if is_paused(batch) else None,
        blocked_by=code_of(batch.blocked_by),
        progress=progress_of(batch, shares, now),
    )


def strict_object(extended: ExtendedBatch) -> BatchObject:
    """Give the part of a batch that OpenAI has."""
    return BatchObject(**{name: getattr(extended, name) for name in BatchObject.__struct_fields__})


def _errors(batch: Batch) -> BatchErrors | None:
    """Only a batch that failed has any; one that was given up did not fail by its input."""
    if batch.status is not BatchStatus.FAILED:
        return None
    data = tuple(BatchError(each.code, each.message, each.param, each.line_number) for each in told_problems(batch))
    return BatchErrors(data=data)


def _expires_at(batch: Batch) -> int | None:
    """Give the second of the deadline, as far behind the second of the create as was asked for: a window of 24 hours
    must not look like one of a second less, because the two were read from the clock one after the other.
    """
    if batch.deadline_at is None:
        return None
    return int(batch.created_at.timestamp()) + round((batch.deadline_at - batch.created_at).total_seconds())


def told_problems(batch: Batch) -> tuple[LineProblem, ...]:
    """Give what a failed batch lists; in what way we failed it is for the log."""
    gave_up = LineProblem(OwnError.code, _GAVE_UP, None, None)
    return tuple(gave_up if each.code == OwnError.code else each for each in batch.problems) or (gave_up,)


def _usage(usage: Usage) -> BatchUsage:
    return BatchUsage(
        input_tokens=usage.input_tokens,
        input_tokens_details=InputDetails(usage.cached_tokens),
        output_tokens=usage.output_tokens,
        output_tokens_details=OutputDetails(usage.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )
