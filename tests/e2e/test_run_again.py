"""The same command again: it goes on, is done already, or says why it will not."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from batchrunner.simulate import SimulatorStats
from tests.e2e.harness import Command, bench, chat_line
from tests.hostile.peer import until

pytestmark = pytest.mark.slow

LINES = 200


async def test_interrupted_run_drains_and_goes_on_without_a_repeat(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="50ms") as run:
        run.write_input(LINES)

        command = await run.start("--json")
        await run.reach(lambda stats: stats.ok >= 60, command)
        command.send(signal.SIGINT)
        interrupted = await command.ended()
        ended = await run.run()

        assert interrupted.code == 130, interrupted.stderr
        assert interrupted.summary["exit_code"] == 130
        assert "run" in interrupted.summary["next_command"]
        assert interrupted.summary["counts"]["succeeded"] >= 60
        assert ended.code == 0, ended.stderr
        run.check(repeats_max=0)


async def test_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="60s") as run:
        run.write_input(20)

        command = await run.start()
        await run.reach(lambda stats: stats.in_flight == 16, command)
        command.send(signal.SIGINT)
        first_talk = await command.said("SIGINT")
        command.send(signal.SIGINT)
        ended = await command.ended()

        assert "again to stop at once" in first_talk
        assert ended.code == 130
        assert run.simulator.stats().total == 16


async def test_second_invocation_is_refused_and_names_the_first(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="60s") as run:
        run.write_input(20)

        command = await run.start()
        await run.reach(lambda stats: stats.in_flight == 16, command)
        second = await run.run()
        still_running = command.process.returncode is None
        command.kill_group()
        await command.ended()

        assert second.code == 1
        assert str(command.pid) in second.stderr
        assert still_running
        assert run.simulator.stats().total == 16


async def test_finished_run_is_done_already_and_writes_lost_files_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(LINES)
        assert (await run.run()).code == 0
        written = run.output.read_bytes()

        again = await run.run()
        run.output.unlink()
        mended = await run.run()

        assert again.code == 0
        assert "already done" in again.stderr
        assert mended.code == 0, mended.stderr
        assert run.output.read_bytes() == written
        run.check(repeats_max=0)


async def test_other_identity_is_refused_with_the_difference(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(LINES)
        assert (await run.run()).code == 0
        sent = run.simulator.stats().total

        other_flag = await run.run("--on-invalid", "skip")
        run.input.write_bytes(run.input.read_bytes() + chat_line(9999))
        other_input = await run.run()

        assert (other_flag.code, other_input.code) == (2, 2)
        assert "--on-invalid: was fail, is skip" in other_flag.stderr
        assert "input (sha256)" in other_input.stderr
        assert run.simulator.stats().total == sent


async def test_fresh_starts_over_and_keeps_what_was_paid(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(LINES)
        assert (await run.run()).code == 0

        fresh = await run.run("--fresh")

        assert fresh.code == 0, fresh.stderr
        assert (tmp_path / "out.jsonl.run.1" / "state.db").exists()
        run.check(repeats_max=LINES)
        assert run.simulator.stats().repeats_paid == LINES


async def test_output_of_somebody_else_is_not_written_over(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(3)
        run.output.write_text("mine\n")

        ended = await run.run()

        assert ended.code == 2
        assert run.output.read_text() == "mine\n"
        assert run.simulator.stats().total == 0


async def test_killed_run_does_not_mistake_its_own_output_for_a_strangers(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(LINES)

        killed = await run.run(BATCHRUNNER_CRASH_AT="export.output_placed")
        ended = await run.run()

        assert killed.code == -signal.SIGKILL
        assert ended.code == 0, ended.stderr
        run.check(repeats_max=0)


async def test_limit_holds_the_rest_and_a_later_run_goes_on(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(LINES)

        held = await run.run("--limit", "70", "--json")
        sent = run.simulator.stats().total
        more = await run.run("--limit", "120", "--json")
        sent_more = run.simulator.stats().total
        ended = await run.run()

        assert (held.code, more.code, ended.code) == (6, 6, 0), ended.stderr
        assert held.summary["counts"]["succeeded"] == 70
        assert (sent, sent_more) == (70, 120)
        run.check(repeats_max=0)


async def test_retried_lines_are_folded_in_at_their_places(tmp_path: Path) -> None:
    """Of 40 lines 10 are refused the first time, 4 of them always; --retry-failed brings the other 6 home."""
    async with bench(tmp_path) as run:
        heals = {"simulate": ["400"]}
        stays = {"simulate": "always:400"}
        bodies = [
            stays if number % 10 == 3 else heals if number % 5 == 1 and number < 30 else {} for number in range(40)
        ]
        run.input.write_bytes(b"".join(chat_line(number, **body) for number, body in enumerate(bodies)))

        first = await run.run("--json")
        before = run.check()
        second = await run.run("--retry-failed", "--json")
        after = run.check()

        assert (first.code, second.code) == (3, 3), second.stderr
        assert before.codes == {"400": 10}
        assert after.codes == {"400": 4}
        assert second.summary["counts"] == {
            "total": 40, "succeeded": 36, "failed": 4, "refused": 0, "expired": 0, "cancelled": 0, "pending": 0,
        }  # fmt: skip
        assert run.simulator.stats().total == 50


async def test_retry_that_heals_every_line_removes_the_errors_file(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.input.write_bytes(chat_line(0) + b"".join(chat_line(number, simulate=["400"]) for number in range(1, 20)))

        first = await run.run()
        nothing = await run.run("--retry-failed=500")
        second = await run.run("--retry-failed=400")

        assert (first.code, nothing.code, second.code) == (3, 2, 0), second.stderr
        assert f"hint: `batchrunner errors {run.output}.run` shows what failed" in nothing.stderr
        assert not run.errors.exists()
        run.check(repeats_max=0)


async def test_a_run_that_has_not_finished_is_not_retried(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.input.write_bytes(b"".join(chat_line(number, simulate=["400"]) for number in range(10)))

        held = await run.run("--limit", "5")
        refused = await run.run("--retry-failed")

        assert (held.code, refused.code) == (6, 2), refused.stderr
        assert "this run has not finished yet" in refused.stderr
        assert run.simulator.stats().total == 5


async def test_killed_retry_goes_on_and_ends_whole(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="5ms") as run:
        bodies = [{"simulate": ["400"]} if number % 2 else {} for number in range(LINES)]
        run.input.write_bytes(b"".join(chat_line(number, **body) for number, body in enumerate(bodies)))
        assert (await run.run()).code == 3

        killed = await run.run("--retry-failed", BATCHRUNNER_CRASH_AT="journal.synced:2")
        ended = await run.run("--retry-failed", "--json")

        assert killed.code == -signal.SIGKILL
        assert ended.code == 0, ended.stderr
        assert not run.errors.exists()
        run.check(repeats_max=ended.summary["re_executed"])


def has_workers(command: Command, count: int) -> bool:
    return len(command.workers()) >= count


async def test_ctrl_c_while_workers_start_prints_no_traceback(tmp_path: Path) -> None:
    """A terminal sends it to the whole process group, and so to children that have run no line of ours yet."""
    async with bench(tmp_path, latency="100ms") as run:
        run.write_input(LINES)

        for count in (1, 2, 2):
            command = await run.start("--workers", "2")
            await until(partial(has_workers, command, count))
            os.killpg(command.pid, signal.SIGINT)
            stopped = await command.ended()

            assert stopped.code == 130, stopped.stderr
            assert "Traceback" not in stopped.stderr
            assert "KeyboardInterrupt" not in stopped.stderr
        ended = await run.run("--workers", "2")

        assert ended.code == 0, ended.stderr
        run.check(repeats_max=0)


async def test_run_folder_of_a_dead_run_is_not_held_by_its_workers(tmp_path: Path) -> None:
    """Workers end with their supervisor: a run whose parent alone was killed can be started again at once."""
    async with bench(tmp_path, latency="50ms") as run:
        run.write_input(LINES * 3)

        command = await run.start("--workers", "2")
        await run.reach(lambda stats: stats.ok >= 100, command)
        os.kill(command.pid, signal.SIGKILL)
        killed = await command.ended()
        ended = await run.run("--workers", "2", "--json")

        assert killed.code == -signal.SIGKILL
        assert ended.code == 0, ended.stderr
        run.check(repeats_max=ended.summary["re_executed"])


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_stop_in_the_middle_leaves_no_line_unknown_that_may_be_sent_once(tmp_path: Path, workers: str) -> None:
    async with bench(tmp_path, latency="20ms", faults="429:0.05", seed=7) as run:
        run.write_input(600)
        flags = ["--on-unknown", "fail", "--workers", workers]

        for stop_at in (100, 300):
            command = await run.start(*flags)
            await run.reach(partial(_has_answered, stop_at), command)
            command.send(signal.SIGINT)
            assert (await command.ended()).code == 130
        ended = await run.run("--json", *flags)

        assert ended.code == 0, ended.stderr
        assert run.check(repeats_max=0).codes == {}


def _has_answered(count: int, stats: SimulatorStats) -> bool:
    return stats.ok >= count


@pytest.mark.parametrize("order", ["input", "completion"])
async def test_retry_heals_a_run_whose_journal_was_damaged_after_its_end(tmp_path: Path, order: str) -> None:
    """Whatever order the retry is told, the first batch's is the one of OUTPUT."""
    async with bench(tmp_path) as run:
        bodies = [{"simulate": ["400"]} if number % 3 == 1 else {} for number in range(30)]
        run.input.write_bytes(b"".join(chat_line(number, **body) for number, body in enumerate(bodies)))
        first = await run.run()
        for segment in (run.state / "blobs" / "journal").rglob("*.seg"):
            _flip(segment, segment.stat().st_size // 2)

        second = await run.run("--retry-failed", "--order", order, "--json")

        assert (first.code, second.code) == (3, 0), second.stderr
        assert run.check(repeats_max=0).codes == {}
        ids = [json.loads(line)["custom_id"] for line in run.output.read_bytes().splitlines()]
        assert ids == [json.loads(line)["custom_id"] for line in run.input.read_bytes().splitlines()]


async def test_retry_says_so_where_a_sealed_file_was_changed(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.input.write_bytes(b"".join(chat_line(number, simulate=["400"] * (number % 2)) for number in range(8)))
        await run.run()
        (output,) = (run.state / "blobs" / "files").rglob("*-output.jsonl")
        output.write_bytes(b"".join(reversed(output.read_bytes().splitlines(keepends=True))))

        ended = await run.run("--retry-failed")

        assert ended.code == 1, ended.stderr
        assert "not in the input, or not at that place" in ended.stderr
        assert "--fresh" in ended.stderr
        assert "Traceback" not in ended.stderr


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
