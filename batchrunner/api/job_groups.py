"""Single jobs of a tenant gather into groups, each of which is made durable at one go while the next one gathers.

Knows how long to wait and how much fits, and nothing of what a group is written to.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass

from batchrunner.errors import BatchrunnerError
from batchrunner.holdings import Replay
from batchrunner.jobs import Job, NewJob
from batchrunner.ports import Clock
from batchrunner.settings import MIB

logger = logging.getLogger(__name__)

# A shard is read at one go by whoever runs it, so that a group is none larger than one may be.
GROUP_LINES_MAX = 256
GROUP_BYTES_MAX = 8 * MIB
# What nobody notices beside an inference makes a tenth of the transactions, shards and segments of those who send many.
GATHER_S = 0.010


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLine:
    """A job, the line that is to run for it, with its 0x0A, and the key that it is noted under, if there is one."""

    new: NewJob
    content: bytes
    replay: Replay | None = None


# Makes a group durable; gives for each line, in order, its job or why it is refused.
Commit = Callable[[Sequence[JobLine]], Awaitable[Sequence[Job | Exception]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    line: JobLine
    came_at_s: float
    job: asyncio.Future[Job]


class JobGroups:
    """The groups of all tenants on one event loop. Every line has somebody who waits for its job, and whoever waits no
    more before the group is begun takes the line back.
    """

    def __init__(self) -> None:
        self._lanes: dict[Hashable, deque[_Waiting]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, lane: Hashable, line: JobLine, clock: Clock, commit: Commit) -> Job:
        """Have a line made durable with others of its lane, which are committed alike.

        Raises:
            Exception: what `commit` raised, to all of the group, or gave for this line.
        """
        waiting = _Waiting(line=line, came_at_s=clock.monotonic_s(), job=asyncio.get_running_loop().create_future())
        lined_up = self._lanes.get(lane)
        if lined_up is not None:
            lined_up.append(waiting)
        else:
            lined_up = self._lanes[lane] = deque([waiting])
            task = asyncio.create_task(self._run(lane, lined_up, clock, commit))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await waiting.job

    async def _run(self, lane: Hashable, lined_up: deque[_Waiting], clock: Clock, commit: Commit) -> None:
        """Commit group after group until nobody waits."""
        try:
            while lined_up:
                wait_s = lined_up[0].came_at_s + GATHER_S - clock.monotonic_s()
                if wait_s > 0.0 and len(lined_up) < GROUP_LINES_MAX:
                    await clock.sleep(wait_s)
                group = _taken(lined_up)
                if group:
                    await _settle(group, commit)
        finally:
            del self._lanes[lane]
            for each in lined_up:
                each.job.cancel()


def _taken(lined_up: deque[_Waiting]) -> list[_Waiting]:
    """Take those at the front that fit together; a line that is longer than a group may be goes alone."""
    group: list[_Waiting] = []
    size_bytes = 0
    while lined_up and len(group) < GROUP_LINES_MAX:
        size_bytes += len(lined_up[0].line.content)
        if group and size_bytes > GROUP_BYTES_MAX:
            break
        each = lined_up.popleft()
        if each.job.done():
            size_bytes -= len(each.line.content)
        else:
            group.append(each)
    return group


async def _settle(group: list[_Waiting], commit: Commit) -> None:
    """Commit a group and tell everybody in it who is still there."""
    try:
        found = await commit([each.line for each in group])
    except BatchrunnerError as error:
        found = [error] * len(group)
    except Exception as error:
        logger.exception("a group of %d jobs was not made", len(group), extra={"action": "job_group_broke"})
        found = [error] * len(group)
    except BaseException:
        for each in group:
            each.job.cancel()
        raise
    for each, outcome in zip(group, found, strict=True):
        if each.job.done():
            continue
        if isinstance(outcome, Exception):
            each.job.set_exception(outcome)
        else:
            each.job.set_result(outcome)
