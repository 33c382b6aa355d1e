"""The pool of a process on virtual time: what is sent when, and what each line comes to."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from batchrunner.limits import DEATHS_ALONE
from batchrunner.models import Attempt, AttemptError, OnUnknown, PauseReason
from batchrunner.settings import Settings
from tests.unit.fanning import (
    always,
    answered,
    batch_of,
    broken,
    failures,
    raw_line,
    records,
    replaced,
    scene,
    settled,
    shard_of,
    succeeded,
)

OK = answered()
REFUSED = answered(429, b"")


# -- the window ------------------------------------------------------------------------------------------------------


async def test_window_is_kept_full_over_shard_borders_and_never_exceeded() -> None:
    runs = [shard_of(range(first, first + 5)) for first in range(1, 101, 5)]
    async with scene(always(OK, latency_s=0.1), window=8) as told:
        told.add(*runs)
        await told.finish(*runs)

        in_flight = [sent.in_flight for sent in told.upstream.sent]
        assert told.upstream.in_flight_max == 8
        assert min(in_flight[7:]) == 8
    assert [succeeded(run) for run in runs] == [list(range(first, first + 5)) for first in range(1, 101, 5)]


async def test_window_grows_and_shrinks_without_aborting_anything() -> None:
    run = shard_of(range(1, 201))
    async with scene(always(OK, latency_s=1.0), window=4) as told:
        told.add(run)
        await told.clock.advance(0.5)
        assert len(told.upstream.in_flight) == 4

        told.fanout.pools[0].window = 20
        await told.clock.advance(0.1)
        assert len(told.upstream.in_flight) == 20

        told.fanout.pools[0].window = 2
        await told.clock.advance(2.0)
        assert len(told.upstream.in_flight) == 2
        told.fanout.pools[0].window = 50
        await told.finish(run)
    assert succeeded(run) == sorted(succeeded(run))
    assert len(succeeded(run)) == 200


async def test_window_of_nothing_sends_nothing() -> None:
    run = shard_of(range(1, 3))
    async with scene(always(OK), window=0, settings=Settings()) as told:
        told.add(run)
        await told.clock.advance(5.0)

        assert told.upstream.sent == []


async def test_nothing_is_sent_when_the_lease_runs_out() -> None:
    run = shard_of(range(1, 100))
    async with scene(always(OK, latency_s=0.1), window=1) as told:
        until_s = told.clock.now_s + 1.0
        told.fanout.stop_sends_at(until_s)
        told.add(run)
        await told.clock.advance(10.0)

        assert 8 <= len(told.upstream.sent) <= 11
        assert max(sent.at_s for sent in told.upstream.sent) < until_s


async def test_nothing_fresh_is_sent_while_the_journal_is_full() -> None:
    run = shard_of(range(1, 20))
    async with scene(always(OK), window=4) as told:
        told.journal.is_full = True
        told.add(run)
        await told.clock.advance(1.0)
        assert told.upstream.sent == []

        told.journal.is_full = False
        await told.finish(run)


async def test_shards_of_one_batch_go_in_line_order_however_they_came() -> None:
    late, early = shard_of(range(10, 15)), shard_of(range(1, 5))
    async with scene(always(OK), window=1) as told:
        told.add(late, early)
        await told.finish(late, early)

        assert told.upstream.lines() == [*range(1, 5), *range(10, 15)]


async def test_batches_take_turns_line_by_line() -> None:
    runs = [shard_of(range(first, first + 20), batch=batch_of(f"batch_{first}")) for first in (1, 101, 201)]
    async with scene(always(OK), window=3) as told:
        told.add(*runs)
        await told.finish(*runs)

        sent = told.upstream.lines()
    for part in range(0, 60, 3):
        assert {line // 100 for line in sent[part : part + 3]} == {0, 1, 2}


# -- retries ---------------------------------------------------------------------------------------------------------


async def test_due_retries_go_before_fresh_lines() -> None:
    run = shard_of(range(1, 50))
    async with scene(lambda line, nth: (0.1, answered(500) if line <= 2 and nth == 1 else OK), window=2) as told:
        told.add(run)
        await told.finish(run)

        assert told.upstream.lines()[:6] == [1, 2, 1, 2, 3, 4]
    assert run.retry_count == 2


async def test_waiting_retry_leaves_its_place_to_others() -> None:
    run = shard_of(range(1, 10))
    slow = answered(500, b"", retry_after_s=5.0)
    async with scene(lambda line, nth: (0.1, slow if line == 1 and nth == 1 else OK), window=1) as told:
        told.add(run)
        took_s = await told.finish(run)

        assert told.upstream.lines() == [*range(1, 10), 1]
        assert 5.0 <= took_s < 6.0


async def test_no_fresh_line_is_sent_while_too_many_wait() -> None:
    run = shard_of(range(1, 200))
    asks = answered(500, b"", retry_after_s=30.0)
    async with scene(always(asks, latency_s=0.01), window=4) as told:
        told.add(run)
        await told.clock.advance(20.0)

        assert told.fanout.waiting_count <= 2 * 4 + 4
        assert len(told.upstream.sent) == told.fanout.waiting_count


async def test_line_is_given_up_after_its_tries_with_the_last_answer() -> None:
    run = shard_of([1, 2])
    async with scene(
        lambda line, nth: (0.1, answered(500, b'{"try":%d}' % nth) if line == 1 else OK),
        settings=Settings(max_tries=3),
    ) as told:
        told.add(run)
        await told.finish(run)

        assert told.upstream.count(1) == 3
    assert failures(run)[1]["response"] == {"status_code": 500, "request_id": None, "body": {"try": 3}}
    assert failures(run)[1]["error"] is None


async def test_refusals_use_up_no_try() -> None:
    run = shard_of([1, 2])
    async with scene(
        lambda line, nth: (0.1, REFUSED if line == 1 and nth < 30 else OK), settings=Settings(max_tries=1)
    ) as told:
        told.add(run)
        await told.finish(run)

        assert told.upstream.count(1) == 30
    assert sorted(succeeded(run)) == [1, 2]


async def test_refused_place_stays_empty_until_the_next_tick() -> None:
    """An upstream that refuses at once is not asked a thousand times a second by each place too many."""
    run = shard_of(range(1, 1000))
    async with scene(always(REFUSED, latency_s=0.001), window=10, uniform=0.5) as told:
        told.add(run)
        await told.clock.advance(1.0)

        assert len(told.upstream.sent) <= 10 * 21


async def test_answers_that_ask_for_a_pause_stop_all_sends_for_as_long() -> None:
    run = shard_of(range(1, 100))
    asks = answered(429, b"", retry_after_s=2.0)
    async with scene(lambda line, nth: (0.1, asks if line <= 4 and nth == 1 else OK), window=4) as told:
        told.add(run)
        await told.finish(run)

        gaps = [later.at_s - sent.at_s for sent, later in zip(told.upstream.sent, told.upstream.sent[1:], strict=False)]
        assert max(gaps) == pytest.approx(2.1, abs=0.06)


async def test_pause_that_is_asked_for_is_no_longer_than_the_setting_allows() -> None:
    run = shard_of(range(1, 9))
    asks = answered(429, b"", retry_after_s=86_400.0)
    async with scene(
        lambda line, nth: (0.1, asks if nth == 1 else OK), window=8, settings=Settings(retry_after_max_s=0.5)
    ) as told:
        told.add(run)
        took_s = await told.finish(run)

        assert took_s < 1.0


async def test_generation_of_the_key_follows_complete_answers_only() -> None:
    """The same key after an unknown outcome, a new one after an answer that says that nothing was done."""
    run = shard_of([1])
    cut, late, page = broken(AttemptError.TRUNCATED), broken(AttemptError.TIMEOUT_TOTAL), answered(200, b"<html>")
    tries = [cut, answered(500), late, page, OK]
    async with scene(lambda _line, nth: (0.1, tries[nth - 1])) as told:
        told.add(run)
        await told.finish(run)

        keys = [sent.key for sent in told.upstream.sent]
    assert keys == ["batch_1-1-0", "batch_1-1-0", "batch_1-1-1", "batch_1-1-1", "batch_1-1-1"]


async def test_key_of_a_line_with_a_blob_of_its_own_begins_with_the_blob() -> None:
    """Batches of jobs have numbers, which two servers on one upstream both give."""
    run = shard_of([3], batch=batch_of("1"), source="jobs/5f")
    async with scene(always(OK)) as told:
        told.add(run)
        await told.finish(run)

        assert [sent.key for sent in told.upstream.sent] == ["jobs/5f-3-0"]


async def test_answer_that_is_no_json_ends_without_a_response() -> None:
    run = shard_of([1])
    async with scene(always(answered(200, b"<html>")), settings=Settings(max_tries=2)) as told:
        told.add(run)
        await told.finish(run)

    assert failures(run)[1]["response"] is None
    assert failures(run)[1]["error"]["code"] == "invalid_response"


# -- at most once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "code"),
    [
        (broken(AttemptError.RESET), "outcome_unknown"),
        (broken(AttemptError.TIMEOUT_TOTAL), "outcome_unknown"),
        (broken(AttemptError.TRUNCATED), "outcome_unknown"),
        (answered(500), "outcome_unknown"),
        (answered(503, b"busy"), "outcome_unknown"),
        (answered(200, b"<html>"), "invalid_response"),
    ],
)
async def test_line_that_may_be_sent_once_is_sent_once(attempt: Attempt, code: str) -> None:
    run = shard_of(range(1, 4), batch=batch_of(on_unknown=OnUnknown.FAIL))
    run.intent_mark = 3
    async with scene(lambda line, _nth: (0.1, attempt if line == 2 else OK)) as told:
        told.add(run)
        await told.finish(run)

        assert told.upstream.count(2) == 1
        assert all(sent.is_at_most_once for sent in told.upstream.sent)
    assert failures(run)[2]["error"]["code"] == code
    assert failures(run)[2]["response"] is None
    assert sorted(succeeded(run)) == [1, 3]


async def test_line_that_may_be_sent_once_is_not_repeated_after_a_death_of_the_upstream() -> None:
    run = shard_of(range(1, 9), batch=batch_of(on_unknown=OnUnknown.FAIL))
    run.intent_mark = 8
    async with scene(lambda line, _nth: (0.1, broken() if line <= 4 else OK)) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.add(run)
        await told.finish(run)

        assert max(Counter(told.upstream.lines()).values()) == 1
    assert sorted(failures(run)) == [1, 2, 3, 4]
    assert {each["error"]["code"] for each in failures(run).values()} == {"outcome_unknown"}
    assert sorted(succeeded(run)) == [5, 6, 7, 8]


@pytest.mark.parametrize("attempt", [REFUSED, answered(503, b""), broken(AttemptError.NOT_CONNECTED)])
async def test_line_that_may_be_sent_once_is_repeated_when_surely_nothing_was_done(attempt: Attempt) -> None:
    run = shard_of(range(1, 4), batch=batch_of(on_unknown=OnUnknown.FAIL))
    run.intent_mark = 3
    async with scene(lambda line, nth: (0.1, attempt if line == 2 and nth == 1 else OK)) as told:
        told.add(run)
        await told.finish(run)

        assert told.upstream.count(2) == 2
    assert sorted(succeeded(run)) == [1, 2, 3]


async def test_line_beyond_the_registered_intent_is_not_handed_out() -> None:
    run = shard_of(range(1, 10), batch=batch_of(on_unknown=OnUnknown.FAIL))
    run.intent_mark = 4
    async with scene(always(OK), window=8) as told:
        told.add(run)
        await told.clock.advance(1.0)
        assert sorted(told.upstream.lines()) == [1, 2, 3, 4]
        assert run.intent_wanted == 5
        assert told.changes

        run.intent_mark = 9
        told.fanout.wake()
        await told.finish(run)


async def test_quarantined_shard_goes_one_line_at_a_time() -> None:
    run = shard_of(range(1, 5), is_quarantined=True)
    async with scene(always(OK), window=8) as told:
        told.add(run)
        while not run.is_finished:
            run.intent_mark = max(run.intent_mark or 0, run.intent_wanted)
            told.fanout.wake()
            await told.clock.advance(0.05)

        assert told.upstream.in_flight_max == 1
    assert succeeded(run) == [1, 2, 3, 4]


# -- the breaker -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, PauseReason.AUTHENTICATION), (403, PauseReason.AUTHENTICATION), (404, PauseReason.MODEL_UNKNOWN)],
)
async def test_breaker_trips_when_every_line_is_answered_alike_and_no_line_is_given_up(
    status: int, reason: PauseReason
) -> None:
    run = shard_of(range(1, 1001))
    async with scene(always(answered(status)), window=4) as told:
        told.add(run)
        await told.clock.advance(5.0)

        assert told.fanout.breaker_news == {run.batch.id: reason}
        assert len({sent.line for sent in told.upstream.sent}) <= 4 * 3
        assert len(told.upstream.sent) <= 16
        assert told.changes
    assert records(run) == []


async def test_breaker_trips_when_fewer_lines_than_it_wants_are_all_there_are() -> None:
    run = shard_of([1, 2])
    async with scene(always(answered(401)), window=4) as told:
        told.add(run)
        await told.clock.advance(5.0)

        assert told.fanout.breaker_news == {run.batch.id: PauseReason.AUTHENTICATION}
    assert records(run) == []


async def test_one_refused_line_is_its_own_failure_and_the_others_go_on() -> None:
    run = shard_of(range(1, 30))
    async with scene(lambda line, _nth: (0.1, answered(401) if line == 1 else OK), window=2) as told:
        told.add(run)
        await told.finish(run)

        assert told.fanout.breaker_news == {}
    assert list(failures(run)) == [1]
    assert failures(run)[1]["response"]["status_code"] == 401
    assert succeeded(run) == list(range(2, 30))


# -- the upstream dies -----------------------------------------------------------------------------------------------


async def test_outage_uses_up_no_tries_and_is_probed_by_one_line_at_a_time() -> None:
    run = shard_of(range(1, 101))
    dead = [1001.0, 1061.0]

    def script(_line: int, _nth: int) -> tuple[float, Attempt]:
        now_s = told.clock.now_s
        if now_s >= dead[1]:
            return 0.1, OK
        if now_s >= dead[0]:
            return 0.0, broken(AttemptError.NOT_CONNECTED)
        return (0.1, OK) if now_s + 0.1 < dead[0] else (dead[0] - now_s, broken())

    async with scene(script, window=4, settings=Settings(max_tries=1)) as told:
        told.add(run)
        await told.finish(run)

        probes = [sent for sent in told.upstream.sent if dead[0] + 1.0 < sent.at_s < dead[1]]
        assert 10 <= len(probes) <= 20
        assert {sent.in_flight for sent in probes} == {1}
    assert failures(run) == {}
    assert Counter(succeeded(run)) == Counter(range(1, 101))


async def test_upstream_that_takes_long_to_refuse_is_given_up_as_soon_as_one_that_is_quick() -> None:
    """A TLS handshake with a server that speaks none ends at the time-out of the connection."""
    for latency_s in (0.0, 10.0):
        async with scene(always(broken(AttemptError.NOT_CONNECTED), latency_s=latency_s), window=4) as told:
            told.add(shard_of(range(1, 101)))
            await told.clock.advance(9.5)
            assert told.fanout.lost_text is None
            await told.clock.advance(1.0)
            assert told.fanout.lost_text is not None


async def test_upstream_that_took_a_request_and_broke_off_is_not_given_up_at_once() -> None:
    async with scene(always(broken(), latency_s=30.0), window=4) as told:
        told.add(shard_of(range(1, 101)))
        await told.clock.advance(30.5)

        assert told.fanout.lost_text is None


async def test_outage_is_over_within_the_longest_probe_interval() -> None:
    run = shard_of(range(1, 101))
    async with scene(always(broken(AttemptError.NOT_CONNECTED), latency_s=0.0), window=4) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.add(run)
        await told.clock.advance(300.0)
        told.upstream.script = always(OK)
        took_s = await told.finish(run)

        assert took_s < 5.0 + 100 / 4 * 0.1 + 1.0


async def test_line_in_flight_at_three_deaths_goes_alone_after_the_others() -> None:
    """Line 1 kills the upstream, and takes with it whatever is in flight."""
    run = shard_of(range(1, 61))

    async with scene(always(OK, latency_s=0.1), window=4, settings=Settings(max_tries=2)) as told:
        told.add(run)
        while not run.is_finished:
            await told.clock.advance(0.05)
            if 1 in told.upstream.in_flight:
                told.upstream.die()

        own = [sent for sent in told.upstream.sent if sent.line == 1]
        alone = own[-2:]
        assert {sent.in_flight for sent in alone} == {1}
        assert max(sent.at_s for sent in told.upstream.sent if sent.line > 4) < alone[0].at_s
        assert len(own) <= DEATHS_ALONE + 2 + 1
    assert list(failures(run)) == [1]
    assert failures(run)[1]["error"]["code"] == "connection_error"
    assert Counter(succeeded(run)) == Counter(range(2, 61))


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("lines", [1, 2, 30])
async def test_line_that_always_resets_ends_whatever_else_there_is(window: int, lines: int) -> None:
    run = shard_of(range(1, lines + 1))
    async with scene(
        lambda line, _nth: (0.1, broken() if line == 1 else OK), window=window, settings=Settings(max_tries=3)
    ) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.add(run)
        await told.finish(run, within_s=120.0)

    assert failures(run)[1]["error"]["code"] == "connection_error"
    assert sorted(succeeded(run)) == list(range(2, lines + 1))


async def test_several_lines_that_always_reset_do_not_keep_the_others_from_being_sent() -> None:
    run = shard_of(range(1, 101))
    async with scene(
        lambda line, _nth: (0.1, broken() if line <= 10 else OK), window=4, settings=Settings(max_tries=3)
    ) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.add(run)
        await told.finish(run, within_s=300.0)

    assert sorted(failures(run)) == list(range(1, 11))
    assert sorted(succeeded(run)) == list(range(11, 101))


NOBODY = [pytest.param(broken(), id="reset"), pytest.param(answered(502, b"<html>"), id="bad gateway")]


@pytest.mark.parametrize("nobody", NOBODY)
@pytest.mark.parametrize("lines", [1, 2, 3, 30])
async def test_long_outage_behind_a_proxy_fails_no_line(nobody: Attempt, lines: int) -> None:
    """The proxy takes every connection and drops it, or answers for the server that it cannot reach."""
    run = shard_of(range(1, lines + 1))
    async with scene(always(nobody), window=4, settings=Settings(max_tries=2), uniform=0.5) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.upstream.knock_answer = nobody
        told.add(run)
        await told.clock.advance(900.0)

        assert records(run) == []
        assert told.fanout.outage_text is not None
        turns = sorted(told.upstream.knocks + [sent.at_s for sent in told.upstream.sent])
        assert len(turns) <= 900.0 / 5.0 + 20
        assert max(later - earlier for earlier, later in pairwise(turns)) <= 6.0
        told.upstream.script, told.upstream.knock_answer = always(OK), OK
        took_s = await told.finish(run)

        assert took_s < 10.0
        assert told.fanout.outage_text is None
    assert sorted(succeeded(run)) == list(range(1, lines + 1))


@pytest.mark.parametrize("nobody", NOBODY)
async def test_few_lines_that_fail_one_after_the_other_wait_for_the_upstream(nobody: Attempt) -> None:
    """Too slow after each other to be a death by numbers."""
    run = shard_of([1, 2, 3])
    async with scene(
        lambda line, _nth: (2.0 * line, nobody), window=3, settings=Settings(max_tries=3), uniform=0.5
    ) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.upstream.knock_answer = nobody
        told.add(run)
        await told.clock.advance(600.0)

        assert records(run) == []
        told.upstream.script, told.upstream.knock_answer = always(OK), OK
        await told.finish(run, within_s=20.0)
    assert sorted(succeeded(run)) == [1, 2, 3]


async def test_suspects_are_not_sent_in_vain_where_knocks_are_known_to_be_answered() -> None:
    run = shard_of([1, 2, 3])
    away = False
    async with scene(
        lambda line, _nth: (0.1, broken() if away or line == 1 else OK), window=1, settings=Settings(max_tries=9)
    ) as told:
        told.add(run)
        await told.clock.advance(15.0)
        assert told.upstream.knocks

        away, told.upstream.knock_answer = True, broken()
        await told.clock.advance(20.0)
        sent_count = told.upstream.count(1)
        await told.clock.advance(600.0)

        assert told.upstream.count(1) == sent_count
        assert records(run) != []
        assert failures(run) == {}


async def test_upstream_that_knows_no_knocks_is_found_again() -> None:
    run = shard_of([1, 2])
    async with scene(always(broken()), window=2, settings=Settings(max_tries=1)) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.upstream.knock_answer = broken()
        told.add(run)
        await told.clock.advance(600.0)

        told.upstream.script = always(OK)
        await told.finish(run, within_s=330.0)
    assert sorted(succeeded(run)) == [1, 2]


async def test_line_that_kills_the_upstream_each_time_ends_although_nobody_answers_for_a_while() -> None:
    """A server that dies of line 1 is away for 20 s; other lines, and then it alone, are waited for all the same."""
    run = shard_of(range(1, 31))
    back_at_s = 0.0

    def script(line: int, _nth: int) -> tuple[float, Attempt]:
        nonlocal back_at_s
        now_s = told.clock.now_s
        if now_s < back_at_s:
            return 0.0, broken()
        if line == 1:
            back_at_s = now_s + 20.0
            return 0.0, broken()
        return 0.1, OK

    async with scene(script, window=4, settings=Settings(max_tries=3)) as told:

        async def knock() -> Attempt:
            now_s = told.clock.now_s
            return replaced(OK if now_s >= back_at_s else broken(), started_at_s=now_s)

        told.upstream.knock = knock  # type: ignore[method-assign]
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.add(run)
        await told.finish(run, within_s=600.0)

    assert list(failures(run)) == [1]
    assert failures(run)[1]["error"]["code"] == "connection_error"
    assert sorted(succeeded(run)) == list(range(2, 31))


async def test_line_that_a_gateway_always_refuses_ends_with_its_answer() -> None:
    run = shard_of(range(1, 31))
    page = answered(502, b'{"page":1}')
    async with scene(
        lambda line, _nth: (0.1, page if line == 1 else OK), window=4, settings=Settings(max_tries=3)
    ) as told:
        told.add(run)
        await told.finish(run, within_s=120.0)

    assert failures(run)[1]["response"]["status_code"] == 502
    assert sorted(succeeded(run)) == list(range(2, 31))


async def test_upstream_that_was_never_there_is_lost_after_ten_seconds() -> None:
    run = shard_of(range(1, 10))
    async with scene(always(broken(AttemptError.NOT_CONNECTED), latency_s=0.0)) as told:
        told.add(run)
        await told.clock.advance(9.9)
        assert told.fanout.lost_text is None

        await told.clock.advance(0.5)
        assert told.fanout.lost_text == "as scripted"
    assert records(run) == []


# -- leaving ---------------------------------------------------------------------------------------------------------


async def test_stopped_shard_sends_nothing_more_and_forgets_its_waiting_lines() -> None:
    kept, left = shard_of(range(1, 40)), shard_of(range(101, 140), batch=batch_of("batch_2"))
    asks = answered(500, b"", retry_after_s=3.0)
    async with scene(lambda line, nth: (0.2, asks if line == 101 and nth == 1 else OK), window=4) as told:
        told.add(kept, left)
        await told.clock.advance(0.5)
        assert told.fanout.waiting_count == 1
        in_flight = [line for line in told.upstream.in_flight if line > 100]
        assert in_flight

        told.fanout.stop(left)
        sent_of_left = sum(line > 100 for line in told.upstream.lines())
        await told.finish(kept)

        assert sum(line > 100 for line in told.upstream.lines()) == sent_of_left
        assert left.in_flight_count == 0
        assert set(in_flight) <= set(succeeded(left))


async def test_abort_ends_what_is_under_way_without_a_record() -> None:
    run = shard_of(range(1, 10))
    async with scene(always(OK, latency_s=100.0), window=4) as told:
        told.add(run)
        await told.clock.advance(1.0)
        told.fanout.stop(run)
        told.fanout.abort(run)
        await settled()

        assert told.upstream.in_flight == []
        assert run.in_flight_count == 0
        assert told.changes
    assert records(run) == []


@pytest.mark.parametrize("is_left_for_good", [False, True])
async def test_abort_of_lines_that_may_be_sent_once_leaves_only_those_under_way_in_doubt(
    is_left_for_good: bool,
) -> None:
    run = shard_of(range(1, 10), batch=batch_of(on_unknown=OnUnknown.FAIL))
    run.intent_mark = 9
    async with scene(always(OK, latency_s=100.0), window=4) as told:
        told.add(run)
        await told.clock.advance(1.0)
        run.is_left_for_good = is_left_for_good
        under_way = list(told.upstream.in_flight)
        told.fanout.stop(run)
        told.fanout.abort(run)
        await settled()

        assert run.in_flight_count == 0
    unknown = [] if is_left_for_good else under_way
    assert sorted(failures(run)) == sorted(unknown)
    assert {each["error"]["code"] for each in failures(run).values()} == ({"outcome_unknown"} if unknown else set())


async def test_places_of_aborted_exchanges_serve_other_shards() -> None:
    stuck, next_one = shard_of(range(1, 10)), shard_of(range(101, 120), batch=batch_of("batch_2"))
    async with scene(lambda line, _nth: (1e6 if line < 100 else 0.1, OK), window=4) as told:
        told.add(stuck)
        await told.clock.advance(1.0)
        told.fanout.stop(stuck)
        told.fanout.abort(stuck)
        told.fanout.forget(stuck)
        told.add(next_one)
        await told.finish(next_one)

        assert told.upstream.in_flight_max == 4


async def test_stopped_shard_forgets_lines_that_were_to_go_alone() -> None:
    run, endless = shard_of([1]), shard_of(range(101, 200), batch=batch_of("batch_2"))
    async with scene(lambda line, _nth: (0.1, broken()) if line == 1 else (60.0, OK), window=1) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.add(run)
        await told.clock.advance(1.0)
        told.add(endless)
        await told.clock.advance(30.0)
        assert told.fanout.waiting_count == 1
        told.fanout.stop(run)

        assert told.fanout.waiting_count == 0
        assert run.in_flight_count == 0


async def test_answer_that_fails_after_its_shard_was_stopped_is_not_retried() -> None:
    run = shard_of([1])
    async with scene(always(answered(500), latency_s=1.0)) as told:
        told.add(run)
        await told.clock.advance(0.5)
        told.fanout.stop(run)
        await told.clock.advance(5.0)

        assert told.upstream.count(1) == 1
        assert run.in_flight_count == 0
    assert records(run) == []


async def test_close_waits_for_what_is_under_way() -> None:
    run = shard_of(range(1, 10))
    async with scene(always(OK, latency_s=3.0), window=2) as told:
        told.add(run)
        await told.clock.advance(1.0)
        told.fanout.close()
        await told.clock.advance(5.0)

    assert succeeded(run) == [1, 2]


# -- limits ----------------------------------------------------------------------------------------------------------


async def test_requests_a_minute_hold_for_every_minute_retries_included() -> None:
    run = shard_of(range(1, 1001))
    async with scene(
        lambda line, nth: (0.05, answered(500) if line % 3 == 0 and nth == 1 else OK), window=64, rpm=600.0
    ) as told:
        told.add(run)
        await told.clock.advance(130.0)

        times = [sent.at_s for sent in told.upstream.sent]
    busiest = max(sum(at_s <= each < at_s + 60.0 for each in times) for at_s in times[::10])
    assert busiest <= 600
    assert len(times) >= 0.95 * 130 * 10


async def test_probes_of_an_outage_take_tokens_too() -> None:
    run = shard_of(range(1, 100))
    async with scene(always(broken(AttemptError.NOT_CONNECTED), latency_s=0.0), window=4, rpm=6.0) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.add(run)
        await told.clock.advance(120.0)

        assert len(told.upstream.sent) <= 12


async def test_tokens_a_minute_count_what_an_answer_may_cost_until_its_usage_is_known() -> None:
    """Each line says that it may generate 1,000 tokens and generates 10."""
    numbers = range(1, 2001)
    buffer = b"".join(raw_line(number, {"max_tokens": 1000}) for number in numbers)
    run = shard_of(numbers, buffer=buffer)
    body = b'{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":10}}'
    async with scene(always(answered(200, body), latency_s=5.0), window=64, tpm=60_000.0) as told:
        told.add(run)
        await told.clock.advance(4.9)
        assert told.fanout.in_flight_count <= 8

        await told.clock.advance(115.0)
        spent = 20 * len(succeeded(run))
        assert spent <= 2 * 60_000


async def test_budget_of_memory_limits_the_window_once_answers_are_large() -> None:
    run = shard_of(range(1, 400))
    large = answered(200, b'{"choices":"%b"}' % (b"x" * 2_000_000))
    settings = Settings(memory_bytes_max=32 * 1024 * 1024)
    async with scene(always(large, latency_s=0.5), window=8, settings=settings) as told:
        told.add(run)
        await told.clock.advance(1.0)
        told.fanout.pools[0].window = 256
        await told.clock.advance(3.0)

        assert len(told.upstream.in_flight) <= 17
        assert told.fanout.effective_window <= 17


# -- what others learn -----------------------------------------------------------------------------------------------


async def test_tally_counts_attempts_retries_and_tokens() -> None:
    run = shard_of(range(1, 4))
    body = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}'
    async with scene(
        lambda line, nth: (0.1, answered(500) if line == 1 and nth == 1 else answered(400 if line == 2 else 200, body))
    ) as told:
        told.add(run)
        await told.finish(run)

        tally = told.fanout.tally
    assert (tally.attempts, tally.retries, tally.succeeded, tally.failed) == (4, 1, 2, 1)
    assert (tally.tokens_in, tally.tokens_out) == (6, 8)
    assert tally.failures == {"500": 1, "400": 1}
    assert run.retry_count == 1


async def test_sample_tells_the_window_what_happened_since_the_last() -> None:
    run = shard_of(range(1, 1000))
    first = {1: REFUSED, 2: broken()}
    async with scene(lambda line, nth: (0.5, first.get(line, OK) if nth == 1 else OK), window=4) as told:
        told.fanout.pools[0].take_sample()
        told.add(run)
        await told.clock.advance(1.0)
        sample = told.fanout.pools[0].take_sample()

        assert (sample.answered, sample.refused, sample.broken) == (2 + 3, 1, 1)
        assert sample.span_s == pytest.approx(1.0)
        assert sample.in_flight_mean == pytest.approx(4.0, rel=0.1)
        await told.clock.advance(1.0)
        assert told.fanout.pools[0].take_sample().refused == 0


async def test_sweep_of_deadlines_comes_twice_a_second() -> None:
    async with scene(always(OK)) as told:
        await told.clock.advance(10.0)

        assert told.upstream.sweeps == 20


async def test_random_faults_leave_every_line_with_one_record() -> None:
    """A storm of everything at once, seeded by line and try."""
    cut, page = broken(AttemptError.TRUNCATED), answered(200, b"no")
    faults = [OK, OK, REFUSED, answered(500), broken(), cut, page, answered(400)]
    runs = [shard_of(range(first, first + 50), batch=batch_of(f"batch_{first % 2}")) for first in range(1, 501, 50)]

    def script(line: int, nth: int) -> tuple[float, Attempt]:
        draw = (line * 7919 + nth * 104729) % 997
        return 0.01 + draw / 5000, faults[draw % len(faults)]

    async with scene(script, window=32, uniform=0.3) as told:
        told.add(*runs)
        await told.finish(*runs)

        assert told.upstream.in_flight_max <= 32
    for run in runs:
        assert Counter(number for number, *_ in records(run)) == Counter(
            range(run.shard.first_line, run.shard.first_line + 50)
        )
