"""Statements on receivers, their secrets and events; `announce` is the only one that makes deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, RowMapping, func, insert, select, update

from batchrunner.deliveries import (
    DeliveryId,
    DeliveryState,
    EndpointId,
    EndReason,
    EventId,
    EventType,
    Secrets,
    WebhookEndpoint,
    WebhookEvent,
)
from batchrunner.errors import NameTaken, NotFound, QuotaExceeded
from batchrunner.models import TenantId
from batchrunner.store.moments import Moment
from batchrunner.store.rows import secrets_of
from batchrunner.store.tables import webhook_deliveries, webhook_endpoints, webhook_events, webhook_secrets
from batchrunner.webhooks import delivery_id, receiver_of

ENDPOINTS_MAX = 100

_endpoints, _deliveries, _events = webhook_endpoints.c, webhook_deliveries.c, webhook_events.c


# -- receivers ---------------------------------------------------------------------------------------------------------


def add_endpoint(conn: Connection, endpoint: WebhookEndpoint) -> None:
    """Insert a receiver; guards that an id is one tenant's, and that a tenant has not too many. May be repeated."""
    found = conn.execute(select(_endpoints.tenant).where(_endpoints.id == endpoint.id)).scalar_one_or_none()
    if found is not None:
        if found != endpoint.tenant:
            raise NameTaken(f"the endpoint id {endpoint.id} is taken")
        return
    mine = select(func.count()).where(_endpoints.tenant == endpoint.tenant, _endpoints.deleted_at.is_(None))
    count = conn.execute(mine).scalar_one()
    if count >= ENDPOINTS_MAX:
        raise QuotaExceeded(f"{count} webhook endpoints are registered, at most {ENDPOINTS_MAX}")
    values = {each.name: getattr(endpoint, each.name) for each in fields(WebhookEndpoint) if each.name != "secrets"}
    conn.execute(insert(webhook_endpoints).values(values | _secret_values(endpoint.secrets)))


def _secret_values(secrets: Secrets) -> dict[str, object]:
    return {"secret": secrets.secret, "old_secrets": secrets.old}


def endpoint_of_tenant(
    conn: Connection, tenant: TenantId, endpoint_id: EndpointId, *, even_deleted: bool = False
) -> RowMapping:
    """Read a receiver; guards that another tenant's and a deleted one look like a missing one."""
    query = select(webhook_endpoints).where(_endpoints.id == endpoint_id, _endpoints.tenant == tenant)
    row = conn.execute(query).mappings().one_or_none()
    if row is None or (row["deleted_at"] is not None and not even_deleted):
        raise NotFound(f"no webhook endpoint {endpoint_id}")
    return row


def endpoints_of_tenant(
    conn: Connection, tenant: TenantId, *, limit: int, after: EndpointId | None
) -> Sequence[RowMapping]:
    """List a tenant's receivers, newest first, behind a cursor that must be the tenant's own but may be deleted."""
    query = select(webhook_endpoints).where(_endpoints.tenant == tenant, _endpoints.deleted_at.is_(None))
    if after is not None:
        query = query.where(_endpoints.serial < endpoint_of_tenant(conn, tenant, after, even_deleted=True)["serial"])
    return conn.execute(query.order_by(_endpoints.serial.desc()).limit(limit)).mappings().all()


def change_endpoint(
    conn: Connection, tenant: TenantId, endpoint_id: EndpointId, changes: dict[str, object], moment: Moment
) -> RowMapping:
    """Write what is given and enable it; its pending deliveries follow a new URL. Guards that it is the tenant's."""
    row = endpoint_of_tenant(conn, tenant, endpoint_id)
    new = {name: value for name, value in changes.items() if value is not None and value != row[name]}
    if new or row["disabled_at"] is not None:
        again: dict[str, object] = {"failing_since": None, "disabled_at": None, "disabled_reason": None}
        values = again | new | {"updated_at": moment.wall}
        conn.execute(update(webhook_endpoints).where(_endpoints.id == endpoint_id).values(values))
    if isinstance(url := new.get("url"), str):
        moved = {"url": url, "receiver": receiver_of(tenant, url)}
        conn.execute(update(webhook_deliveries).where(*_pending_of(endpoint_id)).values(moved))
    return endpoint_of_tenant(conn, tenant, endpoint_id)


def rotate_endpoint(
    conn: Connection,
    tenant: TenantId,
    endpoint_id: EndpointId,
    moment: Moment,
    *,
    secret: str,
    old_until: datetime | None,
) -> RowMapping:
    """Put a secret in the place of another, which stays beside it for as long as it is said to."""
    row = endpoint_of_tenant(conn, tenant, endpoint_id)
    rotated = secrets_of(row).rotated(secret, old_until=old_until, now=moment.wall)
    values = _secret_values(rotated) | {"updated_at": moment.wall}
    conn.execute(update(webhook_endpoints).where(_endpoints.id == endpoint_id).values(values))
    return endpoint_of_tenant(conn, tenant, endpoint_id)


def delete_endpoint(conn: Connection, tenant: TenantId, endpoint_id: EndpointId, moment: Moment) -> None:
    """Hide a receiver, forget its secrets and give up what it was to be told."""
    endpoint_of_tenant(conn, tenant, endpoint_id)
    values = {"deleted_at": moment.wall} | _secret_values(Secrets(secret=""))
    conn.execute(update(webhook_endpoints).where(_endpoints.id == endpoint_id).values(values))
    end_deliveries(conn, endpoint_id, EndReason.ENDPOINT_DELETED, moment)


