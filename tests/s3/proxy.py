"""A proxy in front of an S3 service, in a thread of its own: it counts requests and spoils those that a rule names."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

_CHUNK = 1 << 18
_BUSY = (
    b"HTTP/1.1 %d %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    b"<?xml version='1.0'?><Error><Code>%s</Code><Message>spoilt</Message></Error>"
)


class Fault(Enum):
    """What becomes of a request."""

    BUSY = "answered 503 and not passed on"
    FULL = "answered 507 and not passed on"
    DENIED = "answered 403 and not passed on"
    CUT = "not passed on, the connection is closed"
    LOST = "passed on, and the answer is lost"
    HELD = "not passed on until `release`"


_ANSWERS = {
    Fault.BUSY: (503, b"SlowDown"),
    Fault.FULL: (507, b"InsufficientStorage"),
    Fault.DENIED: (403, b"AccessDenied"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came: `number` counts from 1."""

    number: int
    method: str
    path: str
    query: str

    @property
    def kind(self) -> str:
        """The operation, as S3 calls it."""
        words = [word.partition("=")[0] for word in self.query.split("&")]
        if "uploadId" in words:
            return {"PUT": "UploadPart", "POST": "Complete", "DELETE": "Abort"}.get(self.method, "ListParts")
        if "uploads" in words:
            return "CreateUpload" if self.method == "POST" else "ListUploads"
        if self.method == "GET" and "list-type" in words:
            return "List"
        return self.method


class Proxy:
    """Passes connections on to `upstream`. `rule` says for each request what goes wrong with it, if anything does."""

    def __init__(self, upstream: str) -> None:
        self.rule: Callable[[Request], Fault | None] = lambda _request: None
        self.counts: Counter[str] = Counter()
        self.port = 0
        self._upstream = urlsplit(upstream)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._free: asyncio.Event | None = None
        self._number = 0
        self._thread = threading.Thread(target=self._run, name="s3-proxy", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def release(self) -> None:
        """Let requests that are held go on."""
        assert self._free is not None
        self._loop.call_soon_threadsafe(self._free.set)

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Close everything."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._free = asyncio.Event()
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=_CHUNK))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, forth = await asyncio.open_connection(self._upstream.hostname, self._upstream.port, limit=_CHUNK)
        except OSError:
            writer.close()
            return
        answering = asyncio.create_task(self._pump(back, writer))
        try:
            while await self._pass_on(reader, writer, forth, back, answering):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        finally:
            forth.close()
            writer.close()
            answering.cancel()

    async def _pump(self, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await back.read(_CHUNK):
                writer.write(chunk)
                await writer.drain()
        writer.close()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        forth: asyncio.StreamWriter,
        back: asyncio.StreamReader,
        answering: asyncio.Task[None],
    ) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._number += 1
        request = Request(self._number, method, urlsplit(target).path, urlsplit(target).query)
        self.counts[request.kind] += 1
        fault = self.rule(request)
        if fault is Fault.HELD:
            assert self._free is not None
            self._free.clear()
            await self._free.wait()
        elif fault is Fault.CUT:
            return False
        elif fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            body_bytes = len(_BUSY.partition(b"\r\n\r\n")[2]) - 2 + len(code)
            writer.write(_BUSY % (status, code, body_bytes, code))
            await writer.drain()
            return False
        if fault is Fault.LOST:
            answering.cancel()
            await asyncio.wait({answering})
        forth.write(head)
        left = int(headers.get("content-length", "0"))
        if fault is Fault.LOST and headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while left:
            chunk = await reader.read(min(left, _CHUNK))
            if not chunk:
                return False
            left -= len(chunk)
            forth.write(chunk)
            await forth.drain()
        if fault is Fault.LOST:
            # What it was asked for is done when the service answers, whoever hears it.
            while (await back.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 "):
                pass
            return False
        return True


@contextlib.contextmanager
def proxied(upstream: str) -> Iterator[Proxy]:
    """Run a proxy for a while."""
    proxy = Proxy(upstream)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
