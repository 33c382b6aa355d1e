"""Results and events of a batch, read while it runs and while the processes of its server are killed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from tests.e2e.served import LOOK_S, WAIT_S, Server, site

LINES = 400
WINDOW = 16

pytestmark = pytest.mark.slow


class Reader:
    """Reads results page by page and keeps what came, as a client with a cursor does."""

    def __init__(self, batch_id: str) -> None:
        self.lines: list[bytes] = []
        self.after = "0"
        self.is_whole = False
        self._path = f"/batches/{batch_id}/results"

    async def read(self, server: Server) -> None:
        """Take one page; nothing is kept of one that breaks off."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            query = {"after": self.after, "limit": "50"}
            async with server.session.get(server.base_url + self._path, params=query) as answer:
                assert answer.status == 200
                body = await answer.read()
                assert body.endswith(b"\n") or not body
                self.lines += body.splitlines()
                self.after = answer.headers["X-Last-Sequence"]
                self.is_whole = answer.headers["X-Incomplete"] == "false"

    async def read_until(self, server: Server, count: int) -> None:
        """Read until there are so many lines, or all."""
        async with asyncio.timeout(WAIT_S):
            while len(self.lines) < count and not self.is_whole:
                await self.read(server)
                await asyncio.sleep(LOOK_S)  # real time: the server is another process


class Follower:
    """Follows the events of a batch, and comes back with the last id when the connection breaks."""

    def __init__(self, batch_id: str) -> None:
        self.seen: list[tuple[tuple[int, int], dict[str, Any]]] = []
        self._path = f"/batches/{batch_id}/events"
        self._last = ""

    async def follow(self, server: Server) -> None:
        """Follow until the server says that there is nothing more."""
        async with asyncio.timeout(WAIT_S):
            while True:
                with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                    headers = {"Last-Event-ID": self._last} if self._last else {}
                    async with server.session.get(server.base_url + self._path, headers=headers) as answer:
                        if answer.status == 204:
                            return
                        async for raw in answer.content:
                            self._take(raw.decode().strip())
                await asyncio.sleep(LOOK_S)  # real time: the server is another process

    def _take(self, line: str) -> None:
        name, _, value = line.partition(": ")
        if name == "id":
            self._last = value
        elif name == "data":
            version, sequence = map(int, self._last.split("-"))
            self.seen.append(((version, sequence), orjson.loads(value)))


@pytest.mark.parametrize("victim", ["worker", "api", "all"])
async def test_no_line_is_torn_or_given_twice_over_a_kill(tmp_path: Path, victim: str) -> None:
    async with site(tmp_path, latency="100ms") as here:
        server = await here.serve("--workers", "1", "--concurrency", str(WINDOW))
        batch_id = await server.submit(here.write_input(LINES))
        reader, follower = Reader(batch_id), Follower(batch_id)
        following = asyncio.create_task(follower.follow(server))
        await reader.read_until(server, LINES // 10)

        if victim == "all":
            port = server.base_url.rpartition(":")[2].removesuffix("/v1")
            await server.kill_all()
            server = await here.serve("--workers", "1", "--concurrency", str(WINDOW), "--port", port)
        else:
            (server.worker() if victim == "worker" else server.api()).kill()
        await reader.read_until(server, LINES + 1)
        batch = await server.ended_batch(batch_id)
        await following

        await here.check(server, batch)
        found = [orjson.loads(line)["custom_id"] for line in reader.lines]
        assert len(found) == len(set(found)) == LINES
        assert reader.after == str(LINES) == str(batch["progress"]["last_sequence"])
        assert sorted(reader.lines) == sorted((await server.content(batch["output_file_id"])).splitlines())
        levels = [level for level, _ in follower.seen]
        assert levels == sorted(levels)
        assert [each["status"] for _, each in follower.seen][-1] == "completed"


async def test_progress_tells_what_the_workers_do(tmp_path: Path) -> None:
    async with site(tmp_path, latency="100ms") as here:
        server = await here.serve("--workers", "1", "--concurrency", str(WINDOW))
        batch_id = await server.submit(here.write_input(LINES))

        batch = await server.batch_when(batch_id, lambda each: each["progress"]["eta_at"] is not None)
        progress = batch["progress"]
        ended = await server.ended_batch(batch_id)

        assert 0 < progress["in_flight"] <= WINDOW
        assert progress["window"] == WINDOW
        assert 10 < progress["rate"] < 400
        assert progress["eta_earliest_at"] <= progress["eta_at"] <= progress["eta_latest_at"]
        assert progress["deadline_risk"] == "low"
        assert progress["bound_by"]
        assert progress["succeeded"] + progress["remaining"] == LINES
        # The guess was of whole seconds, and the seal comes on top.
        assert progress["eta_earliest_at"] - 2 <= ended["completed_at"] <= progress["eta_latest_at"] + 10
        await here.check(server, ended)
