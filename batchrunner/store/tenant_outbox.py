"""A tenant's receivers, events and deliveries in an SQL store: which transaction answers which method."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Protocol

from sqlalchemy import Connection

from batchrunner.deliveries import (
    Delivery,
    DeliveryFilter,
    DeliveryId,
    EndpointId,
    EventId,
    EventType,
    Secrets,
    WebhookEndpoint,
    WebhookEvent,
)
from batchrunner.holdings import Replay
from batchrunner.models import TenantId
from batchrunner.store import queries_deliveries, queries_idempotency, queries_webhooks
from batchrunner.store.moments import Moment
from batchrunner.store.rows import delivery_of, endpoint_of, event_of

_EVERYTHING = DeliveryFilter()


class Transactions(Protocol):
    """What a scope asks of its store."""

    def writing(self) -> AbstractContextManager[Connection]:
        """Open a transaction that may write."""

    def reading(self) -> AbstractContextManager[Connection]:
        """Open a connection for reading."""

    def moment(self) -> Moment:
        """Read the clocks."""


class SqlTenantOutbox:
    """TenantOutbox over the statements of this package."""

    def __init__(self, store: Transactions, tenant: TenantId) -> None:
        self._store = store
        self._tenant = tenant

    def add_endpoint(self, endpoint: WebhookEndpoint, *, replay: Replay | None = None) -> WebhookEndpoint:
        """See TenantOutbox."""
        self._require_own(endpoint.tenant, endpoint.id)
        with self._store.writing() as conn:
            made = EndpointId(self._made(conn, replay, endpoint.id, self._store.moment()))
            if made == endpoint.id:
                queries_webhooks.add_endpoint(conn, endpoint)
            return endpoint_of(queries_webhooks.endpoint_of_tenant(conn, self._tenant, made))

    def endpoint(self, endpoint_id: EndpointId) -> WebhookEndpoint:
        """See TenantOutbox."""
        with self._store.reading() as conn:
            return endpoint_of(queries_webhooks.endpoint_of_tenant(conn, self._tenant, endpoint_id))

    def endpoints(self, *, limit: int, after: EndpointId | None = None) -> list[WebhookEndpoint]:
        """See TenantOutbox."""
        with self._store.reading() as conn:
            rows = queries_webhooks.endpoints_of_tenant(conn, self._tenant, limit=limit, after=after)
            return [endpoint_of(row) for row in rows]

    def change_endpoint(
        self,
        endpoint_id: EndpointId,
        *,
        name: str | None = None,
        url: str | None = None,
        event_types: Sequence[EventType] | None = None,
    ) -> WebhookEndpoint:
        """See TenantOutbox."""
        types = tuple(event_types) if event_types is not None else None
        changes: dict[str, object] = {"name": name, "url": url, "event_types": types}
        with self._store.writing() as conn:
            moment = self._store.moment()
            return endpoint_of(queries_webhooks.change_endpoint(conn, self._tenant, endpoint_id, changes, moment))

    def rotate_endpoint_secret(
        self, endpoint_id: EndpointId, secret: str, *, old_until: datetime | None
    ) -> WebhookEndpoint:
        """See TenantOutbox."""
        with self._store.writing() as conn:
            moment = self._store.moment()
            row = queries_webhooks.rotate_endpoint(
                conn, self._tenant, endpoint_id, moment, secret=secret, old_until=old_until
            )
            return endpoint_of(row)

    def delete_endpoint(self, endpoint_id: EndpointId) -> None:
        """See TenantOutbox."""
        with self._store.writing() as conn:
            queries_webhooks.delete_endpoint(conn, self._tenant, endpoint_id, self._store.moment())

    def signing_secrets(self, fresh: str) -> Secrets:
        """See TenantOutbox."""
        with self._store.reading() as conn:
            known = queries_webhooks.signing_secrets(conn, self._tenant)
        if known is not None:
            return known
        with self._store.writing() as conn:
            known = queries_webhooks.signing_secrets(conn, self._tenant)
            if known is None:
                known = Secrets(secret=fresh)
                queries_webhooks.keep_signing_secrets(conn, self._tenant, known)
            return known

    def rotate_signing_secret(self, secret: str, *, old_until: datetime | None) -> Secrets:
        """See TenantOutbox."""
        with self._store.writing() as conn:
            known = queries_webhooks.signing_secrets(conn, self._tenant) or Secrets(secret=secret)
            is_new = known.secret != secret
            rotated = known.rotated(secret, old_until=old_until, now=self._store.moment().wall) if is_new else known
            queries_webhooks.keep_signing_secrets(conn, self._tenant, rotated)
            return rotated

    def announce(self, event: WebhookEvent, *, url: str | None = None) -> WebhookEvent:
        """See TenantOutbox."""
        self._require_own(event.tenant, event.id)
        with self._store.writing() as conn:
            queries_webhooks.announce(conn, event, self._store.moment(), url=url)
            return event_of(queries_webhooks.event_named(conn, event.id))

    def events(self, *, after: int, limit: int) -> list[WebhookEvent]:
        """See TenantOutbox."""
        with self._store.reading() as conn:
            rows = queries_webhooks.events_after(conn, self._tenant, after=after, limit=limit)
            return [event_of(row) for row in rows]

    def event_serial(self, event_id: EventId) -> int:
        """See TenantOutbox."""
        with self._store.reading() as conn:
            return queries_webhooks.serial_of(conn, self._tenant, event_id)

    def last_event(self) -> WebhookEvent | None:
        """See TenantOutbox."""
        with self._store.reading() as conn:
            row = queries_webhooks.last_event(conn, self._tenant)
            return None if row is None else event_of(row)

    def delivery(self, delivery_id: DeliveryId) -> Delivery:
        """See TenantOutbox."""
        with self._store.reading() as conn:
            return delivery_of(queries_deliveries.delivery_of_tenant(conn, self._tenant, delivery_id))

    def deliveries(
        self, *, limit: int, after: DeliveryId | None = None, only: DeliveryFilter | None = None
    ) -> list[Delivery]:
        """See TenantOutbox."""
        with self._store.reading() as conn:
            rows = queries_deliveries.deliveries_of_tenant(
                conn, self._tenant, limit=limit, after=after, only=only or _EVERYTHING
            )
            return [delivery_of(row) for row in rows]

    def resend(self, delivery_id: DeliveryId) -> Delivery:
        """See TenantOutbox."""
        with self._store.writing() as conn:
            return delivery_of(queries_deliveries.resend(conn, self._tenant, delivery_id, self._store.moment()))

    def _require_own(self, tenant: TenantId, name: str) -> None:
        if tenant != self._tenant:
            raise ValueError(f"{name} is not of the tenant {self._tenant}")

    def _made(self, conn: Connection, replay: Replay | None, object_id: str, moment: Moment) -> str:
        """Give the id of what a request made: that of an earlier one with the same key, or this one's."""
        if replay is None:
            return object_id
        return queries_idempotency.note_made(conn, self._tenant, replay, object_id, moment) or object_id
