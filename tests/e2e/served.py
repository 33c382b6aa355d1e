"""A server as its users have it: `batchrunner serve` in processes of its own, a client, and its processes to kill."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import orjson
import psutil

from batchrunner.simulate import Simulator, SimulatorSettings
from tests.e2e.harness import Command, Ended, chat_line, start
from tests.invariants import Checked, check_run

WAIT_S = 60.0
TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
# A batch may be followed for long; what is silent for longer than its heartbeats is broken.
_FOLLOWING = aiohttp.ClientTimeout(total=None, sock_read=WAIT_S)

Found = TypeVar("Found")


@dataclass(slots=True)
class Talk:
    """What a server says on stderr, read all the time, so that no pipe fills."""

    lines: list[str] = field(default_factory=list)
    is_over: bool = False
    _heard: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def read(self, stderr: asyncio.StreamReader) -> None:
        """Take in each line until there are no more."""
        while not self.is_over:
            line = await stderr.readline()
            async with self._heard:
                if line:
                    self.lines.append(line.decode(errors="replace"))
                self.is_over = not line
                self._heard.notify_all()

    async def said(self, words: str) -> str:
        """Wait for a line with these words, if it was not there before, and give it."""
        async with self._heard:
            await self._heard.wait_for(lambda: self.is_over or any(words in line for line in self.lines))
        found = next((line for line in self.lines if words in line), None)
        assert found is not None, f"it ended without saying {words!r}: {''.join(self.lines)}"
        return found


@dataclass(slots=True)
class Server:
    """A running `serve`."""

    command: Command
    base_url: str
    opening: list[str]
    talk: Talk
    reading: asyncio.Task[None]
    session: aiohttp.ClientSession

    @property
    def root(self) -> str:
        """The address without /v1."""
        return self.base_url.removesuffix("/v1")

    def child(self, module: str) -> psutil.Process:
        """Its first process that runs a module."""
        return next(each for each in self.command.workers() if module in each.cmdline())

    def api(self) -> psutil.Process:
        """The API process."""
        return self.child("batchrunner.serving")

    def worker(self) -> psutil.Process:
        """A worker process."""
        return self.child("batchrunner.working")

    async def get(self, path: str) -> Any:
        """GET JSON under the base URL."""
        async with self.session.get(self.base_url + path) as answer:
            found = await answer.json()
            assert answer.status == 200, found
            return found

    async def post(self, path: str, **body: Any) -> Any:
        """POST JSON under the base URL."""
        async with self.session.post(self.base_url + path, json=body) as answer:
            found = await answer.json()
            assert answer.status == 200, found
            return found

    async def ready(self) -> tuple[int, dict[str, Any]]:
        """GET /readyz."""
        async with self.session.get(f"{self.root}/readyz") as answer:
            return answer.status, await answer.json()

    async def when(self, ask: Callable[[], Awaitable[Found]], is_wanted: Callable[[Found], bool]) -> Found:
        """Ask until the answer is as wanted, and give it. `ask` makes a whole request each time: that is its pace."""
        found: Found | None = None
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    found = await ask()
                    if is_wanted(found):
                        return found
        except TimeoutError:
            raise AssertionError(f"it never came to that: {found}; {''.join(self.talk.lines)}") from None

    async def until_ready(self) -> None:
        """Wait until its worker has reported."""
        await self.when(self.ready, lambda found: found[1]["checks"]["workers"].get("detail", "").startswith("1 of"))

    async def submit(self, path: Path, **fields: Any) -> str:
        """Upload a file and make a batch of it; gives the batch's id."""
        file_id = await self.upload(path)
        wanted = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | fields
        batch = await self.post("/batches", input_file_id=file_id, **wanted)
        return str(batch["id"])

    async def upload(self, path: Path) -> str:
        """Upload a file; gives its id."""
        status, file = await self.try_upload(path)
        assert status == 200, file
        return str(file["id"])

    async def try_upload(self, path: Path) -> tuple[int, Any]:
        """Upload a file; gives the status of the answer and what it says."""
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        with path.open("rb") as stream:
            form.add_field("file", stream, filename=path.name)
            async with self.session.post(f"{self.base_url}/files", data=form) as answer:
                return answer.status, await answer.json()

    async def events(self, batch_id: str, last_id: str = "") -> AsyncGenerator[dict[str, str], None]:
        """Follow a batch over one connection; an event that breaks off before its blank line is none."""
        headers = {"Last-Event-ID": last_id} if last_id else {}
        url = f"{self.base_url}/batches/{batch_id}/events"
        async with self.session.get(url, headers=headers, timeout=_FOLLOWING) as answer:
            assert answer.status in (200, 204)
            event: dict[str, str] = {}
            async for raw in answer.content:
                line = raw.decode()
                if line == "\n":
                    if "data" in event:
                        yield event
                    event = {}
                else:
                    name, _, value = line.rstrip("\n").partition(": ")
                    event[name] = value

    async def batch_when(
        self, batch_id: str, is_reached: Callable[[dict[str, Any]], bool], *, within_s: float = WAIT_S
    ) -> dict[str, Any]:
        """Follow a batch until it is as wanted. Where an API process dies, its parent keeps the port: the next request
        waits for the next process.
        """
        async with asyncio.timeout(within_s):
            while True:
                try:
                    async with contextlib.aclosing(self.events(batch_id)) as events:
                        async for event in events:
                            batch: dict[str, Any] = orjson.loads(event["data"])
                            if is_reached(batch):
                                return batch
                            assert batch["status"] not in TERMINAL, batch
                except aiohttp.ClientConnectorError:
                    raise
                except aiohttp.ClientError:
                    pass

    async def ended_batch(self, batch_id: str, *, within_s: float = WAIT_S) -> dict[str, Any]:
        """Wait for the end of a batch."""
        return await self.batch_when(batch_id, lambda batch: batch["status"] in TERMINAL, within_s=within_s)

    async def content(self, file_id: str | None) -> bytes:
        """Download a file, nothing if there is none."""
        if file_id is None:
            return b""
        async with self.session.get(f"{self.base_url}/files/{file_id}/content") as answer:
            assert answer.status == 200
            return await answer.read()

    async def said(self, words: str) -> str:
        """Wait until it has said something."""
        async with asyncio.timeout(WAIT_S):
            return await self.talk.said(words)

    async def stop(self, *signals: signal.Signals) -> Ended:
        """Send signals, SIGTERM if none is named, and wait for the end."""
        for number in signals or (signal.SIGTERM,):
            self.command.send(number)
        return await self.ended()

    async def ended(self) -> Ended:
        """Wait for the end."""
        async with asyncio.timeout(WAIT_S):
            code = await self.command.process.wait()
            await self.reading
        return Ended(code, b"", "".join([*self.opening, *self.talk.lines]))

    async def kill_all(self) -> None:
        """Kill parent, API and workers at one instant."""
        self.command.kill_group()
        await self.ended()


