"""Whole workers among many batches: who waits for whom, what a bad key stops, when an idle one asks for work."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchrunner.lifecycle import BatchEvent, BatchStatus
from batchrunner.models import AttemptError, BatchId, PauseReason
from tests.pipeline.crews import ANA, BEN, crew, good
from tests.unit.fanning import GOOD, answered, broken


async def test_small_batches_never_wait_for_a_huge_one_that_fills_the_window(tmp_path: Path) -> None:
    async with crew(tmp_path, good(1.0), shard_lines_max=500) as team:
        team.hire(window=16)
        team.submit("huge", 20_000)
        await team.until(lambda: len(team.upstream.asked) > 64)

        took_s = []
        for number in range(8):
            team.submit(f"small-{number}", 4)
            took_s.append(await team.until(lambda name=f"small-{number}": team.is_over(name)))  # type: ignore[misc]

        assert max(took_s) <= 2 * 1.5 + 2.0, took_s
        assert not team.is_over("huge")
        # The huge one keeps what the small ones leave.
        assert len(team.upstream.of("huge")) > 8 * sum(took_s)


async def test_small_batches_that_come_together_finish_in_turn_with_the_huge_one(tmp_path: Path) -> None:
    """The window cannot hold them all at once: alone, they would need as long."""
    async with crew(tmp_path, good(1.0), shard_lines_max=500) as team:
        for number in range(20):
            team.submit(f"small-{number}", 10)
        team.hire(window=16)
        alone_s = await team.until(lambda: all(team.is_over(f"small-{number}") for number in range(20)))
        team.submit("huge", 20_000)
        await team.until(lambda: len(team.upstream.of("huge")) > 64)
        for number in range(20):
            team.submit(f"again-{number}", 10)
        beside_s = await team.until(lambda: all(team.is_over(f"again-{number}") for number in range(20)))

        assert beside_s <= 2 * alone_s + 2.0


async def test_tenants_share_line_by_line_whatever_they_submitted(tmp_path: Path) -> None:
    async with crew(tmp_path, good(0.1), shard_lines_max=100) as team:
        for number in range(6):
            team.submit(f"ana-{number}", 3000)
        team.submit("ben", 3000, tenant=BEN)
        team.hire(window=10)
        await team.until(lambda: len(team.upstream.of("ben")) > 10)
        before = len(team.upstream.asked), len(team.upstream.of("ben"))
        await team.advance(10.0)

        asked, of_ben = len(team.upstream.asked) - before[0], len(team.upstream.of("ben")) - before[1]
        assert asked >= 900
        assert 0.45 <= of_ben / asked <= 0.55


async def test_a_bad_key_pauses_its_batch_and_no_other(tmp_path: Path) -> None:
    def script(request, _at_s):
        return 0.1, answered(401) if request["batch"] == "bad" else answered(200, GOOD)

    async with crew(tmp_path, script) as team:
        team.hire()
        team.submit("bad", 100)
        team.submit("well", 400)
        await team.until(lambda: team.is_over("well"))

        bad = team.batch("bad")
        assert (bad.status, bad.paused_reason) == (BatchStatus.IN_PROGRESS, PauseReason.AUTHENTICATION)
        assert bad.failed_count == 0
        assert len(team.upstream.of("bad")) <= 30


async def test_a_breakers_pause_probes_once_a_minute_and_ends_by_itself(tmp_path: Path) -> None:
    mended_at_s = 1000.0 + 150.0

    def script(_request, at_s):
        return 0.1, answered(401) if at_s < mended_at_s else answered(200, GOOD)

    async with crew(tmp_path, script) as team:
        team.hire()
        team.hire()
        team.submit("batch", 100)
        await team.until(lambda: team.batch("batch").paused_reason is not None)
        paused_at_s = team.clock.now_s
        await team.advance(2.0)
        sent_before = len(team.upstream.asked)
        await team.advance(138.0)

        probes = [asked.at_s - paused_at_s for asked in team.upstream.asked[sent_before:]]
        assert len(probes) == 2, probes
        assert 60.0 <= probes[0] <= 61.0
        assert 60.0 <= probes[1] - probes[0] <= 61.0

        await team.until(lambda: team.is_over("batch"), within_s=70.0)
        done = team.batch("batch")
        assert (done.succeeded_count, done.failed_count, done.paused_reason) == (100, 0, None)


async def test_an_operators_pause_is_not_probed(tmp_path: Path) -> None:
    async with crew(tmp_path, good(0.1)) as team:
        team.submit("batch", 10)
        team.store.scope(ANA).pause(BatchId("batch"), PauseReason.OPERATOR.value)
        team.hire()
        await team.advance(200.0)
        assert team.upstream.asked == []

        team.store.scope(ANA).resume(BatchId("batch"))
        await team.until(lambda: team.is_over("batch"))


async def test_a_pause_that_an_operator_makes_while_it_probes_stays(tmp_path: Path) -> None:
    def script(_request, at_s):
        return (0.1, answered(401)) if at_s < 1030.0 else (5.0, answered(200, GOOD))

    async with crew(tmp_path, script) as team:
        team.hire()
        team.submit("batch", 100)
        await team.until(lambda: team.batch("batch").paused_reason is not None)
        await team.advance(2.0)
        before = len(team.upstream.asked)
        await team.until(lambda: len(team.upstream.asked) > before, within_s=70.0)
        team.store.scope(ANA).pause(BatchId("batch"), PauseReason.OPERATOR.value)
        await team.advance(100.0)

        assert team.batch("batch").paused_reason == PauseReason.OPERATOR
        assert len(team.upstream.asked) == before + 1


async def test_a_run_is_paused_and_not_probed(tmp_path: Path) -> None:
    async with crew(tmp_path, lambda _request, _at_s: (0.1, answered(404)), is_server=False) as team:
        team.hire()
        team.submit("batch", 100)
        await team.until(lambda: team.batch("batch").paused_reason == PauseReason.MODEL_UNKNOWN)
        await team.advance(2.0)
        before = len(team.upstream.asked)
        await team.advance(200.0)

        assert len(team.upstream.asked) == before


@pytest.mark.parametrize("is_server", [True, False])
async def test_new_sends_stop_within_a_second_of_a_cancel(tmp_path: Path, *, is_server: bool) -> None:
    async with crew(tmp_path, good(0.2), is_server=is_server) as team:
        team.hire()
        team.submit("batch", 5000)
        await team.until(lambda: len(team.upstream.asked) > 50)

        team.store.scope(ANA).send(BatchId("batch"), BatchEvent.CANCEL_REQUESTED)
        at_s = team.clock.now_s
        await team.until(lambda: team.is_over("batch"))

        assert max(asked.at_s for asked in team.upstream.asked) <= at_s + 1.0
        ended = team.batch("batch")
        assert ended.status is BatchStatus.CANCELLED
        assert ended.succeeded_count + ended.cancelled_count == 5000


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_cancel_with_no_worker_alive_ends_when_one_comes(tmp_path: Path, *, has_begun: bool) -> None:
    async with crew(tmp_path, good(0.2)) as team:
        team.submit("batch", 100)
        if has_begun:
            worker = team.hire()
            await team.until(lambda: len(team.upstream.asked) > 20)
            worker.stop(grace_s=0.0)
            await team.advance(5.0)
        before = len(team.upstream.asked)
        team.store.scope(ANA).send(BatchId("batch"), BatchEvent.CANCEL_REQUESTED)

        team.hire()
        await team.until(lambda: team.is_over("batch"), within_s=5.0)

        assert len(team.upstream.asked) == before


async def test_an_idle_worker_only_reads_and_starts_a_new_batch_within_a_second(tmp_path: Path) -> None:
    async with crew(tmp_path, good(0.1)) as team:
        worker = team.hire()
        await team.advance(30.0)
        asked: list[str] = []
        for verb in ("claim", "has_work", "watch", "report_live", "set_hungry"):
            _count(worker, verb, asked)
        await team.advance(20.0)

        assert set(asked) == {"has_work"}
        # What anybody may run; and now and then what only an idle session may.
        assert len(asked) <= 1.25 * 20.0 / team.settings.poll_s + 2

        team.submit("batch", 1)
        assert await team.until(lambda: bool(team.upstream.asked)) <= 1.0


def _count(worker, verb: str, asked: list[str]) -> None:
    store = worker._store
    function = getattr(store, verb)

    def counted(*arguments, **named):
        asked.append(verb)
        return function(*arguments, **named)

    setattr(store, verb, counted)


async def test_a_worker_tells_once_a_second_what_it_does_and_nothing_while_it_is_idle(tmp_path: Path) -> None:
    async with crew(tmp_path, good(0.5)) as team:
        worker = team.hire(window=8)
        told: list[str] = []
        _count(worker, "report_live", told)
        team.submit("batch", 400)
        await team.until(lambda: len(team.upstream.asked) >= 160)

        (share,) = team.store.scope(ANA).live(BatchId("batch"))
        assert (share.in_flight, share.window) == (8, 8)
        assert share.done_per_s == pytest.approx(16.0, rel=0.15)
        assert share.waiting == 0

        began_s = team.clock.now_s
        await team.until(lambda: team.is_over("batch"))
        assert len(told) <= team.clock.now_s - began_s + 14
        await team.advance(2.0)
        before = len(told)
        await team.advance(20.0)
        assert len(told) == before
        assert team.store.scope(ANA).live(BatchId("batch")) == []


async def test_a_servers_worker_waits_for_an_upstream_that_was_never_there(tmp_path: Path) -> None:
    def script(_request, at_s):
        return 0.01, broken(AttemptError.NOT_CONNECTED) if at_s < 1120.0 else answered(200, GOOD)

    async with crew(tmp_path, script) as team:
        worker = team.hire()
        team.submit("batch", 20)
        await team.advance(100.0)
        assert worker.lost_text is None
        assert team.batch("batch").done_count == 0

        await team.until(lambda: team.is_over("batch"))
        assert team.batch("batch").succeeded_count == 20
