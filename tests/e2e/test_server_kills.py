"""Servers that are killed as a whole, again and again, in mid batch: every line ends once, and little is sent twice."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.following import Follower, Place, Reader, Watcher
from tests.e2e.served import Server, Site, site

WINDOW = 32
# What was in flight, and one commit group of the worker.
REPEATS_PER_KILL = WINDOW + 256
# A busy machine takes its time to start a process; `bench.server` measures how long.
RECOVERY_S = 30.0
FLAGS = ("--workers", "1", "--concurrency", str(WINDOW))

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the batch is, how often its server is killed, and how long the whole may take."""

    lines: int
    kills: int
    latency: str
    within_s: float


QUICK = Scale(lines=2_000, kills=3, latency="50ms", within_s=90.0)
FULL = Scale(lines=50_000, kills=20, latency="20ms", within_s=900.0)


async def requests(here: Site, count: int, *, since: int | None = None) -> None:
    """Wait until so many requests have come since a total, by default from now on."""
    target = (here.simulator.stats().total if since is None else since) + count
    await here.simulator.wait_until(lambda stats: stats.total >= target)


async def kill_again_and_again(here: Site, place: Place, scale: Scale, rng: random.Random) -> Server:
    """Kill parent, API and workers at one instant, at random moments, and start a new server each time."""
    port = place.server.base_url.rpartition(":")[2].removesuffix("/v1")
    gap_max = 3 * scale.lines // (2 * (scale.kills + 1))
    for _ in range(scale.kills):
        await requests(here, rng.randint(1, gap_max))
        before = here.simulator.stats().repeats
        await place.server.kill_all()
        # What a dead worker had sent arrives before the new one is up; it is counted against this kill.
        sent = here.simulator.stats().total
        await place.move(await here.serve(*FLAGS, "--port", port))
        async with asyncio.timeout(RECOVERY_S):
            await requests(here, 1, since=sent)
        assert here.simulator.stats().repeats - before <= REPEATS_PER_KILL
    return place.server


async def kill_server_in_mid_batch(folder: Path, scale: Scale, *, seed: int) -> None:
    async with site(folder, latency=scale.latency, faults="1%", seed=seed) as here:
        server = await here.serve(*FLAGS)
        batch_id = await server.submit(here.write_input(scale.lines))
        place, watcher = Place(server), Watcher()
        reader, follower = Reader(batch_id, page_lines=1000), Follower(batch_id)
        async with asyncio.timeout(scale.within_s), asyncio.TaskGroup() as group:
            watching = group.create_task(watcher.watch(place))
            group.create_task(follower.follow(place, within_s=scale.within_s))
            group.create_task(reader.read_until(place, scale.lines + 1, within_s=scale.within_s))
            server = await kill_again_and_again(here, place, scale, random.Random(seed))
            batch = await server.ended_batch(batch_id, within_s=scale.within_s)
            watching.cancel()

        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": scale.lines, "completed": scale.lines, "failed": 0}
        await here.check(server, batch, repeats_max=REPEATS_PER_KILL * scale.kills)
        assert here.simulator.stats().repeats <= batch["progress"]["re_executed"]
        assert len(reader.lines) == len(set(reader.custom_ids)) == scale.lines
        follower.check()
        watcher.check()
        assert (await server.stop()).code == 0


async def test_server_killed_three_times_in_mid_batch_ends_it_whole(tmp_path: Path) -> None:
    await kill_server_in_mid_batch(tmp_path, QUICK, seed=21)


@pytest.mark.long
async def test_server_killed_twenty_times_in_mid_batch_ends_fifty_thousand_lines_each_once(tmp_path: Path) -> None:
    await kill_server_in_mid_batch(tmp_path, FULL, seed=22)
