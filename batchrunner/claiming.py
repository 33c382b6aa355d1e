"""When a worker asks the Store for work, and for what: a share of every batch that runs, and enough to fill its window.

Asking to take something needs the Store's one writer; so after it got nothing a session only reads until there is work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Protocol, TypeVar

from batchrunner import crash
from batchrunner.appetite import Appetite
from batchrunner.fanout import Fanout
from batchrunner.lanes import Lane
from batchrunner.models import BatchId, Claim, SessionId, TaskKind
from batchrunner.ports import Clock, Store
from batchrunner.settings import Settings
from batchrunner.shards import ShardRun

_T_co = TypeVar("_T_co", covariant=True)

# Of so many batches a session holds a shard at a time, and one more for each further tenant.
BATCHES_MAX = 64
PROBE_EVERY_S = 60.0
_LOOK_S = 0.2
# A session without work looks so often for this long, then as often as it asks for anything else.
_EAGER_S = 10.0
_REAP_S = 1.0
_QUARANTINE_S = 2.0
_STEPS = (TaskKind.SEAL, TaskKind.VALIDATE)


class Caller(Protocol):
    """Runs a blocking call in a thread that may wait."""

    def __call__(self, function: Callable[..., _T_co], *arguments: object) -> Awaitable[_T_co]:
        """Give what the function gives."""


class Steps:
    """The blocking steps that a session runs: of each kind one of any batch, and in a server beside it one of a light
    batch, which would otherwise wait until a huge one is read or written.
    """

    def __init__(self, *, is_server: bool) -> None:
        self._is_server = is_server
        self._any: dict[TaskKind, int] = {}
        self._light: dict[TaskKind, int] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._any) + len(self._light)

    def begin(self, claim: Claim) -> None:
        """Note a step that begins."""
        places = self._light if claim.kind in self._any else self._any
        places[claim.kind] = claim.ref.task_id

    def end(self, claim: Claim) -> None:
        """Note that a step has ended."""
        for places in (self._any, self._light):
            if places.get(claim.kind) == claim.ref.task_id:
                del places[claim.kind]

    @property
    def wanted(self) -> tuple[TaskKind, ...]:
        """The kinds of which one more may begin; where one batch is all there is, they never meet."""
        if not self._is_server:
            return () if self._any else _STEPS
        return tuple(kind for kind in _STEPS if kind not in self._light)

    @property
    def light(self) -> frozenset[TaskKind]:
        """The kinds of which only a light one may begin."""
        return frozenset(self._any)


class Claiming:
    """The claims of one session."""

    def __init__(
        self,
        *,
        session: SessionId,
        store: Store,
        fanout: Fanout,
        reap: Callable[[], int],
        call: Caller,
        clock: Clock,
        settings: Settings,
        is_server: bool,
    ) -> None:
        self._session = session
        self._store = store
        self._fanout = fanout
        self._reap = reap
        self._call = call
        self._clock = clock
        self._settings = settings
        self._is_server = is_server
        # Batches of which nothing more was found to claim; and whether there is news of work all the same.
        self._dry: frozenset[BatchId] = frozenset()
        self._has_news = True
        self._look_at_s = 0.0
        self._reap_at_s = 0.0
        self._quarantine_at_s = 0.0
        self._idle_since_s = clock.monotonic_s()
        self._is_hungry = False

    @property
    def is_resting(self) -> bool:
        """Whether there was nothing to do for a while."""
        return self._clock.monotonic_s() - self._idle_since_s >= _EAGER_S

    def stir(self) -> None:
        """Ask again at once: something happened that may have made work."""
        self._has_news = True

    async def next(self, runs: Collection[ShardRun], *, steps: Steps) -> Claim | None:
        """Take one task, None when there is none or none is wanted now."""
        if any(run.is_quarantined for run in runs):
            return None
        now_s = self._clock.monotonic_s()
        if runs or steps:
            self._idle_since_s = now_s
        wanting = frozenset(lane.batch.id for lane in self._fanout.lanes if self._wants_more(lane))
        self._dry &= wanting
        kinds = (*steps.wanted, TaskKind.SHARD)
        is_idle = not runs and not steps
        appetite = self._appetite(wanting, steps)
        if not (self._has_news or wanting - self._dry):
            if now_s < self._look_at_s:
                return None
            self._look_at_s = now_s + self._look_every_s(now_s, is_full=bool(runs) and not wanting)
            self._has_news = await self._call(partial(self._has_work, kinds, appetite, is_idle=is_idle))
        claim = None
        if self._has_news or wanting - self._dry:
            claim = await self._call(partial(self._claim, kinds, appetite, is_idle=is_idle))
        if claim is None:
            self._has_news = False
            self._dry = wanting
            await self._note_nothing(now_s)
        else:
            self._dry -= {claim.batch.id}
        await self._tell_hunger(is_hungry=claim is None and not steps and self._fanout.untouched_count == 0)
        return claim

    def _wants_more(self, lane: Lane) -> bool:
        """Whether a batch's lines may run out before its next shard is here."""
        if lane.is_probing:
            return False
        share = self._fanout.window // len(self._fanout.lanes)
        return lane.untouched_count < max(1, share) or all(run.is_touched for run in lane.held)

    def _appetite(self, wanting: frozenset[BatchId], steps: Steps) -> Appetite:
        lanes = self._fanout.lanes
        sated = {lane.batch.id for lane in lanes if lane.batch.id not in wanting}
        # Half of the memory is for answers.
        is_heavy = self._fanout.memory.shard_bytes > self._settings.memory_bytes_max // 2
        if is_heavy:
            sated |= {lane.batch.id for lane in lanes if lane.untouched_count}
        has_room = not is_heavy and len(lanes) < BATCHES_MAX
        return Appetite(
            sated=frozenset(sated),
            has_room=has_room,
            probe_every_s=PROBE_EVERY_S if self._is_server else None,
            light=steps.light,
            takes_turns=self._is_server,
        )

    def _look_every_s(self, now_s: float, *, is_full: bool) -> float:
        is_eager = now_s - self._idle_since_s < _EAGER_S and (self._is_server or not is_full)
        return min(_LOOK_S, self._settings.poll_s) if is_eager else self._settings.poll_s

    def _has_work(self, kinds: tuple[TaskKind, ...], appetite: Appetite, *, is_idle: bool) -> bool:
        if self._store.has_work(self._session, kinds=kinds, appetite=appetite):
            return True
        if not is_idle or self._clock.monotonic_s() < self._quarantine_at_s:
            return False
        self._quarantine_at_s = self._clock.monotonic_s() + _QUARANTINE_S
        shards = (TaskKind.SHARD,)
        return self._store.has_work(self._session, kinds=shards, quarantined=True, appetite=appetite)

    def _claim(self, kinds: tuple[TaskKind, ...], appetite: Appetite, *, is_idle: bool) -> Claim | None:
        lease_s = self._settings.lease_s
        claim = self._store.claim(self._session, lease_s=lease_s, kinds=kinds, appetite=appetite)
        if claim is None and is_idle:
            shards = (TaskKind.SHARD,)
            claim = self._store.claim(self._session, lease_s=lease_s, kinds=shards, quarantined=True, appetite=appetite)
        if claim is not None:
            crash.point("claim.taken")
        return claim

    async def _note_nothing(self, now_s: float) -> None:
        if now_s >= self._reap_at_s:
            self._reap_at_s = now_s + _REAP_S
            self._has_news = await self._call(self._reap) > 0

    async def _tell_hunger(self, *, is_hungry: bool) -> None:
        if is_hungry != self._is_hungry:
            self._is_hungry = is_hungry
            await self._call(lambda: self._store.set_hungry(self._session, is_hungry=is_hungry))
