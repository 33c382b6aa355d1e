"""A server under measurement: `serve` in processes of its own, a client of it, and what its processes cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from bench.inputs import LINE_URL
from bench.measuring import ENVIRONMENT, batchrunner, peak_rss_bytes, pin, session_pids
from bench.upstream import Upstream

API, WORKER = "batchrunner.serving", "batchrunner.working"
TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
_CHUNK_BYTES = 256 * 1024
_PATIENCE_S = 3600.0
_LOOK_S = 0.05
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Served:
    """A running server. Its talk goes to a file beside its data folder."""

    def __init__(self, folder: Path, base_url: str, *options: str, core: int | None = None) -> None:
        self.data = folder / "data"
        self.talk = folder / "serve.log"
        command = batchrunner("serve", "--port", "0", "--data", str(self.data), "-u", base_url, *options)
        self.began_s = time.perf_counter()
        with self.talk.open("wb") as talk:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=talk, env=ENVIRONMENT, start_new_session=True
            )
        pin(self._process.pid, core)
        self.base_url = self._first_line()

    def _first_line(self) -> str:
        while not (said := self.talk.read_bytes()).count(b"\n"):
            if self._process.poll() is not None:
                raise RuntimeError(f"the server did not start: {said.decode(errors='replace')}")
            time.sleep(_LOOK_S / 10)
        first = said.splitlines()[0].decode()
        if not first.startswith("http"):
            raise RuntimeError(f"the server did not start: {said.decode(errors='replace')}")
        return first

    def pids(self, module: str) -> list[int]:
        """Its processes that run a module."""
        found = []
        for pid in session_pids(self._process.pid):
            with contextlib.suppress(OSError):
                if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    found.append(pid)
        return found

    def cpu_s(self, module: str) -> float:
        """User + system time so far of its processes that run a module."""
        return sum(map(_cpu_s, self.pids(module)))

    def peak_bytes(self, module: str) -> int:
        """The most memory that one of its processes that run a module has had."""
        return max((peak_rss_bytes(pid) or 0 for pid in self.pids(module)), default=0)

    def kill(self) -> None:
        """End all its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _cpu_s(pid: int) -> float:
    # The name in brackets may hold blanks; user and system time are the 14th and 15th word of the whole.
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / _TICKS_PER_S


@contextlib.contextmanager
def serving(folder: Path, upstream: Upstream, *options: str, core: int | None = None) -> Iterator[Served]:
    """Start a server and kill it at the end."""
    folder.mkdir(exist_ok=True)
    served = Served(folder, upstream.base_url, *options, core=core)
    try:
        yield served
    finally:
        served.kill()


class Client:
    """A client of one server."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self.session = session
        self.base_url = base_url

    async def ask(self, method: str, path: str, **options: Any) -> Any:
        """Ask for JSON."""
        async with self.session.request(method, self.base_url + path, **options) as answer:
            found = await answer.json(content_type=None)
            if answer.status != 200:
                raise RuntimeError(f"{method} {path}: {answer.status} {found}")
            return found

    async def upload(self, path: Path) -> str:
        """Upload a batch file, give its id."""
        head, tail, boundary = _form(path)
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        found = await self.ask("POST", "/files", **body_of(path, head, tail, headers))
        return str(found["id"])

    async def create(self, file_id: str) -> str:
        """Make a batch of a file, give its id."""
        wanted = {"input_file_id": file_id, "endpoint": LINE_URL, "completion_window": "24h"}
        return str((await self.ask("POST", "/batches", json=wanted))["id"])

    async def when(self, batch_id: str, *statuses: str) -> dict[str, Any]:
        """Wait until a batch has one of the statuses."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                batch: dict[str, Any] = await self.ask("GET", f"/batches/{batch_id}")
                if batch["status"] in statuses:
                    return batch
                if batch["status"] in TERMINAL:
                    raise RuntimeError(f"the batch is {batch['status']}: {batch}")
                await asyncio.sleep(_LOOK_S)


@contextlib.asynccontextmanager
async def client_of(base_url: str) -> AsyncIterator[Client]:
    """Have a client."""
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, base_url)


def body_of(path: Path, head: bytes, tail: bytes, headers: dict[str, str]) -> dict[str, Any]:
    """A file between two pieces as the body of a request: read and sent alike, whoever takes it."""

    async def pieces() -> AsyncIterator[bytes]:
        yield head
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
        yield tail

    length = len(head) + path.stat().st_size + len(tail)
    return {"data": pieces(), "headers": {**headers, "Content-Length": str(length)}}


def _form(path: Path) -> tuple[bytes, bytes, str]:
    boundary = "batchrunner-bench"
    purpose = f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    file = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{path.name}"\r\n\r\n'
    return (purpose + file).encode(), f"\r\n--{boundary}--\r\n".encode(), boundary
