"""Groups of single jobs on virtual time: when they go, what is in them, and who hears of their end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from batchrunner.api.job_groups import GATHER_S, GROUP_BYTES_MAX, GROUP_LINES_MAX, JobGroups, JobLine
from batchrunner.errors import QuotaExceeded, StoreUnavailable
from batchrunner.jobs import InferenceType, Job, NewJob
from batchrunner.lifecycle import JobStatus
from batchrunner.models import BatchId
from tests.unit.fanning import VirtualClock, settled

NEW = NewJob(url="/v1/chat/completions", inference_type=InferenceType.LLM, model="m")
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def job(number: int) -> Job:
    return Job(
        url=NEW.url,
        inference_type=NEW.inference_type,
        model=NEW.model,
        number=number,
        batch_id=BatchId("b"),
        line_number=number,
        is_single=True,
        status=JobStatus.QUEUED,
        created_at=MOMENT,
        queued_at=MOMENT,
        ended_at=None,
        retry_count=0,
    )


class Desk:
    """Takes groups, and makes job N of the line `N`; each commit lasts until a test ends it."""

    def __init__(self, *, is_slow: bool = False) -> None:
        self.clock = VirtualClock()
        self.groups = JobGroups()
        self.taken: list[list[int]] = []
        self.ends: list[asyncio.Future[None]] = []
        self.trouble: Exception | None = None
        self.refused: dict[int, Exception] = {}
        self._is_slow = is_slow

    async def commit(self, lines: Sequence[JobLine]) -> list[Job | Exception]:
        numbers = [int(line.content) for line in lines]
        self.taken.append(numbers)
        if self._is_slow:
            self.ends.append(asyncio.get_running_loop().create_future())
            await self.ends[-1]
        trouble, self.trouble = self.trouble, None
        if trouble is not None:
            raise trouble
        return [self.refused.get(number) or job(number) for number in numbers]

    def send(self, *numbers: int, lane: str = "ana", size_bytes: int = 0) -> list[asyncio.Task[Job]]:
        lines = [JobLine(new=NEW, content=b"%d" % number + b" " * size_bytes) for number in numbers]
        return [asyncio.create_task(self.groups.join(lane, line, self.clock, self.commit)) for line in lines]

    async def sent(self, *numbers: int, lane: str = "ana", size_bytes: int = 0) -> list[asyncio.Task[Job]]:
        tasks = self.send(*numbers, lane=lane, size_bytes=size_bytes)
        await settled()
        return tasks


async def test_those_that_come_within_the_gathering_go_together_and_no_later():
    desk = Desk()
    first = await desk.sent(1)
    await desk.clock.advance(GATHER_S * 0.9)
    rest = await desk.sent(2, 3)
    assert desk.taken == []

    await desk.clock.advance(GATHER_S * 0.1)

    assert desk.taken == [[1, 2, 3]]
    assert [(await each).number for each in (*first, *rest)] == [1, 2, 3]


async def test_the_next_group_gathers_while_one_commits_and_then_goes_at_once():
    desk = Desk(is_slow=True)
    await desk.sent(1)
    await desk.clock.advance(GATHER_S)
    late = await desk.sent(2, 3)
    await desk.clock.advance(GATHER_S)
    assert desk.taken == [[1]]

    desk.ends[0].set_result(None)
    await settled()
    assert desk.taken == [[1], [2, 3]]

    desk.ends[1].set_result(None)
    assert [(await each).number for each in late] == [2, 3]


async def test_a_full_group_does_not_wait():
    desk = Desk()

    await desk.sent(*range(GROUP_LINES_MAX + 5))

    assert desk.taken == [[*range(GROUP_LINES_MAX)]]
    await desk.clock.advance(GATHER_S)
    assert desk.taken[1:] == [[*range(GROUP_LINES_MAX, GROUP_LINES_MAX + 5)]]


async def test_a_group_has_no_more_bytes_than_a_shard_may_have():
    desk = Desk()
    third = GROUP_BYTES_MAX // 3

    tasks = [*await desk.sent(1, 2, 3, 4, size_bytes=third), *await desk.sent(5, size_bytes=GROUP_BYTES_MAX + 1)]
    await desk.clock.advance(GATHER_S)

    assert desk.taken == [[1, 2], [3, 4], [5]]
    assert [(await each).number for each in tasks] == [1, 2, 3, 4, 5]


async def test_whoever_hangs_up_in_time_takes_the_line_back_and_neighbours_go_on():
    desk = Desk()
    gone, stays = await desk.sent(1, 2)
    gone.cancel()

    await desk.clock.advance(GATHER_S)

    assert desk.taken == [[2]]
    assert (await stays).number == 2


async def test_a_group_of_nobody_is_not_committed():
    desk = Desk()
    (gone,) = await desk.sent(1)
    gone.cancel()
    await desk.clock.advance(GATHER_S)
    assert desk.taken == []

    (stays,) = await desk.sent(2)
    await desk.clock.advance(GATHER_S)

    assert (await stays).number == 2


async def test_whoever_hangs_up_while_the_group_commits_costs_nobody_anything():
    desk = Desk(is_slow=True)
    gone, stays = await desk.sent(1, 2)
    await desk.clock.advance(GATHER_S)
    gone.cancel()
    await settled()

    desk.ends[0].set_result(None)

    assert (await stays).number == 2
    assert gone.cancelled()


@pytest.mark.parametrize("trouble", [StoreUnavailable("the database is away"), RuntimeError("a bug")])
async def test_a_commit_that_fails_fails_those_of_its_group_only(trouble, caplog):
    desk = Desk()
    desk.trouble = trouble
    failed = await desk.sent(1, 2)
    await desk.clock.advance(GATHER_S)
    fine = await desk.sent(3)
    await desk.clock.advance(GATHER_S)

    assert [each.exception() for each in failed] == [trouble, trouble]
    assert (await fine[0]).number == 3
    assert ("was not made" in caplog.text) is isinstance(trouble, RuntimeError)


async def test_a_line_that_is_refused_is_refused_alone():
    desk = Desk()
    desk.refused[2] = QuotaExceeded("full")

    one, two, three = await desk.sent(1, 2, 3)
    await desk.clock.advance(GATHER_S)

    assert ((await one).number, two.exception(), (await three).number) == (1, desk.refused[2], 3)


async def test_lanes_do_not_wait_for_each_other():
    desk = Desk(is_slow=True)
    await desk.sent(1, lane="ana")
    await desk.clock.advance(GATHER_S)
    (other,) = await desk.sent(2, lane="ben")
    await desk.clock.advance(GATHER_S)
    assert desk.taken == [[1], [2]]

    desk.ends[1].set_result(None)

    assert (await other).number == 2


async def test_a_loop_that_ends_leaves_nobody_waiting():
    desk = Desk(is_slow=True)
    begun = await desk.sent(1)
    await desk.clock.advance(GATHER_S)
    lined_up = await desk.sent(2)

    for each in [*desk.groups._tasks]:
        each.cancel()
    await settled()

    assert [each.cancelled() for each in (*begun, *lined_up)] == [True, True]
