"""Batches: made, shown, listed, cancelled, paused, resumed, retried, deleted."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from batchrunner.api.creating import INLINE_BYTES_MAX, BatchRequest, StrictBatchRequest, create, read_request
from batchrunner.api.envelope import Refusal, no_such_batch
from batchrunner.api.http import Answer, Call, Route, json_answer
from batchrunner.api.job_lines import job_counts_of
from batchrunner.api.paging import Page, next_token, page_of
from batchrunner.api.retrying import RetryRequest, read_retry, retry
from batchrunner.batch_object import BatchObject, strict_object
from batchrunner.errors import NotFound, TransitionRefused
from batchrunner.holdings import KeyScope
from batchrunner.lifecycle import TERMINAL, BatchEvent, BatchStatus, allows
from batchrunner.models import Batch, BatchId, PauseReason
from batchrunner.shared_object import SharedBatch, shared_object

_MOVES_AGAIN = 5
_CANCELLED = (BatchStatus.CANCELLING, BatchStatus.CANCELLED)
_RUNNING = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)


class ListBatches(msgspec.Struct, frozen=True):
    """The query of a listing."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    pagination_token: str | None = None


class BatchList(Page, frozen=True, kw_only=True):
    """A page of batches, newest first, as `data` and, the same ones, as `batches`; the next one is behind `last_id` or
    `pagination_token`.
    """

    data: tuple[SharedBatch, ...]
    batches: tuple[SharedBatch, ...]
    pagination_token: str | None


class StrictBatchList(Page, frozen=True, kw_only=True):
    """A page as OpenAI shows it."""

    data: tuple[BatchObject, ...]


class BatchDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of a deleted batch."""

    id: str
    object: Literal["batch"] = "batch"
    deleted: bool = True


def shown(call: Call, batch: Batch) -> SharedBatch:
    """Map a batch with what its workers do now. Blocks."""
    try:
        shares = call.scope.live(batch.id) if batch.status not in TERMINAL else []
    except NotFound:
        # It has ended and was deleted since it was read.
        shares = []
    counts = job_counts_of(call.scope, batch) if batch.has_jobs else None
    return shared_object(batch, shares, call.parts.clock.now(), prices=call.parts.prices, job_counts=counts)


def batch_of(call: Call) -> Batch:
    """Look up the batch that the path names. Blocks. Raises: Refusal."""
    batch_id = BatchId(call.path_params["batch_id"])
    try:
        return call.scope.batch(batch_id)
    except NotFound:
        raise no_such_batch(batch_id) from None


def _answer(call: Call, shared: SharedBatch) -> Answer:
    return json_answer(strict_object(shared) if call.is_strict else shared)


async def create_batch(call: Call) -> Answer:
    """Make a batch; that its lines are sound is found out by whoever validates it."""
    wanted = await read_request(call)
    return _answer(call, await call.blocking(lambda: shown(call, create(call, wanted))))


async def present_batch(call: Call, batch_id: str) -> Answer:
    """Show the batch that an earlier request with the same Idempotency-Key made."""
    return _answer(call, await call.blocking(lambda: shown(call, call.scope.batch(BatchId(batch_id)))))


async def retrieve_batch(call: Call) -> Answer:
    """Show one batch."""
    return _answer(call, await call.blocking(lambda: shown(call, batch_of(call))))


async def list_batches(call: Call) -> Answer:
    """Give a page of the tenant's batches, newest first."""
    wanted = call.parameters(ListBatches)
    after = wanted.after or (None if call.is_strict else wanted.pagination_token)
    found = await call.blocking(found_batches, call, limit=wanted.limit, after=after)
    if call.is_strict:
        return json_answer(page_of(StrictBatchList, list(map(strict_object, found)), limit=wanted.limit))
    token = next_token(found, limit=wanted.limit)
    shared = partial(BatchList, batches=tuple(found[: wanted.limit]), pagination_token=token)
    return json_answer(page_of(shared, found, limit=wanted.limit))


def found_batches(call: Call, *, limit: int, after: str | None) -> list[SharedBatch]:
    """Look up to one batch beyond the limit of a page. Blocks. Raises: Refusal."""
    try:
        found = call.scope.batches(limit=limit + 1, after=BatchId(after) if after is not None else None)
        return [shown(call, each) for each in found]
    except NotFound:
        raise no_such_batch(after or "") from None


async def cancel_batch(call: Call) -> Answer:
    """Cancel a batch; again is no error, after another end it is."""
    return _answer(call, await call.blocking(lambda: shown(call, cancelled(call))))


def cancelled(call: Call) -> Batch:
    """Cancel the batch that the path names. Blocks. Raises: Refusal."""
    for _ in range(_MOVES_AGAIN):
        batch = batch_of(call)
        if batch.status in _CANCELLED:
            return batch
        if batch.has_jobs and batch.status not in TERMINAL:
            # They end one by one, and any of them may be tried again.
            call.scope.cancel_jobs(batch.id)
            return batch_of(call)
        if not allows(batch.status, BatchEvent.CANCEL_REQUESTED):
            break
        try:
            call.scope.send(batch.id, BatchEvent.CANCEL_REQUESTED)
        except TransitionRefused:
            # It ended in between; the next look says how.
            continue
    else:
        raise Refusal("The batch changes too fast to be cancelled.", status=409, code="conflict", retry_after_s=1.0)
    raise _conflict("cancel", batch)


