"""inference.club's API: its batches, its routes, what they take, and which requests to the root are its own.

Source: inference.club's API pages, Batches.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta, Raw

from batchrunner import crash
from batchrunner.additions import NewAddition
from batchrunner.api import club_jobs
from batchrunner.api.batches import batch_of, cancelled
from batchrunner.api.club_words import (
    TOO_LARGE,
    ClubBatch,
    ClubBatchDetails,
    ClubError,
    club_batch,
    club_batch_job,
    counts_of,
    inference_type_of,
    require_async,
)
from batchrunner.api.creating import INLINE_BYTES_MAX, InlineRequest, require_shape, shape_of, sound_lines
from batchrunner.api.envelope import Refusal, invalid_value, wrong_method
from batchrunner.api.files import kept_blob
from batchrunner.api.http import Answer, Call, Route, json_answer
from batchrunner.api.job_lines import job_counts_of, jobs_of, request_id
from batchrunner.api.live import FORM_URLS
from batchrunner.errors import NotFound
from batchrunner.holdings import KeyScope
from batchrunner.jobs import JOBS_MAX, NewJob
from batchrunner.lifecycle import TERMINAL, JobStatus
from batchrunner.live import Asked, read_asked
from batchrunner.models import CLUB, Batch, BatchId, NewBatch
from batchrunner.settings import Settings
from batchrunner.shared_object import LABEL

_LABEL_CHARS_MAX = 160
_LISTED_MAX = 50


class ClubRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request: where it goes, and what is sent there."""

    endpoint: str
    body: Raw


class ClubBatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a create, with 1 to 256 requests: each becomes a job."""

    label: Annotated[str, Meta(max_length=_LABEL_CHARS_MAX)] | None = None
    requests: Annotated[list[ClubRequest], Meta(min_length=1)]


class ClubBatchList(msgspec.Struct, frozen=True):
    """The newest batches, newest first."""

    data: list[ClubBatch]


async def create_batch(call: Call) -> Answer:
    """Make a batch and its jobs; all are kept, and begin to run, before this answers."""
    require_async(call.parts.settings)
    await require_shape(call)
    wanted = await call.json(ClubBatchRequest)
    return json_answer(await call.blocking(lambda: _shown(call, _create(call, wanted))), status=202)


async def present_batch(call: Call, batch_id: str) -> Answer:
    """Show the batch that an earlier request with the same Idempotency-Key made."""
    return json_answer(await call.blocking(lambda: _shown(call, call.scope.batch(BatchId(batch_id)))), status=202)


async def list_batches(call: Call) -> Answer:
    """Give the tenant's newest batches, whoever made them."""
    require_async(call.parts.settings)
    return json_answer(await call.blocking(_listed, call))


async def retrieve_batch(call: Call) -> Answer:
    """Show one batch with its jobs."""
    require_async(call.parts.settings)
    return json_answer(await call.blocking(lambda: _details(call, batch_of(call))))


async def cancel_batch(call: Call) -> Answer:
    """Cancel what has not ended of a batch; where nothing is left that is no error."""
    require_async(call.parts.settings)
    return json_answer(await call.blocking(lambda: _details(call, _cancelled(call))))


async def cancel_batch_here(call: Call) -> Answer:
    """Cancel a batch by a POST to itself; at the root only one of inference.club."""
    if not call.is_pure and not await is_clubs(call):
        raise wrong_method("POST", call.path, ["DELETE", "GET", "HEAD", "OPTIONS"])
    return await cancel_batch(call)


async def is_create(call: Call) -> bool:
    """Tell by its keys whether a create is inference.club's."""
    return await shape_of(call) == CLUB


async def is_clubs(call: Call) -> bool:
    """Tell whether a batch is inference.club's: no other has a number for its id."""
    batch_id = call.path_params["batch_id"]
    return batch_id.isascii() and batch_id.isdecimal()


def _create(call: Call, wanted: ClubBatchRequest) -> Batch:
    if len(wanted.requests) > JOBS_MAX:
        message = f"A batch takes {JOBS_MAX} requests at most, and this one has {len(wanted.requests)}."
        raise Refusal(message, param="requests", code=TOO_LARGE)
    asked = [_asked(call, number, each) for number, each in enumerate(wanted.requests)]
    requests = [
        InlineRequest(custom_id=request_id(number), url=each.endpoint, body=Raw(body))
        for number, (each, (_, _, body)) in enumerate(zip(wanted.requests, asked, strict=True))
    ]
    content, found = sound_lines(call, requests, param="requests")
    name = f"jobs/{call.parts.rng.token_hex(16)}"
    lines = NewAddition(first_line=1, source=name, id_hashes=b"", shards=found.shards, model=found.model)
    jobs = [
        NewJob(url=each.endpoint, inference_type=inference_type_of(each.endpoint), model=model)
        for each, (model, _, _) in zip(wanted.requests, asked, strict=True)
    ]
    new = _new_batch(call, wanted)
    with kept_blob(call.parts, name, content):
        crash.point("job.stored")
        made = call.scope.create_job_batch(new, lines, jobs, replay=call.replay, limits=call.limits)
        crash.point("job.joined")
    return made


