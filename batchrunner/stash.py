"""Sends each line to an upstream that may answer it, and keeps what was read for one that has no room yet.

Only where there is a choice of upstreams; with one that takes every line nothing of this is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from batchrunner.models import OnUnknown
from batchrunner.routing import Route, Router, Standing, model_of
from batchrunner.shards import ShardRun
from batchrunner.work import Work

# So many lines of a batch may wait for one upstream while those for others go on: about a shard.
_LINES_MAX = 1000
# A line that may be sent only once counts as sent from when it was read, should its holder die.
_LINES_MAX_ONCE = 16


class Desk(Standing, Protocol):
    """The pool of one upstream."""

    @property
    def is_crowded(self) -> bool:
        """Whether so many lines wait there that no more should come."""

    def hand(self, work: Work) -> None:
        """Take over a line, to be sent next."""

    def keep(self, work: Work, due_s: float) -> None:
        """Take over a line that may not be sent before `due_s`."""


class Board:
    """What the stashes of a process have in common: the routes, the pools by place, and a budget of bytes."""

    def __init__(self, router: Router, *, stashed_bytes_max: int, refuse: Callable[[Work], None]) -> None:
        self.router = router
        self.desks: Sequence[Desk] = ()
        self.stashed_bytes = 0
        self.stashed_bytes_max = stashed_bytes_max
        self.refuse = refuse

    def route_of(self, work: Work) -> Route | None:
        """Tell where a line may go now; None if nobody serves its model."""
        if work.route is None:
            work.model = model_of(work.line.body)
            work.route = self.router.route(work.model)
        shut = work.run.shut
        return self.router.without(work.route, shut) if shut and work.route is not None else work.route

    def other_for(self, work: Work, place: int) -> Desk | None:
        """Find an upstream besides `place` that is up and may answer a line, None if there is none."""
        route = self.route_of(work)
        other = route.other(place, self.desks) if route is not None else None
        return None if other is None or self.desks[other].is_crowded else self.desks[other]


class Stash:
    """Lines of one batch that were read while nobody who may answer them had room, in order for each route."""

    __slots__ = ("_board", "_count", "_works")

    def __init__(self, board: Board) -> None:
        self._board = board
        self._count = 0
        self._works: dict[Route, deque[Work]] = {}

    def __len__(self) -> int:
        """Lines in it."""
        return self._count

    def count_for(self, place: int) -> int:
        """Lines that the upstream at that place may answer."""
        return sum(len(works) for route, works in self._works.items() if place in route.places)

    def next_work(self, place: int, read: Callable[[], Work | None]) -> Work | None:
        """Give the next line for `place`, which has room; what is read on the way goes to others or stays here."""
        for route in list(self._works):
            work = self._drain(route, place)
            if work is not None:
                return work
        while self._has_space and (work := read()) is not None:
            found = self._board.route_of(work)
            if found is None:
                self._board.refuse(work)
                continue
            self._keep(work, found)
            if (chosen := self._drain(found, place)) is not None:
                return chosen
        return None

    def drop(self, run: ShardRun) -> int:
        """Forget a shard's lines; gives their number."""
        before = self._count
        kept = [work for works in self._works.values() for work in works if work.run is not run]
        self._refill(kept)
        return before - self._count

    def sort_again(self) -> None:
        """Find the routes anew, after one has changed."""
        self._refill([work for works in self._works.values() for work in works])

    def _refill(self, works: list[Work]) -> None:
        for route in list(self._works):
            while route in self._works:
                self._pop(route)
        for work in works:
            changed = self._board.route_of(work)
            assert changed is not None
            self._keep(work, changed)

    @property
    def _has_space(self) -> bool:
        if self._count == 0:
            return True
        run = next(iter(self._works.values()))[0].run
        limit = _LINES_MAX_ONCE if run.batch.on_unknown is OnUnknown.FAIL else _LINES_MAX
        return self._count < limit and self._board.stashed_bytes < self._board.stashed_bytes_max

    def _drain(self, route: Route, place: int) -> Work | None:
        """Give a line for `place`, and those before it to the others whose turn it is."""
        board = self._board
        while route in self._works:
            chosen = route.choose(place, board.desks)
            if chosen is None:
                return None
            work = self._pop(route)
            if chosen == place:
                return work
            board.desks[chosen].hand(work)
        return None

    def _keep(self, work: Work, route: Route) -> None:
        works = self._works.get(route)
        if works is None:
            works = self._works[route] = deque()
        works.append(work)
        self._count += 1
        self._board.stashed_bytes += len(work.line.body)

    def _pop(self, route: Route) -> Work:
        works = self._works[route]
        work = works.popleft()
        if not works:
            del self._works[route]
        self._count -= 1
        self._board.stashed_bytes -= len(work.line.body)
        return work
