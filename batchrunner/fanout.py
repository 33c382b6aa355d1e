"""Drain claimed shards: a pool for each upstream sends their lines; one tick, twenty times a second, stands for all
timers; no disk, no database.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence

from batchrunner.journal import Journal
from batchrunner.lanes import Lane, Lanes
from batchrunner.limits import Breaker
from batchrunner.memory import MemoryBudget
from batchrunner.metrics import Tally
from batchrunner.models import BatchId, LineCode, PauseReason
from batchrunner.outlets import Outlet, Shared
from batchrunner.pool import Pool
from batchrunner.ports import Clock, Rng
from batchrunner.routing import Router
from batchrunner.settings import Settings
from batchrunner.shards import ShardRun
from batchrunner.stash import Board
from batchrunner.verdict import RetryPolicy
from batchrunner.work import Work

logger = logging.getLogger(__name__)

TICK_S = 0.05
_TICKS_PER_SWEEP = 10
_TICKS_PER_REFUSAL = 3
_TICKS_PER_RANKING = 1200
_TICKS_PER_HAND_OVER = 4
# A pool that had nothing for 10 s looks around less often.
_TICKS_TO_REST = 200
_REST_S = 0.2
# So large a part of the memory may hold lines that were read for upstreams without room.
_STASHED_SHARE = 8


class Fanout:
    """All pools of one process. Their windows are set from outside; everything else follows from the shards that are
    added. Without a router there is one upstream that takes every line.

    `on_change` is called (on the loop) when a shard was finished, exhausted or needs an intent registered, and when a
    breaker has news; it must be cheap.
    """

    def __init__(
        self,
        *,
        outlets: Sequence[Outlet],
        journal: Journal,
        clock: Clock,
        rng: Rng,
        settings: Settings,
        router: Router | None = None,
    ) -> None:
        # What the breakers have found out and nobody has acted on yet: why a batch must be paused, None that it may go
        # on.
        self.breaker_news: dict[BatchId, PauseReason | None] = {}
        self._journal = journal
        self._clock = clock
        self._is_closed = False
        self._board: Board | None = None
        if router is not None:
            stashed_bytes_max = settings.memory_bytes_max // _STASHED_SHARE
            self._board = Board(router, stashed_bytes_max=stashed_bytes_max, refuse=self._refuse)
        self.lanes = Lanes(upstream_count=len(outlets), board=self._board)
        reading = outlets[0].gate.reading
        self.memory = MemoryBudget(settings.memory_bytes_max, lanes=self.lanes, journal=journal, reading=reading)
        self.tally = Tally()
        self._shared = Shared(
            lanes=self.lanes,
            journal=journal,
            memory=self.memory,
            clock=clock,
            rng=rng,
            policy=RetryPolicy(max_tries=settings.max_tries, retry_after_max_s=settings.retry_after_max_s),
            tally=self.tally,
            board=self._board,
            fit=self._fit,
        )
        self.pools = [Pool(outlet, place, self._shared) for place, outlet in enumerate(outlets)]
        if self._board is not None:
            self._board.desks = self.pools

    # -- what the worker calls ---------------------------------------------------------------------------------------

    @property
    def on_change(self) -> Callable[[], None]:
        """Who is called when there is news."""
        return self._shared.on_change

    @on_change.setter
    def on_change(self, listener: Callable[[], None]) -> None:
        self._shared.on_change = listener

    def stop_sends_at(self, at_s: float) -> None:
        """Send nothing from that moment on."""
        self._shared.stop_sends_at_s = at_s

    @property
    def window(self) -> int:
        """Exchanges that may be under way."""
        return sum(pool.window for pool in self.pools)

    @property
    def effective_window(self) -> int:
        """The window, or less where the memory budget would not hold that many answers."""
        return self.memory.window(self.window)

    @property
    def in_flight_count(self) -> int:
        """Exchanges under way."""
        return sum(len(pool.in_flight) for pool in self.pools)

    def in_flight_by_batch(self) -> list[Counter[BatchId]]:
        """Exchanges under way of each batch, for each pool."""
        return [Counter(work.run.batch.id for work in pool.in_flight) for pool in self.pools]

    @property
    def waiting_count(self) -> int:
        """Lines that wait for their next try, or for room at their upstream."""
        stashed = sum(len(lane.stash) for lane in self.lanes if lane.stash is not None)
        return stashed + sum(pool.waiting_count for pool in self.pools)

    def waiting_for(self, pool: Pool) -> int:
        """Lines that wait for one upstream, some perhaps for others as well."""
        stashed = sum(lane.stash.count_for(pool.place) for lane in self.lanes if lane.stash is not None)
        return stashed + pool.waiting_count

    @property
    def untouched_count(self) -> int:
        """Lines in hand that were not handed out yet and may be."""
        return sum(lane.untouched_count for lane in self.lanes)

    def add(self, run: ShardRun) -> None:
        """Take a loaded shard into the rotation."""
        run.on_need = self.on_change
        if self.lanes.of(run.batch.id) is None:
            for pool in self.pools:
                pool.gate.outage.ask_again(self._clock.monotonic_s())
        self.lanes.add(run, self._clock.now())
        self.wake()

    def stop(self, run: ShardRun) -> None:
        """Hand out nothing more of a shard and forget its waiting retries; exchanges under way go on."""
        run.is_stopped = True
        self.lanes.exhaust(run)
        lane = self.lanes.of(run.batch.id)
        if lane is not None and lane.stash is not None:
            run.in_flight_count -= lane.stash.drop(run)
        run.in_flight_count -= sum(pool.waiting.drop(run) for pool in self.pools)

    def forget(self, run: ShardRun) -> None:
        """Drop a shard that is settled or given back."""
        self.stop(run)
        self.lanes.remove(run)

    def abort(self, run: ShardRun) -> None:
        """End the exchanges of a shard that are under way; their lines stay without a record."""
        for pool in self.pools:
            pool.abort(run)

    def wake(self) -> None:
        """Let parked coroutines look for work again."""
        for pool in self.pools:
            pool.wake()

    def durable(self) -> None:
        """Results have become durable, and with them gone from memory."""
        self.memory.share()
        self.wake()

    def bound(self) -> str:
        """What keeps more from being under way at the busiest upstream."""
        return max(self.pools, key=lambda each: len(each.in_flight)).bound()

    @property
    def lost_text(self) -> str | None:
        """Why the upstream counts as unreachable from the start, None while there is hope or contact. Of several, one
        is lost when lines wait that nobody else could send.
        """
        lost = [pool for pool in self.pools if pool.is_lost]
        if self._board is None or not lost:
            return lost[0].caller.contact_message if lost else None
        places = {pool.place for pool in lost}
        for pool in lost:
            routes = [self._board.route_of(work) for work in pool.waiting]
            if any(route is not None and places.issuperset(route.places) for route in routes):
                return f"{pool.name}: {pool.caller.contact_message}"
        return None

    @property
    def outage_text(self) -> str | None:
        """What the present death of an upstream looks like, None while all answer."""
        told = [(pool.name, pool.caller.contact_message) for pool in self.pools if pool.is_down]
        if not told:
            return None
        return f"upstream_down: {told[0][1] if self._board is None else '; '.join(map(': '.join, told))}"

    async def run(self) -> None:
        """Work until `close`; then return when no exchange is under way."""
        async with asyncio.TaskGroup() as group:
            ticks = quiet = 0
            while not (self._is_closed and not self.in_flight_count):
                ticks += 1
                self._tick(group, ticks)
                quiet = 0 if len(self.lanes) or self.in_flight_count else quiet + 1
                await self._clock.sleep(TICK_S if quiet < _TICKS_TO_REST else _REST_S)
            for pool in self.pools:
                pool.end()

    def close(self) -> None:
        """Hand out nothing more; `run` returns when the last exchange has ended."""
        self._is_closed = self._shared.is_closed = True

    # -- the tick ----------------------------------------------------------------------------------------------------

    def _tick(self, group: asyncio.TaskGroup, ticks: int) -> None:
        self.memory.share()
        self.lanes.fit(self.window)
        for pool in self.pools:
            pool.tick(group)
            if ticks % _TICKS_PER_REFUSAL == 0:
                pool.forget_refusals()
            if ticks % _TICKS_PER_SWEEP == 0:
                pool.upstream.sweep_deadlines()
            if ticks % _TICKS_PER_HAND_OVER == 0:
                pool.hand_over()
        if not self._is_closed:
            for lane in list(self.lanes):
                self._check_breakers(lane)
            self.wake()
        if ticks % _TICKS_PER_SWEEP == 0:
            self.memory.fade()
        if ticks % _TICKS_PER_RANKING == 0:
            self.lanes.rank(self._clock.now())

    def _fit(self, window: int) -> int:
        """Give as much of one pool's window as the memory has room for, if all get an equal part of theirs."""
        whole = self.window
        fitting = self.memory.window(whole)
        return window if fitting >= whole else max(1, window * fitting // whole)

    # -- breakers ----------------------------------------------------------------------------------------------------

    def _check_breakers(self, lane: Lane) -> None:
        """Stop a batch when every line so far was answered that the key or the model is wrong; a probe that was
        answered in any other way lets it go on.
        """
        for place, breaker in enumerate(lane.breakers):
            if breaker.has_suspects:
                self._check_breaker(lane, place, breaker)
        if lane.is_probing and any(not breaker.is_undecided for breaker in lane.breakers):
            lane.go_on()
            self.breaker_news[lane.batch.id] = None
            self.on_change()

    def _check_breaker(self, lane: Lane, place: int, breaker: Breaker) -> None:
        is_under_way = any(work.run in lane.held for work in self.pools[place].in_flight)
        is_more_to_come = lane.untouched_count > 0 or (lane.stash is not None and lane.stash.count_for(place) > 0)
        reason = breaker.tripped(is_nothing_left=not is_more_to_come and not is_under_way)
        if reason is None:
            return
        if self._can_do_without(lane, place):
            self._shut(lane, place, reason)
            return
        self.lanes.trip(lane)
        for run in lane.held:
            self.stop(run)
        self.breaker_news[lane.batch.id] = reason
        self.on_change()

    def _can_do_without(self, lane: Lane, place: int) -> bool:
        """Whether another upstream may answer any of the lines that this one refused."""
        if self._board is None:
            return False
        router, shut = self._board.router, {*lane.shut, place}
        routes = {work.route for work in self.pools[place].waiting if work.run in lane.held}
        if not routes:
            # Its last lines of the batch have left already.
            return place in lane.shut
        return any(route is not None and not shut.issuperset(router.without(route, shut).places) for route in routes)

    def _shut(self, lane: Lane, place: int, reason: PauseReason) -> None:
        """Send lines of a batch to others than an upstream that refuses them all."""
        pool = self.pools[place]
        if place not in lane.shut:
            logger.warning(
                "upstream %s refuses every line of batch %s (%s): others get them",
                pool.name,
                lane.batch.id,
                reason,
                extra={"action": "upstream_shut", "batch_id": lane.batch.id},
            )
        lane.shut.add(place)
        lane.breakers[place] = Breaker()
        if lane.stash is not None:
            lane.stash.sort_again()
        pool.send_away(lane.held)

    def _refuse(self, work: Work) -> None:
        """Fail a line whose model no upstream serves."""
        assert self._board is not None
        code = LineCode.MODEL_NOT_SERVED
        self.tally.failures[code.value] += 1
        self.tally.failed += 1
        work.run.refuse(work.line, code, f"no upstream serves the model of this line; {self._board.router.served}")
        self.on_change()
