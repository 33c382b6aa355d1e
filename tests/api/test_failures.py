"""Failures by cause: counted once, in turns, whoever asks and how often."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from batchrunner import frames, pipeline
from batchrunner.api import counting, failures
from batchrunner.frames import Record
from batchrunner.ports import Blobs
from tests.api.batching import chat_lines, ended, get, make_batch, until, working
from tests.api.serving import Reply, Served
from tests.cli.calling import chat_line

FAILING = chat_lines("abcdef", simulate=["400"])
STUCK = chat_line("stuck", simulate="always:stall")


async def ask(api: Served, batch_id: str) -> Reply:
    return await api.call("GET", f"/v1/batches/{batch_id}/errors")


async def test_counting_in_turns_counts_every_line_once(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_SLICE_S", 0.0)
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, FAILING))["id"])

    asked = await asyncio.gather(*(ask(api, batch["id"]) for _ in range(4)))

    assert {each.body for each in asked} == {asked[0].body}
    assert asked[0].json["total"] == 6
    assert [group["count"] for group in asked[0].json["groups"]] == [6]


async def test_failures_of_an_ended_batch_are_read_once(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, FAILING))["id"])
    first = await ask(api, batch["id"])

    def read_again(*_: object) -> None:
        raise AssertionError("the error file is read again")

    monkeypatch.setattr(counting, "lines_of", read_again)
    async with api.parts.heavy:
        # Whoever is busy with something long keeps nobody from what is known.
        again = await ask(api, batch["id"])

    assert (again.status, again.body) == (200, first.body)


async def test_failures_of_a_running_batch_go_on_from_the_last_time(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def read_payload(blobs: Blobs, record: Record) -> bytes:
        read.append(record.line_number)
        return frames.read_payload(blobs, record)

    monkeypatch.setattr(counting, "read_payload", read_payload)
    async with working(tmp_path):
        made = await make_batch(api, FAILING + STUCK)
        await until(api, made["id"], done=6)
        early = await get(api, made["id"], "/errors")
        again = await get(api, made["id"], "/errors")
        await api.call("POST", f"/v1/batches/{made['id']}/cancel")
        await ended(api, made["id"])
        late = await get(api, made["id"], "/errors")

    assert (early["total"], again["total"], late["total"]) == (6, 6, 7)
    assert (early["is_final"], late["is_final"]) == (False, True)
    assert sorted(read) == [1, 2, 3, 4, 5, 6]


async def test_deleted_error_file_is_gone_though_it_was_counted(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, FAILING))["id"])
    assert (await ask(api, batch["id"])).status == 200

    await api.call("DELETE", f"/v1/files/{batch['error_file_id']}")

    assert (await ask(api, batch["id"])).status == 410


async def test_count_that_broke_off_begins_anew(api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, FAILING))["id"])
    real = pipeline.read_blob

    def read_blob(blobs: Blobs, name: str) -> Any:
        yield b"".join(real(blobs, name))[:300]
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr(counting, "read_blob", read_blob)
    broken = await ask(api, batch["id"])
    monkeypatch.setattr(counting, "read_blob", real)

    assert broken.status == 500
    assert (await ask(api, batch["id"])).json["total"] == 6


async def test_nothing_is_counted_for_a_caller_who_has_hung_up(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, FAILING))["id"])
    looked, real = asyncio.Event(), failures._look
    loop = asyncio.get_running_loop()

    def look(call: Any) -> Any:
        loop.call_soon_threadsafe(looked.set)
        return real(call)

    monkeypatch.setattr(failures, "_look", look)
    async with api.parts.heavy:
        _, writing = await asyncio.open_connection("127.0.0.1", api.port)
        writing.write(f"GET /v1/batches/{batch['id']}/errors HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        await looked.wait()
        writing.transport.abort()
        # A request that comes later finds the line cut.
        assert (await api.call("GET", "/healthz")).status == 200
    await api.parts.vitals.idle()

    assert not api.parts.counts.of(api.scope.batch(batch["id"]), api.parts.blobs, api.scope).is_through
