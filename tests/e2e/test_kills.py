"""Runs that are killed at random moments, as a whole or worker by worker, lose nothing and repeat little."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from batchrunner.simulate import SimulatorStats
from tests.e2e.harness import Bench, Command, Ended, bench

WINDOW = 16
COMMIT_GROUP = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the run is, how often it is killed, and how long the rest after the last kill may take."""

    lines: int
    kills: int
    latency: str
    rest_s: float


QUICK = Scale(lines=1_500, kills=3, latency="50ms", rest_s=60.0)
# Undisturbed it takes a little over three minutes.
FULL = Scale(lines=10_000, kills=50, latency="300ms", rest_s=400.0)


class Killer:
    """Draws the moments of a run's deaths, as numbers of requests from one start to the next death."""

    def __init__(self, run: Bench, scale: Scale, *, seed: int, lost_per_kill: int = 0) -> None:
        self._run = run
        self._rng = random.Random(seed)
        # On average the last kill comes after three quarters of the lines, so that it does not come too late.
        self._gap_max = 3 * (scale.lines - scale.kills * lost_per_kill) // (2 * (scale.kills + 1))
        self._repeats = 0

    async def wait(self, command: Command) -> None:
        """Wait for the next moment."""
        target = self._run.simulator.stats().total + self._rng.randint(1, self._gap_max)

        def is_reached(stats: SimulatorStats) -> bool:
            return stats.total >= target

        await self._run.reach(is_reached, command)

    def choose(self, count: int) -> int:
        """Choose one of the workers."""
        return self._rng.randrange(count)

    def check_repeats(self, *, per_kill_max: int) -> None:
        """Hold the needless sends since the last call against what one death may cost."""
        repeats = self._run.simulator.stats().repeats
        since = repeats - self._repeats
        self._repeats = repeats

        assert since <= per_kill_max, f"{since} needless sends after one kill"


async def kill_all(
    run: Bench, scale: Scale, flags: list[str], *, workers: int, seed: int, lost_per_kill: int = 0
) -> Ended:
    """Kill the whole process group again and again; gives the end of the last, undisturbed command."""
    killer = Killer(run, scale, seed=seed, lost_per_kill=lost_per_kill)
    for _ in range(scale.kills):
        command = await run.start(*flags)
        await killer.wait(command)
        killer.check_repeats(per_kill_max=WINDOW + COMMIT_GROUP * workers)
        command.kill_group()
        ended = await command.ended()
        assert ended.code == -signal.SIGKILL, ended.stderr
    ended = await (await run.start(*flags, "--json")).ended(within_s=scale.rest_s)
    killer.check_repeats(per_kill_max=WINDOW + COMMIT_GROUP * workers)
    return ended


async def kill_whole_run(folder: Path, scale: Scale, *, workers: int, seed: int) -> None:
    async with bench(folder, latency=scale.latency, faults="2%", seed=seed) as run:
        run.write_input(scale.lines)

        ended = await kill_all(run, scale, ["--workers", str(workers)], workers=workers, seed=seed)

        assert ended.code == 0, ended.stderr
        run.check(repeats_max=ended.summary["re_executed"])


async def kill_single_workers(folder: Path, scale: Scale, *, seed: int) -> None:
    async with bench(folder, latency=scale.latency, faults="2%", seed=seed) as run:
        run.write_input(scale.lines)
        killer = Killer(run, scale, seed=seed)

        command = await run.start("--workers", "2", "--json")
        for _ in range(scale.kills):
            await killer.wait(command)
            killer.check_repeats(per_kill_max=WINDOW + COMMIT_GROUP)
            workers = command.workers()
            workers[killer.choose(len(workers))].kill()
        ended = await command.ended(within_s=scale.rest_s)

        assert ended.code == 0, ended.stderr
        killer.check_repeats(per_kill_max=WINDOW + COMMIT_GROUP)
        assert ended.stderr.count("starting it again") == scale.kills
        run.check(repeats_max=ended.summary["re_executed"])


async def kill_run_that_sends_once(folder: Path, scale: Scale, *, workers: int, seed: int) -> None:
    """Faults that leave the outcome open would end lines as unknown too, so only those that do not are drawn."""
    async with bench(folder, latency=scale.latency, faults="429:0.02", seed=seed) as run:
        run.write_input(scale.lines)
        flags = ["--workers", str(workers), "--on-unknown", "fail"]

        # Each death ends some lines that were never sent, so there are fewer requests to wait for.
        ended = await kill_all(run, scale, flags, workers=workers, seed=seed, lost_per_kill=4 * WINDOW)

        assert ended.code == 3, ended.stderr
        checked = run.check(repeats_max=0)
        assert set(checked.codes) == {"outcome_unknown"}
        # In doubt are the lines in flight, those whose intent was registered ahead, and answers that were not durable.
        assert checked.codes["outcome_unknown"] <= scale.kills * (2 * WINDOW + COMMIT_GROUP) * workers


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
async def test_run_killed_as_a_whole_three_times_ends_whole(tmp_path: Path, workers: int) -> None:
    await kill_whole_run(tmp_path, QUICK, workers=workers, seed=workers)


@pytest.mark.slow
async def test_run_whose_workers_are_killed_one_by_one_goes_on_and_ends_whole(tmp_path: Path) -> None:
    await kill_single_workers(tmp_path, QUICK, seed=3)


@pytest.mark.slow
async def test_run_with_lines_sent_at_most_once_is_killed_and_repeats_nothing(tmp_path: Path) -> None:
    await kill_run_that_sends_once(tmp_path, QUICK, workers=1, seed=4)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
async def test_run_killed_as_a_whole_fifty_times_ends_whole(tmp_path: Path, workers: int) -> None:
    await kill_whole_run(tmp_path, FULL, workers=workers, seed=10 + workers)


@pytest.mark.long
async def test_run_whose_workers_are_killed_fifty_times_goes_on_and_ends_whole(tmp_path: Path) -> None:
    await kill_single_workers(tmp_path, FULL, seed=13)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
async def test_run_with_lines_sent_at_most_once_is_killed_fifty_times_and_repeats_nothing(
    tmp_path: Path, workers: int
) -> None:
    await kill_run_that_sends_once(tmp_path, FULL, workers=workers, seed=14 + workers)