def endpoints_of(settings: Settings) -> tuple[str, ...]:
    """Give where jobs may go: what takes a form is answered at once only."""
    return tuple(each for each in settings.endpoints if each not in FORM_URLS)


def _asked(call: Call, number: int, request: ClubRequest) -> Asked:
    """Take the word `async` out of a request. Raises: Refusal."""
    supported = endpoints_of(call.parts.settings)
    if request.endpoint not in supported:
        place = f"{request_id(number)}.endpoint"
        shown = request.endpoint[:100] if request.endpoint.isprintable() else ""
        raise Refusal(f"Invalid '{place}': {invalid_value(place, shown, supported).message}", param=place)
    try:
        return read_asked(bytes(request.body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # What is wrong with it is told by whoever judges it as a line.
        return Asked(None, False, bytes(request.body))


def _new_batch(call: Call, wanted: ClubBatchRequest) -> NewBatch:
    return NewBatch(
        # The Store gives it a number.
        id=BatchId(""),
        tenant=call.tenant,
        dialect=CLUB,
        endpoint=None,
        input_file_id=None,
        source="",
        completion_window=None,
        deadline_at=call.parts.clock.now() + timedelta(seconds=call.parts.settings.job_retention_s),
        metadata={LABEL: wanted.label} if wanted.label else {},
        is_open=True,
        created_by=call.key.id if call.key is not None else None,
    )


def _shown(call: Call, batch: Batch) -> ClubBatch:
    """Show a batch. Blocks."""
    if batch.has_jobs:
        return club_batch(batch, job_counts_of(call.scope, batch))
    try:
        shares = call.scope.live(batch.id) if batch.status not in TERMINAL else []
    except NotFound:
        # It has ended and was deleted since it was read.
        shares = []
    return club_batch(batch, counts_of(batch, in_flight=sum(each.in_flight for each in shares)))


def _details(call: Call, batch: Batch) -> ClubBatchDetails:
    """Show a batch with its jobs, all as they stood at one instant. Blocks."""
    if not batch.has_jobs or batch.journal_ended_at is not None:
        # Jobs go with the journal of their batch; its counts stay.
        return ClubBatchDetails(**msgspec.structs.asdict(_shown(call, batch)), jobs=())
    jobs = jobs_of(call.scope, batch)
    counts = dict.fromkeys(JobStatus, 0) | Counter(job.status for job in jobs)
    shown = club_batch(batch, counts)
    return ClubBatchDetails(**msgspec.structs.asdict(shown), jobs=tuple(map(club_batch_job, jobs)))


def _listed(call: Call) -> ClubBatchList:
    return ClubBatchList([_shown(call, each) for each in call.scope.batches(limit=_LISTED_MAX)])


def _cancelled(call: Call) -> Batch:
    """Cancel the batch that the path names, unless it has ended. Raises: Refusal."""
    batch = batch_of(call)
    return batch if batch.status in TERMINAL else cancelled(call)


_route = partial(Route, dialect=CLUB, error=ClubError)
_BATCH = "/club/v1/batches/{batch_id}"

ROUTES = (
    _route(
        method="POST",
        path="/club/v1/batches",
        handler=create_batch,
        summary="Create a batch of 1 to 256 requests, each of which becomes a job",
        scope=KeyScope.WRITE,
        request=ClubBatchRequest,
        accepted=ClubBatch,
        body_bytes_max=INLINE_BYTES_MAX,
        present=present_batch,
        recognizes=is_create,
    ),
    _route(
        method="GET",
        path="/club/v1/batches",
        handler=list_batches,
        summary="List the newest 50 batches, newest first",
        answer=ClubBatchList,
    ),
    _route(
        method="GET",
        path=_BATCH,
        handler=retrieve_batch,
        summary="Show a batch with its jobs",
        answer=ClubBatchDetails,
        recognizes=is_clubs,
    ),
    _route(
        method="POST",
        path=_BATCH,
        handler=cancel_batch_here,
        summary="Cancel the jobs of a batch that have not ended",
        scope=KeyScope.WRITE,
        answer=ClubBatchDetails,
    ),
    _route(
        method="POST",
        path=f"{_BATCH}/cancel",
        handler=cancel_batch,
        summary="Cancel the jobs of a batch that have not ended",
        scope=KeyScope.WRITE,
        answer=ClubBatchDetails,
        recognizes=is_clubs,
    ),
    *club_jobs.ROUTES,
)
