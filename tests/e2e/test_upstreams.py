"""Several upstreams from batchrunner.toml, as real processes: each model at its own, and one that is killed midway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batchrunner.simulate import Simulator, SimulatorSettings
from tests.e2e.harness import Command, chat_line, reach, start
from tests.e2e.served import Server, site
from tests.invariants import check_run

pytestmark = pytest.mark.slow

LINES = 600
KEY = "sk-of-the-box-alone"


@dataclass(slots=True)
class Peer:
    """A `batchrunner simulate` of its own."""

    command: Command
    url: str

    def stats(self) -> dict[str, Any]:
        """What it has counted."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/__stats", timeout=5.0) as answer:
            found = json.load(answer)
        assert isinstance(found, dict)
        return found


@contextlib.asynccontextmanager
async def peers(folder: Path, *flags: list[str]) -> AsyncIterator[list[Peer]]:
    """Start simulators with these flags."""
    commands = [await start(["simulate", "--port", "0", *each], folder, {}) for each in flags]
    try:
        yield [Peer(each, (await each.said("http://")).split()[-1].strip()) for each in commands]
    finally:
        for each in commands:
            each.kill_group()
            await each.ended()


def write_tables(folder: Path, *tables: dict[str, object]) -> None:
    """Make a batchrunner.toml; JSON's text, lists and numbers are TOML's too."""
    lines: list[str] = []
    for table in tables:
        lines.append("[[upstream]]")
        for name, value in table.items():
            shown = json.dumps(value)
            if isinstance(value, dict):
                shown = f"{{ {', '.join(f'{json.dumps(key)} = {json.dumps(each)}' for key, each in value.items())} }}"
            lines.append(f"{name} = {shown}")
    (folder / "batchrunner.toml").write_text("\n".join(lines) + "\n")


def write_input(folder: Path, *models: str, count: int = LINES) -> None:
    """Make an input whose lines ask for these models in turn."""
    lines = [chat_line(number, model=models[number % len(models)]) for number in range(count)]
    (folder / "in.jsonl").write_bytes(b"".join(lines))


def check(folder: Path, **aliases: str) -> None:
    """Prove the run's ledger."""
    check_run(folder / "in.jsonl", folder / "out.jsonl", folder / "out.errors.jsonl", aliases=aliases)


