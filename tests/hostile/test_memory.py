"""A process keeps its budget of memory when all answers are large and come at once."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import chat_line
from tests.hostile.peer import Talk, answer, peer_with

MIB = 1024 * 1024
REPLY = b'{"choices":[],"pad":"%b"}' % (b"x" * 2_000_000)
# An interpreter with everything imported, and what the heap does not give back.
BESIDE_BYTES = 160 * MIB


async def peak_of_run(folder: Path, lines: int, *, budget_mib: int) -> int:
    """Run lines that are all answered at once with 2 MB; gives the most memory that the process ever had."""
    (folder / "in.jsonl").write_bytes(b"".join(chat_line(number) for number in range(lines)))
    at_once = min(lines, 512)
    waiting = 0
    all_there = asyncio.Event()

    async def script(talk: Talk) -> None:
        nonlocal waiting
        while True:
            await talk.request()
            waiting += 1
            if waiting == at_once:
                all_there.set()
            await all_there.wait()
            talk.say(answer(REPLY, Content_Type="application/json"))

    async with peer_with(script) as peer:
        code, peak_bytes = await asyncio.to_thread(run, folder, peer.url, at_once, budget_mib)
    assert code == 0
    return peak_bytes


def run(folder: Path, url: str, at_once: int, budget_mib: int) -> tuple[int, int]:
    """Run the command as a process of its own; its exit code and its peak memory, as the kernel counted it."""
    command = ["run", "in.jsonl", "-o", "out.jsonl", "-u", url, "--workers", "1", "--concurrency", str(at_once)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHRUNNER_", "OPENAI_"))}
    settings = {"BATCHRUNNER_MEMORY_BYTES_MAX": f"{budget_mib}MiB", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (folder / "talk.txt").open("wb") as talk:
        child = subprocess.Popen(
            [sys.executable, "-m", "batchrunner", *command],
            cwd=folder,
            env=inherited | settings,
            stdout=talk,
            stderr=talk,
        )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss * 1024


def check_output(folder: Path, lines: int) -> None:
    found = 0
    with (folder / "out.jsonl").open("rb") as output:
        for number, raw in enumerate(output):
            line = json.loads(raw)
            assert line["custom_id"] == f"request-{number:05}"
            assert len(line["response"]["body"]["pad"]) == 2_000_000
            found += 1
    assert found == lines


@pytest.mark.long
def test_large_answers_at_once_stay_within_a_small_budget(tmp_path: Path) -> None:
    """Without the budget the process would hold 240 MB of answers more than it may."""
    peak_bytes = asyncio.run(peak_of_run(tmp_path, 150, budget_mib=64))

    check_output(tmp_path, 150)
    assert peak_bytes <= 64 * MIB + BESIDE_BYTES


@pytest.mark.long
def test_a_thousand_answers_of_2_mb_stay_within_the_default_budget(tmp_path: Path) -> None:
    peak_bytes = asyncio.run(peak_of_run(tmp_path, 1000, budget_mib=256))

    check_output(tmp_path, 1000)
    assert peak_bytes <= 256 * MIB + BESIDE_BYTES
