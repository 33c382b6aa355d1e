"""Why lines of a batch failed: `/errors` groups them by cause, in turns that hold no thread for long."""

from __future__ import annotations

from batchrunner.api.batches import batch_of
from batchrunner.api.counting import BatchFailures, Count, errors_gone
from batchrunner.api.http import Answer, Call, Route, json_answer
from batchrunner.errors import NotFound
from batchrunner.models import Batch


def _look(call: Call) -> Batch:
    """Look the batch up, and that its failures may still be shown. Blocks. Raises: Refusal."""
    batch = batch_of(call)
    if batch.error_file_id is not None:
        try:
            call.scope.file(batch.error_file_id)
        except NotFound:
            raise errors_gone(batch) from None
    return batch


async def read_errors(call: Call) -> Answer:
    """Group what failed so far, and after the end what was never sent as well."""
    batch = await call.blocking(_look, call)
    count = call.parts.counts.of(batch, call.parts.blobs, call.scope)
    if not (count.is_final and count.is_through):
        async with call.parts.heavy:
            call.require_listener()
            count = call.parts.counts.of(batch, call.parts.blobs, call.scope)
            count.refresh()
            await _count(call, batch, count)
    return json_answer(await call.blocking(count.found))


async def _count(call: Call, batch: Batch, count: Count) -> None:
    try:
        while await call.blocking(count.go_on, call.parts.clock):
            # What is counted stays for whoever asks next.
            if not call.has_listener:
                break
    except BaseException:
        call.parts.counts.forget(batch.id)
        raise
    call.require_listener()


ROUTES = (
    Route(
        method="GET",
        path="/v1/batches/{batch_id}/errors",
        handler=read_errors,
        summary="Group the failed lines by cause, with samples and what to do",
        answer=BatchFailures,
    ),
)
