"""The end of a run, told to the URL of `--webhook-url`: at once, once more if that fails, and by any later run."""

from __future__ import annotations

import asyncio
from pathlib import Path

from batchrunner.app import Adapters, open_adapters
from batchrunner.cli.console import say
from batchrunner.cli.local_secret import local_secret
from batchrunner.courier import Courier
from batchrunner.deliveries import Delivery, DeliveryId, DeliveryState, EndReason
from batchrunner.delivering import address_rules, carrying, open_poster
from batchrunner.models import LOCAL_TENANT, BatchId
from batchrunner.settings import Settings
from batchrunner.webhooks import delivery_id, event_of

# The second attempt is 5 s after the first, and each may take 15 s.
_PATIENCE_S = 40.0
_ATTEMPTS = 2
_LOOK_S = 0.05


async def tell_end(folder: Path, batch_id: BatchId, url: str, settings: Settings) -> None:
    """Tell how a batch ended, unless that was told already. What is not told now is no failure of the run."""
    adapters = await asyncio.to_thread(open_adapters, folder)
    try:
        delivery = await asyncio.to_thread(_begun, adapters, batch_id, url)
        if delivery.state is DeliveryState.PENDING:
            poster = open_poster(adapters, address_rules(settings, is_open=True))
            try:
                async with carrying(adapters, folder, settings, poster) as courier:
                    delivery = await _carried(adapters, courier, delivery.id)
            finally:
                await poster.close()
            say(_outcome(delivery, url))
    finally:
        await asyncio.to_thread(adapters.store.close)


def _begun(adapters: Adapters, batch_id: BatchId, url: str) -> Delivery:
    """Make the delivery, or find it; one that failed the last time is due again. Blocks."""
    scope = adapters.store.scope(LOCAL_TENANT)
    scope.rotate_signing_secret(local_secret(), old_until=None)
    event = event_of(scope.batch(batch_id), adapters.clock.now())
    assert event is not None
    scope.announce(event, url=url)
    delivery = scope.delivery(delivery_id(event.id, url))
    is_over = delivery.state is DeliveryState.DELIVERED or delivery.reason is EndReason.GONE
    return delivery if is_over else scope.resend(delivery.id)


async def _carried(adapters: Adapters, courier: Courier, name: DeliveryId) -> Delivery:
    """Wait until it is delivered, or has failed often enough for now."""
    scope, clock = adapters.store.scope(LOCAL_TENANT), adapters.clock
    give_up_at_s = clock.monotonic_s() + _PATIENCE_S
    running = asyncio.create_task(courier.run())
    try:
        while clock.monotonic_s() < give_up_at_s:
            delivery = await asyncio.to_thread(scope.delivery, name)
            is_tried = delivery.attempt_count >= _ATTEMPTS and delivery.attempts[-1].elapsed_s is not None
            if delivery.state is not DeliveryState.PENDING or is_tried:
                break
            await clock.sleep(_LOOK_S)
    finally:
        courier.stop(grace_s=0.0)
        await running
    return await asyncio.to_thread(scope.delivery, name)


def _outcome(delivery: Delivery, url: str) -> str:
    last = delivery.attempts[-1] if delivery.attempts else None
    answer = "nothing" if last is None else last.status or f"{last.error}: {last.message}"
    if delivery.state is DeliveryState.DELIVERED:
        return f"told {url}: {answer}"
    again = "" if delivery.reason is EndReason.GONE else "; the same command again tries again"
    return f"could not tell {url}: {answer}{again}"
