"""Requests that join an open batch one call after the other, and how each request of any batch stands."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta, Raw

from batchrunner import crash
from batchrunner.adding import Lines, join
from batchrunner.api.batches import batch_of
from batchrunner.api.creating import InlineRequest, sound_lines
from batchrunner.api.envelope import Refusal
from batchrunner.api.files import kept_blob
from batchrunner.api.http import Answer, Call, json_answer
from batchrunner.api.job_lines import jobs_by_line
from batchrunner.api.xai_results import LIMIT_MAX, XaiPage, place_in, token_of
from batchrunner.api.xai_words import URLS, State, XaiRequestMetadata, url_of
from batchrunner.errors import NotFound, TransitionRefused
from batchrunner.frames import Record, read_records, segment_of
from batchrunner.jobs import Job
from batchrunner.lifecycle import BatchStatus, JobStatus
from batchrunner.lines import iter_lines, model_of
from batchrunner.models import Batch, RecordKind, RequestLine, Shard
from batchrunner.settings import MIB
from batchrunner.shared_object import rfc3339
from batchrunner.validation import line_rules

# Source: xAI's limit of one request, which was that of one call before.
ADD_BYTES_MAX = 25 * MIB
# What is held of a request in memory is many times as large as the smallest one on the wire.
_ADD_REQUESTS_MAX = 100_000
_LINE = "l"
_PLACE = re.compile(r"(l)([0-9]{1,18})")
_ENDED: Mapping[BatchStatus, State] = {BatchStatus.CANCELLED: "cancelled", BatchStatus.EXPIRED: "failed"}
_OF_JOBS: Mapping[JobStatus, State] = {
    JobStatus.QUEUED: "pending",
    JobStatus.PROCESSING: "pending",
    JobStatus.PROCESSED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELED: "cancelled",
}


class XaiRequest(msgspec.Struct, frozen=True):
    """One request: the body under the key of its kind, and an id that is new to the batch; without one it gets one."""

    batch_request: Annotated[dict[str, Raw], Meta(extra_json_schema={"propertyNames": {"enum": list(URLS)}})]
    batch_request_id: Annotated[str, Meta(min_length=1)] | None = None


class AddRequests(msgspec.Struct, frozen=True):
    """The body of an addition."""

    batch_requests: Annotated[list[XaiRequest], Meta(min_length=1, max_length=_ADD_REQUESTS_MAX)]


class Added(msgspec.Struct, frozen=True):
    """The answer to an addition, which is empty."""


class XaiRequestPage(msgspec.Struct, frozen=True):
    """A page of requests in the order in which they came."""

    batch_request_metadata: list[XaiRequestMetadata]
    pagination_token: str | None


async def add_requests(call: Call) -> Answer:
    """Let requests join an open batch; they are kept, and begin to run, before this answers."""
    wanted = await call.json(AddRequests)
    await call.blocking(_add, call, wanted)
    return json_answer(Added())


async def present_addition(call: Call, _source: str) -> Answer:
    """Say again that requests have joined."""
    await call.blocking(batch_of, call)
    return json_answer(Added())


def _add(call: Call, wanted: AddRequests) -> None:
    batch = batch_of(call)
    if not batch.is_open or batch.has_jobs:
        # Told before anything is read; the store looks again.
        raise _closed(batch)
    requests = [_inline(call, number, each) for number, each in enumerate(wanted.batch_requests)]
    content, found = sound_lines(call, requests, param="batch_requests")
    name = f"added/{batch.id}/{call.parts.rng.token_hex(8)}"
    ids = [each.custom_id for each in requests]
    with kept_blob(call.parts, name, content):
        crash.point("add.stored")
        _join(call, batch, Lines(custom_ids=ids, source=name, shards=found.shards, model=found.model))


def _join(call: Call, batch: Batch, lines: Lines) -> None:
    parts = call.parts
    try:
        join(
            call.scope,
            parts.blobs,
            parts.open_batches.known_ids(batch.id),
            batch.id,
            lines,
            lines_max=parts.settings.lines_max,
            closes_at=parts.clock.now() + timedelta(seconds=parts.settings.open_idle_s),
            add=partial(call.scope.add_lines, batch.id, replay=call.replay, limits=call.limits),
        )
    except TransitionRefused:
        raise _closed(batch_of(call)) from None


def _closed(batch: Batch) -> Refusal:
    if batch.has_jobs:
        why = "it was made of jobs"
    elif batch.input_name is not None:
        why = "it was made of a file"
    else:
        why = f"it is closed, and its status '{batch.status}'"
    return Refusal(f"Batch '{batch.id}' takes no more requests: {why}.", param="batch_id", code="batch_closed")


def _inline(call: Call, number: int, request: XaiRequest) -> InlineRequest:
    """Turn a request into the line that somebody else would have written. Raises: Refusal."""
    place = f"batch_requests[{number}].batch_request"
    if len(request.batch_request) != 1:
        count = len(request.batch_request)
        raise Refusal(f"Invalid '{place}': it needs one key, the kind of request, and has {count}.", param=place)
    ((kind, body),) = request.batch_request.items()
    if kind not in URLS:
        raise Refusal(f"Invalid '{place}': the kind of request is none of {', '.join(URLS)}.", param=place)
    custom_id = request.batch_request_id
    if custom_id is None:
        custom_id = str(uuid.UUID(hex=call.parts.rng.token_hex(16), version=4))
    return InlineRequest(custom_id=custom_id, url=url_of(kind, body), body=body)


async def list_requests(call: Call) -> Answer:
    """Give a page of requests with their states."""
    return await call.blocking(_page, call, call.parameters(XaiPage))


def _page(call: Call, wanted: XaiPage) -> Answer:
    batch = batch_of(call)
    if batch.journal_ended_at is not None:
        raise Refusal(
            f"The requests of batch '{batch.id}' are no longer kept one by one; read its results.", status=410
        )
    first_line = place_in(wanted.pagination_token, _PLACE)[1] if wanted.pagination_token else 1
    limit = min(wanted.limit, LIMIT_MAX)
    shown: list[XaiRequestMetadata] = []
    jobs = jobs_by_line(call.scope, batch)
    for shard in _shards(call, batch, first_line, at_once=limit + 1):
        states = _states(call, shard, jobs) if len(shown) <= limit else {}
        for line in _lines(call, batch, shard):
            if line.line_number < first_line or (jobs is not None and line.line_number not in jobs):
                continue
            if len(shown) == limit:
                return json_answer(XaiRequestPage(shown, token_of(_LINE, line.line_number)))
            shown.append(_metadata(batch, line, states.get(line.line_number, _ENDED.get(batch.status, "pending"))))
    return json_answer(XaiRequestPage(shown, None))


def _shards(call: Call, batch: Batch, first_line: int, *, at_once: int) -> Iterator[Shard]:
    """Give the shards from a line on. Each has a line at least, so that a page needs no second look, unless a retry of
    jobs has left lines behind that stand for nobody.
    """
    seen = 0
    while True:
        found = call.scope.shards_from(batch.id, first_line, limit=at_once)
        shards = [each for each in found if each.first_line > seen]
        if not shards:
            return
        yield from shards
        seen = shards[-1].first_line
        first_line = seen + 1


def _lines(call: Call, batch: Batch, shard: Shard) -> Iterator[RequestLine]:
    rules = line_rules(call.parts.settings, endpoint=batch.endpoint)
    try:
        buffer = call.parts.blobs.read(shard.source or batch.source, shard.byte_start, shard.byte_end)
    except NotFound:
        message = (
            f"The input of batch '{batch.id}' was deleted, so that its requests cannot be listed; read its results."
        )
        raise Refusal(message, status=410) from None
    yield from iter_lines(buffer, shard.first_line, shard.skipped, rules)


def _states(call: Call, shard: Shard, jobs: Mapping[int, Job] | None) -> dict[int, State]:
    """Tell how those lines of a shard ended that have, and of jobs how they stand."""
    if jobs is not None:
        return {number: _OF_JOBS[job.status] for number, job in jobs.items()}
    found: dict[int, State] = {}
    for extent in call.scope.extents_at(shard.batch_id, shard.first_line):
        for each in read_records(call.parts.blobs, segment_of(extent), extent.byte_start, extent.byte_end):
            if isinstance(each, Record):
                found[each.line_number] = "succeeded" if each.kind is RecordKind.SUCCEEDED else "failed"
    return found


def _metadata(batch: Batch, line: RequestLine, state: State) -> XaiRequestMetadata:
    return XaiRequestMetadata(
        batch_request_id=line.custom_id,
        endpoint=line.url,
        model=model_of(line) or "",
        state=state,
        create_time=rfc3339(batch.created_at),
    )
