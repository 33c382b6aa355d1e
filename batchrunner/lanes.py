"""Lines on their way: the order in which the shards of a process give them out, and where they wait between tries."""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from batchrunner.limits import Breaker
from batchrunner.models import Attempt, Batch, BatchId, RequestLine, TenantId
from batchrunner.ports import AssetSink
from batchrunner.shards import ShardRun
from batchrunner.verdict import GiveUp

_AGEING_STEP = timedelta(hours=1)
_DOUBLINGS_MAX = 6
_NEVER = datetime.max.replace(tzinfo=UTC)
# More than a process holds batches at a time; a breaker that is forgotten only has to learn again.
_BREAKERS_KEPT = 1024


class Work:
    """One line on its way and what it has been through. Tries are per holder, not durable.

    `failed_at_s` is the moment of a failed attempt that has not been counted yet: whether it was the line's own or
    part of the upstream's death shows only a moment later, so it is counted when the line is due again. `last` is then
    the verdict that stands if it was the line's own. `is_excused`: it is sent next without being blamed.
    """

    __slots__ = (
        "cost_tokens", "deaths", "failed_at_s", "generation", "is_aborted", "is_excused", "last", "line", "run",
        "task", "tries", "waits",
    )  # fmt: skip

    def __init__(self, run: ShardRun, line: RequestLine) -> None:
        self.run = run
        self.line = line
        self.cost_tokens = 0
        self.tries = 0
        self.waits = 0
        self.generation = 0
        self.deaths = 0
        self.failed_at_s: float | None = None
        self.last: tuple[Attempt, GiveUp] | None = None
        self.is_aborted = False
        self.is_excused = False
        self.task: asyncio.Task[None] | None = None

    def open_asset(self, content_type: str) -> AssetSink:
        """See AssetOwner."""
        assert self.run.assets is not None
        return self.run.assets.open(self.run.batch.id, self.line.line_number, content_type)


class Lane:
    """The shards of one batch that this process holds: in `runs`, in line order, those with lines left to hand out.

    `allowance` is how many lines may still be handed out, None for all: a lane that only probes has one.
    """

    __slots__ = ("allowance", "batch", "breaker", "held", "is_probing", "quantum", "runs")

    def __init__(self, batch: Batch, breaker: Breaker) -> None:
        self.batch = batch
        self.breaker = breaker
        self.is_probing = False
        self.allowance: int | None = None
        self.quantum = 1
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
        self.breaker = Breaker(suspects_min=1)

    def go_on(self) -> None:
        """Hand out without end, as after a probe that went well."""
        self.is_probing = False
        self.allowance = None

    def next_work(self) -> Work | None:
        """Give the next fresh line of the first shard that has one to give."""
        if self.allowance == 0:
            return None
        for run in self.runs:
            line = run.next_line()
            if line is not None:
                if run.is_exhausted:
                    self.runs.remove(run)
                if self.allowance is not None:
                    self.allowance -= 1
                run.in_flight_count += 1
                return Work(run, line)
        return None


