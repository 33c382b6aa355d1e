"""One line on its way, and where lines wait between tries."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator

from batchrunner.models import Attempt, BatchId, RequestLine
from batchrunner.ports import AssetSink
from batchrunner.routing import Route
from batchrunner.shards import ShardRun
from batchrunner.verdict import GiveUp

# Lines that wait hold memory and tell that the upstream has trouble: beyond so many per place of its share of the
# window a batch sends no fresh line.
_PER_PLACE = 2


class Work:
    """One line on its way and what it has been through. Tries are per holder, not durable.

    `failed_at_s` is the moment of a failed attempt that has not been counted yet: whether it was the line's own or
    part of the upstream's death shows only a moment later, so it is counted when the line is due again. `last` is then
    the verdict that stands if it was the line's own. `is_excused`: it is sent next without being blamed. `is_held`: it
    waits for an upstream that may be down, and no longer than that. `model` and `route` are known only where there is
    a choice of upstreams.
    """

    __slots__ = (
        "cost_tokens", "deaths", "failed_at_s", "generation", "is_aborted", "is_excused", "is_held", "last",
        "line", "model", "route", "run", "task", "tries", "waits",
    )  # fmt: skip

    def __init__(self, run: ShardRun, line: RequestLine) -> None:
        self.run = run
        self.line = line
        self.model: str | None = None
        self.route: Route | None = None
        self.cost_tokens = 0
        self.tries = 0
        self.waits = 0
        self.generation = 0
        self.deaths = 0
        self.failed_at_s: float | None = None
        self.last: tuple[Attempt, GiveUp] | None = None
        self.is_aborted = False
        self.is_excused = False
        self.is_held = False
        self.task: asyncio.Task[None] | None = None

    def open_asset(self, content_type: str) -> AssetSink:
        """See AssetOwner."""
        assert self.run.assets is not None
        return self.run.assets.open(self.run.batch.id, self.line.line_number, content_type)


class Waiting:
    """Lines that wait for their next try, by the time when they are due; those that are, by batch; and apart from them
    those that go alone.

    `is_any` tells whether there are any of the first two.
    """

    __slots__ = ("_alone", "_counts", "_due", "_heap", "_serial", "batch_max", "is_any")

    def __init__(self) -> None:
        self.is_any = False
        self.batch_max = _PER_PLACE
        self._heap: list[tuple[float, int, Work]] = []
        self._due: dict[BatchId, deque[Work]] = {}
        self._alone: deque[Work] = deque()
        self._counts: Counter[BatchId] = Counter()
        self._serial = 0

    def __len__(self) -> int:
        """Lines that do not go alone."""
        return self._counts.total() if self.is_any else 0

    def __iter__(self) -> Iterator[Work]:
        """Give every line, in no order."""
        yield from (entry[2] for entry in self._heap)
        for works in self._due.values():
            yield from works
        yield from self._alone

    @property
    def alone_count(self) -> int:
        """Lines that go alone, after all others."""
        return len(self._alone)

    def fit(self, window: int, batch_count: int) -> None:
        """Give each batch its share of a window to wait for."""
        self.batch_max = _PER_PLACE * max(1, window // max(1, batch_count))

    def is_crowded(self, batch_id: BatchId) -> bool:
        """Whether so many lines of a batch wait that no fresh one should be sent."""
        return self._counts[batch_id] > self.batch_max

    def put(self, work: Work, due_s: float) -> None:
        """Keep a line until `due_s`."""
        self._serial += 1
        heapq.heappush(self._heap, (due_s, self._serial, work))
        self._note(work)

    def put_due(self, work: Work) -> None:
        """Keep a line that may be sent now until its batch has its turn."""
        self._due.setdefault(work.run.batch.id, deque()).append(work)
        self._note(work)

    def put_alone(self, work: Work) -> None:
        """Keep a line until nothing else is left to send."""
        self._alone.append(work)

    def hurry(self, now_s: float) -> None:
        """Let the lines that waited for their upstream become due, now that it is back."""
        self._heap = [
            (min(due_s, now_s) if work.is_held else due_s, serial, work) for due_s, serial, work in self._heap
        ]
        heapq.heapify(self._heap)

    def is_due(self, now_s: float) -> bool:
        """Whether a line has become due since it was put here."""
        return bool(self._heap) and self._heap[0][0] <= now_s

    def first(self) -> Work | None:
        """The line that becomes due next, None if there is none."""
        return self._heap[0][2] if self._heap else None

    def take(self) -> Work | None:
        """Take the line that becomes due next, None if there is none."""
        return self._taken(heapq.heappop(self._heap)[2]) if self._heap else None

    def take_due(self, batch_id: BatchId | None = None) -> Work | None:
        """Take a line of this batch, or of any, that may be sent now."""
        works = self._due.get(batch_id) if batch_id is not None else next(iter(self._due.values()), None)
        if works is None:
            return None
        work = works.popleft()
        if not works:
            del self._due[work.run.batch.id]
        return self._taken(work)

    def take_alone(self) -> Work | None:
        """Take a line that goes alone, None if others still wait."""
        return self._alone.popleft() if self._alone and not self.is_any else None

    def pick(self, is_wanted: Callable[[Work], bool]) -> list[Work]:
        """Take the lines that are wanted, those that are due first in front."""
        picked = [work for works in self._due.values() for work in works if is_wanted(work)]
        picked += [entry[2] for entry in sorted(self._heap) if is_wanted(entry[2])]
        picked += [work for work in self._alone if is_wanted(work)]
        if picked:
            self._forget(set(map(id, picked)))
        return picked

    def drop(self, run: ShardRun) -> int:
        """Forget a shard's lines; gives their number."""
        return len(self.pick(lambda work: work.run is run))

    def _forget(self, gone: set[int]) -> None:
        due = [work for works in self._due.values() for work in works if id(work) not in gone]
        self._heap = [entry for entry in self._heap if id(entry[2]) not in gone]
        heapq.heapify(self._heap)
        self._alone = deque(work for work in self._alone if id(work) not in gone)
        self._due = {}
        self._counts = Counter(entry[2].run.batch.id for entry in self._heap)
        self.is_any = bool(self._heap)
        for work in due:
            self.put_due(work)

    def _note(self, work: Work) -> None:
        self._counts[work.run.batch.id] += 1
        self.is_any = True

    def _taken(self, work: Work) -> Work:
        self._counts[work.run.batch.id] -= 1
        if not (self._heap or self._due):
            self._counts.clear()
            self.is_any = False
        return work
