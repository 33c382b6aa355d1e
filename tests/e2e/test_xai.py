"""Open batches on a server as users have it: requests join while others run and processes die, and each ends once."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.following import Place
from tests.e2e.harness import chat_line
from tests.e2e.served import Server, Site, site

FLAGS = ("--workers", "1", "--concurrency", "64")
REPEATS_PER_KILL = 64 + 256
MIB = 1024 * 1024

pytestmark = pytest.mark.slow


async def ask(place: Place, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Ask until an answer comes: the server may be gone for a while."""
    while True:
        async with (
            place.visit() as server,
            server.session.request(method, server.base_url + path, json=body) as answer,
        ):
            return answer.status, await answer.json()


@dataclass(slots=True)
class Pager:
    """Reads result pages whenever the batch has moved, going on from the last token."""

    place: Place
    batch_id: str
    seen: dict[str, str] = field(default_factory=dict)
    token: str = ""

    async def read_until(self, count: int) -> None:
        async with contextlib.aclosing(self.place.events(self.batch_id)) as events:
            async for _ in events:
                while await self.read():
                    pass
                if len(self.seen) == count:
                    return

    async def read(self) -> bool:
        """Take one page; tell whether there are more now."""
        query = f"?limit=1000&pagination_token={self.token}"
        status, page = await ask(self.place, "GET", f"/batches/{self.batch_id}/results{query}")
        assert status == 200, page
        for each in page["results"]:
            answer = each["batch_result"]["response"]["chat_get_completion"]["choices"][0]["message"]["content"]
            assert self.seen.setdefault(each["batch_request_id"], answer) == answer
        self.token = page["pagination_token"] or self.token
        return page["pagination_token"] is not None


def lines_in(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def requests_of(lines: list[bytes]) -> list[dict[str, Any]]:
    """Say lines of a file in xAI's way."""
    given = [json.loads(line) for line in lines]
    return [
        {"batch_request_id": each["custom_id"], "batch_request": {"chat_get_completion": each["body"]}}
        for each in given
    ]


async def add_all(place: Place, batch_id: str, lines: list[bytes], *, size: int) -> None:
    """Add lines, some at a time. What was answered by nobody is sent again: then its ids may be taken."""
    for start in range(0, len(lines), size):
        body = {"batch_requests": requests_of(lines[start : start + size])}
        status, answer = await ask(place, "POST", f"/batches/{batch_id}/requests", body)
        assert status == 200 or (status == 400 and "already" in answer["error"]), answer


async def requests(here: Site, count: int) -> None:
    """Wait until so many have come to the upstream."""
    await here.simulator.wait_until(lambda stats: stats.total >= count)


async def opened(server: Server) -> str:
    return str((await server.post("/batches", name="nightly"))["batch_id"])


async def closed(here: Site, place: Place, batch_id: str, *, lines: int, repeats_max: int) -> dict[str, Any]:
    """Close the batch, wait for its end and prove its ledger."""
    status, _ = await ask(place, "POST", f"/batches/{batch_id}/close", {})
    assert status == 200
    batch = await place.server.ended_batch(batch_id)
    assert (batch["status"], batch["state"]["num_success"]) == ("completed", lines)
    await here.check(place.server, batch, repeats_max=repeats_max)
    return batch


async def test_requests_that_join_between_kills_are_answered_once_each(tmp_path: Path) -> None:
    lines, kills = 1_000, 2
    async with site(tmp_path, latency="30ms") as here:
        path = here.write_input(lines)
        place = Place(await here.serve(*FLAGS))
        port = place.server.base_url.rpartition(":")[2].removesuffix("/v1")
        batch_id = await opened(place.server)
        pager = Pager(place, batch_id)
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            adding = group.create_task(add_all(place, batch_id, lines_in(path), size=20))
            group.create_task(pager.read_until(lines))
            for number in range(1, kills + 1):
                await requests(here, number * lines // (kills + 2))
                await place.server.kill_all()
                await place.move(await here.serve(*FLAGS, "--port", port))
            await adding

        await closed(here, place, batch_id, lines=lines, repeats_max=REPEATS_PER_KILL * kills)
        assert len(pager.seen) == lines
        assert (await place.server.stop()).code == 0


@pytest.mark.parametrize("point", [pytest.param("add.stored", marks=pytest.mark.long), "add.joined"])
async def test_an_api_that_dies_while_requests_join_loses_and_doubles_none(tmp_path: Path, point: str) -> None:
    lines = 60
    async with site(tmp_path, latency="1ms") as here:
        path = here.write_input(lines)
        armed = await here.serve(*FLAGS, BATCHRUNNER_CRASH_AT=f"{point}:2")
        place = Place(armed)
        port = armed.base_url.rpartition(":")[2].removesuffix("/v1")
        batch_id = await opened(armed)
        adding = asyncio.create_task(add_all(place, batch_id, lines_in(path), size=20))
        await armed.said("ended with code -9")
        await armed.kill_all()
        await place.move(await here.serve(*FLAGS, "--port", port))
        await adding

        await closed(here, place, batch_id, lines=lines, repeats_max=REPEATS_PER_KILL)
        assert (await place.server.stop()).code == 0


@pytest.mark.long
async def test_a_hundred_thousand_requests_join_one_batch_in_a_thousand_calls_while_it_runs(tmp_path: Path) -> None:
    lines = 100_000
    async with site(tmp_path, latency="5ms") as here:
        here.input.write_bytes(b"".join(chat_line(number) for number in range(lines)))
        place = Place(await here.serve(*FLAGS))
        batch_id = await opened(place.server)
        pager = Pager(place, batch_id)
        processes = place.server.api(), place.server.worker()
        async with asyncio.timeout(1200), asyncio.TaskGroup() as group:
            group.create_task(add_all(place, batch_id, lines_in(here.input), size=100))
            reading = group.create_task(pager.read_until(lines))
            await requests(here, lines // 10)
            early = [_memory(each) for each in processes]
            await reading
        late = [_memory(each) for each in processes]

        await closed(here, place, batch_id, lines=lines, repeats_max=0)
        grown = [after - before for before, after in zip(early, late, strict=True)]
        assert max(grown) < 48 * MIB, grown
        assert (await place.server.stop()).code == 0


def _memory(process: psutil.Process) -> int:
    return int(process.memory_info().rss)
