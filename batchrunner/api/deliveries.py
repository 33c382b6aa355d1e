"""What was told and to whom: the log of deliveries, sending one again, and events as a stream for a laptop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from batchrunner.api.auth import CACHED_S
from batchrunner.api.envelope import Refusal, refused_if_missing
from batchrunner.api.events import EVENT_STREAM, HEARTBEAT, HEARTBEAT_S, is_admitted, streamed, written
from batchrunner.api.http import Answer, Call, Route, json_answer
from batchrunner.api.paging import Page, page_of
from batchrunner.api.webhooks import Url, check_url, new_sample
from batchrunner.deliveries import (
    Delivery,
    DeliveryAttempt,
    DeliveryFilter,
    DeliveryId,
    DeliveryState,
    EndpointId,
    EventId,
    EventType,
)
from batchrunner.errors import NotFound, TransitionRefused
from batchrunner.holdings import KeyScope
from batchrunner.models import BatchId
from batchrunner.progress import seconds_of

LOOK_S = 0.5
_PAGE = 100
# No event has it: behind it are all.
_BEFORE_ALL = EventId("evt_none")


class ListDeliveries(msgspec.Struct, frozen=True):
    """The query of a listing."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    status: DeliveryState | None = None
    event_type: EventType | None = None
    batch_id: str | None = None
    webhook_endpoint_id: str | None = None


class AttemptObject(msgspec.Struct, frozen=True, kw_only=True):
    """One POST. Either `status_code` or `error` tells its end; both are null while it is under way."""

    number: int
    started_at: int
    elapsed_ms: int | None
    status_code: int | None
    error: str | None
    message: str | None


class DeliveryObject(msgspec.Struct, frozen=True, kw_only=True):
    """The telling of one event to one receiver. Its id is the `webhook-id` of every attempt.

    `attempt_count` counts since it was last begun, `attempts` lists the last ones of all; `webhook_endpoint_id` is null
    for a batch's own URL.
    """

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    status: DeliveryState
    reason: str | None
    event_id: str
    event_type: EventType
    batch_id: str
    webhook_endpoint_id: str | None
    url: str
    created_at: int
    next_attempt_at: int | None
    ended_at: int | None
    attempt_count: int
    attempts: tuple[AttemptObject, ...]


class DeliveryList(Page, frozen=True, kw_only=True):
    """A page of deliveries, newest first; the next one is behind `last_id`."""

    data: tuple[DeliveryObject, ...]


class TriggerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a trigger: an event of a batch that never was, for all receivers that want it, and for `url`."""

    type: EventType
    url: Url | None = None


class Triggered(msgspec.Struct, frozen=True, kw_only=True):
    """The event that was made."""

    object: Literal["event"] = "event"
    id: str
    type: EventType
    created_at: int


class HookEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event: `data` is the JSON that receivers get, `id` goes into Last-Event-ID of who comes back."""

    event: EventType
    id: str
    data: Annotated[str, Meta(extra_json_schema={"contentMediaType": "application/json"})]


def _attempt(attempt: DeliveryAttempt) -> AttemptObject:
    return AttemptObject(
        number=attempt.number,
        started_at=seconds_of(attempt.started_at),
        elapsed_ms=None if attempt.elapsed_s is None else round(attempt.elapsed_s * 1000),
        status_code=attempt.status,
        error=attempt.error,
        message=attempt.message,
    )


def _shown(delivery: Delivery) -> DeliveryObject:
    return DeliveryObject(
        id=delivery.id,
        status=delivery.state,
        reason=delivery.reason,
        event_id=delivery.event_id,
        event_type=delivery.type,
        batch_id=delivery.batch_id,
        webhook_endpoint_id=delivery.endpoint_id,
        url=delivery.url,
        created_at=seconds_of(delivery.created_at),
        next_attempt_at=seconds_of(delivery.due_at),
        ended_at=seconds_of(delivery.ended_at),
        attempt_count=delivery.attempt_count,
        attempts=tuple(map(_attempt, delivery.attempts)),
    )


def _no_such_delivery(delivery_id: str) -> Refusal:
    return Refusal(f"No such WebhookDelivery object: {delivery_id}", status=404, param="id")


def _delivery_id(call: Call) -> DeliveryId:
    return DeliveryId(call.path_params["webhook_delivery_id"])


