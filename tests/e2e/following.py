"""Clients that follow a batch while its server is killed and started again: by results, by events, by looks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from batchrunner.lifecycle import TERMINAL, TRANSITIONS, BatchEvent, BatchStatus
from tests.e2e.served import LOOK_S, Server

_INSTANTS = tuple(
    f"{status}_at"
    for status in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
)


@dataclass(slots=True)
class Place:
    """Where the server is now: it changes when a killed one is started again."""

    server: Server


class Reader:
    """Reads results page by page and keeps what came, as a client with a cursor does."""

    def __init__(self, batch_id: str, *, page_lines: int = 50) -> None:
        self.lines: list[bytes] = []
        self.after = "0"
        self.is_whole = False
        self._path = f"/batches/{batch_id}/results"
        self._page_lines = page_lines

    async def read(self, server: Server) -> None:
        """Take one page; nothing is kept of one that breaks off."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            query = {"after": self.after, "limit": str(self._page_lines)}
            async with server.session.get(server.base_url + self._path, params=query) as answer:
                assert answer.status == 200
                body = await answer.read()
                assert body.endswith(b"\n") or not body
                lines = body.splitlines()
                assert int(answer.headers["X-Last-Sequence"]) == int(self.after) + len(lines)
                self.lines += lines
                self.after = answer.headers["X-Last-Sequence"]
                self.is_whole = answer.headers["X-Incomplete"] == "false"

    async def read_until(self, place: Place, count: int, *, within_s: float) -> None:
        """Read until there are so many lines, or all."""
        async with asyncio.timeout(within_s):
            while len(self.lines) < count and not self.is_whole:
                await self.read(place.server)
                await asyncio.sleep(LOOK_S)  # real time: the server is another process

    @property
    def custom_ids(self) -> list[str]:
        """The ids of what came, in the order in which it came. A torn line raises."""
        return [orjson.loads(line)["custom_id"] for line in self.lines]


class Follower:
    """Follows the events of a batch, and comes back with the last id when the connection breaks."""

    def __init__(self, batch_id: str) -> None:
        self.seen: list[tuple[tuple[int, int], dict[str, Any]]] = []
        self._path = f"/batches/{batch_id}/events"
        self._last = ""

    async def follow(self, place: Place, *, within_s: float) -> None:
        """Follow until the server says that there is nothing more."""
        async with asyncio.timeout(within_s):
            while True:
                with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                    headers = {"Last-Event-ID": self._last} if self._last else {}
                    url = place.server.base_url + self._path
                    async with place.server.session.get(url, headers=headers) as answer:
                        if answer.status == 204:
                            return
                        assert answer.status == 200
                        async for event in _events(answer.content):
                            self._take(event)
                await asyncio.sleep(LOOK_S)  # real time: the server is another process

    def _take(self, event: dict[str, str]) -> None:
        version, sequence = map(int, event["id"].split("-"))
        self._last = event["id"]
        self.seen.append(((version, sequence), orjson.loads(event["data"])))

    def check(self) -> None:
        """Prove that the events only went on, and that what they show never went back."""
        levels = [level for level, _ in self.seen]
        assert levels == sorted(levels)
        check_forward(batch for _, batch in self.seen)


async def _events(stream: aiohttp.StreamReader) -> AsyncIterator[dict[str, str]]:
    """Give each whole event; one that breaks off before its blank line is none."""
    event: dict[str, str] = {}
    async for raw in stream:
        line = raw.decode()
        if line == "\n":
            if "data" in event:
                yield event
            event = {}
        else:
            name, _, value = line.rstrip("\n").partition(": ")
            event[name] = value


@dataclass(slots=True)
class Watcher:
    """Looks at all batches of a server again and again, and keeps what it saw of each."""

    seen: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    async def watch(self, place: Place) -> None:
        """Look until it is cancelled."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                for batch in (await place.server.get("/batches?limit=100"))["data"]:
                    self.seen.setdefault(batch["id"], []).append(batch)
            await asyncio.sleep(LOOK_S)  # real time: the server is another process

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
