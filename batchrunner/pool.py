"""The pool of one upstream: take a line, send it, judge the answer, retry or journal it; no disk, no database.

Long-lived coroutines, as many as the window allows, pull lines straight from the shards; there is no task, queue item,
lock or timer per line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import assert_never

from batchrunner.caller import Caller
from batchrunner.limits import DEATHS_ALONE, OUTAGE_SPAN_S, estimate_tokens
from batchrunner.models import NO_USAGE, Attempt, RecordKind, Usage
from batchrunner.outlets import Outlet, Shared
from batchrunner.pace import FULL_LEAST
from batchrunner.results import ReplyFacts, reply_facts
from batchrunner.sampler import Bound, Sample, Sampler
from batchrunner.shards import ShardRun
from batchrunner.stash import Board
from batchrunner.verdict import (
    REFUSALS,
    Accept,
    GiveUp,
    RetryAfter,
    is_silent,
    is_unreached,
    judge,
    suspicion,
)
from batchrunner.work import Waiting, Work

# With more waiting lines than this many times the window a pool takes over none from others.
_WAITING_PER_WINDOW = 2
# A line answered 401, 403 or "no such model" is asked again after this time, until the breaker knows more.
_UNDECIDED_WAIT_S = 1.0


class Pool:
    """Sends lines to one upstream. `window` and `bound_by` are set from outside.

    `bound_by` is what the window's controller says keeps the window from growing.
    """

    def __init__(self, outlet: Outlet, place: int, shared: Shared) -> None:
        self.name = outlet.name
        self.place = place
        self.gate = outlet.gate
        self.upstream = outlet.upstream
        self.window = 1
        self.bound_by: str | None = None
        self.waiting = Waiting()
        self.in_flight: set[Work] = set()
        self._shared = shared
        self._board, self._clock, self._lanes, self._tally = shared.board, shared.clock, shared.lanes, shared.tally
        self.caller = Caller(outlet)
        self._allowed = 0
        # Places that were refused lately stay empty until the window was asked again, which takes a while over a pipe:
        # an upstream that refuses at once would be asked a thousand times a second by each place too many.
        self._refused_before = 0
        self._refused_places = 0
        self._parked: list[asyncio.Future[None]] = []
        self._slot_count = 0
        self._knocking: asyncio.Task[None] | None = None
        self._wants_knock = False
        self._was_down = False
        self.sampler = Sampler(shared.clock.monotonic_s())

    # -- how it stands -----------------------------------------------------------------------------------------------

    @property
    def waiting_count(self) -> int:
        """Lines that wait for their next try."""
        return len(self.waiting) + self.waiting.alone_count

    @property
    def effective_window(self) -> int:
        """The window, or less where the memory budget would not hold that many answers."""
        return self._shared.fit(self.window)

    @property
    def is_down(self) -> bool:
        """See Standing."""
        return self.gate.outage.is_down

    @property
    def has_room(self) -> bool:
        """See Standing. Whatever waits counts, so that nothing is given to who has enough."""
        gate, now_s = self.gate, self._clock.monotonic_s()
        if gate.outage.is_down or now_s < gate.cooldown.until_s:
            return False
        if self._occupied + len(self.waiting) >= self._allowed:
            return False
        return gate.requests is None or gate.requests.wait_s(now_s, 1) <= 0

    @property
    def is_crowded(self) -> bool:
        """See Desk."""
        return len(self.waiting) > _WAITING_PER_WINDOW * self.window

    @property
    def _occupied(self) -> int:
        return len(self.in_flight) + self._refused_places + self._refused_before

    def take_sample(self) -> Sample:
        """Give what happened since the last sample, for the window's controller."""
        now_s, window = self._clock.monotonic_s(), self.effective_window
        return self.sampler.take(now_s, window, self.short_of(), is_down=self.is_down)

    def short_of(self) -> Bound:
        """What keeps the window from being full, if anything does."""
        if self.effective_window < self.window:
            return Bound.MEMORY
        if self._clock.monotonic_s() < self.gate.cooldown.until_s:
            return Bound.REFUSALS
        if self.gate.requests is not None or self.gate.tokens is not None:
            return Bound.RATE
        return Bound.INPUT

    def bound(self) -> str:
        """What keeps more from being under way: what bounds the window, or what keeps it from being full."""
        is_full = len(self.in_flight) >= FULL_LEAST * self.effective_window
        return self.bound_by if is_full and self.bound_by else str(self.short_of())

    @property
    def is_lost(self) -> bool:
        """Whether the upstream counts as unreachable from the start."""
        return self.gate.first_contact.is_lost(self._clock.monotonic_s())

    # -- what the fan-out calls --------------------------------------------------------------------------------------

    def tick(self, group: asyncio.TaskGroup) -> None:
        """Follow the window; about twenty times a second."""
        now_s = self._clock.monotonic_s()
        self.sampler.note_in_flight(now_s, len(self.in_flight))
        if self._was_down and not self.is_down:
            self.waiting.hurry(now_s)
        self._was_down = self.is_down
        if self._shared.is_closed:
            return
        self._allowed = self.effective_window
        self.waiting.fit(self.window, len(self._lanes))
        while self._slot_count < self._allowed:
            self._slot_count += 1
            group.create_task(self._slot())
        if self._wants_knock and self._knocking is None:
            self._knocking = group.create_task(self._knock())

    def forget_refusals(self) -> None:
        """Let places be used again that were refused some ticks ago."""
        self._refused_before, self._refused_places = self._refused_places, 0

    def wake(self) -> None:
        """Let a parked coroutine look for work again; it wakes the next one if it found some."""
        while self._parked:
            waiter = self._parked.pop()
            if not waiter.done():
                waiter.set_result(None)
                return

    def end(self) -> None:
        """Let every coroutine end that has nothing under way."""
        if self._knocking is not None:
            self._knocking.cancel()
        for waiter in self._parked:
            if not waiter.done():
                waiter.set_result(None)

    def abort(self, run: ShardRun) -> None:
        """End the exchanges of a shard that are under way; their lines stay without a record."""
        for work in self.in_flight:
            if work.run is run and work.task is not None:
                work.is_aborted = True
                work.task.cancel()

    def hand(self, work: Work) -> None:
        """See Desk."""
        if work.deaths >= DEATHS_ALONE:
            self.waiting.put_alone(work)
        else:
            self.waiting.put(work, self._clock.monotonic_s())
        self.wake()

    def keep(self, work: Work, due_s: float) -> None:
        """See Desk."""
        self.waiting.put(work, due_s)

    def hand_over(self) -> None:
        """Give lines that wait here to others that may answer them, while nothing can be sent here."""
        board, gate = self._board, self.gate
        is_stuck = gate.outage.is_down or self._clock.monotonic_s() < gate.cooldown.until_s
        if board is not None and is_stuck and self.waiting_count:
            self._hand_over(board, lambda _: True)

    def send_away(self, runs: set[ShardRun]) -> None:
        """Give waiting lines of these shards to others, whatever this upstream does."""
        if self._board is not None:
            self._hand_over(self._board, lambda work: work.run in runs)

    def _hand_over(self, board: Board, is_meant: Callable[[Work], bool]) -> None:
        covers = self.gate.outage.covers
        picked = self.waiting.pick(
            lambda work: (
                is_meant(work)
                and (work.failed_at_s is None or covers(work.failed_at_s))
                and board.other_for(work, self.place) is not None
            )
        )
        for work in picked:
            if work.failed_at_s is not None:
                work.deaths += 1
                work.failed_at_s = work.last = None
            (board.other_for(work, self.place) or self).hand(work)

    # -- the pool ----------------------------------------------------------------------------------------------------

    async def _slot(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while not self._shared.is_closed and self._slot_count <= self._allowed:
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
        """Give what is to be sent next, None if nothing may be sent now. A batch's due retries go before its fresh
        lines and count as its share.
        """
        shared, gate = self._shared, self.gate
        now_s = self._clock.monotonic_s()
        if now_s >= shared.stop_sends_at_s or shared.is_closed:
            return None
        if now_s < gate.cooldown.until_s or self._occupied >= self._allowed:
            return None
        if gate.requests is not None and gate.requests.wait_s(now_s, 1) > 0:
            return None
        while (work := self._pick(now_s)) is not None and work.run.drops(work.line):
            shared.on_change()
        return self._admit(work, now_s) if work is not None else None

    def _pick(self, now_s: float) -> Work | None:
        if self.gate.outage.is_down:
            return self._probe(now_s)
        if self.waiting.is_due(now_s):
            self._note_due(now_s)
        return self.waiting.take_due() if self._shared.journal.is_full else self._next()

    def _probe(self, now_s: float) -> Work | None:
        """While the upstream is down, one line finds out whether it is back. Where others send its lines meanwhile, a
        knock does.
        """
        outage = self.gate.outage
        if not outage.is_turn(now_s) or self._knocking is not None:
            return None
        work = self._probing_line(now_s)
        if work is not None:
            outage.may_send(now_s)
        self._wants_knock = work is None and self._board is not None
        return work

    def _probing_line(self, now_s: float) -> Work | None:
        """Give the line that costs least if it fails: if possible one that is no suspect. Where only one batch may be
        refused, they take turns.
        """
        first = self.waiting.first()
        is_suspect = first is not None and first.failed_at_s is not None
        if is_silent := self.gate.outage.is_silent:
            self._note_due(now_s)
        if (is_suspect or is_silent) and not self._shared.journal.is_full and (other := self._turn()) is not None:
            return other
        while (waiting := self.waiting.take()) is not None:
            work = self._settled_death(waiting, now_s)
            if work is not None:
                return work
        return self._next()

    async def _knock(self) -> None:
        """Ask whether the upstream is back."""
        outage = self.gate.outage
        try:
            if not (outage.is_down and outage.may_send(self._clock.monotonic_s())):
                return
            is_back = await self.caller.knock(len(self.in_flight))
        finally:
            self._knocking, self._wants_knock = None, False
        if is_back:
            self.wake()

    def _note_due(self, now_s: float) -> None:
        """Let retries that are due have their batches' turns."""
        while self.waiting.is_due(now_s) and (waiting := self.waiting.take()) is not None:
            work = self._settled_death(waiting, now_s)
            if work is not None:
                self.waiting.put_due(work)

    def _settled_death(self, work: Work, now_s: float) -> Work | None:
        """Decide whose fault it was that a line found nobody; None if the line is not to be sent now."""
        failed_at_s, last = work.failed_at_s, work.last
        work.failed_at_s = work.last = None
        if failed_at_s is None:
            return work
        if self.gate.outage.covers(failed_at_s):
            work.deaths += 1
            if work.deaths >= DEATHS_ALONE:
                self.waiting.put_alone(work)
                return None
            return work
        if last is not None:
            self._give_up(work, *last, now_s, is_final=True)
            return None
        work.tries += 1
        return work

    def _lonely(self) -> Work | None:
        """A line that was in flight at several deaths of the upstream may be their cause: it goes alone and last."""
        return self.waiting.take_alone() if not self.in_flight else None

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

    def _turn(self) -> Work | None:
        return self._lanes.next_work(self.place, self.waiting)

    def _next(self) -> Work | None:
        return self._turn() or self._lonely()

    async def _send(self, work: Work) -> None:
        self.in_flight.add(work)
        work.task = asyncio.current_task()
        self._tally.attempts += 1
        try:
            attempt = await self.caller.send(work)
        except asyncio.CancelledError:
            if not work.is_aborted or work.task is None:
                raise
            work.task.uncancel()
            attempt = None
        finally:
            work.task = None
            self.in_flight.discard(work)
        if attempt is None:
            work.run.break_off(work.line)
            self._shared.on_change()
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
        run, line, usage, tally = work.run, work.line, facts.usage, self._tally
        self.sampler.note_answer(attempt.elapsed_s)
        run.breakers[self.place].note(None, line.line_number)
        self._shared.memory.note_reply(len(attempt.body))
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
            self._shared.on_change()

    def _judge(self, work: Work, attempt: Attempt, facts: ReplyFacts | None) -> None:
        now_s = self._clock.monotonic_s()
        self._note_failure(work, attempt, now_s)
        verdict = judge(
            attempt,
            policy=self._shared.policy,
            tries=work.tries,
            waits=work.waits,
            is_json=facts is not None,
            has_error=facts is not None and facts.has_error,
            uniform=self._shared.rng.uniform(),
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
        self._tally.failures[str(error or attempt.status)] += 1
        in_flight = len(self.in_flight) + 1
        self.caller.note_failure(work, attempt, now_s, in_flight=in_flight, line_count=in_flight + self.waiting_count)
        if error is not None or is_unreached(attempt):
            self.sampler.broken += 1
        elif attempt.status in REFUSALS:
            self.sampler.refused += 1
            self._refused_places += 1
            if attempt.retry_after_s is not None:
                asked_s = min(attempt.retry_after_s, self._shared.policy.retry_after_max_s)
                gate.cooldown.ask(now_s, asked_s, in_flight=in_flight, uniform=self._shared.rng.uniform())
        else:
            self.sampler.note_answer(attempt.elapsed_s)
            work.run.breakers[self.place].note(suspicion(attempt), work.line.line_number)

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
        work.is_held = is_silent(attempt) or (self.is_down and is_unreached(attempt))
        self._tally.retries += 1
        work.run.retry_count += 1
        self._put_back(work, now_s + wait_s, is_for_another=work.failed_at_s is None)

    def _put_back(self, work: Work, due_s: float, *, is_for_another: bool = False) -> None:
        """Have a line wait, where there are others and it may leave with one of them."""
        if work.run.is_stopped:
            work.run.in_flight_count -= 1
            self._shared.on_change()
            return
        board = self._board
        if is_for_another and board is not None:
            other = board.other_for(work, self.place)
            if other is not None:
                other.keep(work, due_s)
                return
        self.waiting.put(work, due_s)

    def _give_up(self, work: Work, attempt: Attempt, verdict: GiveUp, now_s: float, *, is_final: bool = False) -> None:
        """Journal the error line, unless the breaker still has to find out whether every line would end like this."""
        if suspicion(attempt) is not None and work.run.breakers[self.place].is_undecided:
            self._put_back(work, now_s + _UNDECIDED_WAIT_S, is_for_another=self.place in work.run.shut)
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
        self._tally.failed += 1
        self._finish(work, RecordKind.FAILED, payload, NO_USAGE)
