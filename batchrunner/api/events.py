"""Server-sent events of one batch: what it is now, then each change, until it is over.

Source: the event stream of the HTML standard.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from batchrunner.api.auth import CACHED_S
from batchrunner.api.batches import batch_of, shown
from batchrunner.api.http import Answer, Call, Route
from batchrunner.api.watching import Feed, Seen
from batchrunner.lifecycle import TERMINAL
from batchrunner.models import Batch, BatchId

EVENT_STREAM = "text/event-stream"
# Proxies close what is silent for half a minute or more.
HEARTBEAT_S = 15.0
HEARTBEAT = b": still here\n\n"
_EVENT_ID = re.compile(r"\d{1,18}-\d{1,18}")
_encode = msgspec.json.Encoder().encode


class ServerEvent(msgspec.Struct, frozen=True):
    """One event: `data` is the batch as JSON, `id` goes into Last-Event-ID of who comes back."""

    event: Literal["status", "progress"]
    id: str
    data: Annotated[str, Meta(extra_json_schema={"contentMediaType": "application/json"})]


async def follow_batch(call: Call) -> Answer:
    """Stream a batch's levels; a reader that comes back with the id of the last one of all is told to stay away."""
    first = await call.blocking(lambda: _look(call, batch_of(call)))
    known = call.request.headers.get("Last-Event-ID", "")
    if first.is_over and _EVENT_ID.fullmatch(known) and known == first.event_id:
        return Answer(status=204)
    return streamed(_events(call, first))


def streamed(events: AsyncIterator[bytes]) -> Answer:
    """Answer with events as they come."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return Answer(content_type=EVENT_STREAM, headers=headers, chunks=events, is_endless=True)


def _look(call: Call, batch: Batch) -> Seen:
    return Seen(
        batch=shown(call, batch),
        version=batch.version,
        is_over=batch.status in TERMINAL,
        looked_at_s=call.parts.clock.monotonic_s(),
    )


async def _events(call: Call, first: Seen) -> AsyncIterator[bytes]:
    yield _event("status", first)
    if first.is_over:
        return

    batch_id = BatchId(first.batch.id)

    async def look() -> Seen:
        return await call.blocking(lambda: _look(call, call.scope.batch(batch_id)))

    async with call.parts.watching.follow(batch_id, first, look, call.parts.clock) as feed:
        async for piece in _changes(call, feed, first):
            yield piece


async def _changes(call: Call, feed: Feed, known: Seen) -> AsyncIterator[bytes]:
    checked_at_s = call.parts.clock.monotonic_s()
    while not known.is_over:
        try:
            seen: Seen | None = await feed.next_after(known, timeout_s=HEARTBEAT_S)
        except TimeoutError:
            seen = known
        now_s = call.parts.clock.monotonic_s()
        if now_s - checked_at_s >= CACHED_S:
            # A batch may be followed for days: a key that was revoked meanwhile hears no more of it.
            checked_at_s = now_s
            if not await call.blocking(is_admitted, call):
                return
        if seen is known:
            yield HEARTBEAT
            continue
        if seen is None:
            return
        is_moved = (seen.version, seen.is_over) != (known.version, known.is_over)
        yield _event("status" if is_moved else "progress", seen)
        known = seen


def is_admitted(call: Call) -> bool:
    """Tell whether the key of a call that lasts is still valid. Blocks."""
    return call.key is None or call.parts.store.find_key(call.key.digest) is not None


def written(name: str, event_id: str, content: bytes) -> bytes:
    """Write one event; its content is JSON, which has no line ends of its own."""
    return b"event: %b\nid: %b\ndata: %b\n\n" % (name.encode(), event_id.encode(), content)


def _event(name: str, seen: Seen) -> bytes:
    return written(name, seen.event_id, _encode(seen.batch))


ROUTES = (
    Route(
        method="GET",
        path="/v1/batches/{batch_id}/events",
        handler=follow_batch,
        summary="Follow a batch as server-sent events until it is over; resumes with Last-Event-ID",
        answer=ServerEvent,
        answer_media=EVENT_STREAM,
    ),
)