class _Tenant:
    """The lanes of one tenant. In each round every lane may hand out its quantum, the most urgent lane first."""

    __slots__ = ("_credit", "_round", "lanes")

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self._round: deque[Lane] = deque()
        self._credit = 0

    def add(self, lane: Lane) -> None:
        """Take in a lane, whose turn comes at once: it may be a small batch that is soon over."""
        self.lanes.append(lane)
        self._round.appendleft(lane)
        self._credit = 0

    def remove(self, lane: Lane) -> None:
        """Forget a lane."""
        self.lanes.remove(lane)
        if lane in self._round:
            self._round.remove(lane)
        self._credit = 0

    def next_work(self) -> Work | None:
        """Give the next line by deficit round robin, every line costing 1."""
        lanes = self.lanes
        if len(lanes) == 1:
            return lanes[0].next_work()
        # The rest of this round and a whole one: then every lane was asked.
        for _ in range(len(self._round) + len(lanes)):
            if not self._round:
                self._round.extend(lanes)
            lane = self._round[0]
            if self._credit <= 0:
                self._credit = lane.quantum
            work = lane.next_work()
            self._credit = 0 if work is None else self._credit - 1
            if self._credit == 0:
                self._round.popleft()
            if work is not None:
                return work
        return None

    def rank(self, now: datetime) -> None:
        """Set quanta, and the order within a round: by priority, then deadline. A step of priority doubles a share."""
        highest = max(lane.batch.priority for lane in self.lanes)
        steps = {lane: _aged_priority(lane.batch, now, highest) for lane in self.lanes}
        lowest = min(steps.values())
        for lane, step in steps.items():
            lane.quantum = 1 << min(step - lowest, _DOUBLINGS_MAX)
        self.lanes.sort(key=lambda lane: (-steps[lane], lane.batch.deadline_at or _NEVER))


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

    def __init__(self) -> None:
        self._lane_of: dict[BatchId, Lane] = {}
        self._tenant_of: dict[TenantId, _Tenant] = {}
        self._turns: deque[_Tenant] = deque()
        self._breakers: OrderedDict[BatchId, Breaker] = OrderedDict()

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
            lane = self._open(run.batch, now)
            # Its turn must not pass while it waits for the disk.
            run.reserve_first()
        if run.batch.paused_reason is not None:
            lane.probe()
            self._breakers[run.batch.id] = lane.breaker
        elif lane.is_probing:
            lane.go_on()
        run.breaker = lane.breaker
        lane.held.add(run)
        lane.runs.append(run)
        lane.runs.sort(key=lambda held: held.shard.first_line)

    def _open(self, batch: Batch, now: datetime) -> Lane:
        breaker = self._breakers.setdefault(batch.id, Breaker())
        self._breakers.move_to_end(batch.id)
        if len(self._breakers) > _BREAKERS_KEPT:
            self._breakers.popitem(last=False)
        lane = self._lane_of[batch.id] = Lane(batch, breaker)
        tenant = self._tenant_of.get(batch.tenant)
        if tenant is None:
            tenant = self._tenant_of[batch.tenant] = _Tenant()
            self._turns.appendleft(tenant)
        tenant.add(lane)
        tenant.rank(now)
        return lane

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
        lane.breaker = Breaker()
        self._breakers.pop(lane.batch.id, None)

    def rank(self, now: datetime) -> None:
        """Let batches age; about once a minute."""
        for tenant in self._turns:
            tenant.rank(now)

    def next_work(self) -> Work | None:
        """Give the next fresh line, None if no lane may hand one out now."""
        turns = self._turns
        if len(turns) == 1:
            return turns[0].next_work()
        for _ in range(len(turns)):
            work = turns[0].next_work()
            turns.rotate(-1)
            if work is not None:
                return work
        return None


class Waiting:
    """Lines that wait for their next try, by the time when they are due, and apart from them those that go alone."""

    __slots__ = ("_alone", "_heap", "_serial")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Work]] = []
        self._alone: deque[Work] = deque()
        self._serial = 0

    def __len__(self) -> int:
        """Lines with a due time."""
        return len(self._heap)

    @property
    def alone_count(self) -> int:
        """Lines that go alone, after all others."""
        return len(self._alone)

    def put(self, work: Work, due_s: float) -> None:
        """Keep a line until `due_s`."""
        self._serial += 1
        heapq.heappush(self._heap, (due_s, self._serial, work))

    def put_alone(self, work: Work) -> None:
        """Keep a line until nothing else is left to send."""
        self._alone.append(work)

    def is_due(self, now_s: float) -> bool:
        """Whether a line may be sent again now."""
        return bool(self._heap) and self._heap[0][0] <= now_s

    def first(self) -> Work:
        """The line that is due next; there must be one."""
        return self._heap[0][2]

    def take(self) -> Work:
        """Take the line that is due next; there must be one."""
        return heapq.heappop(self._heap)[2]

    def take_alone(self) -> Work | None:
        """Take a line that goes alone, None if others still wait."""
        return self._alone.popleft() if self._alone and not self._heap else None

    def drop(self, run: ShardRun) -> int:
        """Forget a shard's lines; gives their number."""
        before = len(self._heap) + len(self._alone)
        self._heap = [entry for entry in self._heap if entry[2].run is not run]
        heapq.heapify(self._heap)
        self._alone = deque(work for work in self._alone if work.run is not run)
        return before - len(self._heap) - len(self._alone)
