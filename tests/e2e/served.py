"""A server as its users have it: `batchrunner serve` in processes of its own, a client, and its processes to kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from batchrunner.simulate import Simulator, SimulatorSettings
from tests.e2e.harness import Command, Ended, chat_line, start
from tests.invariants import Checked, check_run

WAIT_S = 60.0
LOOK_S = 0.02
TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(slots=True)
class Server:
    """A running `serve`. Its talk is read all the time, so that no pipe fills."""

    command: Command
    base_url: str
    opening: list[str]
    reading: asyncio.Task[None]
    talk: list[str]
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
        return self.child("batchrunner.app")

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

    async def until_ready(self) -> None:
        """Wait until its worker has reported."""
        async with asyncio.timeout(WAIT_S):
            while not (await self.ready())[1]["checks"]["workers"].get("detail", "").startswith("1 of"):
                pass

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

    async def batch_when(
        self, batch_id: str, is_reached: Callable[[dict[str, Any]], bool], *, within_s: float = WAIT_S
    ) -> dict[str, Any]:
        """Ask for a batch until it is as wanted; the API may be gone for a while."""
        async with asyncio.timeout(within_s):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    batch: dict[str, Any] = await self.get(f"/batches/{batch_id}")
                    if is_reached(batch):
                        return batch
                await asyncio.sleep(LOOK_S)  # real time: the server is another process

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
            while True:
                for line in self.talk:
                    if words in line:
                        return line
                assert not self.reading.done(), f"it ended without saying {words!r}: {''.join(self.talk)}"
                await asyncio.sleep(LOOK_S)  # real time: the server is another process

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
        return Ended(code, b"", "".join([*self.opening, *self.talk]))

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
        talk: list[str] = []
        server = Server(
            command, opening[0].strip(), opening, asyncio.create_task(_read(command, talk)), talk, self.session
        )
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


async def died(process: psutil.Process) -> None:
    """Wait for the death of a process, whose parent need not have noticed."""
    loop, dead = asyncio.get_running_loop(), asyncio.Event()
    pidfd = os.pidfd_open(process.pid)
    loop.add_reader(pidfd, dead.set)
    try:
        async with asyncio.timeout(WAIT_S):
            await dead.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def until(is_reached: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again until something is so."""
    async with asyncio.timeout(WAIT_S):
        while not await is_reached():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(LOOK_S)  # real time: the server is another process


async def _read(command: Command, talk: list[str]) -> None:
    assert command.process.stderr is not None
    while line := await command.process.stderr.readline():
        talk.append(line.decode(errors="replace"))


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
