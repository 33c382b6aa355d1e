"""A server whose disk is full: it answers, refuses what needs space, and goes on by itself when there is some."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import freeze
from tests.e2e.served import TERMINAL, Server, Site, site
from tests.e2e.small_disk import fill_up, needs_root, small_disk
from tests.hostile.peer import until

LINES = 2_000
WINDOW = 16
# One commit group and what was in flight, for each kill.
REPEATS_PER_KILL = WINDOW + 256
RESERVE_BYTES = 4 << 20
FLAGS = ("--workers", "1", "--concurrency", str(WINDOW))

pytestmark = [pytest.mark.slow, needs_root]


@contextlib.asynccontextmanager
async def site_on_a_small_disk(folder: Path) -> AsyncIterator[Site]:
    with small_disk(folder / "disk", "32m") as disk:
        async with site(disk, latency="20ms") as here:
            yield here


def ballast_of(here: Site) -> Path:
    return here.folder / "ballast"


async def stand_still(here: Site, server: Server) -> None:
    """Fill the disk, the server's own reserve too, while the worker sleeps, until that says that nothing goes on."""
    await server.when(server.ready, lambda _: reserve_of(here).exists())
    worker = server.worker()
    freeze(here.data / "state.db", worker)
    fill_up(ballast_of(here))
    await server.when(server.ready, lambda _: not reserve_of(here).exists())
    worker.resume()

    async def ready_while_full() -> tuple[int, dict[str, Any]]:
        # The name of the reserve goes before its space does.
        fill_up(ballast_of(here))
        return await server.ready()

    await server.when(ready_while_full, lambda found: "disk_full" in found[1]["checks"]["workers"].get("detail", ""))


def free_bytes(here: Site) -> int:
    space = os.statvfs(here.folder)
    return space.f_bavail * space.f_frsize


def reserve_of(here: Site) -> Path:
    return here.data / "blobs" / "reserve~"


async def test_full_disk_refuses_uploads_answers_status_and_the_batch_goes_on_when_space_returns(
    tmp_path: Path,
) -> None:
    async with site_on_a_small_disk(tmp_path) as here:
        server = await here.serve(*FLAGS)
        batch_id = await server.submit(here.write_input(LINES))
        await here.simulator.wait_until(lambda stats: stats.ok >= LINES // 10)
        await stand_still(here, server)
        before = set(here.data.rglob("*"))

        sent = here.simulator.stats().total
        batch = await server.get(f"/batches/{batch_id}")
        status, refused = await server.try_upload(here.input)
        ready = await server.ready()
        after = set(here.data.rglob("*"))
        still_sent = here.simulator.stats().total
        ballast_of(here).unlink()
        ended = await server.ended_batch(batch_id)

        assert batch["status"] == "in_progress"
        assert (status, refused["error"]["code"], refused["error"]["type"]) == (503, "disk_full", "server_error")
        assert ready[0] == 503
        assert "blobs" in ready[1]["failed"]
        # What the refused upload began is gone.
        assert after <= before
        assert still_sent == sent < LINES
        assert ended["status"] == "completed"
        await here.check(server, ended, repeats_max=0)
        assert (await server.try_upload(here.input))[0] == 200
        assert (await server.stop()).code == 0


async def test_batch_is_cancelled_out_of_the_reserve_of_a_full_disk(tmp_path: Path) -> None:
    async with site_on_a_small_disk(tmp_path) as here:
        server = await here.serve(*FLAGS)
        batch_id = await server.submit(here.write_input(LINES), metadata={"why": "full"})
        await here.simulator.wait_until(lambda stats: stats.ok >= LINES // 10)

        await server.when(server.ready, lambda _: reserve_of(here).exists())
        fill_up(ballast_of(here))
        await server.when(server.ready, lambda _: not reserve_of(here).exists())
        cancelled = await server.post(f"/batches/{batch_id}/cancel")
        batch = await server.ended_batch(batch_id)

        assert cancelled["status"] == "cancelling"
        assert batch["status"] == "cancelled"
        await here.check(server, batch, repeats_max=0)
        assert (await server.stop()).code == 0


async def test_seal_keeps_its_claim_and_waits_for_room(tmp_path: Path) -> None:
    async with site_on_a_small_disk(tmp_path) as here:
        server = await here.serve(*FLAGS)
        await server.when(server.ready, lambda _: reserve_of(here).exists())
        batch_id = await server.submit(here.write_input(LINES))
        await here.simulator.wait_until(lambda stats: stats.ok >= LINES // 2)
        worker = server.worker()
        freeze(here.data / "state.db", worker)
        fill_up(ballast_of(here))
        # The server gives its reserve up, whose name goes before its space does.
        await until(lambda: free_bytes(here) > RESERVE_BYTES // 2)
        journal = sum(path.stat().st_size for path in (here.data / "blobs" / "journal").rglob("*.seg"))
        results = journal * LINES // here.simulator.stats().ok
        # Room for the lines to come and what the database says of them, but not for all results once more.
        room = results - journal + results * 6 // 10
        with ballast_of(here).open("ab") as ballast:
            ballast.write(bytes(free_bytes(here) - room))
        worker.resume()

        blocked = await server.batch_when(batch_id, lambda batch: "blocked_by" in batch and batch["blocked_by"])
        await server.when(server.ready, lambda found: "sealing needs" in found[1]["checks"]["workers"]["detail"])
        ballast_of(here).unlink()
        ended = await server.batch_when(batch_id, lambda batch: batch["status"] in TERMINAL)

        assert blocked["blocked_by"] == "disk_full"
        assert blocked["status"] == "finalizing"
        assert ended["status"] == "completed"
        assert server.worker() == worker
        await here.check(server, ended, repeats_max=0)
        stopped = await server.stop()
        assert stopped.code == 0
        assert "seal failed" not in stopped.stderr


async def test_server_killed_on_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Started while there is still no space it says so and ends; once there is some it goes on."""
    async with site_on_a_small_disk(tmp_path) as here:
        server = await here.serve(*FLAGS)
        batch_id = await server.submit(here.write_input(LINES))
        await here.simulator.wait_until(lambda stats: stats.ok >= LINES // 10)
        await stand_still(here, server)
        await server.kill_all()

        fill_up(ballast_of(here))
        refused = await (await here.launch(*FLAGS)).ended()
        ballast_of(here).unlink()
        again = await here.serve(*FLAGS)
        batch = await again.ended_batch(batch_id)

        assert refused.code == 1
        assert "disk is full" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert batch["status"] == "completed"
        await here.check(again, batch, repeats_max=REPEATS_PER_KILL)
        assert (await again.stop()).code == 0
