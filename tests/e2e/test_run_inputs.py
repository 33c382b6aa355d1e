"""Where lines come from and where they go: packed, piped, streamed, skipped and refused ones."""

from __future__ import annotations

import gzip
import json
import shlex
import signal
from pathlib import Path

import pytest
import zstandard

from tests.e2e.harness import bench, chat_line, start

pytestmark = pytest.mark.slow

LINES = 120


@pytest.mark.parametrize("suffix", ["gz", "zst"])
async def test_packed_input_is_run_and_resumed(tmp_path: Path, suffix: str) -> None:
    async with bench(tmp_path, latency="5ms") as run:
        run.write_input(LINES)
        packed = tmp_path / f"in.jsonl.{suffix}"
        plain = run.input.read_bytes()
        packed.write_bytes(gzip.compress(plain) if suffix == "gz" else zstandard.compress(plain))
        arguments = ["run", str(packed), "-o", str(run.output), "-u", run.simulator.url]

        held = await (await start([*arguments, "--limit", "50"], tmp_path, {})).ended()
        ended = await (await start(arguments, tmp_path, {})).ended()

        assert (held.code, ended.code) == (6, 0), ended.stderr
        run.check(repeats_max=0)


async def test_a_refused_packed_input_does_not_replace_that_of_the_run(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="5ms") as run:
        run.write_input(LINES)
        packed, original = tmp_path / "in.jsonl.gz", tmp_path / "original"
        packed.write_bytes(gzip.compress(run.input.read_bytes()))
        arguments = ["run", str(packed), "-o", str(run.output), "-u", run.simulator.url]

        held = await (await start([*arguments, "--limit", "50"], tmp_path, {})).ended()
        packed.rename(original)
        packed.write_bytes(gzip.compress(chat_line(1)))
        refused = await (await start(arguments, tmp_path, {})).ended()
        # The very file, which looks as it did.
        original.replace(packed)
        ended = await (await start(arguments, tmp_path, {})).ended()

        assert (held.code, refused.code, ended.code) == (6, 2, 0), ended.stderr
        run.check(repeats_max=0)


