"""Answers that wait for memory wait for us: they are read one after the other, and no deadline counts that time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from batchrunner.limits import ReadBudget
from batchrunner.models import AttemptError
from batchrunner.upstream import AiohttpUpstream
from tests.hostile.cases import chunked
from tests.hostile.peer import LIMIT_S, SteppedClock, Talk, answer, peer_with, until

SIZE_BYTES = 8 * 1024 * 1024
TOTAL_S, IDLE_S = 60.0, 5.0


def body_for(request: bytes) -> bytes:
    """An answer so large that it comes in many reads, and that is of this request only."""
    return request.partition(b"\r\n\r\n")[2] * SIZE_BYTES


@asynccontextmanager
async def no_room() -> AsyncIterator[ReadBudget]:
    """A budget without any room, as a process sets it again and again."""
    budget = ReadBudget()

    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def tick() -> None:
        budget.set_limit(0)
        timers[:] = [loop.call_later(0.005, tick)]

    tick()
    try:
        yield budget
    finally:
        timers[0].cancel()


def upstream_of(url: str, clock: SteppedClock, budget: ReadBudget) -> AiohttpUpstream:
    return AiohttpUpstream(url, clock=clock, total_timeout_s=TOTAL_S, idle_timeout_s=IDLE_S, budget=budget)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_answers_beyond_the_budget_are_read_one_after_the_other(is_chunked: bool) -> None:
    async def script(talk: Talk) -> None:
        body = body_for(await talk.request())
        talk.say(chunked(body) if is_chunked else answer(body))
        await talk.gone()

    clock = SteppedClock()
    async with peer_with(script) as peer, no_room() as budget:
        upstream = upstream_of(peer.url, clock, budget)
        sending = [upstream.send("/v1/embeddings", b"%d" % number, idempotency_key=None) for number in range(6)]
        attempts = await asyncio.wait_for(asyncio.gather(*sending), LIMIT_S)
        await upstream.close()

    assert [attempt.error for attempt in attempts] == [None] * 6
    assert [attempt.body == b"%d" % number * SIZE_BYTES for number, attempt in enumerate(attempts)] == [True] * 6


async def test_no_deadline_counts_the_time_for_which_an_answer_was_not_read() -> None:
    release = asyncio.Event()

    async def script(talk: Talk) -> None:
        request = await talk.request()
        whole = answer(body_for(request))
        if request.endswith(b"0"):
            talk.say(whole[:1000])
            await release.wait()
            talk.say(whole[1000:])
        else:
            talk.say(whole)
        await talk.gone()

    clock = SteppedClock()
    async with peer_with(script) as peer, no_room() as budget:
        upstream = upstream_of(peer.url, clock, budget)
        oldest = asyncio.create_task(upstream.send("/v1/embeddings", b"0", idempotency_key=None))
        await until(lambda: any(wire.received_bytes > 0 for wire in upstream._busy))
        clock.step(1.0)
        younger = asyncio.create_task(upstream.send("/v1/embeddings", b"1", idempotency_key=None))
        await until(lambda: any(wire.is_paused for wire in upstream._busy))
        for _ in range(int(2 * TOTAL_S)):
            clock.step(0.5)
            upstream.sweep_deadlines()
        attempt = await asyncio.wait_for(oldest, LIMIT_S)
        assert attempt.error is AttemptError.TIMEOUT_IDLE

        late = await asyncio.wait_for(younger, LIMIT_S)
        release.set()
        await upstream.close()

    assert late.error is None
    assert late.body == b"1" * SIZE_BYTES


@pytest.mark.parametrize("how", ["cancel", "abort", "deadline"])
async def test_answer_that_ends_while_it_is_not_read_gives_its_share_back(how: str) -> None:
    async def script(talk: Talk) -> None:
        request = await talk.request()
        talk.say(answer(body_for(request))[: SIZE_BYTES // 2])
        await talk.gone()

    clock = SteppedClock()
    async with peer_with(script) as peer, no_room() as budget:
        upstream = upstream_of(peer.url, clock, budget)
        sending = [asyncio.create_task(upstream.send("/v1/embeddings", b"1", idempotency_key=None)) for _ in range(3)]
        await until(lambda: sum(wire.is_paused for wire in upstream._busy) == 2)
        if how == "cancel":
            for task in sending:
                task.cancel()
        elif how == "abort":
            upstream.abort_all()
        else:
            # Each in turn is read on, and falls silent.
            while upstream._busy:
                clock.step(0.5)
                upstream.sweep_deadlines()
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*sending, return_exceptions=True), LIMIT_S)
        await upstream.close()

    assert budget._held_bytes == 0
    assert not budget._running
    assert not budget._paused


async def test_connection_that_was_to_be_read_later_is_read_in_its_next_exchange() -> None:
    """A head that comes before its body, then a large answer that has no room: the idle connection is none of those
    that wait.
    """
    release = asyncio.Event()

    async def script(talk: Talk) -> None:
        while True:
            request = await talk.request()
            if request.endswith(b"large"):
                talk.say(answer(b"x" * SIZE_BYTES)[:-1])
                await release.wait()
                talk.say(b"x")
            else:
                head, _, body = answer(b"{}", Content_Type="application/json").partition(b"\r\n\r\n")
                talk.say(head + b"\r\n\r\n")
                await until(lambda: any(wire.received_bytes == 0 for wire in upstream._busy))
                talk.say(body)

    clock = SteppedClock()
    async with peer_with(script) as peer, no_room() as budget:
        upstream = upstream_of(peer.url, clock, budget)
        first = [upstream.send("/v1/embeddings", b"small", idempotency_key=None) for _ in range(2)]
        await asyncio.wait_for(asyncio.gather(*first), LIMIT_S)
        large = asyncio.create_task(upstream.send("/v1/embeddings", b"large", idempotency_key=None))
        await until(lambda: any(wire.received_bytes > 0 for wire in upstream._busy))
        again = await asyncio.wait_for(upstream.send("/v1/embeddings", b"small", idempotency_key=None), LIMIT_S)
        release.set()
        last = await asyncio.wait_for(large, LIMIT_S)
        await upstream.close()

    assert (again.error, again.body) == (None, b"{}")
    assert (last.error, len(last.body)) == (None, SIZE_BYTES)
