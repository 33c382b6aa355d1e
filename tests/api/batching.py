"""Batches for the tests of the API: a real worker session beside the server, and the proof of what came out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from yarl import URL

from batchrunner.app import LocalCrew, open_adapters
from batchrunner.settings import Settings
from batchrunner.simulate import Simulator, SimulatorSettings
from tests.api.serving import Served
from tests.cli.calling import chat_line
from tests.invariants import Checked, check_run

CHAT = "/v1/chat/completions"
QUICK: dict[str, Any] = {"register_s": 0.02, "poll_s": 0.05, "cancel_grace_s": 0.1, "sweep_s": 0.2}


@contextlib.asynccontextmanager
async def working(folder: Path, *, concurrency: int = 8, **simulated: Any) -> AsyncIterator[Simulator]:
    """Have a worker session on the server's folder until the block ends, and an upstream for it."""
    async with Simulator(SimulatorSettings(**({"latency": "1ms"} | simulated))) as simulator:
        adapters = open_adapters(folder)
        settings = Settings(base_url=simulator.url, concurrency=concurrency, **QUICK)
        crew = LocalCrew(adapters, folder, settings, {})
        task = asyncio.create_task(crew.run())
        try:
            yield simulator
        finally:
            crew.stop(grace_s=0.0)
            await task
            adapters.store.close()


def chat_lines(names: Iterable[str], **simulated: Any) -> bytes:
    """Give one line for each name."""
    return b"".join(chat_line(name, **simulated) for name in names)


async def make_batch(served: Served, content: bytes, **wanted: Any) -> dict[str, Any]:
    """Upload a file and create its batch."""
    file_id = (await served.upload(content)).json["id"]
    order = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"} | wanted
    made = await served.call("POST", "/v1/batches", json=order)
    assert made.status == 200, made.body
    return made.json


async def get(served: Served, batch_id: str, what: str = "", **headers: str) -> Any:
    """Show the batch, or a part of it."""
    reply = await served.call("GET", f"/v1/batches/{batch_id}{what}", headers=headers)
    assert reply.status == 200, reply.body
    return reply.json


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event."""

    name: str
    id: str
    batch: dict[str, Any]


async def events(served: Served, batch_id: str, *, last: str | None = None) -> AsyncGenerator[Event, None]:
    """Follow a batch."""
    headers = {} if last is None else {"Last-Event-ID": last}
    if served.secret is not None:
        headers["Authorization"] = f"Bearer {served.secret}"
    url = URL(f"{served.base}/v1/batches/{batch_id}/events")
    async with served.session.get(url, headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream"
        given: dict[str, str] = {}
        async for raw in answer.content:
            line = raw.decode().rstrip("\n")
            if not line and given:
                yield Event(given["event"], given["id"], orjson.loads(given["data"]))
                given = {}
            elif line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                given[name] = value


async def ended(served: Served, batch_id: str) -> dict[str, Any]:
    """Wait for the end of a batch, by its events, and show it then."""
    async with asyncio.timeout(30), contextlib.aclosing(events(served, batch_id)) as seen:
        async for _ in seen:
            pass
    return await get(served, batch_id)


async def until(served: Served, batch_id: str, *, done: int) -> dict[str, Any]:
    """Wait until so many lines are done."""
    async with asyncio.timeout(30), contextlib.aclosing(events(served, batch_id)) as seen:
        async for event in seen:
            progress = event.batch["progress"]
            if progress["succeeded"] + progress["failed"] >= done:
                return event.batch
    raise AssertionError("the batch ended before")


async def content_of(served: Served, file_id: str | None) -> bytes:
    """Download a file; nothing where there is none."""
    if file_id is None:
        return b""
    reply = await served.call("GET", f"/v1/files/{file_id}/content")
    assert reply.status == 200
    return reply.body


async def check_ledger(served: Served, batch: dict[str, Any], content: bytes, folder: Path) -> Checked:
    """Prove that every request of the input is in exactly one file of an ended batch, once, with its own answer."""
    place = folder / batch["id"]
    place.mkdir()
    (place / "in.jsonl").write_bytes(content)
    (place / "out.jsonl").write_bytes(await content_of(served, batch["output_file_id"]))
    (place / "errors.jsonl").write_bytes(await content_of(served, batch["error_file_id"]))
    return check_run(place / "in.jsonl", place / "out.jsonl", place / "errors.jsonl")