async def test_broken_packed_input_is_a_usage_error(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        packed = tmp_path / "in.jsonl.gz"
        packed.write_bytes(gzip.compress(chat_line(1) * 1000)[:-20])

        command = await start(["run", str(packed), "-o", str(run.output), "-u", run.simulator.url], tmp_path, {})
        ended = await command.ended()

        assert ended.code == 2
        assert "cannot be unpacked" in ended.stderr
        assert run.simulator.stats().total == 0


async def test_streamed_lines_come_whole_at_each_invocation(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="5ms") as run:
        run.write_input(LINES)
        arguments = ["run", str(run.input), "-o", "-", "-u", run.simulator.url]

        held = await (await start([*arguments, "--limit", "50"], tmp_path, {})).ended()
        ended = await (await start(arguments, tmp_path, {})).ended()
        again = await (await start(arguments, tmp_path, {})).ended()

        assert (held.code, ended.code, again.code) == (6, 0, 0), ended.stderr
        assert ids(held.stdout) == {f"request-{number:05}" for number in range(50)}
        assert ended.stdout.count(b"\n") == again.stdout.count(b"\n") == LINES
        assert ids(ended.stdout) == ids(again.stdout) == {f"request-{number:05}" for number in range(LINES)}
        assert (tmp_path / "in.jsonl.run").is_dir()
        assert run.simulator.stats().repeats == 0


def ids(lines: bytes) -> set[str]:
    return {json.loads(line)["custom_id"] for line in lines.splitlines()}


async def test_streamed_run_that_is_killed_prints_everything_the_next_time(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="5ms") as run:
        run.write_input(LINES)
        arguments = ["run", str(run.input), "-o", "-", "-u", run.simulator.url]

        killed = await (await start(arguments, tmp_path, {"BATCHRUNNER_CRASH_AT": "journal.synced:3"})).ended()
        ended = await (await start(arguments, tmp_path, {})).ended()

        assert killed.code == -signal.SIGKILL
        assert ended.code == 0, ended.stderr
        assert ended.stdout.count(b"\n") == LINES
        assert ids(ended.stdout) == {f"request-{number:05}" for number in range(LINES)}


async def test_streamed_run_prints_the_lines_of_all_its_tries(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        bodies = [{"simulate": ["400"] * (number % 3)} for number in range(30)]
        run.input.write_bytes(b"".join(chat_line(number, **body) for number, body in enumerate(bodies)))
        arguments = ["run", str(run.input), "-o", "-", "-u", run.simulator.url]

        printed = [
            await (await start([*arguments, *flags], tmp_path, {})).ended()
            for flags in ([], ["--retry-failed"], ["--retry-failed"], [])
        ]

        assert [each.code for each in printed] == [3, 3, 0, 0], printed[-1].stderr
        wanted = [10, 20, 30, 30]
        assert [each.stdout.count(b"\n") for each in printed] == wanted
        assert [len(ids(each.stdout)) for each in printed] == wanted
        assert run.simulator.stats().total == 30 + 20 + 10


@pytest.mark.parametrize("is_over", [False, True])
async def test_streamed_run_whose_reader_leaves_says_so_and_goes_on_later(tmp_path: Path, is_over: bool) -> None:
    async with bench(tmp_path, latency="20ms") as run:
        run.write_input(LINES)
        arguments = ["run", str(run.input), "-o", "-", "-u", run.simulator.url, "--concurrency", "4"]
        if is_over:
            assert (await (await start(arguments, tmp_path, {})).ended()).code == 0

        command = await start(arguments, tmp_path, {})
        assert command.process.stdout is not None
        command.process.stdout._transport.close()  # type: ignore[attr-defined]
        left = await command.ended()
        whole = await (await start(arguments, tmp_path, {})).ended()

        assert left.code == 1, left.stderr
        assert "nobody reads stdout any more" in left.stderr
        assert f"  next: batchrunner {shlex.join(arguments)}\n" in left.stderr
        assert "Traceback" not in left.stderr
        assert "Exception" not in left.stderr
        assert (whole.code, whole.stdout.count(b"\n")) == (0, LINES), whole.stderr
        assert run.simulator.stats().repeats == 0


async def test_piped_input_with_a_state_folder_is_resumed(tmp_path: Path) -> None:
    async with bench(tmp_path, latency="5ms") as run:
        run.write_input(LINES)
        arguments = ["run", "-", "-o", str(run.output), "--state", str(run.state), "-u", run.simulator.url]

        held = await (await start([*arguments, "--limit", "50"], tmp_path, {}, stdin=run.input)).ended()
        ended = await (await start(arguments, tmp_path, {}, stdin=run.input)).ended()

        assert (held.code, ended.code) == (6, 0), ended.stderr
        run.check(repeats_max=0)


async def test_piped_input_to_stdout_wants_a_state_folder(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(3)

        command = await start(["run", "-", "-o", "-", "-u", run.simulator.url], tmp_path, {}, stdin=run.input)
        ended = await command.ended()

        assert ended.code == 2
        assert "--state" in ended.stderr


async def test_invalid_lines_end_the_run_before_it_begins_and_a_mended_input_starts(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        good = [chat_line(number) for number in range(10)]
        run.input.write_bytes(b"".join([*good[:4], b"{broken\n", *good[4:], good[2]]))

        refused = await run.run()
        run.input.write_bytes(b"".join(good))
        mended = await run.run()

        assert refused.code == 5
        assert "line 5: invalid_json_line" in refused.stderr
        assert "line 12: duplicate_custom_id" in refused.stderr
        assert not run.output.exists() or mended.code == 0
        assert mended.code == 0, mended.stderr
        run.check(repeats_max=0)


async def test_skipped_lines_are_in_the_errors_file_at_their_places(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        good = [chat_line(number) for number in range(10)]
        bad_request = chat_line(77, simulate="always:400")
        run.input.write_bytes(b"".join([good[0], b"{broken\n", *good[1:6], bad_request, good[3], b"\n", *good[6:]]))

        ended = await run.run("--on-invalid", "skip", "--json")

        assert ended.code == 3, ended.stderr
        checked = run.check(repeats_max=0)
        assert checked.codes == {"invalid_json_line": 1, "400": 1, "duplicate_custom_id": 1}
        assert checked.failed == [None, "request-00077", "request-00003"]
        assert len(checked.succeeded) == 10
        assert ended.summary["counts"]["refused"] == 2


async def test_empty_input_is_refused(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.input.write_bytes(b"\n\n")

        ended = await run.run()

        assert ended.code == 5, ended.stderr
        assert run.simulator.stats().total == 0


async def test_window_that_is_too_short_is_a_usage_error(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(3)

        ended = await run.run("--window", "30s")

        assert ended.code == 2
        assert "1m" in ended.stderr
