"""A worker session: claim tasks under a lease, keep the lease alive, run each task's step, register what is durable,
let go.

One coroutine, the keeper, does all bookkeeping of the shards in hand, so that no two store calls of a session race.
Renewals run on a thread of their own and stop when the work shows no life.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar, assert_never

from batchrunner import crash
from batchrunner.appetite import BREAKER_REASONS
from batchrunner.claiming import Claiming, Steps
from batchrunner.errors import (
    BatchrunnerError,
    BlobsUnavailable,
    DiskFull,
    Fenced,
    InputChanged,
    StoreUnavailable,
)
from batchrunner.fanout import Fanout
from batchrunner.lifecycle import BatchStatus
from batchrunner.models import Claim, Held, PauseReason, Progress, SessionId, TaskKind
from batchrunner.owing import Owing
from batchrunner.pipeline import Pipeline
from batchrunner.ports import Clock, Store
from batchrunner.renewals import Renewals
from batchrunner.reporting import LiveReports
from batchrunner.settings import Settings
from batchrunner.shards import ShardRun

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# A sender must have stopped before anybody else may own the lease.
_LEASE_MARGIN_S = 3.0
_QUARANTINE_DEATHS = 3
_KEEP_S = 0.1
_REST_S = 0.2


class Worker:
    """One session. `run` returns after `stop`, when everything in hand has been given back.

    `pacer` is called every 100 ms with what happened since and sets the fan-out's window and shares. Where others wait
    for a `run` to end, a pause or an upstream that was never there ends it; a session that `is_server` waits for better
    times by itself.
    """

    def __init__(
        self,
        *,
        session: SessionId,
        store: Store,
        pipeline: Pipeline,
        fanout: Fanout,
        pacer: Callable[[Fanout], None],
        reap: Callable[[], int],
        clock: Clock,
        settings: Settings,
        is_server: bool = False,
    ) -> None:
        self.session = session
        self.fanout = fanout
        fanout.on_change = self.changed
        pipeline.assets.on_trouble = self._note_trouble
        self.step_done = asyncio.Event()
        self.trouble: BatchrunnerError | None = None
        self._store = store
        self._pipeline = pipeline
        self._pacer = pacer
        self._clock = clock
        self._settings = settings
        self._renewals = Renewals(store, session, settings, clock)
        # Two steps of each kind, and the keeper's own calls.
        self._threads = ThreadPoolExecutor(max_workers=5, thread_name_prefix="worker")
        self._reports = LiveReports(fanout)
        self._claiming = Claiming(
            session=session,
            store=store,
            fanout=fanout,
            reap=reap,
            call=self._call,
            clock=clock,
            settings=settings,
            is_server=is_server,
        )
        self._is_server = is_server
        self._runs: dict[int, ShardRun] = {}
        # Shards given away or lost whose last replies are still awaited: these belong into their journal all the same.
        self._lost: list[ShardRun] = []
        self._owing = Owing(store, self._call)
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._stop_by_s = 0.0
        self._steps = Steps(is_server=is_server)
        self._watch_at_s = 0.0
        self._sweep_at_s = 0.0

    def changed(self) -> None:
        """Ask the keeper to look at its shards soon."""
        self._changed.set()

    def durable(self) -> None:
        """Results have become durable: lines and answers that waited for that may go on, and a finished shard may be
        settled.
        """
        self.fanout.durable()
        if any(run.is_finished or run.leave_by_s is not None for run in self._runs.values()):
            self._changed.set()

    @property
    def trouble_text(self) -> str | None:
        """Why the work stands still, None while it goes on."""
        trouble = self._pipeline.trouble or self.trouble
        return f"{trouble.code}: {trouble}" if trouble is not None else self.fanout.outage_text

    @property
    def lost_text(self) -> str | None:
        """Why the upstream counts as unreachable from the start, None while there is hope or contact."""
        return None if self._is_server else self.fanout.lost_text

    def stop(self, *, grace_s: float | None = None) -> None:
        """Claim nothing more, let what is in flight end within the grace, give everything back."""
        grace_s = self._settings.drain_grace_s if grace_s is None else grace_s
        stop_by_s = self._clock.monotonic_s() + grace_s
        self._stop_by_s = min(self._stop_by_s, stop_by_s) if self._is_stopping else stop_by_s
        self._is_stopping = True
        self._pipeline.stop()
        self._changed.set()

    async def run(self) -> None:
        """Work until `stop`. Shards that could not be given back are left to their leases."""
        self._renewals.start()
        await self._call(self._pipeline.keep_reserve)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.fanout.run())
                group.create_task(self._pace())
                await self._keep(group)
                self.fanout.close()
        finally:
            self._renewals.stop()
            self._threads.shutdown(wait=True)
            self._pipeline.assets.close()

    # -- the keeper --------------------------------------------------------------------------------------------------

    async def _pace(self) -> None:
        while not (self._is_stopping and not self._runs):
            self._renewals.loop_ticked()
            self.fanout.stop_sends_at(self._renewals.renewed_at_s + self._settings.lease_s - _LEASE_MARGIN_S)
            self.fanout.tally.damages = self._pipeline.damage_count
            self._pacer(self.fanout)
            await self._clock.sleep(_REST_S if self._claiming.is_resting else _KEEP_S)

    async def _keep(self, group: asyncio.TaskGroup) -> None:
        while not (self._is_stopping and not self._runs and not self._owing and not self._steps):
            try:
                await self._keep_once(group)
                if self.trouble is not None:
                    self.trouble = None
                    await self._call(self._pipeline.keep_reserve)
            except (StoreUnavailable, DiskFull) as error:
                is_lasting = self.trouble is not None
                self._note_trouble(error)
                if isinstance(error, DiskFull):
                    await self._call(self._pipeline.release_reserve)
                if self._is_stopping and is_lasting:
                    self._abandon(error)
                await self._clock.sleep(1.0)
            await self._pause_between_rounds()

    def _abandon(self, error: BatchrunnerError) -> None:
        """Leave to their leases what the store does not take back, once nothing else is waited for."""
        is_idle = not any(run.in_flight_count for run in self._runs.values())
        if self._clock.monotonic_s() < self._stop_by_s and not (is_idle and isinstance(error, DiskFull)):
            return
        for run in list(self._runs.values()):
            self.fanout.stop(run)
            self.fanout.abort(run)
            self._drop(run)
        self._owing.forget()

    async def _pause_between_rounds(self) -> None:
        try:
            async with asyncio.timeout(_REST_S if self._claiming.is_resting else _KEEP_S):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _note_trouble(self, error: BatchrunnerError) -> None:
        if self.trouble is None:
            logger.warning("waiting: %s", error, extra={"action": "worker_waits", "code": error.code})
        self.trouble = error

    async def _keep_once(self, group: asyncio.TaskGroup) -> None:
        now_s = self._clock.monotonic_s()
        if self._is_stopping:
            self._leave_all()
        if now_s >= self._watch_at_s:
            self._watch_at_s = now_s + self._settings.poll_s
            if self._runs:
                await self._watch()
            self._close_lost()
        if now_s >= self._sweep_at_s:
            self._sweep_at_s = now_s + self._settings.sweep_s
            await self._call(self._store.sweep)
        await self._owing.pay()
        for run in list(self._runs.values()):
            await self._tend(run)
        await self._follow_breakers()
        await self._report()
        while await self._claim(group):
            pass

    async def _call(self, function: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    # -- shards in hand ----------------------------------------------------------------------------------------------

    async def _tend(self, run: ShardRun) -> None:
        """Do for one shard what is due: register, settle, give back, split at the hold, register an intent."""
        try:
            if run.leave_by_s is not None:
                await self._lead_out(run)
            elif run.is_finished:
                await self._settle_if_durable(run)
            else:
                if run.is_held:
                    await self._split(run, keep_lines=0)
                mark = self._mark_of(run)
                if mark is not None or self._clock.monotonic_s() - run.registered_at_s >= self._settings.register_s:
                    await self._register(run, intent_mark=mark)
        except Fenced:
            logger.warning(
                "shard lost to a newer holder", extra={"action": "shard_fenced", "task_id": run.shard.task_id}
            )
            self._drop(run)

    def _registered(self, run: ShardRun, progress: Progress) -> None:
        del run.unregistered[: len(progress.extents)]
        run.re_executed_count -= progress.re_executed_count
        run.retry_count -= progress.retry_count
        run.registered_at_s = self._clock.monotonic_s()

    async def _register(self, run: ShardRun, *, intent_mark: int | None = None) -> None:
        progress = run.progress(intent_mark=intent_mark)
        run.registered_at_s = self._clock.monotonic_s()
        if progress == Progress():
            return
        crash.point("register.before_commit")
        await self._call(self._store.register, run.claim.ref, progress)
        crash.point("register.committed")
        self._registered(run, progress)
        if intent_mark is not None:
            run.mark_registered(intent_mark)
            self.fanout.wake()

    def _mark_of(self, run: ShardRun) -> int | None:
        window = self.fanout.window
        lines_ahead = sum(pool.sampler.lines_ahead(pool.window) for pool in self.fanout.pools)
        return run.mark_to_register(window, lines_ahead=lines_ahead)

    async def _settle_if_durable(self, run: ShardRun) -> None:
        if run.journal.waiting_records:
            run.journal.request_sync()
            return
        crash.point("settle.before_commit")
        if await self._call(self._store.settle, run.claim.ref, run.progress()):
            self._claiming.stir()
        crash.point("settle.committed")
        self._drop(run)
        self.step_done.set()

    async def _lead_out(self, run: ShardRun) -> None:
        """Give a shard back once its exchanges have ended or its grace is over, and what they brought is durable."""
        self.fanout.stop(run)
        if run.in_flight_count > 0:
            if self._clock.monotonic_s() >= (run.leave_by_s or 0.0):
                run.aborted_count = run.aborted_count or run.in_flight_count
                self.fanout.abort(run)
            return
        is_stuck = run.journal.waiting_records > 0 and self._pipeline.journal.trouble is not None
        if run.is_finished and not (is_stuck and self._is_stopping):
            await self._settle_if_durable(run)
            return
        if run.journal.waiting_records and not is_stuck:
            run.journal.request_sync()
            return
        await self._call(self._store.give_back, run.claim.ref, run.last_progress())
        crash.point("give_back.committed")
        self._drop(run)

    def _drop(self, run: ShardRun) -> None:
        self.fanout.forget(run)
        self._reports.leave(run)
        self._runs.pop(run.shard.task_id, None)
        self._lost.append(run)
        self._close_lost()

    def _close_lost(self) -> None:
        """Close the journals of dropped shards whose last reply has come."""
        for run in [lost for lost in self._lost if lost.in_flight_count == 0]:
            self._lost.remove(run)
            run.journal.close()

    def _leave(self, run: ShardRun, *, by_s: float) -> None:
        if run.leave_by_s is None or by_s < run.leave_by_s:
            run.leave_by_s = by_s
            self.fanout.stop(run)

    def _leave_all(self) -> None:
        for run in self._runs.values():
            self._leave(run, by_s=self._stop_by_s)

    async def _split(self, run: ShardRun, *, keep_lines: int) -> None:
        """Cut untouched lines off into a shard of their own, unless they are too few or reserved already."""
        cut = run.cut_tail(keep_lines=keep_lines)
        if cut is None:
            return
        head, tail = cut
        whole = run.shard
        run.drop_tail(head, tail)
        try:
            await self._call(self._store.split, run.claim.ref, head, tail)
        except (StoreUnavailable, DiskFull):
            # It may have happened or not: the next holder reads from the store which lines the shard still has.
            run.take_back_tail(whole, tail)
            self._leave(run, by_s=float("inf"))
            raise
        crash.point("split.committed")

    # -- what others want --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Ask how the tasks in hand stand; follow cancel, deadline, pause, hold and loss; share with the hungry."""
        watch = await self._call(self._store.watch, self.session)
        now_s = self._clock.monotonic_s()
        rows = {held.task_id: held for held in watch.held}
        for run in list(self._runs.values()):
            held = rows.get(run.shard.task_id)
            if held is None or not held.is_mine:
                logger.warning("shard lost", extra={"action": "shard_lost", "task_id": run.shard.task_id})
                self._drop(run)
            else:
                self._follow(run, held, now_s)
        if watch.is_anyone_hungry and not self._is_stopping:
            await self._share()

    def _follow(self, run: ShardRun, held: Held, now_s: float) -> None:
        if held.status is not BatchStatus.IN_PROGRESS:
            run.is_left_for_good = True
            self._leave(run, by_s=now_s + self._settings.cancel_grace_s)
        elif held.paused_reason is None or self._may_probe(run, held.paused_reason):
            run.follow(held)
        else:
            self._leave(run, by_s=float("inf"))

    def _may_probe(self, run: ShardRun, paused_reason: str) -> bool:
        """Whether the shard was claimed to find out if its batch may go on, or has just found out."""
        lane = self.fanout.lanes.of(run.batch.id)
        is_probing = (lane is not None and lane.is_probing) or run.batch.id in self.fanout.breaker_news
        return is_probing and paused_reason in BREAKER_REASONS

    async def _share(self) -> None:
        """Cut the shard with the most untouched lines in two, so that a hungry session finds something."""
        runs = [run for run in self._runs.values() if run.leave_by_s is None and not run.is_quarantined]
        run = max(runs, key=lambda held: held.untouched_count, default=None)
        if run is not None and run.untouched_count > max(1, self.fanout.window // 4):
            try:
                await self._split(run, keep_lines=run.untouched_count // 2)
            except Fenced:
                self._drop(run)

    async def _follow_breakers(self) -> None:
        """Pause in the store what the fan-out has stopped, and let go on what a probe has found well again."""
        news = self.fanout.breaker_news
        for batch_id, reason in list(news.items()):
            runs = [run for run in self._runs.values() if run.batch.id == batch_id]
            if runs:
                extra = {"action": "batch_paused" if reason else "batch_resumed", "batch_id": batch_id}
                logger.warning("batch %s: %s", batch_id, reason or "goes on", extra=extra)
                scope = self._store.scope(runs[0].batch.tenant)
                resume = partial(scope.resume, batch_id, only_if=BREAKER_REASONS)
                await self._call(partial(scope.pause, batch_id, reason.value) if reason else resume)
            for run in runs if reason else ():
                self._leave(run, by_s=float("inf"))
            if news.get(batch_id) is reason:
                del news[batch_id]

    async def _report(self) -> None:
        shares = self._reports.due(self._clock.monotonic_s())
        if shares is not None:
            await self._call(self._store.report_live, self.session, shares)

    # -- claims ------------------------------------------------------------------------------------------------------

    async def _claim(self, group: asyncio.TaskGroup) -> bool:
        """Claim and start one task; False when there was none, or something else is due."""
        if self._is_stopping or self._pipeline.journal.trouble or self._clock.monotonic_s() >= self._watch_at_s:
            return False
        claim = await self._claiming.next(self._runs.values(), steps=self._steps)
        if claim is None:
            return False
        match claim.kind:
            case TaskKind.SHARD:
                await self._take_shard(claim)
            case TaskKind.VALIDATE | TaskKind.SEAL | TaskKind.NOTIFY:
                self._steps.begin(claim)
                group.create_task(self._run_step(claim))
            case _:
                assert_never(claim.kind)
        return True

    async def _take_shard(self, claim: Claim) -> None:
        """Load a claimed shard and put it into the rotation; whatever fails, the task does not stay with this
        session.
        """
        assert claim.shard is not None
        try:
            run = await self._call(self._pipeline.load_shard, claim)
            crash.point("shard.loaded")
            if run.deaths_at_work >= _QUARANTINE_DEATHS and not claim.shard.is_quarantined:
                await self._quarantine(run)
                return
            # What was salvaged and may be sent again is on record before the first line goes out: a second death must
            # not hide the repeats of the first.
            await self._register(run, intent_mark=self._mark_of(run))
        except Fenced:
            return
        except InputChanged as error:
            self._owe(claim, error)
            scope = self._store.scope(claim.batch.tenant)
            await self._call(scope.pause, claim.batch.id, PauseReason.INPUT_CHANGED.value)
            return
        except Exception as error:
            self._owe(claim, error)
            return
        self._runs[claim.ref.task_id] = run
        self._reports.follow(run)
        self.fanout.add(run)

    async def _quarantine(self, run: ShardRun) -> None:
        """Have the lines that may have killed their holders sent one at a time; those never sent go on as they are."""
        run.journal.close()
        cut = run.cut_suspects()
        if cut is not None:
            await self._call(self._store.split, run.claim.ref, *cut)
        await self._call(self._store.quarantine, run.claim.ref)

    async def _run_step(self, claim: Claim) -> None:
        """Validate or seal in a thread, with its own proof of life."""
        task_id = claim.ref.task_id
        self._renewals.step_moved(task_id)
        try:
            await self._call(self._pipeline.run_step, claim, lambda: self._renewals.step_moved(task_id))
        except Fenced:
            logger.warning("step lost to a newer holder", extra={"action": "step_fenced", "task_id": task_id})
        except Exception as error:
            self._owe(claim, error)
        finally:
            self._renewals.step_ended(task_id)
            self._steps.end(claim)
            self._claiming.stir()
            self.step_done.set()
            self.changed()

    def _owe(self, claim: Claim, error: Exception) -> None:
        """Remember a task that failed; what we know the cause of needs no traceback."""
        extra = {"action": "task_failed", "task_id": claim.ref.task_id, "kind": claim.kind}
        is_known = isinstance(error, DiskFull | BlobsUnavailable | StoreUnavailable | InputChanged)
        logger.log(
            logging.WARNING if is_known else logging.ERROR,
            "%s failed: %s",
            claim.kind,
            error,
            exc_info=None if is_known else error,
            extra=extra,
        )
        self._owing.note(claim, error)
