"""Drain claimed shards: take a line, send it, judge the answer, retry or journal it; no disk, no database.

A pool of long-lived coroutines, as many as the window allows, pulls lines straight from the shards; there is no task,
queue item, lock or timer per line. One tick, twenty times a second, stands for all timers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import assert_never

from batchrunner.caller import Caller
from batchrunner.journal import Journal
from batchrunner.lanes import Lane, Lanes, Waiting, Work
from batchrunner.limits import DEATHS_ALONE, OUTAGE_SPAN_S, Gate, estimate_tokens
from batchrunner.memory import MemoryBudget
from batchrunner.metrics import Tally
from batchrunner.models import NO_USAGE, Attempt, BatchId, PauseReason, RecordKind, Usage
from batchrunner.pace import Bound, Sample
from batchrunner.ports import Clock, Rng, Upstream
from batchrunner.results import ReplyFacts, reply_facts
from batchrunner.sampler import Sampler
from batchrunner.settings import Settings
from batchrunner.shards import ShardRun, nobody
from batchrunner.verdict import (
    REFUSALS,
    Accept,
    GiveUp,
    RetryAfter,
    RetryPolicy,
    is_unreached,
    judge,
    suspicion,
)

TICK_S = 0.05
_TICKS_PER_SWEEP = 10
_TICKS_PER_REFUSAL = 3
_TICKS_PER_RANKING = 1200
# A pool that had nothing for 10 s looks around less often.
_TICKS_TO_REST = 200
_REST_S = 0.2
# Waiting retries hold their lines in memory and tell that the upstream has trouble: beyond this many times the window
# no fresh line is sent.
_WAITING_PER_WINDOW = 2
# A line answered 401, 403 or "no such model" is asked again after this time, until the breaker knows more.
_UNDECIDED_WAIT_S = 1.0


class Fanout:
    """The pool of one process. `window` is set from outside; everything else follows from the shards that are added.

    `on_change` is called (on the loop) when a shard was finished, exhausted or needs an intent registered, and when a
    breaker has news; it must be cheap.
    """

    def __init__(
        self,
        *,
        upstream: Upstream,
        journal: Journal,
        clock: Clock,
        rng: Rng,
        settings: Settings,
        gate: Gate,
    ) -> None:
        self.tally = Tally()
        self.window = 1
        self.stop_sends_at_s = 0.0
        # What the breakers have found out and nobody has acted on yet: why a batch must be paused, None that it may go
        # on. What the window's controller says keeps the window from growing.
        self.breaker_news: dict[BatchId, PauseReason | None] = {}
        self.bound_by: str | None = None
        self.lanes = Lanes()
        self.gate = gate
        self.on_change: Callable[[], None] = nobody
        self._upstream = upstream
        self._caller = Caller(upstream, gate.outage)
        self._journal = journal
        self._clock = clock
        self._rng = rng
        self._policy = RetryPolicy(max_tries=settings.max_tries, retry_after_max_s=settings.retry_after_max_s)
        self.memory = MemoryBudget(settings.memory_bytes_max, lanes=self.lanes, journal=journal, reading=gate.reading)
        self._waiting = Waiting()
        self._allowed = 0
        # Places that were refused lately stay empty until the window was asked again, which takes a while over a pipe:
        # an upstream that refuses at once would be asked a thousand times a second by each place too many.
        self._refused_before = 0
        self._refused_places = 0
        self._parked: list[asyncio.Future[None]] = []
        self._slot_count = 0
        self._in_flight: set[Work] = set()
        self._is_closed = False
        self._contact_message = ""
        self.sampler = Sampler(clock.monotonic_s())

    # -- what the worker calls ---------------------------------------------------------------------------------------

    @property
    def in_flight_count(self) -> int:
        """Exchanges under way."""
        return len(self._in_flight)

    def in_flight_by_batch(self) -> Counter[BatchId]:
        """Exchanges under way of each batch."""
        return Counter(work.run.batch.id for work in self._in_flight)

    @property
    def waiting_count(self) -> int:
        """Lines that wait for their next try."""
        return len(self._waiting) + self._waiting.alone_count

    @property
    def untouched_count(self) -> int:
        """Lines in hand that were not handed out yet and may be."""
        return sum(lane.untouched_count for lane in self.lanes)

    def add(self, run: ShardRun) -> None:
        """Take a loaded shard into the rotation."""
        self.lanes.add(run, self._clock.now())
        run.on_need = self.on_change
        self.wake()

    def stop(self, run: ShardRun) -> None:
        """Hand out nothing more of a shard and forget its waiting retries; exchanges under way go on."""
        run.is_stopped = True
        self.lanes.exhaust(run)
        run.in_flight_count -= self._waiting.drop(run)

    def forget(self, run: ShardRun) -> None:
        """Drop a shard that is settled or given back."""
        self.stop(run)
        self.lanes.remove(run)

    def abort(self, run: ShardRun) -> None:
        """End the exchanges of a shard that are under way; their lines stay without a record."""
        for work in self._in_flight:
            if work.run is run and work.task is not None:
                work.is_aborted = True
                work.task.cancel()

    def wake(self) -> None:
        """Let a parked coroutine look for work again; it wakes the next one if it found some."""
        while self._parked:
            waiter = self._parked.pop()
            if not waiter.done():
                waiter.set_result(None)
                return

    def durable(self) -> None:
        """Results have become durable, and with them gone from memory."""
        self.memory.share()
        self.wake()

    def take_sample(self) -> Sample:
        """Give what happened since the last sample, for the window's controller."""
        return self.sampler.take(self._clock.monotonic_s(), self.effective_window, self.short_of())

    def short_of(self) -> Bound:
        """What keeps the window from being full, if anything does."""
        now_s = self._clock.monotonic_s()
        if self.effective_window < self.window:
            return Bound.MEMORY
        if now_s < self.gate.cooldown.until_s:
            return Bound.REFUSALS
        if self.gate.requests is not None or self.gate.tokens is not None:
            return Bound.RATE
        return Bound.INPUT

    @property
    def lost_text(self) -> str | None:
        """Why the upstream counts as unreachable from the start, None while there is hope or contact."""
        if self.gate.first_contact.is_lost(self._clock.monotonic_s()):
            return self._contact_message
        return None

    @property
    def outage_text(self) -> str | None:
        """What the upstream's present death looks like, None while it answers."""
        return f"upstream_down: {self._contact_message}" if self.gate.outage.is_down else None

    @property
    def effective_window(self) -> int:
        """The window, or less where the memory budget would not hold that many answers."""
        return self.memory.window(self.window)

    async def run(self) -> None:
        """Work until `close`; then return when no exchange is under way."""
        async with asyncio.TaskGroup() as group:
            ticks = quiet = 0
            while not (self._is_closed and not self._in_flight):
                self._tick(group)
                ticks += 1
                if ticks % _TICKS_PER_REFUSAL == 0:
                    self._refused_before, self._refused_places = self._refused_places, 0
                if ticks % _TICKS_PER_SWEEP == 0:
                    self._upstream.sweep_deadlines()
                    self.memory.fade()
                if ticks % _TICKS_PER_RANKING == 0:
                    self.lanes.rank(self._clock.now())
                quiet = 0 if len(self.lanes) or self._in_flight else quiet + 1
                await self._clock.sleep(TICK_S if quiet < _TICKS_TO_REST else _REST_S)
            for waiter in self._parked:
                if not waiter.done():
                    waiter.set_result(None)

    def close(self) -> None:
        """Hand out nothing more; `run` returns when the last exchange has ended."""
        self._is_closed = True

    # -- the pool ----------------------------------------------------------------------------------------------------

    def _tick(self, group: asyncio.TaskGroup) -> None:
        now_s = self._clock.monotonic_s()
        self.sampler.note_in_flight(now_s, len(self._in_flight))
        self.memory.share()
        if self._is_closed:
            return
        self._allowed = self.effective_window
        while self._slot_count < self._allowed:
            self._slot_count += 1
            group.create_task(self._slot())
        for lane in list(self.lanes):
            self._check_breaker(lane)
        self.wake()

    async def _slot(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while not self._is_closed and self._slot_count <= self._allowed:
                work = self._take()
                if work is None:
                    waiter = loop.create_future()
                    self._parked.append(waiter)
                    await waiter
                    continue
                if self._parked:
                    self.wake()
                await self._send(work)
        finally:
            self._slot_count -= 1

    def _take(self) -> Work | None:
        """Give what is to be sent next, None if nothing may be sent now. Due retries go before fresh lines."""
        now_s = self._clock.monotonic_s()
        gate = self.gate
        if now_s >= self.stop_sends_at_s or self._is_closed:
            return None
        if (
            now_s < gate.cooldown.until_s
            or len(self._in_flight) + self._refused_places + self._refused_before >= self._allowed
        ):
            return None
        if gate.requests is not None and gate.requests.wait_s(now_s, 1) > 0:
            return None
        if gate.outage.is_down:
            work = self._probe(now_s)
        elif self._waiting.is_due(now_s):
            work = self._due(now_s)
        elif self._is_crowded:
            return None
        else:
            work = self._fresh() or self._lonely()
        return self._admit(work, now_s) if work is not None else None

    @property
    def _is_crowded(self) -> bool:
        return self._journal.is_full or len(self._waiting) > _WAITING_PER_WINDOW * self.window

    def _probe(self, now_s: float) -> Work | None:
        """While the upstream is down, one line finds out whether it is back, if possible one that is no suspect."""
        if not (self.waiting_count or self.untouched_count) or not self.gate.outage.may_send(now_s):
            return None
        is_suspect = bool(self._waiting) and self._waiting.first().failed_at_s is not None
        if is_suspect and not self._is_crowded and (fresh := self._fresh()) is not None:
            return fresh
        while self._waiting:
            work = self._settled_death(self._waiting.take(), now_s)
            if work is not None:
                return work
        return self._fresh() or self._lonely()

    def _due(self, now_s: float) -> Work | None:
        """Take the retry that is due longest."""
        while self._waiting.is_due(now_s):
            work = self._settled_death(self._waiting.take(), now_s)
            if work is not None:
                return work
        return None

    def _settled_death(self, work: Work, now_s: float) -> Work | None:
        """Decide whose fault it was that a line found nobody; None if the line is not to be sent now."""
        failed_at_s, last = work.failed_at_s, work.last
        work.failed_at_s = work.last = None
        if failed_at_s is None:
            return work
        if self.gate.outage.covers(failed_at_s):
            work.deaths += 1
            if work.deaths >= DEATHS_ALONE:
                self._waiting.put_alone(work)
                return None
            return work
        if last is not None:
            self._give_up(work, *last, now_s, is_final=True)
            return None
        work.tries += 1
        return work

    def _lonely(self) -> Work | None:
        """A line that was in flight at several deaths of the upstream may be their cause: it goes alone and last."""
        return self._waiting.take_alone() if not self._in_flight else None

    def _admit(self, work: Work, now_s: float) -> Work | None:
        """Charge the rate limits with one attempt; without tokens for it the line waits."""
        gate = self.gate
        if gate.tokens is not None:
            work.cost_tokens = estimate_tokens(work.line.body)
            wait_s = gate.tokens.take(now_s, work.cost_tokens)
            if wait_s > 0:
                self._put_back(work, now_s + wait_s)
                return None
        if gate.requests is not None:
            gate.requests.take(now_s, 1)
        return work

    def _fresh(self) -> Work | None:
        work = self.lanes.next_work()
        if work is not None and work.run.is_exhausted:
            self.on_change()
        return work

    async def _send(self, work: Work) -> None:
        self._in_flight.add(work)
        work.task = asyncio.current_task()
        self.tally.attempts += 1
        try:
            attempt = await self._caller.send(work)
        except asyncio.CancelledError:
            if not work.is_aborted or work.task is None:
                raise
            work.task.uncancel()
            attempt = None
        finally:
            work.task = None
            self._in_flight.discard(work)
        if attempt is None:
            work.run.break_off(work.line)
            self.on_change()
            return
        self._settle(work, attempt)

    # -- the outcome -------------------------------------------------------------------------------------------------

    def _settle(self, work: Work, attempt: Attempt) -> None:
        facts: ReplyFacts | None = None
        if attempt.error is None:
            self.gate.first_contact.note_answer()
            if 200 <= attempt.status < 300:
                facts = reply_facts(attempt.body)
                if facts is not None and not facts.has_error:
                    self._accept(work, attempt, facts)
                    return
        self._judge(work, attempt, facts)

    def _accept(self, work: Work, attempt: Attempt, facts: ReplyFacts) -> None:
        run, line, usage, tally = work.run, work.line, facts.usage, self.tally
        self.sampler.note_answer(attempt.elapsed_s)
        run.breaker.note(None, line.line_number)
        self.memory.note_reply(len(attempt.body))
        payload = run.results.answered(
            line.line_number, line.custom_id, attempt.status, attempt.request_id, attempt.body
        )
        tally.succeeded += 1
        tally.tokens_in += usage.input_tokens
        tally.tokens_out += usage.output_tokens
        tally.latencies.add(attempt.elapsed_s)
        if self.gate.tokens is not None and usage.total_tokens:
            self.gate.tokens.settle(usage.total_tokens - work.cost_tokens)
        self._finish(work, RecordKind.SUCCEEDED, payload, usage)

    def _finish(self, work: Work, kind: RecordKind, payload: bytes, usage: Usage) -> None:
        run = work.run
        run.record(work.line.line_number, kind, payload, usage)
        run.in_flight_count -= 1
        if run.is_finished:
            self.on_change()

    def _judge(self, work: Work, attempt: Attempt, facts: ReplyFacts | None) -> None:
        now_s = self._clock.monotonic_s()
        self._note_failure(work, attempt, now_s)
        verdict = judge(
            attempt,
            policy=self._policy,
            tries=work.tries,
            waits=work.waits,
            is_json=facts is not None,
            has_error=facts is not None and facts.has_error,
            uniform=self._rng.uniform(),
            is_at_most_once=work.run.is_at_most_once,
        )
        match verdict:
            case Accept():
                self._accept(work, attempt, facts or ReplyFacts())
            case RetryAfter():
                self._retry(work, attempt, verdict, now_s)
            case GiveUp():
                self._give_up(work, attempt, verdict, now_s)
            case _:
                assert_never(verdict)

    def _note_failure(self, work: Work, attempt: Attempt, now_s: float) -> None:
        gate, error = self.gate, attempt.error
        self.tally.failures[str(error or attempt.status)] += 1
        if is_unreached(attempt):
            gate.outage.note_failure(now_s, len(self._in_flight) + 1)
            gate.first_contact.note_failure(now_s)
            self._contact_message = attempt.message or f"status {attempt.status}"
            self.sampler.broken += 1
        elif error is not None:
            self.sampler.broken += 1
        elif attempt.status in REFUSALS:
            self.sampler.refused += 1
            self._refused_places += 1
            if attempt.retry_after_s is not None:
                in_flight = len(self._in_flight) + 1
                asked_s = min(attempt.retry_after_s, self._policy.retry_after_max_s)
                gate.cooldown.ask(now_s, asked_s, in_flight=in_flight, uniform=self._rng.uniform())
        else:
            self.sampler.note_answer(attempt.elapsed_s)
            work.run.breaker.note(suspicion(attempt), work.line.line_number)

    def _retry(self, work: Work, attempt: Attempt, verdict: RetryAfter, now_s: float) -> None:
        """Put a line back with its due time; it leaves its slot meanwhile."""
        wait_s = verdict.wait_s
        if is_unreached(attempt) and verdict.uses_try and work.deaths < DEATHS_ALONE:
            # Whose fault it was shows only when all that went down with it have told.
            work.failed_at_s = now_s
            wait_s = max(wait_s, OUTAGE_SPAN_S)
        elif verdict.uses_try:
            work.tries += 1
        else:
            work.waits += 1
        if attempt.error is None and not 200 <= attempt.status < 300:
            work.generation += 1
        self.tally.retries += 1
        work.run.retry_count += 1
        self._put_back(work, now_s + wait_s)

    def _put_back(self, work: Work, due_s: float) -> None:
        if work.run.is_stopped:
            work.run.in_flight_count -= 1
            self.on_change()
            return
        self._waiting.put(work, due_s)

    def _give_up(self, work: Work, attempt: Attempt, verdict: GiveUp, now_s: float, *, is_final: bool = False) -> None:
        """Journal the error line, unless the breaker still has to find out whether every line would end like this."""
        if suspicion(attempt) is not None and work.run.breaker.is_undecided:
            self._put_back(work, now_s + _UNDECIDED_WAIT_S)
            return
        is_final = is_final or work.deaths >= DEATHS_ALONE or work.run.is_at_most_once
        if is_unreached(attempt) and not is_final:
            work.failed_at_s, work.last = now_s, (attempt, verdict)
            self._put_back(work, now_s + OUTAGE_SPAN_S)
            return
        run, line = work.run, work.line
        payload = run.results.failed(
            line.line_number,
            line.custom_id,
            code=verdict.code,
            message=verdict.message,
            status=attempt.status if verdict.code is None else None,
            request_id=attempt.request_id,
            body=attempt.body,
        )
        self.tally.failed += 1
        self._finish(work, RecordKind.FAILED, payload, NO_USAGE)

    def _check_breaker(self, lane: Lane) -> None:
        """Stop a batch when every line so far was answered that the key or the model is wrong; a probe that was
        answered in any other way lets it go on.
        """
        if lane.breaker.has_suspects:
            is_all = lane.untouched_count == 0 and not any(work.run in lane.held for work in self._in_flight)
            reason = lane.breaker.tripped(is_nothing_left=is_all)
            if reason is not None:
                self.lanes.trip(lane)
                for run in lane.held:
                    self.stop(run)
                self.breaker_news[lane.batch.id] = reason
                self.on_change()
        elif lane.is_probing and not lane.breaker.is_undecided:
            lane.go_on()
            self.breaker_news[lane.batch.id] = None
            self.on_change()
