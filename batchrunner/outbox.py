"""The ports of webhooks: what they ask of the Store, and the Poster; the docstrings are contracts, as in `ports`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Protocol

from batchrunner.deliveries import (
    Appointments,
    Delivery,
    DeliveryFilter,
    DeliveryId,
    DeliveryState,
    Dispatch,
    EndpointId,
    EventId,
    EventType,
    Posted,
    Recorded,
    Secrets,
    WebhookEndpoint,
    WebhookEvent,
)
from batchrunner.holdings import Replay
from batchrunner.models import SessionId


class Outbox(Protocol):
    """Deliveries of all tenants. Those of an event are made by the transaction that makes the event itself true."""

    def claim_deliveries(self, wanted: Appointments, recorded: Sequence[Recorded] = ()) -> list[Dispatch]:
        """Take deliveries that are due, the longest due first, a fair part of each receiver; their attempts are on
        record from then on. One whose holder died, or whose hold ended, is due at once. Waits for no writer when there
        is nothing to do. The same transaction writes what `record_attempts` would.
        """

    def record_attempts(self, recorded: Sequence[Recorded]) -> None:
        """Guarded, each by its epoch: write how attempts ended, and what that means for their endpoints. Those that
        somebody else holds by now are left out.
        """

    def give_deliveries_back(self, session: SessionId) -> int:
        """End the hold of a session on whatever it took; gives the number."""

    def delivery_counts(self) -> dict[DeliveryState, int]:
        """Count the deliveries that are kept, by state; none is left out."""


class TenantOutbox(Protocol):
    """A tenant's receivers, events and deliveries. Ids of other tenants are answered like missing ones."""

    def add_endpoint(self, endpoint: WebhookEndpoint, *, replay: Replay | None = None) -> WebhookEndpoint:
        """Register a receiver. `replay` as in `create_batch`. Raises: QuotaExceeded above 100."""

    def endpoint(self, endpoint_id: EndpointId) -> WebhookEndpoint:
        """Raises: NotFound. So in all that follow."""

    def endpoints(self, *, limit: int, after: EndpointId | None = None) -> list[WebhookEndpoint]:
        """Newest first, those older than `after`, which may be a deleted one."""

    def change_endpoint(
        self,
        endpoint_id: EndpointId,
        *,
        name: str | None = None,
        url: str | None = None,
        event_types: Sequence[EventType] | None = None,
    ) -> WebhookEndpoint:
        """Change what is given; one that was disabled is told again."""

    def rotate_endpoint_secret(
        self, endpoint_id: EndpointId, secret: str, *, old_until: datetime | None
    ) -> WebhookEndpoint:
        """Sign with another secret, and with the old one too until then."""

    def delete_endpoint(self, endpoint_id: EndpointId) -> None:
        """Forget a receiver; what it has not been told is given up."""

    def signing_secrets(self, fresh: str) -> Secrets:
        """Give what signs for the batches' own URLs; `fresh` becomes it where there is none yet."""

    def rotate_signing_secret(self, secret: str, *, old_until: datetime | None) -> Secrets:
        """As `rotate_endpoint_secret`, for the batches' own URLs."""

    def announce(self, event: WebhookEvent, *, url: str | None = None) -> WebhookEvent:
        """Tell an event to all endpoints that want it, and to `url`. May be repeated."""

    def events(self, *, after: int, limit: int) -> list[WebhookEvent]:
        """Events with a serial above `after`, in the order in which they became true."""

    def event_serial(self, event_id: EventId) -> int:
        """The serial of an event; it counts those of all tenants, so it is not for their eyes. Raises: NotFound."""

    def last_event(self) -> WebhookEvent | None:
        """The newest event."""

    def delivery(self, delivery_id: DeliveryId) -> Delivery:
        """Raises: NotFound."""

    def deliveries(
        self, *, limit: int, after: DeliveryId | None = None, only: DeliveryFilter | None = None
    ) -> list[Delivery]:
        """Newest first, those older than `after`. Raises: NotFound."""

    def resend(self, delivery_id: DeliveryId) -> Delivery:
        """Begin a delivery that is over, or that waits for its next attempt, again at once, under the same id.

        Raises:
            NotFound: no such delivery.
            TransitionRefused: its endpoint is not there, or disabled.
        """


class Poster(Protocol):
    """What sends one notification."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Posted:
        """POST once, within the time that one attempt has, to an address that was checked when the connection was made.
        Never raises for what the receiver or the network does. Redirects are not followed, answers are not read.
        """

    async def close(self) -> None:
        """Close what is open."""
