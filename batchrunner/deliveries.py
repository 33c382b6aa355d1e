"""The nouns of webhooks: who wants to be told, what happened, and each telling of it to one receiver."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NewType

import msgspec

from batchrunner.models import BatchId, SessionId, TenantId

EndpointId = NewType("EndpointId", str)
EventId = NewType("EventId", str)
# Also the `webhook-id` of all attempts: what a receiver tells repeats by.
DeliveryId = NewType("DeliveryId", str)


class EventType(StrEnum):
    """What can be told of a batch. Source: the webhook events of the OpenAI API, and `in_progress`, which is ours."""

    COMPLETED = "batch.completed"
    FAILED = "batch.failed"
    EXPIRED = "batch.expired"
    CANCELLED = "batch.cancelled"
    IN_PROGRESS = "batch.in_progress"


# Each of them makes the headers of every attempt longer.
_OLD_SECRETS_MAX = 10

# The SDKs know no other: who wants more has to ask for it.
DEFAULT_TYPES = (EventType.COMPLETED, EventType.FAILED, EventType.EXPIRED, EventType.CANCELLED)


class DeliveryState(StrEnum):
    """How a delivery stands."""

    PENDING = "pending"
    DELIVERED = "delivered"
    UNDELIVERED = "undelivered"


class PostError(StrEnum):
    """How an attempt ended without an answer."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    ADDRESS_REFUSED = "address_refused"
    TLS = "tls"
    BROKEN_ANSWER = "broken_answer"
    # The process died, or lost the delivery to another one: whether it was sent is not known.
    UNKNOWN = "unknown"


class EndReason(StrEnum):
    """Why a delivery was given up."""

    ATTEMPTS_USED_UP = "attempts_used_up"
    GONE = "gone"
    ENDPOINT_DISABLED = "endpoint_disabled"
    ENDPOINT_DELETED = "endpoint_deleted"


class OldSecret(msgspec.Struct, frozen=True, kw_only=True):
    """A secret that signs beside its successor until its time."""

    secret: str
    until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """What signs; of those before it, the newest first, each until its own time."""

    secret: str
    old: tuple[OldSecret, ...] = ()

    def valid(self, now: datetime) -> tuple[str, ...]:
        """Give the secrets to sign with, the newest first."""
        return (self.secret, *(each.secret for each in self.old if now < each.until))

    def rotated(self, secret: str, *, old_until: datetime | None, now: datetime) -> Secrets:
        """Give what signs when another secret takes over: without a time for the old one, none but the new one. What
        was to be kept is not cut short by a rotation that is repeated.
        """
        if old_until is None:
            return Secrets(secret=secret)
        kept = (OldSecret(secret=self.secret, until=old_until), *(each for each in self.old if now < each.until))
        return Secrets(secret=secret, old=kept[:_OLD_SECRETS_MAX])


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookEndpoint:
    """A registered receiver. `failing_since` is the first failure since its last success; a disabled one is told
    nothing until it is changed.
    """

    id: EndpointId
    tenant: TenantId
    name: str
    url: str
    event_types: tuple[EventType, ...]
    secrets: Secrets
    created_at: datetime
    updated_at: datetime
    failing_since: datetime | None = None
    disabled_at: datetime | None = None
    disabled_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookEvent:
    """Something that happened, as it is told: `body` is the whole JSON. `serial` orders the events of a store, 0 in one
    that is not stored yet.
    """

    id: EventId
    tenant: TenantId
    batch_id: BatchId
    type: EventType
    body: str
    created_at: datetime
    serial: int = 0


class DeliveryAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """One POST. Without an end it is under way, or its process died."""

    number: int
    started_at: datetime
    elapsed_s: float | None = None
    status: int | None = None
    error: PostError | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """The telling of one event to one receiver: `endpoint_id` None is a batch's own `webhook_url`.

    `attempt_count` counts from the last time that it was begun, `attempts` are the last ones of all.
    """

    id: DeliveryId
    tenant: TenantId
    event_id: EventId
    type: EventType
    batch_id: BatchId
    endpoint_id: EndpointId | None
    url: str
    state: DeliveryState
    reason: EndReason | None
    due_at: datetime | None
    attempt_count: int
    attempts: tuple[DeliveryAttempt, ...]
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryFilter:
    """What a listing of deliveries is narrowed to."""

    state: DeliveryState | None = None
    type: EventType | None = None
    batch_id: BatchId | None = None
    endpoint_id: EndpointId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """A delivery in the hands of a courier, under the epoch that guards its record. `secrets` None: the tenant has none
    yet. `first_at` is when its first attempt began.
    """

    id: DeliveryId
    epoch: int
    tenant: TenantId
    type: EventType
    endpoint_id: EndpointId | None
    url: str
    receiver: str
    body: bytes
    secrets: Secrets | None
    attempt: DeliveryAttempt
    attempt_count: int
    first_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Appointments:
    """What a courier can take: its hold on a delivery lasts `lease_s`; at most `each_max` of one receiver, those in
    `busy` included, `room` in all, and bodies of `bytes_max` together, but one always.
    """

    session: SessionId
    lease_s: float
    each_max: int
    room: int
    busy: dict[str, int] = field(default_factory=dict)
    bytes_max: int = sys.maxsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """How an attempt ended, for the log, and what follows: `state`, and for one that goes on when it is due."""

    id: DeliveryId
    epoch: int
    attempt: DeliveryAttempt
    attempt_count: int
    state: DeliveryState
    reason: EndReason | None = None
    due_at: datetime | None = None
    endpoint_id: EndpointId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """What came of one POST: a `status`, or an `error`."""

    status: int | None = None
    error: PostError | None = None
    message: str | None = None
    retry_after_s: float | None = None
    elapsed_s: float = 0.0

    @property
    def is_taken(self) -> bool:
        """Tell whether the receiver took it: any 2xx."""
        return self.status is not None and 200 <= self.status < 300
