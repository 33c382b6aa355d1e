"""A run that an older version began: its database is migrated, its journals are read, and the rest runs."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

from tests.e2e.harness import Bench, bench

# Written by schema 0001: two of three shards of 20 lines are settled, and the worker was killed in the third.
WRITTEN = Path(__file__).parent / "written_by_0001"


def lay_out(run: Bench) -> None:
    """Put the old folder where a run of `run.input` looks for it."""
    shutil.copy(WRITTEN / "input.jsonl", run.input)
    (run.state / "sessions").mkdir(parents=True)
    shutil.copy(WRITTEN / "run.json", run.state)
    shutil.copytree(WRITTEN / "journal", run.state / "blobs" / "journal")
    (run.state / "blobs" / "input").symlink_to(run.input)
    connection = sqlite3.connect(run.state / "state.db")
    connection.executescript((WRITTEN / "state.sql").read_text())
    connection.close()


async def test_run_begun_by_the_first_schema_is_finished(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        lay_out(run)

        ended = await run.run()

        assert ended.code == 0, ended.stderr
        assert len(run.check(repeats_max=0).succeeded) == 60
        assert run.simulator.stats().total == 20
