"""The retry of an ended batch: which of its lines run again, and the linked batch that runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import timedelta
from typing import Annotated

import msgspec
from msgspec import Meta

from batchrunner.adding import joined
from batchrunner.api.chain import chosen_numbers, healed_ids
from batchrunner.api.creating import Metadata, Priority, Window, check_priority, window_s
from batchrunner.api.envelope import Refusal
from batchrunner.api.file_object import BATCH
from batchrunner.api.files import OWNER, BlobSink, new_file
from batchrunner.api.http import Call
from batchrunner.api.webhooks import Url, check_url
from batchrunner.choosing import failed_ids, lines_of, write_chosen
from batchrunner.errors import NotFound, TransitionRefused
from batchrunner.lifecycle import TERMINAL, BatchStatus
from batchrunner.models import Batch, BatchId, File, FileId, NewBatch
from batchrunner.pipeline import give_up, read_blob
from batchrunner.seal import refused_numbers

_CHOICES_MAX = 100_000
_TRIES = 3


class RetryRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a retry, which may be empty: every line without a result of its own runs again.

    `codes` are those of the error file or of `/errors`, or HTTP statuses such as `429`. What is not given is as in the
    first batch.
    """

    codes: Annotated[list[str], Meta(min_length=1, max_length=_CHOICES_MAX)] | None = None
    custom_ids: Annotated[list[str], Meta(min_length=1, max_length=_CHOICES_MAX)] | None = None
    completion_window: Window | None = None
    priority: Priority | None = None
    metadata: Metadata | None = None
    webhook_url: Url | None = None


async def read_retry(call: Call) -> RetryRequest:
    """Read and check the body. Raises: Refusal."""
    wanted = await call.json_if_any(RetryRequest)
    if wanted.completion_window is not None:
        window_s(wanted.completion_window, is_strict=call.is_strict)
    if wanted.priority is not None:
        check_priority(call, wanted.priority)
    check_url(call.parts, wanted.webhook_url, param="webhook_url")
    return wanted


def retry(call: Call, parent: Batch, wanted: RetryRequest) -> Batch:
    """Make the linked batch. Blocks, for as long as it takes to read the input.

    Raises:
        Refusal: the batch is not over, nothing of it can run again, or a line is under way in another retry.
        QuotaExceeded: the key's limits are reached.
    """
    for _ in range(_TRIES):
        try:
            return _retry(call, parent, wanted)
        except TransitionRefused:
            # Another retry came in between: it counts.
            continue
    message = "The batch is retried by others just now; see what they took, then ask again."
    raise Refusal(message, status=409, code="conflict", retry_after_s=1.0)


def _retry(call: Call, parent: Batch, wanted: RetryRequest) -> Batch:
    if parent.status not in TERMINAL or parent.status is BatchStatus.FAILED:
        raise Refusal(f"Cannot retry a batch with status '{parent.status}'.", status=409)
    if parent.has_jobs:
        message = "Each request of this batch is a job: retry those that failed."
        raise Refusal(message, status=409, code="not_retryable")
    family = [each for each in call.scope.family(parent.id) if each.deleted_at is None]
    failed = failed_ids(
        _error_lines(call, parent),
        codes=frozenset(wanted.codes) if wanted.codes is not None else None,
        custom_ids=frozenset(wanted.custom_ids) if wanted.custom_ids is not None else None,
    )
    failed -= healed_ids(call.parts.blobs, call.scope, family)
    if not failed:
        raise _nothing()
    with contextlib.ExitStack() as undoing:
        file = None if parent.source else _gathered(call, parent, undoing)
        origin = parent if file is None else _made_of(parent, file)
        new = _new_batch(call, origin, wanted)
        assert new.chosen_blob is not None
        call.parts.store.register_blob(new.chosen_blob, owner=OWNER)
        undoing.callback(give_up, call.parts.store, new.chosen_blob)
        if not _write(call, origin, new.chosen_blob, failed):
            raise _nothing()
        _check_apart(call, family, new.chosen_blob)
        made = _created(call, new, family, file)
        undoing.pop_all()
        return made


def _nothing() -> Refusal:
    return Refusal("No line of this batch has failed in such a way and can be retried.", code="nothing_to_retry")


