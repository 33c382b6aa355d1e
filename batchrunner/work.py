"""One line on its way, and where lines wait between tries."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterator

from batchrunner.models import Attempt, RequestLine
from batchrunner.ports import AssetSink
from batchrunner.routing import Route
from batchrunner.shards import ShardRun
from batchrunner.verdict import GiveUp


class Work:
    """One line on its way and what it has been through. Tries are per holder, not durable.

    `failed_at_s` is the moment of a failed attempt that has not been counted yet: whether it was the line's own or
    part of the upstream's death shows only a moment later, so it is counted when the line is due again. `last` is then
    the verdict that stands if it was the line's own. `is_excused`: it is sent next without being blamed. `model` and
    `route` are known only where there is a choice of upstreams.
    """

    __slots__ = (
        "cost_tokens", "deaths", "failed_at_s", "generation", "is_aborted", "is_excused", "last", "line", "model",
        "route", "run", "task", "tries", "waits",
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
        self.task: asyncio.Task[None] | None = None

    def open_asset(self, content_type: str) -> AssetSink:
        """See AssetOwner."""
        assert self.run.assets is not None
        return self.run.assets.open(self.run.batch.id, self.line.line_number, content_type)


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

    def __iter__(self) -> Iterator[Work]:
        """Give every line, in no order."""
        yield from (entry[2] for entry in self._heap)
        yield from self._alone

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

    def pick(self, is_wanted: Callable[[Work], bool]) -> list[Work]:
        """Take the lines that are wanted, those that are due first in front."""
        picked = [entry for entry in self._heap if is_wanted(entry[2])]
        alone = [work for work in self._alone if is_wanted(work)]
        if picked or alone:
            gone = {id(entry[2]) for entry in picked} | set(map(id, alone))
            self._heap = [entry for entry in self._heap if id(entry[2]) not in gone]
            heapq.heapify(self._heap)
            self._alone = deque(work for work in self._alone if id(work) not in gone)
        return [entry[2] for entry in sorted(picked)] + alone

    def drop(self, run: ShardRun) -> int:
        """Forget a shard's lines; gives their number."""
        return len(self.pick(lambda work: work.run is run))