def _conflict(verb: str, batch: Batch) -> Refusal:
    """Source: recorded answer of the OpenAI API to a cancel of a completed batch."""
    return Refusal(f"Cannot {verb} a batch with status '{batch.status}'.", status=409)


async def pause_batch(call: Call) -> Answer:
    """Hold a batch; its deadline goes on."""

    def pause() -> SharedBatch:
        batch = batch_of(call)
        if batch.status not in _RUNNING:
            raise _conflict("pause", batch)
        call.scope.pause(batch.id, PauseReason.OPERATOR)
        return shown(call, batch_of(call))

    return _answer(call, await call.blocking(pause))


async def resume_batch(call: Call) -> Answer:
    """Let a batch go on that was paused, or that was parked after too many failures."""

    def resume() -> SharedBatch:
        batch = batch_of(call)
        if batch.status in TERMINAL:
            raise _conflict("resume", batch)
        call.scope.resume(batch.id)
        return shown(call, batch_of(call))

    return _answer(call, await call.blocking(resume))


async def close_batch(call: Call) -> Answer:
    """Let no more requests join an open batch, so that it ends when all are answered; again is no error."""

    def close() -> SharedBatch:
        batch = batch_of(call)
        call.scope.close_batch(batch.id)
        return shown(call, batch_of(call))

    return _answer(call, await call.blocking(close))


async def retry_batch(call: Call) -> Answer:
    """Make a batch of the lines of an ended one that failed, were cancelled or ran out of time."""
    wanted = await read_retry(call)
    async with call.parts.heavy:
        call.require_listener()
        return _answer(call, await call.blocking(lambda: shown(call, retry(call, batch_of(call), wanted))))


async def delete_batch(call: Call) -> Answer:
    """Hide a batch that is over; its files stay."""

    def delete() -> BatchDeleted:
        batch = batch_of(call)
        try:
            call.scope.delete_batch(batch.id)
        except TransitionRefused:
            raise _conflict("delete", batch) from None
        return BatchDeleted(id=batch.id)

    return json_answer(await call.blocking(delete))


ROUTES = (
    Route(
        method="POST",
        path="/v1/batches",
        handler=create_batch,
        summary="Create a batch from a file or from requests",
        scope=KeyScope.WRITE,
        request=BatchRequest,
        strict_request=StrictBatchRequest,
        answer=SharedBatch,
        strict_answer=BatchObject,
        body_bytes_max=INLINE_BYTES_MAX,
        present=present_batch,
    ),
    Route(
        method="GET",
        path="/v1/batches",
        handler=list_batches,
        summary="List batches, newest first",
        query=ListBatches,
        answer=BatchList,
        strict_answer=StrictBatchList,
    ),
    Route(
        method="GET",
        path="/v1/batches/{batch_id}",
        handler=retrieve_batch,
        summary="Show a batch with its progress",
        answer=SharedBatch,
        strict_answer=BatchObject,
    ),
    Route(
        method="POST",
        path="/v1/batches/{batch_id}/cancel",
        handler=cancel_batch,
        summary="Cancel a batch; finished results are kept",
        scope=KeyScope.WRITE,
        answer=SharedBatch,
        strict_answer=BatchObject,
    ),
    Route(
        method="POST",
        path="/v1/batches/{batch_id}/pause",
        handler=pause_batch,
        summary="Send no more requests of a batch until it is resumed; its deadline goes on",
        scope=KeyScope.WRITE,
        answer=SharedBatch,
        strict_answer=BatchObject,
    ),
    Route(
        method="POST",
        path="/v1/batches/{batch_id}/resume",
        handler=resume_batch,
        summary="Let a paused or blocked batch go on",
        scope=KeyScope.WRITE,
        answer=SharedBatch,
        strict_answer=BatchObject,
    ),
    Route(
        method="POST",
        path="/v1/batches/{batch_id}/close",
        handler=close_batch,
        summary="Let no more requests join an open batch; it ends when all are answered",
        scope=KeyScope.WRITE,
        answer=SharedBatch,
        strict_answer=BatchObject,
    ),
    Route(
        method="POST",
        path="/v1/batches/{batch_id}/retry",
        handler=retry_batch,
        summary="Run the failed lines of an ended batch again, as a batch linked to it",
        scope=KeyScope.WRITE,
        request=RetryRequest,
        answer=SharedBatch,
        strict_answer=BatchObject,
        present=present_batch,
    ),
    Route(
        method="DELETE",
        path="/v1/batches/{batch_id}",
        handler=delete_batch,
        summary="Delete a batch that is over; its files stay",
        scope=KeyScope.WRITE,
        answer=BatchDeleted,
    ),
)