@dataclass(slots=True)
class Site:
    """A data folder beside a simulator, and the servers that are started over it."""

    folder: Path
    simulator: Simulator
    session: aiohttp.ClientSession
    servers: list[Server] = field(default_factory=list)

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.folder / "served"

    @property
    def input(self) -> Path:
        """The input of the batches."""
        return self.folder / "in.jsonl"

    def write_input(self, count: int, **body: object) -> Path:
        """Make an input of chat lines, each with a prompt of its own."""
        self.input.write_bytes(b"".join(chat_line(number, **body) for number in range(count)))
        return self.input

    async def launch(self, *flags: str, upstream: bool = True, **environment: str) -> Command:
        """Start `serve` over the folder, without waiting for anything."""
        arguments = ["serve", "--data", str(self.data), *flags]
        if "--port" not in flags:
            arguments += ["--port", "0"]
        if upstream:
            arguments += ["-u", self.simulator.url]
        return await start(arguments, self.folder, environment)

    async def serve(self, *flags: str, upstream: bool = True, lines: int = 5, **environment: str) -> Server:
        """Start `serve` and wait until it has told where it is."""
        command = await self.launch(*flags, upstream=upstream, **environment)
        opening: list[str] = []
        assert command.process.stderr is not None
        async with asyncio.timeout(WAIT_S):
            while len(opening) < lines and (line := await command.process.stderr.readline()):
                opening.append(line.decode())
        if not (opening and re.fullmatch(r"http://\S+/v1\n", opening[0])):
            command.kill_group()
            raise AssertionError("".join(opening) + (await command.ended()).stderr)
        talk = Talk()
        reading = asyncio.create_task(talk.read(command.process.stderr))
        server = Server(command, opening[0].strip(), opening, talk, reading, self.session)
        self.servers.append(server)
        return server

    async def check(
        self, server: Server, batch: dict[str, Any], *, repeats_max: int | None = None, path: Path | None = None
    ) -> Checked:
        """Prove the ledger of an ended batch of the input, or that at `path`, from its files as a client gets them."""
        output, errors = self.folder / "got.jsonl", self.folder / "got.errors.jsonl"
        output.write_bytes(await server.content(batch["output_file_id"]))
        errors.write_bytes(await server.content(batch["error_file_id"]))
        checked = check_run(
            path or self.input,
            output,
            errors,
            sim_stats=None if repeats_max is None else self.simulator.stats(),
            repeats_max=repeats_max or 0,
        )
        counts = batch["request_counts"]
        assert counts["completed"] == len(checked.succeeded)
        assert counts["total"] == len(checked.succeeded) + len(checked.failed)
        return checked


@contextlib.asynccontextmanager
async def site(folder: Path, **settings: Any) -> AsyncIterator[Site]:
    """Have a folder and a simulator; what was started is killed at the end."""
    timeout = aiohttp.ClientTimeout(total=WAIT_S)
    async with (
        Simulator(SimulatorSettings(**settings)) as simulator,
        aiohttp.ClientSession(timeout=timeout) as session,
    ):
        made = Site(folder, simulator, session)
        try:
            yield made
        finally:
            await _clear(made.servers)


async def _clear(servers: Iterable[Server]) -> None:
    for server in servers:
        server.command.kill_group()
        await server.ended()
