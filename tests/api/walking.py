"""Random walks over one batch of a server: whatever comes next, a look follows that compares all that is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from batchrunner.errors import Fenced
from batchrunner.models import Progress, TaskKind
from batchrunner.shards import ShardRun
from tests.api.serving import Served, serving
from tests.pipeline.hands import Hand, Place


@dataclass(slots=True)
class Ground:
    """A server, and the hand that works beside it by the same clock."""

    served: Served
    place: Place
    hand: Hand

    def pass_time(self, duration_s: float) -> None:
        """Let time pass that nobody lived through."""
        self.place.clock.advance(duration_s)
        # A clock that jumps so far is believed the second time.
        for _ in range(2):
            self.hand.store.sweep()


@asynccontextmanager
async def walking(folder: Path) -> AsyncIterator[Ground]:
    """Have a server and a hand until the block ends."""
    place = Place(folder)
    async with serving(folder, clock=place.clock) as served:
        hand = place.hand("worker")
        try:
            yield Ground(served, place, hand)
        finally:
            hand.store.close()


@dataclass(slots=True)
class Walker(ABC):
    """A batch, and the shard of it that the hand holds."""

    ground: Ground
    batch_id: str
    run: ShardRun | None = None

    @abstractmethod
    async def step(self, verb: str, count: int) -> None:
        """Do one thing."""

    @abstractmethod
    async def look(self) -> None:
        """Compare all that is shown now with itself and with what was shown before."""

    async def go(self, steps: Iterable[tuple[str, int]]) -> None:
        """Look at first and after each step."""
        await self.look()
        for verb, count in steps:
            await self.step(verb, count)
            await self.look()

    @property
    def served(self) -> Served:
        return self.ground.served

    @property
    def hand(self) -> Hand:
        return self.ground.hand

    @property
    def is_unfinished(self) -> bool:
        """Whether lines are in hand, or there for the taking."""
        return self.run is not None or self.hand.store.has_work(self.hand.session, kinds=[TaskKind.SHARD])

    def work(self, answer: Callable[[ShardRun], object]) -> None:
        """Take a shard unless one is held, answer lines of it, and register them as a worker does."""
        if self.run is None:
            claim = self.hand.find(TaskKind.SHARD)
            if claim is None:
                return
            self.run = self.hand.pipeline.load_shard(claim)
        try:
            answer(self.run)
            if self.run.is_finished:
                self.hand.settle(self.run)
                self.run = None
            else:
                self.hand.register(self.run)
        except Fenced:
            self.run = None

    def leave(self) -> None:
        """Give the shard back, as a holder does whose batch ends or whose process stops."""
        if self.run is not None:
            with suppress(Fenced):
                self.hand.store.give_back(self.run.claim.ref, Progress(extents=self.hand.extents(self.run)))
            self.run = None
