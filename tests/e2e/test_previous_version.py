"""What an older version began: its database is migrated, its journals are read, and the rest runs."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.e2e.harness import Bench, bench
from tests.e2e.served import Site, site

# Written by schema 0001: two of three shards of 20 lines are settled, and the worker was killed in the third.
WRITTEN = Path(__file__).parent / "written_by_0001"
# Written by a server of schema 0002: one batch is over; of another's 60 lines, in shards of 20, 28 are registered, and
# parent, API and worker were killed. What ends by time was put off to the year 2100.
SERVED = Path(__file__).parent / "written_by_0002"
ENDED = "batch_822ca50d34ccdd0e4633e6a1441796b2"
RUNNING = "batch_d6e8f98a966625f1253ed00caab962c5"
INPUT = "files/8ea996645c8e9e87bb4d9622dc4240f3"


def lay_out(run: Bench) -> None:
    """Put the old folder where a run of `run.input` looks for it."""
    shutil.copy(WRITTEN / "input.jsonl", run.input)
    (run.state / "sessions").mkdir(parents=True)
    shutil.copy(WRITTEN / "run.json", run.state)
    shutil.copytree(WRITTEN / "journal", run.state / "blobs" / "journal")
    (run.state / "blobs" / "input").symlink_to(run.input)
    restore(WRITTEN, run.state)


def restore(written: Path, folder: Path) -> None:
    """Make the database of a folder from what was written down of it."""
    connection = sqlite3.connect(folder / "state.db")
    connection.executescript((written / "state.sql").read_text())
    connection.close()


async def test_run_begun_by_the_first_schema_is_finished(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        lay_out(run)

        ended = await run.run()

        assert ended.code == 0, ended.stderr
        assert len(run.check(repeats_max=0).succeeded) == 60
        assert run.simulator.stats().total == 20


def lay_out_server(here: Site) -> None:
    """Put the old folder where a server looks for it."""
    shutil.copytree(SERVED / "blobs", here.data / "blobs")
    shutil.copy(SERVED / "blobs" / INPUT, here.input)
    restore(SERVED, here.data)


@pytest.mark.slow
async def test_server_killed_under_the_second_schema_goes_on(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        lay_out_server(here)

        server = await here.serve("--workers", "1")
        batch = await server.ended_batch(RUNNING)
        ended = await server.get(f"/batches/{ENDED}")
        output = await server.get(f"/files/{ended['output_file_id']}")

        assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 60)
        assert batch["progress"]["last_sequence"] == 60
        await here.check(server, batch)
        assert here.simulator.stats().total <= 60 - 28
        assert (ended["status"], ended["request_counts"]["completed"]) == ("completed", 1)
        assert hashlib.sha256(await server.content(output["id"])).hexdigest() == output["sha256"]
