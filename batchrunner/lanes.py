"""The order in which the shards of a process give out their lines."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from batchrunner.limits import Breaker
from batchrunner.models import Batch, BatchId, TenantId
from batchrunner.shards import ShardRun
from batchrunner.stash import Board, Stash
from batchrunner.work import Waiting, Work

_AGEING_STEP = timedelta(hours=1)
_DOUBLINGS_MAX = 6
_NEVER = datetime.max.replace(tzinfo=UTC)
# More than a process holds batches at a time; a breaker that is forgotten only has to learn again.
_BREAKERS_KEPT = 1024
# While newcomers have their head start, one line in so many goes by turns between the others.
_TURN_EVERY = 4
# As long as many a small batch, however small the window.
_HEAD_START_LEAST = 64


class Lane:
    """The shards of one batch that this process holds: in `runs`, in line order, those with lines left to hand out.

    `allowance` is how many lines may still be handed out, None for all: a lane that only probes has one. There is a
    breaker for each upstream, and `shut` holds the places of those whose breaker has tripped while others can do
    without them. The stash holds what was read for upstreams without room, where there are several.
    """

    __slots__ = (
        "allowance", "batch", "breakers", "head_start", "held", "is_probing", "quantum", "runs", "shut", "stash",
    )  # fmt: skip

    def __init__(self, batch: Batch, breakers: list[Breaker], stash: Stash | None) -> None:
        self.batch = batch
        self.breakers = breakers
        self.shut: set[int] = set()
        self.stash = stash
        self.is_probing = False
        self.allowance: int | None = None
        self.quantum = 1
        self.head_start = 0
        self.held: set[ShardRun] = set()
        self.runs: list[ShardRun] = []

    @property
    def untouched_count(self) -> int:
        """Lines that were not handed out yet and may be."""
        return sum(run.untouched_count for run in self.runs if not (run.is_held or run.is_stopped))

    def probe(self) -> None:
        """Hand out one line of a paused batch, whose answer decides."""
        self.is_probing = True
        self.allowance = 1
        self.breakers = [Breaker(suspects_min=1) for _ in self.breakers]
        self.shut = set()

    def go_on(self) -> None:
        """Hand out without end, as after a probe that went well."""
        self.is_probing = False
        self.allowance = None

    def reserve_next(self, ahead: int) -> None:
        """Reserve the first lines of the next shard, so that hand-out goes on without a wait for the disk."""
        run = next((run for run in self.runs if not run.is_touched), None)
        if run is not None:
            run.reserve_first(ahead, is_early=True)

    def next_work(self, place: int, waiting: Waiting) -> Work | None:
        """Give a line that waits for the upstream at that place and is due, else the next fresh one for it."""
        if waiting.is_any:
            work = waiting.take_due(self.batch.id)
            if work is not None or waiting.is_crowded(self.batch.id):
                return work
        return self._read() if self.stash is None else self.stash.next_work(place, self._read)

    def _read(self) -> Work | None:
        """Give the next line of the first shard that has one to give."""
        if self.allowance == 0:
            return None
        for run in self.runs:
            line = run.next_line()
            if line is not None:
                if run.is_exhausted:
                    self.runs.remove(run)
                    run.on_need()
                if self.allowance is not None:
                    self.allowance -= 1
                run.in_flight_count += 1
                return Work(run, line)
        return None


class _Tenant:
    """The lanes of one tenant. In each round every lane may hand out its quantum, the most urgent lane first.

    Newcomers have a head start: most lines are theirs, one newcomer after the other, until each has had so many. Small
    batches are over with that, each before it would be if all took turns. Of four lines one is for the turns of others.
    """

    __slots__ = ("_count", "_credit", "_newcomers", "_round", "lanes")

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self._round: deque[Lane] = deque()
        self._credit = 0
        self._newcomers: list[Lane] = []
        self._count = 0

    def add(self, lane: Lane) -> None:
        """Take in a lane, whose turn comes at once: it may be a small batch that is soon over."""
        if len(self.lanes) == 1 and any(run.is_touched for run in self.lanes[0].held):
            # While it was alone nobody counted.
            self._end_head_start(self.lanes[0])
        self.lanes.append(lane)
        self._round.appendleft(lane)
        self._credit = 0
        if lane.head_start:
            self._newcomers.append(lane)

    def remove(self, lane: Lane) -> None:
        """Forget a lane."""
        self.lanes.remove(lane)
        if lane in self._round:
            self._round.remove(lane)
        self._end_head_start(lane)
        self._credit = 0

    def next_work(self, place: int, waiting: Waiting) -> Work | None:
        """Give the next line: of a newcomer, or by deficit round robin, every line costing 1."""
        lanes = self.lanes
        if len(lanes) == 1:
            return lanes[0].next_work(place, waiting)
        if self._newcomers:
            self._count += 1
            is_turn = self._count % _TURN_EVERY == 0
            work = (
                self._work_by_turns(place, waiting, is_for_old=True)
                if is_turn
                else self._newcomers_work(place, waiting)
            )
            if work is not None:
                return work
        return self._work_by_turns(place, waiting, is_for_old=False)

    def _work_by_turns(self, place: int, waiting: Waiting, *, is_for_old: bool) -> Work | None:
        lanes = self.lanes
        # The rest of this round and a whole one: then every lane was asked.
        for _ in range(len(self._round) + len(lanes)):
            if not self._round:
                self._round.extend(lanes)
            lane = self._round[0]
            if self._credit <= 0:
                self._credit = lane.quantum
            work = None if is_for_old and lane.head_start else lane.next_work(place, waiting)
            self._credit = 0 if work is None else self._credit - 1
            if self._credit == 0:
                self._round.popleft()
            if work is not None:
                return work
        return None

    def _newcomers_work(self, place: int, waiting: Waiting) -> Work | None:
        for lane in list(self._newcomers):
            # One whose first lines still wait for the disk keeps its place.
            work = lane.next_work(place, waiting)
            if work is not None:
                lane.head_start -= 1
            if lane.head_start == 0 or not lane.untouched_count:
                self._end_head_start(lane)
            if work is not None:
                return work
        return None

    def _end_head_start(self, lane: Lane) -> None:
        lane.head_start = 0
        if lane in self._newcomers:
            self._newcomers.remove(lane)

    def rank(self, now: datetime) -> None:
        """Set quanta, and the order within a round: by priority, then deadline. A step of priority doubles a share.

        Only among those of the highest priority a newcomer keeps its head start.
        """
        highest = max(lane.batch.priority for lane in self.lanes)
        steps = {lane: _aged_priority(lane.batch, now, highest) for lane in self.lanes}
        lowest = min(steps.values())
        for lane, step in steps.items():
            lane.quantum = 1 << min(step - lowest, _DOUBLINGS_MAX)
        self.lanes.sort(key=lambda lane: (-steps[lane], lane.batch.deadline_at or _NEVER))
        top = steps[self.lanes[0]]
        for lane in self._newcomers:
            lane.head_start *= steps[lane] == top
        self._newcomers = [lane for lane in self.lanes if lane.head_start]


def _aged_priority(batch: Batch, now: datetime, highest: int) -> int:
    """Give a batch's priority, a step more for each hour of its age, but by age no more than `highest`: a huge batch
    that has run for a day must not get ahead of the small ones that began as its equals.
    """
    age = max(0, (now - batch.created_at) // _AGEING_STEP)
    return max(batch.priority, min(batch.priority + age, highest))


class Lanes:
    """All lanes of a process. Tenants take turns line by line, and within a tenant its batches do.

    Breakers outlive lanes: what the upstream said to one shard of a batch holds for its next.
    """

    def __init__(self, *, upstream_count: int = 1, board: Board | None = None) -> None:
        self._upstream_count = upstream_count
        self._board = board
        self._lane_of: dict[BatchId, Lane] = {}
        self._tenant_of: dict[TenantId, _Tenant] = {}
        self._turns: deque[_Tenant] = deque()
        self._breakers: OrderedDict[BatchId, list[Breaker]] = OrderedDict()
        self._head_start = 0

    def __iter__(self) -> Iterator[Lane]:
        """Give every lane."""
        return iter(self._lane_of.values())

    def __len__(self) -> int:
        """Batches of which something is held."""
        return len(self._lane_of)

    def of(self, batch_id: BatchId) -> Lane | None:
        """Give a batch's lane, if anything of it is held."""
        return self._lane_of.get(batch_id)

    def add(self, run: ShardRun, now: datetime) -> None:
        """Take in a shard."""
        lane = self._lane_of.get(run.batch.id)
        if lane is None:
            # A huge batch must not be new again with each of its shards.
            lane = self._open(run.batch, now, head_start=self._head_start if run.shard.first_index == 0 else 0)
            # Its turn must not pass while it waits for the disk.
            run.reserve_first()
        if run.batch.paused_reason is not None:
            lane.probe()
            self._breakers[run.batch.id] = lane.breakers
        elif lane.is_probing:
            lane.go_on()
        run.breakers, run.shut = lane.breakers, lane.shut
        run.on_ending = lane.reserve_next
        lane.held.add(run)
        lane.runs.append(run)
        lane.runs.sort(key=lambda held: held.shard.first_line)

    def _open(self, batch: Batch, now: datetime, *, head_start: int) -> Lane:
        breakers = self._breakers.setdefault(batch.id, self._untried())
        self._breakers.move_to_end(batch.id)
        if len(self._breakers) > _BREAKERS_KEPT:
            self._breakers.popitem(last=False)
        stash = Stash(self._board) if self._board is not None else None
        lane = self._lane_of[batch.id] = Lane(batch, breakers, stash)
        lane.head_start = head_start
        tenant = self._tenant_of.get(batch.tenant)
        if tenant is None:
            tenant = self._tenant_of[batch.tenant] = _Tenant()
            self._turns.appendleft(tenant)
        tenant.add(lane)
        tenant.rank(now)
        return lane

    def _untried(self) -> list[Breaker]:
        return [Breaker() for _ in range(self._upstream_count)]

    def exhaust(self, run: ShardRun) -> None:
        """Hand out nothing more of a shard that is still held."""
        lane = self._lane_of.get(run.batch.id)
        if lane is not None and run in lane.runs:
            lane.runs.remove(run)

    def remove(self, run: ShardRun) -> None:
        """Forget a shard, and with the last one its lane."""
        self.exhaust(run)
        lane = self._lane_of.get(run.batch.id)
        if lane is None:
            return
        lane.held.discard(run)
        if not lane.held:
            del self._lane_of[lane.batch.id]
            tenant = self._tenant_of[lane.batch.tenant]
            tenant.remove(lane)
            if not tenant.lanes:
                del self._tenant_of[lane.batch.tenant]
                self._turns.remove(tenant)

    def trip(self, lane: Lane) -> None:
        """Have the batch judged anew when it comes back; answers that still come are judged as before."""
        lane.breakers = self._untried()
        self._breakers.pop(lane.batch.id, None)

    def fit(self, window: int) -> None:
        """Give newcomers a head start of about a window."""
        self._head_start = max(window, _HEAD_START_LEAST)

    def rank(self, now: datetime) -> None:
        """Let batches age; about once a minute."""
        for tenant in self._turns:
            tenant.rank(now)

    def next_work(self, place: int, waiting: Waiting) -> Work | None:
        """Give the next line for the upstream at that place, None if no lane may hand one out now. What waits there and
        is due goes in the turn of its batch.
        """
        turns = self._turns
        if len(turns) == 1:
            return turns[0].next_work(place, waiting)
        for _ in range(len(turns)):
            work = turns[0].next_work(place, waiting)
            turns.rotate(-1)
            if work is not None:
                return work
        return None
