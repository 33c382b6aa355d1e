"""Couriers over open adapters: the only place that knows which Poster there is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from pathlib import Path

from batchrunner.addresses import AddressRules, parse_networks
from batchrunner.app import Adapters, reap
from batchrunner.courier import IN_FLIGHT_MAX, Courier
from batchrunner.models import SessionId
from batchrunner.outbox import Poster
from batchrunner.poster import AiohttpPoster
from batchrunner.session_locks import SessionLocks
from batchrunner.settings import Settings


def address_rules(settings: Settings, *, is_open: bool) -> AddressRules:
    """Tell where webhooks may go: where anybody on this machine may do anything, to this machine, too.

    Raises:
        UsageError: a network of the settings is none.
    """
    return AddressRules(is_loopback_allowed=is_open, networks=parse_networks(settings.webhook_networks))


def open_poster(adapters: Adapters, rules: AddressRules) -> Poster:
    """Open what posts; the caller closes it."""
    return AiohttpPoster(rules, adapters.clock)


@contextlib.asynccontextmanager
async def carrying(
    adapters: Adapters,
    folder: Path,
    settings: Settings,
    poster: Poster,
    *,
    in_flight_max: int = IN_FLIGHT_MAX,
    threads: Executor | None = None,
) -> AsyncIterator[Courier]:
    """Make a courier session over a data folder; its lock and what it holds end with the block."""
    locks = SessionLocks(folder)
    session = SessionId(adapters.rng.token_hex(8))
    locks.hold(session)
    try:
        # What a courier that was killed held is due at once.
        await asyncio.to_thread(reap, adapters, locks)
        yield Courier(
            session=session,
            store=adapters.store,
            poster=poster,
            clock=adapters.clock,
            rng=adapters.rng,
            each_max=settings.webhook_concurrency,
            in_flight_max=in_flight_max,
            threads=threads,
        )
    finally:
        locks.let_go(session)
