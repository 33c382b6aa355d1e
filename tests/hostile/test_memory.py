"""A process keeps its budget of memory when all answers are large and come at once, however slow the disk is."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import chat_line
from tests.hostile.peer import Script, Talk, answer, peer_with

MIB = 1024 * 1024
REPLY = b'{"choices":[],"pad":"%b"}' % (b"x" * 2_000_000)
PIECE = bytes(range(256)) * 4096
# An interpreter with everything imported takes 75 MiB; the rest is what is not counted, or not given back by the heap.
BESIDE_BYTES = 136 * MIB
# Syncs like those of a disk that somebody else keeps busy: finished answers pile up before it. Each takes so many
# questions to this test.
SLOW_DISK = """
import os, socket
sync = os.fdatasync
def fdatasync(fd):
    with socket.create_connection(("127.0.0.1", %d)) as disk:
        for _ in range(%d):
            disk.sendall(b"?")
            disk.recv(1)
    sync(fd)
os.fdatasync = fdatasync
"""
# A tenth of a second on a machine that has nothing else to do.
SLOW = 1_000
# The kernel counts towards a process what the one that started it had: this test would be measured along.
WAITER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
print(child.returncode, usage.ru_maxrss)
"""


async def peak_of(
    folder: Path, lines: list[bytes], reply: Callable[[Talk], object], *, budget_mib: int, sync_trips: int = 0
) -> int:
    """Run lines that are all answered at once; gives the most memory that the process ever had."""
    (folder / "in.jsonl").write_bytes(b"".join(lines))
    at_once = min(len(lines), 512)
    async with peer_with(all_at_once(at_once, reply)) as peer, await asyncio.start_server(echo, "127.0.0.1") as disk:
        slowness = SLOW_DISK % (disk.sockets[0].getsockname()[1], sync_trips) if sync_trips else ""
        code, peak_bytes = await asyncio.to_thread(run, folder, peer.url, at_once, budget_mib, slowness)
    assert code == 0, (folder / "talk.txt").read_text()
    return peak_bytes


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say what is heard."""
    while heard := await reader.read(1):
        writer.write(heard)
    writer.close()


def all_at_once(count: int, reply: Callable[[Talk], object]) -> Script:
    """Answer nobody before `count` requests are there."""
    waiting = 0
    all_there = asyncio.Event()

    async def script(talk: Talk) -> None:
        nonlocal waiting
        while True:
            await talk.request()
            waiting += 1
            if waiting == count:
                all_there.set()
            await all_there.wait()
            said = reply(talk)
            if asyncio.iscoroutine(said):
                await said

    return script


def say_json(talk: Talk) -> None:
    talk.say(answer(REPLY, Content_Type="application/json"))


def saying_sound(pieces: int) -> Callable[[Talk], object]:
    async def say(talk: Talk) -> None:
        await talk.say_on(b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\n")
        await talk.say_on(b"Content-Length: %d\r\n\r\n" % (pieces * len(PIECE)))
        for _ in range(pieces):
            await talk.say_on(PIECE)

    return say


def speech_line(number: int) -> bytes:
    body = {"model": "m", "input": "hello", "voice": "alloy"}
    line = {"custom_id": f"request-{number:05}", "method": "POST", "url": "/v1/audio/speech", "body": body}
    return json.dumps(line).encode() + b"\n"


def run(folder: Path, url: str, at_once: int, budget_mib: int, slowness: str) -> tuple[int, int]:
    """Run the command as a process of its own; its exit code and its peak memory, as the kernel counted it."""
    command = ["run", "in.jsonl", "-o", "out.jsonl", "-u", url, "--workers", "1", "--concurrency", str(at_once)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHRUNNER_", "OPENAI_"))}
    places = [str(Path(__file__).parents[2])]
    if slowness:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(slowness)
        places.insert(0, str(folder / "site"))
    settings = {"BATCHRUNNER_MEMORY_BYTES_MAX": f"{budget_mib}MiB", "PYTHONPATH": os.pathsep.join(places)}
    with (folder / "talk.txt").open("wb") as talk:
        waited = subprocess.run(
            [sys.executable, "-S", "-c", WAITER, sys.executable, "-m", "batchrunner", *command],
            cwd=folder,
            env=inherited | settings,
            stdout=subprocess.PIPE,
            stderr=talk,
            check=True,
        )
    code, peak_kib = map(int, waited.stdout.split())
    return code, peak_kib * 1024


def check_output(folder: Path, lines: int) -> None:
    found = 0
    with (folder / "out.jsonl").open("rb") as output:
        for number, raw in enumerate(output):
            line = json.loads(raw)
            assert line["custom_id"] == f"request-{number:05}"
            assert len(line["response"]["body"]["pad"]) == 2_000_000
            found += 1
    assert found == lines


def check_sounds(folder: Path, lines: int, pieces: int) -> None:
    sha256 = hashlib.sha256()
    for _ in range(pieces):
        sha256.update(PIECE)
    assets = [json.loads(raw)["response"]["body"] for raw in (folder / "out.jsonl").read_bytes().splitlines()]
    assert [(each["bytes"], each["sha256"]) for each in assets] == [(pieces * len(PIECE), sha256.hexdigest())] * lines
    assert {(folder / each["url"]).stat().st_size for each in assets} == {pieces * len(PIECE)}


@pytest.mark.slow
def test_large_answers_do_not_pile_up_before_a_slow_disk(tmp_path: Path) -> None:
    """Without the budget the process would hold 190 MiB of answers."""
    lines = [chat_line(number) for number in range(100)]

    peak_bytes = asyncio.run(peak_of(tmp_path, lines, say_json, budget_mib=32, sync_trips=SLOW))

    check_output(tmp_path, 100)
    assert peak_bytes <= 32 * MIB + BESIDE_BYTES


@pytest.mark.slow
def test_media_answers_are_never_held_whole(tmp_path: Path) -> None:
    """Held whole they would be 256 MiB."""
    lines = [speech_line(number) for number in range(16)]

    peak_bytes = asyncio.run(peak_of(tmp_path, lines, saying_sound(16), budget_mib=32))

    check_sounds(tmp_path, 16, 16)
    assert peak_bytes <= 32 * MIB + BESIDE_BYTES


@pytest.mark.long
@pytest.mark.parametrize("sync_trips", [0, 10 * SLOW])
def test_large_answers_at_once_stay_within_a_small_budget(tmp_path: Path, sync_trips: int) -> None:
    """Without the budget the process would hold 240 MB of answers more than it may."""
    lines = [chat_line(number) for number in range(150)]

    peak_bytes = asyncio.run(peak_of(tmp_path, lines, say_json, budget_mib=64, sync_trips=sync_trips))

    check_output(tmp_path, 150)
    assert peak_bytes <= 64 * MIB + BESIDE_BYTES


@pytest.mark.long
def test_a_thousand_answers_of_2_mb_stay_within_the_default_budget(tmp_path: Path) -> None:
    lines = [chat_line(number) for number in range(1000)]

    peak_bytes = asyncio.run(peak_of(tmp_path, lines, say_json, budget_mib=256))

    check_output(tmp_path, 1000)
    assert peak_bytes <= 256 * MIB + BESIDE_BYTES


@pytest.mark.long
def test_64_media_answers_of_100_mib_at_once_stay_within_the_budget(tmp_path: Path) -> None:
    lines = [speech_line(number) for number in range(64)]

    peak_bytes = asyncio.run(peak_of(tmp_path, lines, saying_sound(100), budget_mib=256))

    check_sounds(tmp_path, 64, 100)
    assert peak_bytes <= 256 * MIB + BESIDE_BYTES
