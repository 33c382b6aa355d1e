"""The rules of webhooks, without a network: what is told, how it is signed, when it is tried again and when no more.

Source: Standard Webhooks 1.0 for headers, signatures and schedule; the OpenAI API for the events.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from urllib.parse import urlsplit

import msgspec

from batchrunner.batch_object import strict_object
from batchrunner.deliveries import (
    DeliveryAttempt,
    DeliveryId,
    DeliveryState,
    Dispatch,
    EndReason,
    EventId,
    EventType,
    Posted,
    Recorded,
    WebhookEvent,
)
from batchrunner.errors import UsageError
from batchrunner.lifecycle import BatchStatus
from batchrunner.models import OPENAI_STRICT, Batch, TenantId
from batchrunner.progress import seconds_of
from batchrunner.samples import sample_batch
from batchrunner.shared_object import shared_object

USER_AGENT = "batchrunner/1.0 (+webhooks)"
SECRET_PREFIX = "whsec_"  # noqa: S105 - what every secret begins with
SECRET_BYTES = 32
_SECRET_BYTES_MIN = 24

# Waits after the attempt before; after the last of them comes one attempt at the end of `LAST_AFTER`.
WAITS_S = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0)
LAST_AFTER = timedelta(hours=72)
ATTEMPTS_MAX = len(WAITS_S) + 2
JITTER = 0.1
# An endpoint that has failed for so long is told nothing more.
DISABLED_AFTER = timedelta(days=5)
_ATTEMPTS_BEFORE_DISABLED = 3
OLD_SECRET_KEPT = timedelta(hours=24)

_GONE = 410
_WAITING = frozenset({429, 503})
_encode = msgspec.json.Encoder().encode

# Every status that has an event.
EVENTS: Mapping[BatchStatus, EventType] = {
    BatchStatus.IN_PROGRESS: EventType.IN_PROGRESS,
    BatchStatus.COMPLETED: EventType.COMPLETED,
    BatchStatus.FAILED: EventType.FAILED,
    BatchStatus.EXPIRED: EventType.EXPIRED,
    BatchStatus.CANCELLED: EventType.CANCELLED,
}


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    """An event on the wire. Source: the webhook events of the OpenAI API; `data` is the whole batch."""

    id: str
    object: str = "event"
    type: str
    created_at: int
    data: msgspec.Raw


# -- what is told ------------------------------------------------------------------------------------------------------


def event_of(batch: Batch, at: datetime) -> WebhookEvent | None:
    """Give the event of the status that a batch has reached, None if that is none. Its id follows from batch and
    status: the same end is told under one id.
    """
    kind = EVENTS.get(batch.status)
    if kind is None:
        return None
    event_id = EventId("evt_" + _digest(f"{batch.id}:{batch.status}"))
    return _event(event_id, kind, batch, at)


def sample_event(kind: EventType, tenant: TenantId, event_id: EventId, at: datetime) -> WebhookEvent:
    """Make an event of a batch that never was, to try a receiver with."""
    status = next(status for status, each in EVENTS.items() if each is kind)
    return _event(event_id, kind, sample_batch(status, tenant, at), at)


def _event(event_id: EventId, kind: EventType, batch: Batch, at: datetime) -> WebhookEvent:
    shared = shared_object(batch, (), at)
    shown: msgspec.Struct = strict_object(shared) if batch.dialect == OPENAI_STRICT else shared
    body = _Body(id=event_id, type=kind, created_at=seconds_of(at), data=msgspec.Raw(_encode(shown)))
    return WebhookEvent(
        id=event_id, tenant=batch.tenant, batch_id=batch.id, type=kind, body=_encode(body).decode(), created_at=at
    )


def delivery_id(event_id: EventId, target: str) -> DeliveryId:
    """Name the telling of an event to a target, which cannot be made twice."""
    return DeliveryId("wh_" + _digest(f"{event_id}:{target}"))


def receiver_of(tenant: TenantId, url: str) -> str:
    """Name whom a URL reaches: what is slow there delays nobody else."""
    parts = urlsplit(url)
    return f"{tenant} {parts.scheme}://{parts.netloc}"


def tenant_of(receiver: str) -> str:
    """Name the tenant of what `receiver_of` gave; a URL has no space."""
    return receiver.rpartition(" ")[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# -- how it is signed --------------------------------------------------------------------------------------------------


def secret_of(random_hex: str) -> str:
    """Write random bytes as a signing secret."""
    return SECRET_PREFIX + base64.b64encode(bytes.fromhex(random_hex)).decode()


def check_secret(secret: str) -> str:
    """Give a secret that somebody brings along back, if it is a good one.

    Raises:
        UsageError: it is not `whsec_` and the base64 of at least 24 bytes.
    """
    try:
        size_bytes = len(_key_of(secret))
    except (ValueError, binascii.Error):
        size_bytes = 0
    if not secret.startswith(SECRET_PREFIX) or size_bytes < _SECRET_BYTES_MIN:
        raise UsageError("the signing secret is not whsec_ and the base64 of at least 24 bytes")
    return secret


def hint_of(secret: str) -> str:
    """Show of a secret what tells it from others."""
    return f"{SECRET_PREFIX}...{secret[-4:]}"


def signature(secret: str, webhook_id: str, timestamp: int, body: bytes) -> str:
    """Sign an attempt. Source: Standard Webhooks, symmetric signatures, version 1."""
    signed = b"%b.%d.%b" % (webhook_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(_key_of(secret), signed, "sha256")).decode()


def _key_of(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)


def signed_headers(
    webhook_id: str, kind: str, body: bytes, secrets: Sequence[str], at: datetime, *, endpoint_id: str | None = None
) -> dict[str, str]:
    """Give the headers of one attempt, whose signature holds for its own time only: receivers refuse old ones. A
    registered receiver is called by its own id, too.
    """
    timestamp = seconds_of(at)
    return {
        "content-type": "application/json",
        "user-agent": USER_AGENT,
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signature(each, webhook_id, timestamp, body) for each in secrets),
        "x-inference-event": kind,
        "x-inference-webhook-id": endpoint_id or webhook_id,
    }


# -- when it is tried again --------------------------------------------------------------------------------------------


def judge(dispatch: Dispatch, posted: Posted, now: datetime, *, chance: float) -> Recorded:
    """Decide what follows from an attempt that ended `now`; `chance` is a number from [0, 1) for the jitter."""
    recorded = Recorded(
        id=dispatch.id,
        epoch=dispatch.epoch,
        attempt=_ended(dispatch.attempt, posted),
        attempt_count=dispatch.attempt_count,
        state=DeliveryState.UNDELIVERED,
        endpoint_id=dispatch.endpoint_id,
    )
    if posted.is_taken:
        return replace(recorded, state=DeliveryState.DELIVERED)
    if posted.status == _GONE:
        return replace(recorded, reason=EndReason.GONE)
    due_at = next_attempt_at(
        dispatch.attempt_count,
        first_at=dispatch.first_at,
        now=now,
        retry_after_s=posted.retry_after_s if posted.status in _WAITING else None,
        chance=chance,
    )
    if due_at is None:
        return replace(recorded, reason=EndReason.ATTEMPTS_USED_UP)
    return replace(recorded, state=DeliveryState.PENDING, due_at=due_at)


def _ended(attempt: DeliveryAttempt, posted: Posted) -> DeliveryAttempt:
    return msgspec.structs.replace(
        attempt,
        elapsed_s=round(posted.elapsed_s, 4),
        status=posted.status,
        error=posted.error,
        message=posted.message,
    )


def next_attempt_at(
    attempt_count: int, *, first_at: datetime, now: datetime, retry_after_s: float | None, chance: float
) -> datetime | None:
    """Tell when to try again after `attempt_count` attempts; None when that was the last one."""
    last_at = first_at + LAST_AFTER
    if attempt_count >= ATTEMPTS_MAX or now >= last_at:
        return None
    spread = 1.0 - JITTER + 2 * JITTER * chance
    if attempt_count <= len(WAITS_S):
        wait_s = WAITS_S[attempt_count - 1] * spread
    else:
        # The end is an end: chance may only bring the last attempt forward.
        wait_s = (last_at - now).total_seconds() * (1.0 - JITTER * chance)
    wait_s = max(wait_s, min(retry_after_s or 0.0, LAST_AFTER.total_seconds()))
    return min(now + timedelta(seconds=wait_s), last_at)


def is_failing_too_long(failing_since: datetime, attempt_count: int, now: datetime) -> bool:
    """Tell whether an endpoint has failed for so long that it is disabled. One that was told nothing for weeks may have
    been mended meanwhile: a single failure after that is not enough.
    """
    return now - failing_since >= DISABLED_AFTER and attempt_count >= _ATTEMPTS_BEFORE_DISABLED
