"""Lines on their way, and the order in which the shards of a process give them out."""

from __future__ import annotations

import asyncio

from batchrunner.models import Attempt, BatchId, RequestLine
from batchrunner.shards import ShardRun
from batchrunner.verdict import GiveUp


class Work:
    """One line on its way and what it has been through. Tries are per holder, not durable.

    `failed_at_s` is the moment of a connection error that has not been counted yet: whether it was the line's own or
    part of the upstream's death shows only a moment later, so it is counted when the line is due again. `last` is then
    the verdict that stands if it was the line's own.
    """

    __slots__ = ("deaths", "failed_at_s", "generation", "is_aborted", "last", "line", "run", "task", "tries", "waits")

    def __init__(self, run: ShardRun, line: RequestLine) -> None:
        self.run = run
        self.line = line
        self.tries = 0
        self.waits = 0
        self.generation = 0
        self.deaths = 0
        self.failed_at_s: float | None = None
        self.last: tuple[Attempt, GiveUp] | None = None
        self.is_aborted = False
        self.task: asyncio.Task[None] | None = None


class Lane:
    """The shards of one batch that this process holds, in line order; lanes take turns line by line."""

    __slots__ = ("batch_id", "runs")

    def __init__(self, batch_id: BatchId) -> None:
        self.batch_id = batch_id
        self.runs: list[ShardRun] = []

    def next_work(self) -> Work | None:
        """Give the next fresh line of the first shard that has one to give."""
        for run in self.runs:
            line = run.next_line()
            if line is not None:
                if run.is_exhausted:
                    self.runs.remove(run)
                run.in_flight_count += 1
                return Work(run, line)
        return None
