"""Ctrl-C at any moment of a run: no traceback, exit code 130, and the command that goes on if something was begun."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest

from tests.e2e.harness import Bench, Command, Ended, bench, start

pytestmark = pytest.mark.slow

# Interrupts the command itself, no child of it, at the Nth import of a module, opening of a file and so on; at a moment
# that is told to hang, nothing after it happens in that thread.
HOOK = """
import os, sys, threading
event, name, count, then = os.environ["INTERRUPT_AT"].split("|")
left = [int(count)]
def hook(happens, arguments):
    if happens != event or os.getpid() != os.getsid(0) or not left[0]:
        return
    if str(arguments[0]).endswith(name):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), 2)
            if then == "hang":
                threading.Event().wait()
sys.addaudithook(hook)
"""


async def interrupted(run: Bench, event: str, name: str, *flags: str, count: int = 1, then: str = "goes on") -> Command:
    hooks = run.folder / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(HOOK)
    moment = f"{event}|{name}|{count}|{then}"
    root = str(Path(__file__).parents[2])
    return await run.start(*flags, PYTHONPATH=f"{hooks}:{root}", INTERRUPT_AT=moment)


def next_of(ended: Ended) -> list[str]:
    (line,) = [line for line in ended.stderr.splitlines() if line.strip().startswith("next: ")]
    return shlex.split(line)[1:]


@pytest.mark.parametrize(
    ("event", "name"),
    [
        ("import", "batchrunner.cli"),
        ("import", "click"),
        ("import", "batchrunner.cli.configuring"),
        ("import", "batchrunner.cli.running"),
        ("import", "batchrunner.store.sqlite"),
        ("open", "in.jsonl"),
    ],
)
async def test_before_anything_is_begun(tmp_path: Path, event: str, name: str) -> None:
    async with bench(tmp_path) as run:
        run.write_input(20)

        ended = await (await interrupted(run, event, name)).ended()
        later = await run.run()

        assert ended.code == 130, ended.stderr
        assert ended.stderr.split() == ["interrupted"]
        assert (later.code, run.simulator.stats().total) == (0, 20), later.stderr


@pytest.mark.parametrize(
    ("event", "name", "count"),
    [
        ("open", ".run.json.tmp", 2),
        ("sqlite3.connect", "state.db", 1),
        ("sqlite3.connect", "state.db", 2),
        ("open", "blobs/input", 1),
    ],
)
async def test_as_soon_as_something_is_begun(tmp_path: Path, event: str, name: str, count: int) -> None:
    async with bench(tmp_path) as run:
        run.write_input(20)

        ended = await (await interrupted(run, event, name, "--fresh", count=count)).ended()
        command = next_of(ended)
        later = await (await start(command[1:], tmp_path, {})).ended()

        assert ended.code == 130, ended.stderr
        assert "Traceback" not in ended.stderr
        assert "--fresh" not in command
        assert (later.code, run.simulator.stats().total) == (0, 20), later.stderr
        assert not (tmp_path / "out.jsonl.run.1").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_while_workers_start(tmp_path: Path, workers: str) -> None:
    async with bench(tmp_path, latency="20ms") as run:
        run.write_input(600)

        command = await run.start("--workers", workers)
        await command.said("starting;")
        command.send(signal.SIGINT)
        ended = await command.ended()
        later = await run.run("--workers", workers)

        assert ended.code == 130, ended.stderr
        assert "Traceback" not in ended.stderr
        assert next_of(ended)[:2] == ["batchrunner", "run"]
        assert later.code == 0, later.stderr
        run.check(repeats_max=0)


async def test_while_a_run_that_is_half_done_begins_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as run:
        run.write_input(20)
        assert (await run.run("--limit", "5")).code == 6

        ended = await (await interrupted(run, "open", "run.json")).ended()

        assert ended.code == 130, ended.stderr
        assert "Traceback" not in ended.stderr
        assert next_of(ended)[:2] == ["batchrunner", "run"]


@pytest.mark.parametrize("is_json", [False, True])
async def test_second_one_while_the_output_is_written_ends_at_once(tmp_path: Path, is_json: bool) -> None:
    """Nothing is written any more after the first, so that only an end at once is one."""
    async with bench(tmp_path) as run:
        run.write_input(20)
        flags = ("--json",) if is_json else ()

        command = await interrupted(run, "open", ".out.jsonl.tmp", *flags, then="hang")
        await command.said("again to stop at once")
        command.send(signal.SIGINT)
        ended = await command.ended()
        later = await run.run()

        assert ended.code == 130, ended.stderr
        assert "Traceback" not in ended.stderr
        assert next_of(ended)[:2] == ["batchrunner", "run"]
        if is_json:
            assert (ended.summary["exit_code"], ended.summary["error"]["code"]) == (130, "interrupted")
            assert ended.summary["next_command"] == shlex.join(next_of(ended))
        assert later.code == 0, later.stderr
        run.check(repeats_max=0)


@pytest.mark.parametrize("flags", [("--fresh",), ("--limit", "5", "--fresh"), ("--fresh", "--limit=5")])
async def test_what_to_type_next_never_starts_over(tmp_path: Path, flags: tuple[str, ...]) -> None:
    async with bench(tmp_path, latency="60s" if len(flags) == 1 else "1ms") as run:
        run.write_input(20)

        command = await run.start(*flags)
        if len(flags) == 1:
            await run.reach(lambda stats: stats.in_flight == 16, command)
            command.send(signal.SIGINT)
            await command.said("SIGINT")
            command.send(signal.SIGINT)
        ended = await command.ended()

        assert ended.code == (130 if len(flags) == 1 else 6), ended.stderr
        wanted = ["batchrunner", "run", str(run.input), "-o", str(run.output), "-u", run.simulator.url, *run.flags]
        assert next_of(ended) == wanted