def _gathered(call: Call, parent: Batch, undoing: contextlib.ExitStack) -> File:
    """Lay the requests that came one call after the other into one file, where each has the line number that it had."""
    blobs = call.parts.blobs
    name = f"files/{call.parts.rng.token_hex(16)}"
    sink = BlobSink(call.parts, name, size_bytes_max=call.parts.settings.file_bytes_max)
    undoing.callback(sink.abort)
    try:
        for addition in joined(call.scope, parent.id):
            for chunk in read_blob(blobs, addition.source):
                sink.feed(chunk)
    except NotFound:
        raise _gone(f"The requests of batch {parent.id} are no longer kept") from None
    taken = sink.finish()
    if taken.line_count != parent.total_count:
        raise _gone(f"The requests of batch {parent.id} are no longer kept")
    filename = f"{parent.id}_requests.jsonl"
    return new_file(call, taken, blob=name, filename=filename, purpose=BATCH, expires_after_s=None)


def _made_of(parent: Batch, file: File) -> Batch:
    """Give a batch as if it had been made of a file."""
    return replace(
        parent, source=file.blob, input_file_id=file.id, input_name=file.id, input_sha256=file.sha256, closes_at=None
    )


def _created(call: Call, new: NewBatch, family: list[Batch], file: File | None) -> Batch:
    try:
        seen = [each.id for each in family]
        return call.scope.create_batch(new, replay=call.replay, limits=call.limits, file=file, family=seen)
    except NotFound:
        raise _gone(f"The input of batch {new.parent_id} was deleted") from None


def _write(call: Call, parent: Batch, name: str, failed: set[str]) -> int:
    blobs = call.parts.blobs
    refused = refused_numbers(blobs, parent.problems_blob)
    line_bytes_max = call.parts.settings.line_bytes_max
    among = chosen_numbers(blobs, parent.chosen_blob) if parent.chosen_blob is not None else None
    source = read_blob(blobs, parent.source)
    try:
        return write_chosen(blobs, name, source, failed, refused=refused, line_bytes_max=line_bytes_max, among=among)
    except NotFound:
        raise _gone(f"The input of batch {parent.id} was deleted") from None


def _error_lines(call: Call, parent: Batch) -> Iterator[bytes]:
    if parent.error_file_id is None:
        return
    try:
        file = call.scope.file(FileId(parent.error_file_id))
        yield from lines_of(read_blob(call.parts.blobs, file.blob))
    except NotFound:
        raise _gone(f"The error file {parent.error_file_id} was deleted") from None


def _gone(what: str) -> Refusal:
    return Refusal(f"{what}, so that its lines cannot be run again.", status=410, code="input_gone")


def _check_apart(call: Call, family: list[Batch], name: str) -> None:
    """Raises: Refusal when a chosen line is under way in another retry of the family."""
    blobs = call.parts.blobs
    busy = [each for each in family if each.status not in TERMINAL and each.chosen_blob is not None]
    chosen = chosen_numbers(blobs, name) if busy else ()
    for each in busy:
        assert each.chosen_blob is not None
        under_way = chosen_numbers(blobs, each.chosen_blob)
        for number in chosen:
            if number in under_way:
                message = f"Line {number} is being retried by batch {each.id} already; wait for its end, or cancel it."
                raise Refusal(message, status=409, code="already_retrying")


def _new_batch(call: Call, parent: Batch, wanted: RetryRequest) -> NewBatch:
    """Take from the parent what the request does not name."""
    batch_id = BatchId(f"batch_{call.parts.rng.token_hex(16)}")
    window = wanted.completion_window or parent.completion_window or "24h"
    deadline_s = window_s(window, is_strict=False)
    inherited = NewBatch(**{each.name: getattr(parent, each.name) for each in fields(NewBatch)})
    return replace(
        inherited,
        id=batch_id,
        parent_id=parent.id,
        chosen_blob=f"chosen/{batch_id}",
        completion_window=window,
        deadline_at=call.parts.clock.now() + timedelta(seconds=deadline_s),
        priority=wanted.priority if wanted.priority is not None else _inherited_priority(call, parent),
        metadata=dict(wanted.metadata) if wanted.metadata is not None else parent.metadata,
        webhook_url=wanted.webhook_url if wanted.webhook_url is not None else parent.webhook_url,
        created_by=call.key.id if call.key is not None else None,
    )


def _inherited_priority(call: Call, parent: Batch) -> int:
    """The parent's priority, as far as the key may ask for it: another key may have made the parent."""
    priority_max = call.limits.priority_max
    return parent.priority if priority_max is None else min(parent.priority, priority_max)
