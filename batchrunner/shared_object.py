"""The batch that OpenAI's and xAI's clients both can read: the keys of both APIs on one object, and xAI's alone. One
of inference.club has its counts besides.

Source: the Batch objects of the OpenAI and of the xAI API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec
from msgspec import UNSET, UnsetType

from batchrunner.batch_object import BatchErrors, ExtendedBatch, batch_object, told_problems
from batchrunner.holdings import LiveShare
from batchrunner.lifecycle import BatchStatus, JobStatus
from batchrunner.models import Batch
from batchrunner.prices import Price, price_of

# The key of a batch's metadata that holds what xAI calls its name.
NAME = "name"
# And the one that holds inference.club's label.
LABEL = "label"


class RequestStates(msgspec.Struct, frozen=True, kw_only=True):
    """Requests by their state; they sum to `num_requests` at every instant. Expired ones count as errors."""

    num_requests: int
    num_pending: int
    num_success: int
    num_error: int
    num_cancelled: int


class EndpointCost(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests to one endpoint cost, in units of 1e-10 US dollars."""

    endpoint: str
    cost_usd_ticks: int
    request_count: int


class CostBreakdown(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch has cost so far, by the tokens that its upstream reported and the server's setting `prices`.

    Of a batch whose requests may go to several endpoints no parts are known.
    """

    total_cost_usd_ticks: int
    endpoint_costs: tuple[EndpointCost, ...]
    calculation_time: str


class SharedBatch(ExtendedBatch, frozen=True, kw_only=True):
    """A batch with every key of OpenAI, of xAI, and of ours; xAI's instants are RFC 3339. What stands behind them only
    batches of jobs have.
    """

    batch_id: str
    name: str
    create_time: str
    expire_time: str | None
    cancel_time: str | None
    create_api_key_id: str
    cancel_by_xai_message: str | None
    state: RequestStates
    cost_breakdown: CostBreakdown | None
    label: str | UnsetType = UNSET
    total: int | UnsetType = UNSET
    queued: int | UnsetType = UNSET
    processing: int | UnsetType = UNSET
    processed: int | UnsetType = UNSET
    failed: int | UnsetType = UNSET


class XaiBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as xAI shows it; `status` and `errors` are what OpenAI has, and ours to add."""

    batch_id: str
    name: str
    create_time: str
    expire_time: str | None
    cancel_time: str | None
    create_api_key_id: str
    cancel_by_xai_message: str | None
    state: RequestStates
    cost_breakdown: CostBreakdown | None
    input_file_id: str | UnsetType = UNSET
    status: str
    errors: BatchErrors | None


def shared_object(
    batch: Batch,
    shares: Sequence[LiveShare],
    now: datetime,
    *,
    prices: Sequence[Price] = (),
    job_counts: Mapping[JobStatus, int] | None = None,
) -> SharedBatch:
    """Map a batch to the wire, with its costs where there is a price for its model. One of jobs has `job_counts`."""
    extended = batch_object(batch, shares, now)
    cancelled_at = batch.cancelling_at or batch.failed_at
    given = {name: getattr(extended, name) for name in ExtendedBatch.__struct_fields__}
    return SharedBatch(
        **(given if job_counts is None else given | _jobs(batch, job_counts)),
        batch_id=batch.id,
        name=batch.metadata.get(NAME, ""),
        create_time=rfc3339(batch.created_at),
        expire_time=rfc3339(batch.deadline_at) if batch.deadline_at is not None else None,
        cancel_time=rfc3339(cancelled_at) if cancelled_at is not None else None,
        create_api_key_id=batch.created_by or "",
        cancel_by_xai_message=_why_failed(batch),
        state=RequestStates(
            num_requests=batch.total_count,
            num_pending=batch.pending_count,
            num_success=batch.succeeded_count,
            num_error=batch.failed_count + batch.expired_count,
            num_cancelled=batch.cancelled_count,
        ),
        cost_breakdown=_costs(batch, now, prices),
    )


def _jobs(batch: Batch, counts: Mapping[JobStatus, int]) -> dict[str, str | int]:
    """Say in inference.club's words how the jobs stand; those that were cancelled are in the total alone."""
    shown = (JobStatus.QUEUED, JobStatus.PROCESSING, JobStatus.PROCESSED, JobStatus.FAILED)
    states = {status.lower(): counts[status] for status in shown}
    return {"label": label_of(batch), "total": sum(counts.values()), **states}


def label_of(batch: Batch) -> str:
    """Give what a batch is called, by any of its clients."""
    return batch.metadata.get(LABEL) or batch.metadata.get(NAME, "")


def xai_object(shared: SharedBatch) -> XaiBatch:
    """Give the part of a batch that xAI has; only one that was made of a file names it."""
    given = {name: getattr(shared, name) for name in XaiBatch.__struct_fields__}
    return XaiBatch(**given | {"input_file_id": shared.input_file_id or UNSET})


def rfc3339(at: datetime) -> str:
    """Write an instant, which is in UTC."""
    return at.isoformat().replace("+00:00", "Z")


def _costs(batch: Batch, now: datetime, prices: Sequence[Price]) -> CostBreakdown | None:
    price = price_of(batch.model, prices)
    if price is None:
        return None
    usage = batch.usage
    ticks = price.cost_ticks(
        input_tokens=usage.input_tokens, cached_tokens=usage.cached_tokens, output_tokens=usage.output_tokens
    )
    done = batch.succeeded_count + batch.failed_count - batch.refused_count
    parts = [EndpointCost(endpoint=batch.endpoint, cost_usd_ticks=ticks, request_count=done)] if batch.endpoint else []
    return CostBreakdown(total_cost_usd_ticks=ticks, endpoint_costs=tuple(parts), calculation_time=rfc3339(now))


def _why_failed(batch: Batch) -> str | None:
    """Tell in one sentence why a batch never ran: xAI cancels those whose file is not sound."""
    if batch.status is not BatchStatus.FAILED:
        return None
    first = told_problems(batch)[0]
    place = "" if first.line_number is None else f"line {first.line_number}: "
    rest = batch.problem_count - 1
    return f"{place}{first.message}" + (f" ({rest} more in errors)" if rest > 0 else "")
