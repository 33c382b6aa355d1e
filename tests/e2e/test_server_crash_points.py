"""A server that dies at each durable step, and in each status, ends every batch whole when it is started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchrunner import crash
from tests.e2e.served import Server, Site, site

LINES = 300
WINDOW = 16
REPEATS_PER_KILL = WINDOW + 256
# What a server does not come to in an undisturbed batch.
ELSEWHERE = (
    "run_record.",
    "batch.created",
    "add.",
    "job.",
    "export.",
    "salvage.",
    "seal.salvage",
    "seal.repaired",
    "split.",
    "give_",
    "webhook.",
)
SWEEP = ("clear.journal_deleted", "clear.blobs_deleted")
POINTS = [point for point in crash.POINTS if not point.startswith(ELSEWHERE) and point not in SWEEP]
# One of each step in every run of the tests, the rest in the long lane.
QUICK = {"validate.accepted", "register.committed", "seal.files_committed"}
FLAGS = ("--workers", "1", "--concurrency", str(WINDOW))

pytestmark = pytest.mark.slow


async def end_and_check(here: Site, batch_id: str, *, deaths: int) -> None:
    again = await here.serve(*FLAGS)
    batch = await again.ended_batch(batch_id)

    assert batch["status"] == "completed", batch
    await here.check(again, batch, repeats_max=REPEATS_PER_KILL * deaths)
    assert (await again.stop()).code == 0


@pytest.mark.parametrize(
    "point", [pytest.param(each, marks=() if each in QUICK else pytest.mark.long) for each in POINTS]
)
async def test_worker_dies_at_point_and_then_all_and_the_batch_completes(tmp_path: Path, point: str) -> None:
    async with site(tmp_path, latency="20ms") as here:
        path = here.write_input(LINES)
        armed = await here.serve(*FLAGS, BATCHRUNNER_CRASH_AT=point, BATCHRUNNER_REGISTER_S="50ms")
        batch_id = await armed.submit(path)

        await armed.said("worker 0 ended with code -9")
        # The next one may die there as well before all are killed.
        await armed.kill_all()
        deaths = sum("ended with code -9" in line for line in armed.talk.lines) + 1

        await end_and_check(here, batch_id, deaths=deaths)


async def cancelled(server: Server, batch_id: str) -> None:
    await server.batch_when(batch_id, lambda batch: batch["request_counts"]["completed"] > 0)
    assert (await server.post(f"/batches/{batch_id}/cancel"))["status"] == "cancelling"


async def test_server_killed_while_cancelling_ends_the_batch_cancelled(tmp_path: Path) -> None:
    async with site(tmp_path, latency="100ms") as here:
        server = await here.serve(*FLAGS, BATCHRUNNER_REGISTER_S="50ms")
        batch_id = await server.submit(here.write_input(10 * LINES))
        await cancelled(server, batch_id)
        await server.kill_all()
        sent = here.simulator.stats().total

        again = await here.serve(*FLAGS)
        batch = await again.ended_batch(batch_id)

        assert batch["status"] == "cancelled"
        assert here.simulator.stats().total == sent
        checked = await here.check(again, batch)
        assert set(checked.codes) == {"batch_cancelled"}
        assert (await again.stop()).code == 0


async def test_api_that_dies_in_its_sweep_leaves_nothing_behind(tmp_path: Path) -> None:
    """The bytes are gone and the row still says that they are to go: the next sweep finds nothing and says so."""
    async with site(tmp_path) as here:
        armed = await here.serve(
            "--workers", "0", BATCHRUNNER_CRASH_AT="clear.blobs_deleted", BATCHRUNNER_SWEEP_S="100ms"
        )
        batch_id = await armed.submit(here.write_input(LINES))
        kept = set((here.data / "blobs" / "files").rglob("*"))
        file_id = await armed.upload(here.input)
        async with armed.session.delete(f"{armed.base_url}/files/{file_id}") as answer:
            assert (await answer.json())["deleted"] is True
        await armed.said("the API process ended with code -9")
        await armed.kill_all()

        again = await here.serve("--workers", "1", BATCHRUNNER_SWEEP_S="100ms")
        await again.said("blobs deleted")
        batch = await again.ended_batch(batch_id)
        await here.check(again, batch)
        assert kept <= set((here.data / "blobs" / "files").rglob("*"))
        assert (await again.stop()).code == 0
