"""What the fan-out does when a door answers for the upstream behind it, with 503 or 504, or nobody answers in time."""

from __future__ import annotations

from collections import Counter

import pytest

from batchrunner.models import Attempt, AttemptError, OnUnknown
from batchrunner.settings import Settings
from tests.unit.fanning import always, answered, batch_of, broken, failures, records, scene, shard_of, succeeded

OK = answered()
LOADING = answered(503, b'{"error":"loading"}')
SILENT = [
    pytest.param(LOADING, id="503"),
    pytest.param(answered(504, b"<html>"), id="504"),
    pytest.param(broken(AttemptError.TIMEOUT_TOTAL), id="timeout"),
]


@pytest.mark.parametrize("nobody", SILENT)
@pytest.mark.parametrize("window", [4, 64])
async def test_long_silence_is_told_fails_no_line_and_ends_with_the_first_answer(nobody: Attempt, window: int) -> None:
    run = shard_of(range(1, 201))
    async with scene(always(OK), window=window, uniform=0.9) as told:
        told.add(run)
        await told.clock.advance(0.25)
        told.upstream.script, told.upstream.knock_answer = always(nobody), nobody
        await told.clock.advance(20.0)

        assert told.fanout.outage_text is not None
        before = len(told.upstream.sent) + len(told.upstream.knocks)
        await told.clock.advance(900.0)
        assert len(told.upstream.sent) + len(told.upstream.knocks) - before <= 900.0 / 5.0 + 5
        told.upstream.script, told.upstream.knock_answer = always(OK), OK
        took_s = await told.finish(run)

        assert took_s < 5.0 + 200 / window * 0.1 + 1.0
        assert told.fanout.outage_text is None
    assert failures(run) == {}
    assert Counter(succeeded(run)) == Counter(range(1, 201))


async def test_doors_that_answer_differently_are_one_silence() -> None:
    run = shard_of(range(1, 101))
    said = [answered(502, b"<html>"), LOADING, answered(504, b""), LOADING]
    async with scene(lambda line, nth: (0.1, said[(line + nth) % 4]), window=16, uniform=0.5) as told:
        told.upstream.knock_answer = LOADING
        told.add(run)
        await told.clock.advance(600.0)

        assert told.fanout.outage_text is not None
        told.upstream.script, told.upstream.knock_answer = always(OK), OK
        assert await told.finish(run) < 7.0
    assert sorted(succeeded(run)) == list(range(1, 101))


async def test_silence_is_probed_by_one_line_at_a_time() -> None:
    run = shard_of(range(1, 101))
    async with scene(always(LOADING), window=16, uniform=0.5) as told:
        told.add(run)
        await told.clock.advance(5.0)
        assert told.fanout.outage_text == "upstream_down: the upstream answers 503 to everything"

        before = len(told.upstream.sent)
        await told.clock.advance(60.0)
        assert {sent.in_flight for sent in told.upstream.sent[before:]} == {1}


async def test_few_lines_that_are_left_are_waited_for_alike() -> None:
    """A server that loads its model says 503 to the three lines of a first try."""
    run = shard_of([1, 2, 3])
    async with scene(always(LOADING), window=16, uniform=0.9) as told:
        told.add(run)
        await told.clock.advance(300.0)

        assert told.fanout.outage_text is not None
        told.upstream.script = always(OK)
        assert await told.finish(run) < 6.0
    assert sorted(succeeded(run)) == [1, 2, 3]


async def test_line_that_waits_for_what_it_was_told_is_not_hurried() -> None:
    run = shard_of(range(1, 21))
    asks = answered(500, b"", retry_after_s=120.0)
    async with scene(lambda line, _nth: (0.1, asks if line == 1 else LOADING), window=16, uniform=0.5) as told:
        told.add(run)
        await told.clock.advance(30.0)
        assert told.fanout.outage_text is not None
        told.upstream.script = always(OK)
        await told.clock.advance(10.0)

        assert len(succeeded(run)) == 19
        assert told.upstream.count(1) == 1
        await told.finish(run)


@pytest.mark.parametrize("status", [500, 503, 504])
@pytest.mark.parametrize("lines", [1, 30])
async def test_one_line_never_puts_the_upstream_down(status: int, lines: int) -> None:
    run = shard_of(range(1, lines + 1))
    told_down = False
    async with scene(
        lambda line, _nth: (0.1, answered(status, b"no") if line == 1 else OK), window=4, uniform=0.5
    ) as told:
        told.add(run)
        for _ in range(600):
            await told.clock.advance(0.1)
            told_down = told_down or told.fanout.outage_text is not None
        assert not told_down

    assert sorted(succeeded(run)) == list(range(2, lines + 1))
    assert list(failures(run)) == ([] if status == 503 else [1])


async def test_lines_that_are_all_answered_500_fail_by_their_own_tries() -> None:
    run = shard_of(range(1, 31))
    async with scene(always(answered(500, b"no")), window=16) as told:
        told.add(run)
        await told.finish(run)

        assert told.fanout.outage_text is None
        assert set(Counter(told.upstream.lines()).values()) == {5}


