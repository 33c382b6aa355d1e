"""What a run does when the world around it misbehaves: the upstream, the key, the input, the disk, a frozen worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batchrunner.clock import SystemClock
from batchrunner.lifecycle import BatchEvent
from batchrunner.models import LOCAL_TENANT
from batchrunner.simulate import Simulator, SimulatorSettings
from batchrunner.store.sqlite import SqliteStore
from tests.e2e.harness import Bench, Command, bench, freeze, start
from tests.e2e.small_disk import needs_root, small_disk

pytestmark = pytest.mark.slow

LINES = 400
WINDOW = 16


# -- the upstream ----------------------------------------------------------------------------------


async def test_refused_key_stops_the_run_and_the_right_one_resumes_it(tmp_path: Path) -> None:
    async with bench(tmp_path, api_key="right") as run:
        run.write_input(LINES)

        refused = await run.run("--json", OPENAI_API_KEY="wrong")
        asked = run.simulator.stats().total
        nothing_written = not run.output.exists() and not run.errors.exists()
        ended = await run.run(OPENAI_API_KEY="right")

        assert refused.code == 4, refused.stderr
        assert refused.summary["counts"]["failed"] == 0
        assert asked <= 3 * WINDOW
        assert nothing_written
        assert ended.code == 0, ended.stderr
        assert not run.errors.exists()
        run.check(repeats_max=0)


async def test_model_unknown_on_every_line_stops_the_run(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(LINES, model="missing-model")

        first = await run.run("--json")
        asked = run.simulator.stats().total
        again = await run.run("--json")

        assert (first.code, again.code) == (6, 6), first.stderr
        assert first.summary["counts"]["failed"] == 0
        assert asked <= 3 * WINDOW
        assert not run.output.exists()


async def test_upstream_that_is_down_for_a_while_is_waited_for_and_uses_no_try(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="50ms") as run:
        run.write_input(LINES)

        command = await run.start("--max-tries", "1")
        await run.reach(lambda stats: stats.ok >= 100, command)
        run.simulator.refuse(3.0)
        ended = await command.ended()

        assert ended.code == 0, ended.stderr
        assert "waiting:" in ended.stderr
        assert "going on" in ended.stderr
        run.check(repeats_max=0)


async def test_upstream_that_answers_503_to_everything_for_a_while_is_waited_for(tmp_path: Path) -> None:
    """A proxy stands before a server that starts anew, or the server is there and loads its model."""
    async with bench(tmp_path, latency="50ms") as run:
        run.write_input(LINES)

        command = await run.start("--max-tries", "1")
        await run.reach(lambda stats: stats.ok >= 100, command)
        up = run.simulator.settings
        run.simulator.change(replace(up, is_down=True))
        said = await command.said("waiting:")
        run.simulator.change(up)
        ended = await command.ended()

        assert f"upstream_down: {run.simulator.url} answers 503 to everything" in said
        assert ended.code == 0, ended.stderr
        assert "going on" in ended.stderr
        run.check(repeats_max=0)


async def test_upstream_that_was_never_there_ends_the_run_and_names_the_flag(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        async with bench(tmp_path) as run:
            run.write_input(LINES)
            arguments = ["run", str(run.input), "-o", str(run.output), "-u", f"http://127.0.0.1:{port}/v1"]

            async with asyncio.timeout(20.0):
                ended = await (await start(arguments, tmp_path, {})).ended()
            later = await run.run()

    assert ended.code == 1
    assert "-u" in ended.stderr
    assert f"127.0.0.1:{port}" in ended.stderr
    assert later.code == 0, later.stderr


async def test_upstream_of_another_run_may_be_named(tmp_path: Path) -> None:
    """The URL is policy, not identity: a run begun on one server may end on another."""
    async with bench(tmp_path) as run, Simulator(SimulatorSettings()) as other:
        run.write_input(LINES)

        held = await run.run("--limit", "100")
        run.simulator, first = other, run.simulator
        ended = await run.run()

        assert (held.code, ended.code) == (6, 0), ended.stderr
        assert (first.stats().total, other.stats().total) == (100, LINES - 100)
        run.check()


# -- cancel and deadline ---------------------------------------------------------------------------


def store_of(run: Bench) -> contextlib.closing[SqliteStore]:
    return contextlib.closing(SqliteStore.open(run.state / "state.db", SystemClock()))


async def test_cancel_stops_new_sends_within_a_second_and_keeps_what_was_in_flight(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="1s") as run:
        run.write_input(LINES)

        command = await run.start("--json")
        await run.reach(lambda stats: stats.ok >= WINDOW, command)
        with store_of(run) as store:
            scope = store.scope(LOCAL_TENANT)
            batch = scope.batches(limit=1)[0]
            sent = run.simulator.stats().total
            assert scope.send(batch.id, BatchEvent.CANCEL_REQUESTED)
        ended = await command.ended()

        stats = run.simulator.stats()
        assert ended.code == 3, ended.stderr
        assert ended.summary["status"] == "cancelled"
        checked = run.check(repeats_max=0)
        # Within a second of the cancel no more than one round of requests can have begun.
        assert stats.total <= sent + WINDOW
        assert stats.abandoned == 0
        assert len(checked.succeeded) == stats.ok
        assert checked.codes == {"batch_cancelled": LINES - stats.ok}
        assert ended.summary["counts"]["cancelled"] == LINES - stats.ok


async def test_deadline_expires_what_is_left_and_keeps_the_rest(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="200ms") as run:
        run.write_input(LINES)
        run.environment["BATCHRUNNER_SWEEP_S"] = "200ms"

        command = await run.start("--window", "1m", "--json")
        await run.reach(lambda stats: stats.ok >= 2 * WINDOW, command)
        bring_deadline_forward(run.state / "state.db")
        ended = await command.ended()
        again = await run.run("--window", "1m")

        assert ended.code == 7, ended.stderr
        assert again.code == 7
        assert "already done" in again.stderr
        checked = run.check(repeats_max=0)
        assert checked.codes == {"batch_expired": LINES - len(checked.succeeded)}
        assert len(checked.succeeded) == run.simulator.stats().ok


async def test_expired_lines_can_be_retried(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="200ms") as run:
        run.write_input(100)
        run.environment["BATCHRUNNER_SWEEP_S"] = "200ms"

        command = await run.start("--window", "1m", "--json")
        await run.reach(lambda stats: stats.ok >= 2 * WINDOW, command)
        bring_deadline_forward(run.state / "state.db")
        expired = await command.ended()
        retried = await run.run("--retry-failed", "--json")

        assert expired.code == 7, expired.stderr
        assert retried.code == 0, retried.stderr
        assert retried.summary["counts"]["succeeded"] == 100
        run.check(repeats_max=0)


def bring_deadline_forward(path: Path) -> None:
    """Let the completion window of a run end now; the flag takes no less than a minute."""
    with contextlib.closing(sqlite3.connect(path, timeout=30.0)) as database, database:
        now_us = int(datetime.now(UTC).timestamp() * 1e6)
        changed = database.execute("UPDATE batches SET deadline_at = ? WHERE deadline_at > ?", (now_us, now_us))
        assert changed.rowcount == 1


# -- the input -------------------------------------------------------------------------------------


async def test_input_rewritten_in_mid_run_sends_no_line_under_a_wrong_id(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="50ms") as run:
        run.environment["BATCHRUNNER_SHARD_LINES_MAX"] = "40"
        run.write_input(LINES)
        original = run.input.read_bytes()

        command = await run.start("--json")
        await run.reach(lambda stats: stats.ok >= 60, command)
        rewritten = original.replace(b"prompt ", b"secret ")
        run.input.write_bytes(rewritten)
        ended = await command.ended()
        refused = await run.run()
        run.input.write_bytes(original)
        mended = await run.run()

        assert ended.code == 5, ended.stderr
        assert refused.code == 2, refused.stderr
        assert mended.code == 0, mended.stderr
        assert run.simulator.stats().unique == LINES
        run.check(repeats_max=0)


# -- a frozen worker -------------------------------------------------------------------------------


async def test_frozen_worker_loses_its_lines_to_another_and_its_late_answers_count_once(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="300ms") as run:
        run.environment |= {"BATCHRUNNER_LEASE_S": "4s", "BATCHRUNNER_RENEW_S": "500ms"}
        run.environment["BATCHRUNNER_SHARD_LINES_MAX"] = "50"
        run.write_input(600)

        command = await run.start("--workers", "2", "--json")
        await run.reach(lambda stats: stats.ok >= 64, command)
        frozen = run.sender(command)
        freeze(run.state / "state.db", frozen)
        await run.reach(lambda stats: stats.repeats > 0, command)
        frozen.resume()
        ended = await command.ended()

        assert ended.code == 0, ended.stderr
        run.check(repeats_max=min(WINDOW + 256, ended.summary["re_executed"]))


@pytest.mark.long
async def test_run_ends_although_a_worker_stays_frozen(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="100ms") as run:
        run.environment |= {"BATCHRUNNER_LEASE_S": "4s", "BATCHRUNNER_RENEW_S": "500ms"}
        run.environment |= {"BATCHRUNNER_SHARD_LINES_MAX": "50", "BATCHRUNNER_DRAIN_GRACE_S": "100ms"}
        run.write_input(300)

        command = await run.start("--workers", "2", "--json")
        await run.reach(lambda stats: stats.ok >= 64, command)
        freeze(run.state / "state.db", run.sender(command))
        ended = await command.ended()

        assert ended.code == 0, ended.stderr
        run.check(repeats_max=min(WINDOW + 256, ended.summary["re_executed"]))


# -- the disk --------------------------------------------------------------------------------------


@needs_root
async def test_full_disk_is_said_and_the_run_goes_on_when_space_returns(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "24m") as disk:
        async with bench(disk, latency="20ms") as run:
            run.write_input(3_000)
            ballast = disk / "ballast"

            command = await run.start()
            await run.reach(lambda stats: stats.ok >= 200, command)
            space = os.statvfs(disk)
            ballast.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - 200_000)))
            said = await command.said("waiting:")
            waiting_for = run.simulator.stats()
            ballast.unlink()
            ended = await command.ended()

            assert "disk_full" in said
            assert waiting_for.ok < 3_000
            assert ended.code == 0, ended.stderr
            run.check(repeats_max=0)


@needs_root
async def test_run_killed_on_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "24m") as disk:
        async with bench(disk, latency="20ms") as run:
            run.write_input(3_000)
            ballast = disk / "ballast"

            command = await run.start()
            await run.reach(lambda stats: stats.ok >= 200, command)
            space = os.statvfs(disk)
            ballast.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - 200_000)))
            await command.said("waiting:")
            command.kill_group()
            killed = await command.ended()
            ballast.unlink()
            ended = await run.run("--json")

            assert killed.code == -signal.SIGKILL
            assert ended.code == 0, ended.stderr
            run.check(repeats_max=min(WINDOW + 256, ended.summary["re_executed"]))


async def test_damaged_journal_is_told_and_only_its_lines_run_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(LINES)
        assert (await run.run("--limit", "100")).code == 6
        segment = max((run.state / "blobs" / "journal").rglob("*.seg"), key=lambda path: path.stat().st_size)
        content = bytearray(segment.read_bytes())
        content[len(content) // 2] ^= 0x40
        segment.write_bytes(content)

        ended = await run.run("--json")

        assert ended.code == 0, ended.stderr
        assert "damaged" in ended.stderr
        assert segment.read_bytes() == content
        assert ended.summary["re_executed"] == 1
        run.check(repeats_max=1)


def limit_files(command: Command, size_bytes: int) -> None:
    """Let the command's files grow no further than this; below zero lifts the limit."""
    _, hard = resource.prlimit(command.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (hard if size_bytes < 0 else size_bytes, hard))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process can be set on Linux only")
@pytest.mark.parametrize("is_killed", [False, True], ids=["goes_on", "killed"])
async def test_short_writes_lose_nothing(tmp_path: Path, is_killed: bool) -> None:
    async with bench(tmp_path, latency="20ms") as run:
        run.write_input(1_000)

        command = await run.start()
        await run.reach(lambda stats: stats.ok >= 100, command)
        limit_files(command, 40_000)
        await command.said("waiting:")
        limit_files(command, -1)
        if is_killed:
            command.kill_group()
        first = await command.ended()
        ended = await run.run("--json")

        assert first.code == (-signal.SIGKILL if is_killed else 0), first.stderr
        assert ended.code == 0, ended.stderr
        run.check(repeats_max=min(WINDOW + 256, ended.summary["re_executed"]))