async def list_webhook_deliveries(call: Call) -> Answer:
    """Give a page of the tenant's deliveries."""
    wanted = call.parameters(ListDeliveries)
    narrowed = DeliveryFilter(
        state=wanted.status,
        type=wanted.event_type,
        batch_id=BatchId(wanted.batch_id) if wanted.batch_id is not None else None,
        endpoint_id=EndpointId(wanted.webhook_endpoint_id) if wanted.webhook_endpoint_id is not None else None,
    )
    after = DeliveryId(wanted.after) if wanted.after is not None else None
    with refused_if_missing(_no_such_delivery(wanted.after or "")):
        found = await call.blocking(call.scope.deliveries, limit=wanted.limit + 1, after=after, only=narrowed)
    return json_answer(page_of(DeliveryList, list(map(_shown, found)), limit=wanted.limit))


async def retrieve_webhook_delivery(call: Call) -> Answer:
    """Show one delivery with its attempts."""
    delivery_id = _delivery_id(call)
    with refused_if_missing(_no_such_delivery(delivery_id)):
        return json_answer(_shown(await call.blocking(call.scope.delivery, delivery_id)))


async def resend_webhook_delivery(call: Call) -> Answer:
    """Begin a delivery again at once; receivers see the same `webhook-id`."""
    delivery_id = _delivery_id(call)
    try:
        with refused_if_missing(_no_such_delivery(delivery_id)):
            return json_answer(_shown(await call.blocking(call.scope.resend, delivery_id)))
    except TransitionRefused as error:
        raise Refusal(f"Cannot resend: {error.message}.", status=409, code=error.code) from None


async def trigger_webhook_event(call: Call) -> Answer:
    """Tell an event of a batch that never was."""
    wanted = await call.json(TriggerRequest)
    check_url(call.parts, wanted.url, param="url")
    event = new_sample(call, wanted.type, call.parts.clock.now())
    made = await call.blocking(call.scope.announce, event, url=wanted.url)
    return json_answer(Triggered(id=made.id, type=made.type, created_at=seconds_of(made.created_at)))


async def follow_webhook_events(call: Call) -> Answer:
    """Stream the tenant's events from now on, or from behind Last-Event-ID; behind one that is dropped, all of them."""
    known = call.request.headers.get("Last-Event-ID")
    after, place = await call.blocking(_place, call, known)
    return streamed(_events(call, after, place))


def _place(call: Call, known: str | None) -> tuple[int, EventId]:
    """Find where to begin: the serial, and the id that stands for it."""
    if known:
        try:
            return call.scope.event_serial(EventId(known)), EventId(known)
        except NotFound:
            return 0, _BEFORE_ALL
    last = call.scope.last_event()
    return (0, _BEFORE_ALL) if last is None else (last.serial, last.id)


async def _events(call: Call, after: int, place: EventId) -> AsyncIterator[bytes]:
    # Whoever loses the stream before its first event comes back with this.
    yield b": listening\nid: %b\n\n" % place.encode()
    clock = call.parts.clock
    silent_since_s = admitted_at_s = clock.monotonic_s()
    while True:
        found = await call.blocking(call.scope.events, after=after, limit=_PAGE)
        for each in found:
            # By its id: its serial would count other tenants' events, too.
            yield written(each.type, each.id, each.body.encode())
            after = each.serial
        now_s = clock.monotonic_s()
        if now_s - admitted_at_s >= CACHED_S:
            admitted_at_s = now_s
            if not await call.blocking(is_admitted, call):
                return
        if found:
            silent_since_s = now_s
        elif now_s - silent_since_s >= HEARTBEAT_S:
            yield HEARTBEAT
            silent_since_s = now_s
        if len(found) < _PAGE:
            await clock.sleep(LOOK_S)


_ONE = "/v1/webhook_deliveries/{webhook_delivery_id}"

ROUTES = (
    Route(
        method="GET",
        path="/v1/webhook_deliveries",
        handler=list_webhook_deliveries,
        summary="List deliveries of events, newest first",
        query=ListDeliveries,
        answer=DeliveryList,
    ),
    Route(
        method="GET",
        path=_ONE,
        handler=retrieve_webhook_delivery,
        summary="Show a delivery with its attempts",
        answer=DeliveryObject,
    ),
    Route(
        method="POST",
        path=f"{_ONE}/resend",
        handler=resend_webhook_delivery,
        summary="Send an event to a receiver again, under the same webhook-id",
        scope=KeyScope.WRITE,
        answer=DeliveryObject,
    ),
    Route(
        method="GET",
        path="/v1/webhook_events",
        handler=follow_webhook_events,
        summary="Follow all events as server-sent events; resumes with Last-Event-ID",
        answer=HookEvent,
        answer_media=EVENT_STREAM,
    ),
    Route(
        method="POST",
        path="/v1/webhook_events",
        handler=trigger_webhook_event,
        summary="Send a sample event to all receivers that want its type",
        scope=KeyScope.WRITE,
        request=TriggerRequest,
        answer=Triggered,
    ),
)
