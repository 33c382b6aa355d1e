"""A run that dies at a named point and is started again ends as if nothing had happened."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest

from batchrunner import crash
from tests.e2e.harness import Bench, bench

LINES = 300
WINDOW = 16
# What one death may cost at most: the requests in flight and one commit group.
REPEATS_MAX = WINDOW + 256

# These come only after another death, with a second worker, after a clean stop or damage: each has its own test.
ELSEWHERE = {"salvage.copied", "seal.salvage_copied", "seal.repaired", "split.committed", "give_back.committed"}
# What only a server does.
ELSEWHERE |= {"add.stored", "add.joined", "job.stored", "job.joined", "clear.journal_deleted", "clear.blobs_deleted"}
# What only a run with a receiver does.
ELSEWHERE |= {"webhook.claimed", "webhook.posted", "webhook.recorded"}
# Before the batch has lines nothing can have been sent; from the seal on nothing may be sent any more.
SENDS_NOTHING_TWICE = ("run_record.", "batch.", "validate.", "seal.", "export.")


async def die_at(run: Bench, point: str) -> None:
    """Have the run die at a point; that it ends otherwise would mean that the point is never reached."""
    ended = await run.run(BATCHRUNNER_CRASH_AT=point)

    assert ended.code == -signal.SIGKILL, ended.stderr


async def finish(run: Bench) -> int:
    """Run the same command again, to the end; gives the number of lines that counts as sent again."""
    ended = await run.run("--json")

    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("Traceback") == 0, ended.stderr
    re_executed = ended.summary["re_executed"]
    assert isinstance(re_executed, int)
    return re_executed


async def die_and_finish(folder: Path, point: str) -> None:
    async with bench(folder, latency="5ms") as run:
        run.environment["BATCHRUNNER_REGISTER_S"] = "50ms"
        run.write_input(LINES)

        await die_at(run, point)
        re_executed = await finish(run)

        is_free = point.startswith(SENDS_NOTHING_TWICE)
        run.check(repeats_max=0 if is_free else min(re_executed, REPEATS_MAX))


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in crash.POINTS if point not in ELSEWHERE])
async def test_run_dies_at_point_once_and_ends_whole(tmp_path: Path, point: str) -> None:
    await die_and_finish(tmp_path, point)


@pytest.mark.long
@pytest.mark.parametrize(
    ("point", "ordinal"),
    [
        *itertools.product(["claim.taken", "run_record.saved", "run_record.before_save"], [2, 3]),
        *itertools.product(["journal.synced"], [2, 3, 5]),
    ],
)
async def test_run_dies_at_point_later_and_ends_whole(tmp_path: Path, point: str, ordinal: int) -> None:
    await die_and_finish(tmp_path, f"{point}:{ordinal}")


@pytest.mark.slow
async def test_run_dies_between_sync_and_registering_and_again_in_salvage_and_ends_whole(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="5ms") as run:
        run.write_input(LINES)

        await die_at(run, "journal.synced:4")
        sent_before = run.simulator.stats().total
        await die_at(run, "salvage.copied")

        assert run.simulator.stats().total == sent_before
        await die_at(run, "salvage.copied")
        re_executed = await finish(run)

        run.check(repeats_max=min(re_executed, REPEATS_MAX))


@pytest.mark.slow
async def test_workers_that_die_whenever_they_start_end_the_run_and_lose_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="5ms") as run:
        run.write_input(LINES)

        ended = await run.run("--workers", "2", BATCHRUNNER_CRASH_AT="shard.loaded")
        sent = run.simulator.stats().total
        await finish(run)

        assert ended.code == 1, ended.stderr
        assert "Traceback" not in ended.stderr
        assert "died" in ended.stderr
        assert sent == 0
        run.check(repeats_max=0)
