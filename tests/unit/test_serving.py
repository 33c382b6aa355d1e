"""The API process beside its requests: what it notices, and how long it takes to end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from batchrunner import serving
from batchrunner.app import Adapters, open_adapters
from batchrunner.errors import DiskFull, StoreUnavailable
from batchrunner.orders import Greeting
from batchrunner.serving import ApiProcess
from batchrunner.settings import MIB, Settings
from tests.hostile.peer import until

RESERVE = 4 * MIB
LIMIT_S = 30.0


@pytest.fixture
def adapters(tmp_path: Path) -> Iterator[Adapters]:
    made = open_adapters(tmp_path)
    yield made
    made.store.close()


def process_of(adapters: Adapters, *sockets: socket.socket, **settings: float) -> ApiProcess:
    greeting = Greeting(
        folder=str(adapters.store._path.parent),
        settings=Settings(reserve_bytes=RESERVE, **settings),  # type: ignore[arg-type]
        listening_fds=tuple(each.detach() for each in sockets),
        is_local=True,
    )
    return ApiProcess(adapters, greeting, is_open=True)


@asynccontextmanager
async def running(process: ApiProcess, capfd: pytest.CaptureFixture[str]) -> AsyncIterator[asyncio.Task[None]]:
    async with asyncio.timeout(LIMIT_S):
        task = asyncio.create_task(process.run())
        await until(lambda: "ready" in capfd.readouterr().out)
        yield task
        await task


@pytest.mark.parametrize("was_held", [False, True])
@pytest.mark.parametrize(("free_bytes", "is_held"), [(10 * RESERVE, True), (RESERVE - 1, False), (2 * RESERVE, None)])
def test_reserve_is_given_up_on_a_full_disk_and_taken_when_there_is_plenty(
    adapters: Adapters, monkeypatch: pytest.MonkeyPatch, free_bytes: int, is_held: bool | None, *, was_held: bool
) -> None:
    if was_held:
        adapters.blobs.keep_reserve(RESERVE)
    monkeypatch.setattr(adapters.blobs.__class__, "free_bytes", lambda _: free_bytes)

    process_of(adapters)._mind_the_reserve()

    assert adapters.blobs.path("reserve").with_name("reserve~").exists() is (was_held if is_held is None else is_held)


def test_disk_that_fills_up_meanwhile_is_no_end(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DiskFull("no space")

    monkeypatch.setattr(adapters.blobs.__class__, "keep_reserve", full)

    process_of(adapters)._mind_the_reserve()


async def test_store_that_is_away_ends_neither_the_sweep_nor_the_process(
    adapters: Adapters,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def away(*_: object) -> None:
        raise StoreUnavailable("busy")

    monkeypatch.setattr(adapters.store.__class__, "expire", away)
    monkeypatch.setattr(adapters.store.__class__, "has_keys", away)
    process = process_of(adapters)

    async with running(process, capfd):
        await until(lambda: "sweep failed: busy" in caplog.text and "around failed: busy" in caplog.text)
        process.stop(grace_s=1.0)


async def test_bug_in_the_upkeep_does_not_end_the_process(
    adapters: Adapters,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a row that nobody thought of")

    monkeypatch.setattr(adapters.store.__class__, "expire", broken)
    monkeypatch.setattr(adapters.store.__class__, "has_keys", broken)
    process = process_of(adapters)

    async with running(process, capfd):
        await until(lambda: "the sweep broke" in caplog.text and "the look around broke" in caplog.text)
        process.stop(grace_s=1.0)


async def test_what_dead_writers_left_is_swept_at_first_and_then_once_a_day(
    adapters: Adapters, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    day_s, swept_at_s = 0.2, list[float]()

    def sweep(*_: object, **_named: object) -> int:
        swept_at_s.append(adapters.clock.monotonic_s())
        return 0

    monkeypatch.setattr(serving, "_UNFINISHED_S", day_s)
    monkeypatch.setattr(adapters.blobs.__class__, "drop_unfinished", sweep)
    process = process_of(adapters, sweep_s=0.01)
    began_s = adapters.clock.monotonic_s()

    async with running(process, capfd):
        await until(lambda: len(swept_at_s) >= 3)
        process.stop(grace_s=1.0)

    assert all(at_s - began_s >= number * day_s * 0.9 for number, at_s in enumerate(swept_at_s))


async def test_request_that_outlasts_the_grace_is_cut_off(
    adapters: Adapters, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    bound = socket.create_server(("127.0.0.1", 0))
    port = bound.getsockname()[1]
    process = process_of(adapters, bound)
    began = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"--x\r\n"
        began.set()
        await asyncio.Event().wait()

    async def ask() -> None:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        async with aiohttp.ClientSession() as session:
            await session.post(f"http://127.0.0.1:{port}/v1/files", data=endless(), headers=headers)

    async with running(process, capfd):
        asking = asyncio.create_task(ask())
        await began.wait()
        process.stop(grace_s=20.0)
        process.stop(grace_s=0.2)

    with pytest.raises(aiohttp.ClientError):
        await asking
    assert "1 requests are cut off" in caplog.text
