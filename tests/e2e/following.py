"""Clients that follow a batch while its server is killed and started again: by results, by events, by looks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from batchrunner.lifecycle import TERMINAL, TRANSITIONS, BatchEvent, BatchStatus
from tests.e2e.served import Server

_INSTANTS = tuple(
    f"{status}_at"
    for status in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
)


class Place:
    """Where the server is now: it moves when a killed one is started again."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._moved = asyncio.Condition()

    async def move(self, server: Server) -> None:
        """Have a new server."""
        async with self._moved:
            self.server = server
            self._moved.notify_all()

    @contextlib.asynccontextmanager
    async def visit(self) -> AsyncIterator[Server]:
        """Have the server for a try, which may break off. An API process that dies alone leaves its port to its parent,
        and the next try waits for the next process; where nobody has the port, this waits for the next server.
        """
        server = self.server
        try:
            yield server
        except aiohttp.ClientConnectorError:
            async with self._moved:
                await self._moved.wait_for(lambda: self.server is not server)
        except (aiohttp.ClientError, ConnectionError):
            pass

    async def events(self, batch_id: str) -> AsyncGenerator[dict[str, str], None]:
        """Follow a batch to its end, from connection to connection, going on behind the last event that came."""
        last_id, is_over = "", False
        while not is_over:
            async with self.visit() as server, contextlib.aclosing(server.events(batch_id, last_id)) as events:
                last_id_before = last_id
                async for event in events:
                    last_id = event["id"]
                    yield event
                is_over = last_id == last_id_before


class Reader:
    """Reads results page by page and keeps what came, as a client with a cursor does."""

    def __init__(self, batch_id: str, *, page_lines: int = 50) -> None:
        self.lines: list[bytes] = []
        self.after = "0"
        self.is_whole = False
        self._batch_id = batch_id
        self._page_lines = page_lines

    async def read(self, server: Server) -> None:
        """Take one page; nothing is kept of one that breaks off."""
        query = {"after": self.after, "limit": str(self._page_lines)}
        url = f"{server.base_url}/batches/{self._batch_id}/results"
        async with server.session.get(url, params=query) as answer:
            assert answer.status == 200
            body = await answer.read()
            assert body.endswith(b"\n") or not body
            lines = body.splitlines()
            assert int(answer.headers["X-Last-Sequence"]) == int(self.after) + len(lines)
            self.lines += lines
            self.after = answer.headers["X-Last-Sequence"]
            self.is_whole = answer.headers["X-Incomplete"] == "false"

    async def read_until(self, place: Place, count: int, *, within_s: float) -> None:
        """Read what there is at each event of the batch, until there are so many lines, or all."""
        async with asyncio.timeout(within_s), contextlib.aclosing(place.events(self._batch_id)) as events:
            async for _ in events:
                is_behind = True
                while is_behind and not self._has(count):
                    before = self.after
                    async with place.visit() as server:
                        await self.read(server)
                        is_behind = self.after != before
                if self._has(count):
                    return
        raise AssertionError(f"the batch is over, and of {count} lines there are {len(self.lines)}")

    def _has(self, count: int) -> bool:
        return len(self.lines) >= count or self.is_whole

    @property
    def custom_ids(self) -> list[str]:
        """The ids of what came, in the order in which it came. A torn line raises."""
        return [orjson.loads(line)["custom_id"] for line in self.lines]


class Follower:
    """Follows the events of a batch, and comes back with the last id when the connection breaks."""

    def __init__(self, batch_id: str) -> None:
        self.seen: list[tuple[tuple[int, int], dict[str, Any]]] = []
        self._batch_id = batch_id

    async def follow(self, place: Place, *, within_s: float) -> None:
        """Follow until the server says that there is nothing more."""
        async with asyncio.timeout(within_s), contextlib.aclosing(place.events(self._batch_id)) as events:
            async for event in events:
                version, sequence = map(int, event["id"].split("-"))
                self.seen.append(((version, sequence), orjson.loads(event["data"])))

    def check(self) -> None:
        """Prove that the events only went on, and that what they show never went back."""
        levels = [level for level, _ in self.seen]
        assert levels == sorted(levels)
        assert self.seen[-1][1]["status"] in TERMINAL
        check_forward(batch for _, batch in self.seen)


@dataclass(slots=True)
class Watcher:
    """Looks at all batches of a server again and again, and keeps what it saw of each."""

    seen: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    async def look(self, server: Server) -> None:
        """Look once."""
        for batch in (await server.get("/batches?limit=100"))["data"]:
            self.seen.setdefault(batch["id"], []).append(batch)

    async def watch(self, place: Place) -> None:
        """Look until it is cancelled; each time is a whole request."""
        while True:
            async with place.visit() as server:
                await self.look(server)

    def check(self) -> None:
        """Prove that nothing of any batch went back."""
        for looks in self.seen.values():
            check_forward(looks)


def check_forward(looks: Iterable[dict[str, Any]]) -> None:
    """Prove of looks at one batch, in order, that its status, counts, instants and files never went back."""
    before: dict[str, Any] | None = None
    for batch in looks:
        if before is not None:
            old, new = BatchStatus(before["status"]), BatchStatus(batch["status"])
            assert new in _REACHABLE[old], f"{batch['id']}: {old}, then {new}"
            for name in _INSTANTS:
                assert before[name] in (None, batch[name]), f"{batch['id']}: {name} {before[name]}, then {batch[name]}"
            for name, count in before["request_counts"].items():
                assert count <= batch["request_counts"][name], f"{batch['id']}: fewer {name} than before"
            assert before["progress"]["last_sequence"] <= batch["progress"]["last_sequence"]
            if old in TERMINAL:
                assert batch["output_file_id"] == before["output_file_id"]
                assert batch["error_file_id"] == before["error_file_id"]
        before = batch


def _reachable(status: BatchStatus) -> frozenset[BatchStatus]:
    found = {status}
    for event, target in TRANSITIONS[status].items():
        # Nothing damages results in these tests, so the one way back is no excuse.
        if event is not BatchEvent.RESULTS_DAMAGED:
            found |= _reachable(target)
    return frozenset(found)


_REACHABLE = {status: _reachable(status) for status in BatchStatus}