def disable_endpoint(conn: Connection, endpoint_id: EndpointId, reason: str, moment: Moment) -> None:
    """Tell a receiver nothing more until it is changed; guards that the first reason stays."""
    enabled = (_endpoints.id == endpoint_id, _endpoints.disabled_at.is_(None))
    values = {"disabled_at": moment.wall, "disabled_reason": reason}
    conn.execute(update(webhook_endpoints).where(*enabled).values(values))
    end_deliveries(conn, endpoint_id, EndReason.ENDPOINT_DISABLED, moment)


def end_deliveries(conn: Connection, endpoint_id: EndpointId, reason: EndReason, moment: Moment) -> None:
    """Give up what waits for a receiver. What is under way stays in its courier's hand, so that nobody else takes it
    before that has come back, whatever becomes of it.
    """
    ended = {"state": DeliveryState.UNDELIVERED, "reason": reason, "due_at": None, "ended_at": moment.wall}
    conn.execute(update(webhook_deliveries).where(*_pending_of(endpoint_id)).values(ended))


def _pending_of(endpoint_id: EndpointId) -> tuple[ColumnElement[bool], ...]:
    return (_deliveries.endpoint_id == endpoint_id, _deliveries.state == DeliveryState.PENDING)


# -- the tenant's own secret -------------------------------------------------------------------------------------------


def signing_secrets(conn: Connection, tenant: TenantId) -> Secrets | None:
    """Read what signs for a tenant's batches."""
    row = conn.execute(select(webhook_secrets).where(webhook_secrets.c.tenant == tenant)).mappings().one_or_none()
    return None if row is None else secrets_of(row)


def keep_signing_secrets(conn: Connection, tenant: TenantId, secrets: Secrets) -> None:
    """Write what signs for a tenant's batches."""
    values = _secret_values(secrets)
    mine = webhook_secrets.c.tenant == tenant
    if conn.execute(update(webhook_secrets).where(mine).values(values)).rowcount == 0:
        conn.execute(insert(webhook_secrets).values(values | {"tenant": tenant}))


# -- events ------------------------------------------------------------------------------------------------------------


def is_wanted(conn: Connection, tenant: TenantId, kind: EventType) -> bool:
    """Tell whether any receiver of the tenant asked for events of this type."""
    return any(kind in row["event_types"] for row in _enabled(conn, tenant))


def announce(conn: Connection, event: WebhookEvent, moment: Moment, *, url: str | None) -> None:
    """Write an event and a delivery for each receiver that wants it; guards that neither is made twice. One that is
    there already is only told to `url`.
    """
    rows = []
    if url is not None and not _is_made(conn, delivery_id(event.id, url)):
        rows.append(_delivery(event, None, url, moment))
    if conn.execute(select(_events.serial).where(_events.id == event.id)).scalar_one_or_none() is None:
        rows = [*_write_event(conn, event, moment), *rows]
    if rows:
        conn.execute(insert(webhook_deliveries), rows)


def _is_made(conn: Connection, name: DeliveryId) -> bool:
    return conn.execute(select(_deliveries.serial).where(_deliveries.id == name)).scalar_one_or_none() is not None


def _write_event(conn: Connection, event: WebhookEvent, moment: Moment) -> list[dict[str, object]]:
    values = {each.name: getattr(event, each.name) for each in fields(WebhookEvent) if each.name != "serial"}
    conn.execute(insert(webhook_events).values(values))
    return [
        _delivery(event, EndpointId(each["id"]), each["url"], moment)
        for each in _enabled(conn, event.tenant)
        if event.type in each["event_types"]
    ]


def _enabled(conn: Connection, tenant: TenantId) -> Sequence[RowMapping]:
    query = select(_endpoints.id, _endpoints.url, _endpoints.event_types).where(
        _endpoints.tenant == tenant, _endpoints.deleted_at.is_(None), _endpoints.disabled_at.is_(None)
    )
    return conn.execute(query.order_by(_endpoints.serial)).mappings().all()


def _delivery(event: WebhookEvent, endpoint_id: EndpointId | None, url: str, moment: Moment) -> dict[str, object]:
    return {
        "id": delivery_id(event.id, endpoint_id or url),
        "event_id": event.id,
        "tenant": event.tenant,
        "batch_id": event.batch_id,
        "type": event.type,
        "endpoint_id": endpoint_id,
        "url": url,
        "receiver": receiver_of(event.tenant, url),
        "state": DeliveryState.PENDING,
        "due_at": moment.wall,
        "attempts": (),
        "created_at": moment.wall,
    }


def events_after(conn: Connection, tenant: TenantId, *, after: int, limit: int) -> Sequence[RowMapping]:
    """List a tenant's events above a serial, in order."""
    query = select(webhook_events).where(_events.tenant == tenant, _events.serial > after)
    return conn.execute(query.order_by(_events.serial).limit(limit)).mappings().all()


def last_event(conn: Connection, tenant: TenantId) -> RowMapping | None:
    """Read a tenant's newest event."""
    query = select(webhook_events).where(_events.tenant == tenant).order_by(_events.serial.desc()).limit(1)
    return conn.execute(query).mappings().one_or_none()


def serial_of(conn: Connection, tenant: TenantId, event_id: EventId) -> int:
    """Read the serial of an event; guards that another tenant's looks like a missing one."""
    query = select(_events.serial).where(_events.id == event_id, _events.tenant == tenant)
    serial = conn.execute(query).scalar_one_or_none()
    if serial is None:
        raise NotFound(f"no webhook event {event_id}")
    return int(serial)


def event_named(conn: Connection, event_id: EventId) -> RowMapping:
    """Read an event that is there."""
    return conn.execute(select(webhook_events).where(_events.id == event_id)).mappings().one()
