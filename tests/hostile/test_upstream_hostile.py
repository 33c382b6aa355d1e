"""Every hostile case becomes the Attempt that it stands for, and the next line gets its own answer all the same."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from batchrunner.models import AttemptError
from batchrunner.upstream import AiohttpUpstream
from tests.hostile.cases import CASES, REPLY_BYTES_MAX, Case
from tests.hostile.peer import LIMIT_S, Peer, SteppedClock, Talk, answer, peer_with, until

SECRETS = ("sk-secret", "my prompt", "choices", "hello", "zzz")
TOTAL_S = 600.0
IDLE_S = 60.0


def hostile_upstream(peer: Peer, clock: SteppedClock) -> AiohttpUpstream:
    return AiohttpUpstream(
        peer.url,
        clock=clock,
        api_key="sk-secret",
        total_timeout_s=TOTAL_S,
        idle_timeout_s=IDLE_S,
        reply_bytes_max=REPLY_BYTES_MAX,
    )


def received_bytes(upstream: AiohttpUpstream) -> int | None:
    return next((wire.received_bytes for wire in upstream._busy if wire.has_heard or wire.received_bytes >= 0), None)


async def outlast(upstream: AiohttpUpstream, clock: SteppedClock, peer: Peer, stall_bytes: int) -> None:
    """Let the time run out on a peer that fell silent, in sweeps half a second apart."""
    await until(lambda: len(peer.requests) == 1)
    if stall_bytes >= 0:
        await until(lambda: received_bytes(upstream) == stall_bytes)
    while upstream._busy:
        clock.step(0.5)
        upstream.sweep_deadlines()
        await asyncio.sleep(0)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
async def test_hostile_answer_becomes_the_expected_attempt(case: Case) -> None:
    async def script(talk: Talk) -> None:
        await case.words.speak(talk)
        await talk.gone()
        talk.hang_up()

    clock = SteppedClock()
    async with peer_with(script) as peer:
        upstream = hostile_upstream(peer, clock)
        task = asyncio.create_task(upstream.send("/v1/embeddings", b'{"input":"my prompt"}', idempotency_key="k"))
        if case.stall_bytes is not None:
            await outlast(upstream, clock, peer, case.stall_bytes)
        attempt = await asyncio.wait_for(task, LIMIT_S)
        is_reused = any(wire.is_open for wire in upstream._idle)
        await upstream.close()

    assert msgspec.structs.replace(attempt, message="", started_at_s=0.0, elapsed_s=0.0) == case.expected
    assert bool(attempt.message) == (attempt.error is not None)
    assert not any(secret in attempt.message for secret in SECRETS)
    assert attempt.message.isprintable()
    assert is_reused == case.is_reused
    assert len(peer.requests) == 1


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.stall_bytes is None])
async def test_line_after_a_hostile_answer_gets_its_own_answer(case: Case) -> None:
    async def script(talk: Talk) -> None:
        if talk is peer.talks[0]:
            await case.words.speak(talk)
        if case.is_reused or talk is not peer.talks[0]:
            await talk.request()
            talk.say(answer(b"the next line's"))
        await talk.gone()
        talk.hang_up()

    async with peer_with(script) as peer:
        upstream = hostile_upstream(peer, SteppedClock())
        await asyncio.wait_for(upstream.send("/v1/embeddings", b"{}", idempotency_key=None), LIMIT_S)
        attempt = await asyncio.wait_for(upstream.send("/v1/embeddings", b"{}", idempotency_key=None), LIMIT_S)
        await upstream.close()

    assert (attempt.status, attempt.body) == (200, b"the next line's")
    assert len(peer.talks) == (1 if case.is_reused else 2)


async def test_answer_that_drips_for_ever_ends_by_the_total_deadline() -> None:
    """A byte each 100 ms is progress, so only the total deadline ends it."""
    clock = SteppedClock()
    drops = 0
    next_drop = asyncio.Event()

    async def script(talk: Talk) -> None:
        nonlocal drops
        await talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not talk.is_left:
            await next_drop.wait()
            next_drop.clear()
            talk.say(b".")
            drops += 1

    async with peer_with(script) as peer:
        upstream = hostile_upstream(peer, clock)
        task = asyncio.create_task(upstream.send("/v1/embeddings", b"{}", idempotency_key=None))
        await until(lambda: received_bytes(upstream) == 0)
        while not task.done():
            seen = drops
            next_drop.set()
            await until(lambda seen=seen: received_bytes(upstream) == seen + 1)  # type: ignore[misc]
            for _ in range(10):
                clock.step(IDLE_S / 20)
                upstream.sweep_deadlines()
            await asyncio.sleep(0)
        attempt = await task
        await upstream.close()

    assert attempt.error is AttemptError.TIMEOUT_TOTAL
    assert attempt.status == 200
    assert attempt.elapsed_s == pytest.approx(TOTAL_S, abs=IDLE_S)
    assert drops > 10


def test_there_are_enough_cases_and_no_name_twice() -> None:
    names = [case.name for case in CASES]

    assert len(set(names)) == len(names)
    assert len(names) >= 40
    assert {case.expected.error for case in CASES} == {None, *AttemptError} - {
        AttemptError.NOT_CONNECTED,
        AttemptError.ABORTED,
    }
