"""A run whose disk is full at its start, at its seal or where OUTPUT goes, and who looks at it meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.harness import Bench, Command, Ended, bench, start
from tests.e2e.small_disk import fill_up, needs_root, small_disk

pytestmark = [pytest.mark.slow, needs_root]

LINES = 3_000
# What the database of a run may grow by at its end.
STORE_BYTES = 600_000


@contextlib.asynccontextmanager
async def bench_on_a_small_disk(folder: Path) -> AsyncIterator[Bench]:
    with small_disk(folder / "disk", "32m") as disk:
        async with bench(disk) as run:
            yield run


def ballast_of(run: Bench) -> Path:
    return run.folder / "ballast"


def leave(run: Bench, size_bytes: int) -> None:
    """Fill the disk up to this."""
    space = os.statvfs(run.folder)
    ballast_of(run).write_bytes(bytes(space.f_bavail * space.f_frsize - size_bytes))


def partial_files(run: Bench) -> list[Path]:
    return [path for path in run.folder.rglob("*") if "~" in path.name and "reserve" not in path.name]


async def interrupted(command: Command) -> Ended:
    """Press Ctrl-C."""
    os.killpg(command.pid, signal.SIGINT)
    return await command.ended()


async def until_sealing(run: Bench) -> Command:
    """Start a run that has too little room for what it seals."""
    run.write_input(LINES)
    assert (await run.run("--limit", str(LINES - 10))).code == 6
    results = sum(path.stat().st_size for path in (run.state / "blobs" / "journal").rglob("*.seg"))
    assert results > 2 * STORE_BYTES
    leave(run, results // 2)
    command = await run.start()
    said = await command.said("waiting:")
    assert "disk_full" in said
    return command


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "almost"])
async def test_start_on_a_full_disk_tells_what_to_do_and_the_same_command_goes_on(
    tmp_path: Path, is_full: bool
) -> None:
    async with bench_on_a_small_disk(tmp_path) as run:
        run.write_input(100)
        leave(run, 20_000)
        if is_full:
            fill_up(ballast_of(run))

        refused = await run.run()
        ballast_of(run).unlink()
        ended = await run.run()

        assert refused.code == 1, refused.stderr
        assert "Traceback" not in refused.stderr
        assert "error:" in refused.stderr
        assert "hint:" in refused.stderr
        assert ended.code == 0, ended.stderr
        run.check(repeats_max=0)


async def test_spooling_on_a_full_disk_tells_what_to_do(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        async with bench(disk) as run:
            big = tmp_path / "in.jsonl"
            run.folder = tmp_path
            run.write_input(10_000)
            arguments = ["run", "-", "-o", str(disk / "out.jsonl"), "-u", run.simulator.url]

            refused = await (await start(arguments, disk, {}, stdin=big)).ended()

            assert refused.code == 1, refused.stderr
            assert "Traceback" not in refused.stderr
            assert "No space left" in refused.stderr
            assert "hint:" in refused.stderr
            assert [path.name for path in (disk / "out.jsonl.run").iterdir()] == ["lock"]


async def test_seal_waits_for_room_and_takes_none_meanwhile(tmp_path: Path) -> None:
    async with bench_on_a_small_disk(tmp_path) as run:
        command = await until_sealing(run)
        begun = partial_files(run)
        ballast_of(run).unlink()
        ended = await command.ended()

        assert begun == []
        assert ended.code == 0, ended.stderr
        assert "going on" in ended.stderr
        assert "failed" not in ended.stderr.partition("completed:")[0]
        run.check(repeats_max=0)


async def test_ctrl_c_while_the_seal_waits_for_room_ends_the_run_and_the_same_command_goes_on(tmp_path: Path) -> None:
    async with bench_on_a_small_disk(tmp_path) as run:
        command = await until_sealing(run)
        fill_up(ballast_of(run))
        stopped = await interrupted(command)
        ballast_of(run).unlink()
        ended = await run.run()

        assert stopped.code == 130, stopped.stderr
        assert "next: batchrunner run" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert ended.code == 0, ended.stderr
        run.check(repeats_max=0)


@pytest.mark.parametrize("is_stopped", [False, True], ids=["goes_on", "ctrl_c"])
async def test_output_on_another_disk_waits_for_room(tmp_path: Path, is_stopped: bool) -> None:
    async with bench_on_a_small_disk(tmp_path) as run:
        run.write_input(LINES)
        leave(run, 500_000)

        command = await run.start("--state", str(tmp_path / "state"))
        said = await command.said("waiting:")
        there = {path.name for path in run.folder.iterdir()}
        if is_stopped:
            stopped = await interrupted(command)
            assert stopped.code == 130, stopped.stderr
            assert "next: batchrunner run" in stopped.stderr
            assert "Traceback" not in stopped.stderr
            ballast_of(run).unlink()
            ended = await run.run("--state", str(tmp_path / "state"))
        else:
            ballast_of(run).unlink()
            ended = await command.ended()
            assert "going on" in ended.stderr

        assert "disk_full" in said
        assert str(run.output) in said
        assert there == {"in.jsonl", "ballast"}
        assert ended.code == 0, ended.stderr
        run.check(repeats_max=0)


async def test_results_are_read_from_a_full_disk(tmp_path: Path) -> None:
    async with bench_on_a_small_disk(tmp_path) as run:
        run.write_input(LINES)
        assert (await run.run("--limit", "500")).code == 6
        fill_up(ballast_of(run))

        read = await (await start(["results", str(run.state)], run.folder, {})).ended()
        again = await (await start(["results", str(run.state)], run.folder, {})).ended()

        assert read.code == 0, read.stderr
        assert len(read.stdout.splitlines()) == 500
        assert again.stdout == read.stdout
        ballast_of(run).unlink()
        assert (await run.run()).code == 0
        run.check(repeats_max=0)
