"""Results and events of a batch, read while it runs and while the processes of its server are killed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e.following import Follower, Place, Reader
from tests.e2e.served import WAIT_S, site

LINES = 400
WINDOW = 16

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "victim", [pytest.param("worker", marks=pytest.mark.long), pytest.param("api", marks=pytest.mark.long), "all"]
)
async def test_no_line_is_torn_or_given_twice_over_a_kill(tmp_path: Path, victim: str) -> None:
    async with site(tmp_path, latency="100ms") as here:
        server = await here.serve("--workers", "1", "--concurrency", str(WINDOW))
        batch_id = await server.submit(here.write_input(LINES))
        place, reader, follower = Place(server), Reader(batch_id), Follower(batch_id)
        following = asyncio.create_task(follower.follow(place, within_s=WAIT_S))
        await reader.read_until(place, LINES // 10, within_s=WAIT_S)

        if victim == "all":
            port = server.base_url.rpartition(":")[2].removesuffix("/v1")
            await server.kill_all()
            server = await here.serve("--workers", "1", "--concurrency", str(WINDOW), "--port", port)
            await place.move(server)
        else:
            (server.worker() if victim == "worker" else server.api()).kill()
        await reader.read_until(place, LINES + 1, within_s=WAIT_S)
        batch = await server.ended_batch(batch_id)
        await following

        await here.check(server, batch)
        assert len(reader.custom_ids) == len(set(reader.custom_ids)) == LINES
        assert reader.after == str(LINES) == str(batch["progress"]["last_sequence"])
        assert sorted(reader.lines) == sorted((await server.content(batch["output_file_id"])).splitlines())
        follower.check()
        assert follower.seen[-1][1]["status"] == "completed"


async def test_progress_tells_what_the_workers_do(tmp_path: Path) -> None:
    # Six seconds: workers report once a second, and a guess needs more than one report.
    async with site(tmp_path, latency="250ms") as here:
        server = await here.serve("--workers", "1", "--concurrency", str(WINDOW))
        batch_id = await server.submit(here.write_input(LINES))

        batch = await server.batch_when(batch_id, lambda each: each["progress"]["eta_at"] is not None)
        progress = batch["progress"]
        ended = await server.ended_batch(batch_id)

        assert 0 < progress["in_flight"] <= WINDOW
        assert progress["window"] == WINDOW
        assert 10 < progress["rate"] < 400
        assert progress["eta_earliest_at"] <= progress["eta_at"] <= progress["eta_latest_at"]
        assert progress["deadline_risk"] == "low"
        assert progress["bound_by"]
        assert progress["succeeded"] + progress["remaining"] == LINES
        # The guess was of whole seconds, and the seal comes on top.
        assert progress["eta_earliest_at"] - 2 <= ended["completed_at"] <= progress["eta_latest_at"] + 10
        await here.check(server, ended)
