"""Batches that somebody follows: each is looked at by one poller, however many follow it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from batchrunner.batch_object import ExtendedBatch
from batchrunner.errors import BatchrunnerError, NotFound
from batchrunner.models import BatchId
from batchrunner.ports import Clock

logger = logging.getLogger(__name__)

LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A batch at one look. `version` counts moves of its status; with `last_sequence` it tells how far it is."""

    batch: ExtendedBatch
    version: int
    is_over: bool
    looked_at_s: float

    @property
    def event_id(self) -> str:
        """Names the level; a later one has a greater pair."""
        return f"{self.version}-{self.batch.progress.last_sequence + 1}"

    def follows(self, known: Seen) -> bool:
        """Tell whether a follower that saw `known` has something to hear; what it saw may be the later of the two."""
        reached, before = self._reached, known._reached
        if reached != before or self.looked_at_s <= known.looked_at_s:
            return reached > before
        return self._standing != known._standing

    @property
    def _reached(self) -> tuple[int, int]:
        return self.version, self.batch.progress.last_sequence

    @property
    def _standing(self) -> tuple[str | None, str | None, bool]:
        # A batch of jobs is over when the last of them is, which may be by a cancel that moves nothing else.
        return self.batch.paused_reason, self.batch.blocked_by, self.is_over


Look = Callable[[], Awaitable[Seen]]


class Feed:
    """What the followers of one batch share: the last look, and a wake-up when a later one differs."""

    def __init__(self, first: Seen) -> None:
        self.seen: Seen | None = first
        self.follower_count = 0
        self._changed = asyncio.Event()

    def tell(self, seen: Seen | None) -> None:
        """Wake everybody; None means that there is nothing more to see."""
        self.seen = seen
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def next_after(self, known: Seen, *, timeout_s: float) -> Seen | None:
        """Wait for a look that tells more than `known`; None at the end.

        Raises:
            TimeoutError: there was none in time.
        """
        async with asyncio.timeout(timeout_s):
            while self.seen is not None and not self.seen.follows(known):
                await self._changed.wait()
        return self.seen

    async def poll(self, look: Look, clock: Clock) -> None:
        """Look again and again, until the batch is over or gone."""
        while self.seen is not None and not self.seen.is_over:
            await clock.sleep(LOOK_S)
            try:
                self.tell(await look())
            except NotFound:
                self.tell(None)
            except BatchrunnerError:
                # The followers keep what they have; the store or its disk comes back.
                logger.warning("a batch could not be looked at", exc_info=True, extra={"action": "look_failed"})
            except Exception:
                # Whoever follows would otherwise hear nothing but heartbeats.
                logger.exception("a batch is followed no more", extra={"action": "look_broke"})
                self.tell(None)


class Watching:
    """The feeds of one process. One event loop only."""

    def __init__(self) -> None:
        self._feeds: dict[BatchId, Feed] = {}
        self._pollers: dict[BatchId, asyncio.Task[None]] = {}

    def stop(self) -> None:
        """End what everybody follows, so that nobody keeps the process from ending."""
        for feed in self._feeds.values():
            feed.tell(None)

    @property
    def poller_count(self) -> int:
        """How many batches are looked at."""
        return len(self._pollers)

    @asynccontextmanager
    async def follow(self, batch_id: BatchId, first: Seen, look: Look, clock: Clock) -> AsyncIterator[Feed]:
        """Give the feed of a batch; its first follower starts the poller, its last one ends it."""
        feed = self._feeds.get(batch_id)
        if feed is None:
            feed = self._feeds[batch_id] = Feed(first)
            self._pollers[batch_id] = asyncio.ensure_future(feed.poll(look, clock))
        feed.follower_count += 1
        try:
            yield feed
        finally:
            feed.follower_count -= 1
            if not feed.follower_count:
                del self._feeds[batch_id]
                poller = self._pollers.pop(batch_id)
                poller.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await poller