async def test_workers_take_turns_where_each_upstream_takes_one_request_at_a_time(tmp_path: Path) -> None:
    write_input(tmp_path, "llama", "fast", count=100)
    async with peers(tmp_path, ["--latency", "10ms"], ["--latency", "10ms"]) as (box, cloud):
        write_tables(
            tmp_path,
            {"name": "box", "base_url": box.url, "models": ["llama"], "window": 1},
            {"name": "cloud", "base_url": cloud.url, "models": ["fast"], "window": 1},
        )
        command = await start(["run", "in.jsonl", "-o", "out.jsonl", "--workers", "2"], tmp_path, {})
        ended = await command.ended()

        assert ended.code == 0, ended.stderr
        assert max(peer.stats()["peak_in_flight"] for peer in (box, cloud)) == 1
        check(tmp_path)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_each_line_is_answered_by_the_upstream_of_its_model(tmp_path: Path, workers: str) -> None:
    write_input(tmp_path, "llama", "fast", "nobody-has-it")
    (tmp_path / "box.key").write_text(KEY + "\n")
    async with peers(tmp_path, ["--latency", "20ms", "--api-key", KEY], ["--latency", "20ms"]) as (box, cloud):
        write_tables(
            tmp_path,
            {"name": "box", "base_url": box.url, "api_key_file": "box.key", "models": ["llama*"], "window": 8},
            {"name": "cloud", "base_url": cloud.url, "models": ["big"], "aliases": {"fast": "big"}},
        )
        command = await start(
            ["run", "in.jsonl", "-o", "out.jsonl", "--json", "--workers", workers], tmp_path, {"OPENAI_API_KEY": "x"}
        )
        ended = await command.ended()
        asked = [peer.stats() for peer in (box, cloud)]

    assert ended.code == 3, ended.stderr
    assert [each["total"] for each in asked] == [LINES // 3, LINES // 3]
    assert ended.summary["counts"]["failed"] == LINES // 3
    assert all(b'"model_not_served"' in line for line in (tmp_path / "out.errors.jsonl").read_bytes().splitlines())
    assert b'"model":"big"' in (tmp_path / "out.jsonl").read_bytes()
    check(tmp_path, fast="big")
    for path in (tmp_path / "out.jsonl.run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in ended.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_run_finishes_on_the_other_upstream_when_one_is_killed(tmp_path: Path, workers: str) -> None:
    write_input(tmp_path, "m")
    async with (
        peers(tmp_path, ["--latency", "100ms"]) as (first,),
        Simulator(SimulatorSettings(latency="100ms")) as second,
    ):
        write_tables(
            tmp_path,
            {"name": "first", "base_url": first.url, "window": 8},
            {"name": "second", "base_url": second.url, "window": 8},
        )
        command = await start(["run", "in.jsonl", "-o", "out.jsonl", "--workers", workers], tmp_path, {})
        await reach(second, lambda stats: stats.total >= LINES // 10, command)
        asked = (await asyncio.to_thread(first.stats))["total"]
        first.command.send(signal.SIGKILL)
        ended = await command.ended()
        answered = second.stats().total

    assert ended.code == 0, ended.stderr
    assert asked > 0
    assert "upstream_down: first: " in ended.stderr
    assert answered >= LINES // 2
    check(tmp_path)


async def test_base_url_of_the_command_line_goes_before_the_tables(tmp_path: Path) -> None:
    write_input(tmp_path, "m", "n", count=40)
    async with peers(tmp_path, ["--latency", "1ms"], ["--latency", "1ms"]) as (named, given):
        write_tables(tmp_path, {"name": "named", "base_url": named.url, "models": ["m"]})
        command = await start(["run", "in.jsonl", "-o", "out.jsonl", "-u", given.url], tmp_path, {})
        ended = await command.ended()

        assert ended.code == 0, ended.stderr
        assert (named.stats()["total"], given.stats()["total"]) == (0, 40)
    check(tmp_path)


async def test_server_goes_on_at_the_other_upstream_and_tells_of_each(tmp_path: Path) -> None:
    write_input(tmp_path, "m")
    async with peers(tmp_path, ["--latency", "100ms"], ["--latency", "100ms"]) as (first, second), site(tmp_path) as at:
        write_tables(
            tmp_path,
            {"name": "first", "base_url": first.url, "window": 8},
            {"name": "second", "base_url": second.url, "window": 8},
        )
        server = await at.serve("--workers", "1", upstream=False, lines=6)
        batch_id = await server.submit(at.input)
        running = await server.batch_when(batch_id, lambda batch: "upstreams" in batch["progress"])
        first.command.send(signal.SIGKILL)
        await server.when(lambda: _tells(server, "first", is_up=False), bool)
        batch = await server.ended_batch(batch_id)
        await at.check(server, batch)

    assert [line for line in server.opening if line.startswith("upstream")] == [
        f"upstream first: {first.url}\n",
        f"upstream second: {second.url}\n",
    ]
    assert batch["status"] == "completed"
    assert batch["request_counts"]["completed"] == LINES
    assert [each["name"] for each in running["progress"]["upstreams"]] == ["first", "second"]
    assert {each["window"] for each in running["progress"]["upstreams"]} == {8}


async def _tells(server: Server, name: str, *, is_up: bool) -> bool:
    """Whether the metrics say that an upstream is up, or down, and that the other is up."""
    async with server.session.get(f"{server.root}/metrics") as answer:
        found = (await answer.text()).splitlines()
    assert 'batchrunner_upstream_up{upstream="second"} 1.0' in found
    return f'batchrunner_upstream_up{{upstream="{name}"}} {float(is_up)}' in found


@pytest.mark.parametrize("flags", [[], ["--on-unknown", "fail"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_lines_that_waited_for_a_slow_upstream_run_after_a_stop(
    tmp_path: Path, flags: list[str], number: signal.Signals
) -> None:
    """Lines that were read for an upstream without room were not sent: a clean stop leaves none of them in doubt."""
    write_input(tmp_path, "fast", "slow", count=400)
    async with (
        peers(tmp_path, ["--latency", "10ms"]) as (fast,),
        Simulator(SimulatorSettings(latency="150ms")) as slow,
    ):
        write_tables(
            tmp_path,
            {"name": "fast", "base_url": fast.url, "models": ["fast"], "window": 4},
            {"name": "slow", "base_url": slow.url, "models": ["slow"], "window": 16},
        )
        arguments = ["run", "in.jsonl", "-o", "out.jsonl", "--workers", "1", *flags]
        command = await start(arguments, tmp_path, {})
        await reach(slow, lambda stats: stats.total >= 40, command)
        if number is signal.SIGINT:
            command.send(number)
        else:
            command.kill_group()
        stopped = await command.ended()
        ended = await (await start([*arguments, "--json"], tmp_path, {})).ended()
        asked = (await asyncio.to_thread(fast.stats))["total"] + slow.stats().total

    assert stopped.code == (130 if number is signal.SIGINT else -number), stopped.stderr
    unknown = 400 - ended.summary["counts"]["succeeded"]
    if number is signal.SIGINT:
        assert (ended.code, asked, unknown) == (0, 400, 0), ended.stderr
    elif flags:
        # What was under way, and the few that count as sent from when they were read.
        assert unknown <= 2 * (4 + 16) + 16
    else:
        assert (ended.code, unknown) == (0, 0), ended.stderr
        assert asked <= 400 + 4 + 16 + 256
    check(tmp_path)