@pytest.mark.parametrize("late", [answered(504, b""), broken(AttemptError.TIMEOUT_TOTAL)])
async def test_lines_that_always_come_too_late_end_where_knocks_are_answered(late: Attempt) -> None:
    """The lines that ask for too much are often the last ones, and all that is left looks like a death."""
    was_down = False
    run = shard_of(range(1, 61))
    async with scene(lambda line, _nth: (60.0, late) if line <= 20 else (0.1, OK), window=20, uniform=0.5) as told:
        told.add(run)
        while not run.is_finished:
            await told.clock.advance(1.0)
            was_down = was_down or told.fanout.outage_text is not None

        assert not was_down
        assert max(Counter(told.upstream.lines()).values()) == 5
        # One knock is for all that come to nothing at one time.
        assert len(told.upstream.knocks) <= 5 * 3
    assert sorted(failures(run)) == list(range(1, 21))
    assert sorted(succeeded(run)) == list(range(21, 61))


@pytest.mark.parametrize("slots", [1, 4])
async def test_server_that_is_full_is_not_taken_for_one_that_is_down(slots: int) -> None:
    """It works on a few lines for long, and refuses all others within no time."""
    run = shard_of(range(1, 31))
    accepted: set[int] = set()

    def script(_line: int, _nth: int) -> tuple[float, Attempt]:
        if len(accepted.intersection(told.upstream.in_flight)) < slots:
            accepted.add(told.upstream.in_flight[-1])
            return 20.0, OK
        return 0.001, LOADING

    async with scene(script, window=16, uniform=0.9) as told:
        told.add(run)
        while not run.is_finished:
            await told.clock.advance(0.1)
            assert told.fanout.outage_text is None
    assert sorted(succeeded(run)) == list(range(1, 31))


async def test_batch_whose_lines_alone_are_refused_keeps_no_other_from_being_sent() -> None:
    """A gateway has nobody for its model: what looks like an upstream that is down answers the next batch."""
    refused = shard_of(range(1, 101), batch=batch_of("batch_1"))
    async with scene(lambda line, _nth: (0.1, LOADING if line <= 100 else OK), window=16, uniform=0.5) as told:
        told.add(refused)
        await told.clock.advance(300.0)
        assert told.fanout.outage_text is not None

        for number in range(2, 6):
            other = shard_of(range(100 * number + 1, 100 * number + 33), batch=batch_of(f"batch_{number}"))
            told.add(other)
            assert await told.finish(other) < 2.0
            told.fanout.forget(other)
            await told.clock.advance(10.0)
    assert records(refused) == []


async def test_pause_that_a_503_asks_for_is_kept() -> None:
    run = shard_of(range(1, 51))
    asks = answered(503, b"", retry_after_s=30.0)
    async with scene(always(asks), window=8) as told:
        told.add(run)
        await told.clock.advance(95.0)

        assert told.fanout.outage_text is None
        assert max(Counter(told.upstream.lines()).values()) <= 4
    assert records(run) == []


async def test_key_is_a_new_one_after_a_504_and_the_same_after_a_timeout_of_an_upstream_that_is_down() -> None:
    run = shard_of([1])
    tries = [answered(504, b""), broken(AttemptError.TIMEOUT_TOTAL), OK]
    async with scene(lambda _line, nth: (0.1, tries[nth - 1])) as told:
        told.upstream.knock_answer = LOADING
        told.add(run)
        await told.finish(run)

        assert [sent.key for sent in told.upstream.sent] == ["batch_1-1-0", "batch_1-1-1", "batch_1-1-1"]


async def test_line_that_may_be_sent_once_is_not_repeated_although_nobody_is_there() -> None:
    run = shard_of([1, 2], batch=batch_of(on_unknown=OnUnknown.FAIL))
    run.intent_mark = 2
    late = broken(AttemptError.TIMEOUT_TOTAL)
    async with scene(lambda line, _nth: (1.0, late if line == 1 else OK)) as told:
        told.upstream.knock_answer = late
        told.add(run)
        await told.finish(run)

        assert told.upstream.count(1) == 1
    assert failures(run)[1]["error"]["code"] == "outcome_unknown"


async def test_line_that_may_be_tried_once_survives_a_silence_that_has_begun() -> None:
    run = shard_of(range(1, 101))
    async with scene(always(LOADING), window=8, settings=Settings(max_tries=1), uniform=0.5) as told:
        told.upstream.knock_answer = LOADING
        told.add(run)
        await told.clock.advance(10.0)
        told.upstream.script = always(answered(504, b""))
        await told.clock.advance(600.0)

        assert records(run) == []
        told.upstream.script, told.upstream.knock_answer = always(OK), OK
        await told.finish(run)
    assert sorted(succeeded(run)) == list(range(1, 101))
