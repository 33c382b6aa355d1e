"""What a batch in trouble, a paused one, a limit or a second worker means for all the others."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from batchrunner.models import BatchId, PauseReason
from tests.pipeline.crews import ANA, BEN, Crew, crew, good
from tests.unit.fanning import GOOD, answered

_ALONE_S = 1.5


async def _took_s(team: Crew, name: str, lines: int = 4) -> float:
    """Submit a batch and give how long it takes."""
    team.submit(name, lines)
    return await team.until(lambda: team.is_over(name))


@pytest.mark.parametrize(("status", "latency_s"), [(429, 0.5), (503, 0.1), (500, 0.5), (408, 0.2)])
async def test_a_batch_that_is_refused_line_by_line_keeps_nobody_waiting(
    tmp_path: Path, status: int, latency_s: float
) -> None:
    """Its retries are due all the time, and those that wait are more than the window: both are its own affair."""

    def script(request, _at_s):
        is_huge = request["batch"] == "huge"
        return (latency_s, answered(status)) if is_huge else (1.0, answered(200, GOOD))

    async with crew(tmp_path, script, shard_lines_max=500) as team:
        team.hire(window=16)
        team.submit("huge", 5000)
        await team.advance(30.0)

        took_s = [await _took_s(team, f"small-{number}") for number in range(4)]

        assert max(took_s) <= 2 * _ALONE_S + 2.0, took_s
        # Nor is it forgotten itself.
        asked = len(team.upstream.of("huge"))
        await team.advance(20.0)
        assert len(team.upstream.of("huge")) > asked


async def test_retries_count_as_the_share_of_their_batch(tmp_path: Path) -> None:
    def script(request, at_s):
        is_shaky = request["batch"] == "shaky" and (request["n"] + int(at_s)) % 2
        return 0.5, answered(500) if is_shaky else answered(200, GOOD)

    async with crew(tmp_path, script, shard_lines_max=500, max_tries=50) as team:
        team.submit("shaky", 3000)
        team.submit("well", 3000)
        team.hire(window=16)
        await team.advance(5.0)
        before = len(team.upstream.of("shaky")), len(team.upstream.of("well"))
        await team.advance(30.0)

        shaky, well = len(team.upstream.of("shaky")) - before[0], len(team.upstream.of("well")) - before[1]
        assert shaky + well >= 0.9 * 30.0 * 32
        assert 0.45 <= well / (shaky + well) <= 0.55


@pytest.mark.parametrize("reason", [PauseReason.OPERATOR, PauseReason.AUTHENTICATION])
async def test_a_paused_batch_holds_no_place_in_the_window(tmp_path: Path, reason: PauseReason) -> None:
    def script(request, _at_s):
        is_locked_out = reason is PauseReason.AUTHENTICATION and request["batch"] == "paused"
        return 1.0, answered(401) if is_locked_out else answered(200, GOOD)

    async with crew(tmp_path, script, shard_lines_max=500) as team:
        worker = team.hire(window=16)
        team.submit("paused", 5000)
        team.submit("well", 5000)
        await team.advance(1.0)
        assert worker.fanout.in_flight_by_batch()[0][BatchId("paused")] > 0
        if reason is PauseReason.OPERATOR:
            team.store.scope(ANA).pause(BatchId("paused"), reason.value)
        await team.until(lambda: team.batch("paused").paused_reason is not None)
        await team.advance(3.0)

        assert worker.fanout.in_flight_by_batch() == [{BatchId("well"): 16}]
        asked = len(team.upstream.of("paused"))
        await team.advance(20.0)
        assert worker.fanout.in_flight_by_batch() == [{BatchId("well"): 16}]
        assert len(team.upstream.of("paused")) == asked


async def test_two_workers_keep_small_batches_within_their_bound(tmp_path: Path) -> None:
    async with crew(tmp_path, good(1.0), shard_lines_max=500) as team:
        for _ in range(2):
            team.hire(window=8)
        team.submit("huge", 20_000)
        await team.until(lambda: len(team.upstream.asked) > 64)

        took_s = [await _took_s(team, f"small-{number}") for number in range(6)]

        assert max(took_s) <= 2 * _ALONE_S + 2.0, took_s


async def test_small_batches_that_come_at_once_are_done_one_after_the_other(tmp_path: Path) -> None:
    """Turn by turn all of them would end at the end of the last."""
    async with crew(tmp_path, good(1.0), shard_lines_max=500) as team:
        team.hire(window=16)
        team.submit("huge", 20_000)
        await team.until(lambda: len(team.upstream.asked) > 64)
        names = [f"small-{number}" for number in range(12)]
        for name in names:
            team.submit(name, 16)
        began_s = team.clock.now_s
        ended_s: dict[str, float] = {}
        while len(ended_s) < len(names):
            await team.advance(0.2)
            for name in names:
                if name not in ended_s and team.is_over(name):
                    ended_s[name] = team.clock.now_s - began_s

        # Three of four places are theirs: 12 lines a second.
        each_s = sorted(ended_s.values())
        assert all(took_s <= 16 * (number + 1) / 12 + 3.0 for number, took_s in enumerate(each_s)), each_s
        assert len([asked for asked in team.upstream.of("huge") if asked.at_s > began_s]) >= 0.2 * 16 * each_s[-1]


async def test_among_small_batches_the_earliest_deadline_is_first(tmp_path: Path) -> None:
    async with crew(tmp_path, good(1.0)) as team:
        team.hire(window=4)
        team.submit("huge", 2000)
        await team.until(lambda: len(team.upstream.asked) > 16)
        deadlines = {"late": 24, "later": 25, "soon": 1}
        for name, hours in deadlines.items():
            team.submit(name, 4, deadline_at=team.clock.now() + timedelta(hours=hours))
        order: list[str] = []
        while len(order) < 3:
            await team.advance(0.1)
            order += [name for name in deadlines if name not in order and team.is_over(name)]

        assert order == ["soon", "late", "later"]


async def test_a_small_batch_of_low_priority_gets_no_head_start(tmp_path: Path) -> None:
    async with crew(tmp_path, good(1.0), shard_lines_max=500) as team:
        team.hire(window=9)
        team.submit("vip", 5000, priority=3)
        await team.until(lambda: len(team.upstream.asked) > 36)
        team.submit("low", 500)
        await team.until(lambda: bool(team.upstream.of("low")))
        before = len(team.upstream.of("vip")), len(team.upstream.of("low"))
        await team.advance(20.0)

        vip, low = len(team.upstream.of("vip")) - before[0], len(team.upstream.of("low")) - before[1]
        # Eight to one by rights; a head start would make it one to three.
        assert vip / low >= 5.0


async def test_a_tenants_many_newcomers_leave_another_tenant_its_half(tmp_path: Path) -> None:
    async with crew(tmp_path, good(0.5), shard_lines_max=500) as team:
        team.hire(window=16)
        team.submit("ben", 5000, tenant=BEN)
        await team.until(lambda: len(team.upstream.asked) > 64)
        for number in range(30):
            team.submit(f"ana-{number}", 16)
        await team.until(lambda: len(team.upstream.asked) > len(team.upstream.of("ben")))
        began_s, before = team.clock.now_s, len(team.upstream.of("ben"))
        await team.until(lambda: all(team.is_over(f"ana-{number}") for number in range(30)))

        of_ben = len(team.upstream.of("ben")) - before
        assert of_ben >= 0.45 * 32 * (team.clock.now_s - began_s)


@pytest.mark.parametrize("limits", [{"rpm": 600.0, "tpm": None}, {"rpm": None, "tpm": 12_000.0}])
async def test_under_a_rate_limit_small_batches_come_first_and_the_huge_one_goes_on(
    tmp_path: Path, limits: dict[str, float | None]
) -> None:
    """Some ten lines a second, by either limit: a line is counted as about twenty tokens."""
    async with crew(tmp_path, good(0.5), shard_lines_max=500) as team:
        worker = team.hire(window=64)
        worker.fanout.pools[0].gate.set_rates(team.clock.monotonic_s(), rpm=limits["rpm"], tpm=limits["tpm"])
        team.submit("huge", 5000)
        await team.until(lambda: len(team.upstream.asked) > 50)

        began_s, before = team.clock.now_s, len(team.upstream.asked)
        took_s = [await _took_s(team, f"small-{number}", 10) for number in range(4)]

        rate = (len(team.upstream.asked) - before) / (team.clock.now_s - began_s)
        huge_count = len([asked for asked in team.upstream.of("huge") if asked.at_s > began_s])
        assert max(took_s) <= 2 * (10 / rate + 1.0) + 2.0, (took_s, rate)
        assert huge_count >= 10
