"""An HTTP peer that does exactly what a script says, to the byte and the TCP flag, and a clock that only tests move."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

LIMIT_S = 20.0
DRIP_S = 0.05


class SteppedClock:
    """Clock that stands still until a test steps it."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def step(self, duration_s: float) -> None:
        self.seconds += duration_s

    def monotonic_s(self) -> float:
        return self.seconds

    def boot_s(self) -> float:
        return self.seconds

    def boot_id(self) -> str:
        return "boot"

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds - 1000.0)

    async def sleep(self, duration_s: float) -> None:
        raise NotImplementedError


class Talk:
    """The peer's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.requests: list[bytes] = []
        self.is_left = False

    async def request(self) -> bytes:
        """Read one whole request, head and body."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
        )
        request = head + await self._reader.readexactly(length)
        self.requests.append(request)
        return request

    async def head(self) -> bytes:
        """Read a request's head only."""
        return await self._reader.readuntil(b"\r\n\r\n")

    def say(self, message: bytes) -> None:
        self._writer.write(message)

    async def say_on(self, message: bytes) -> None:
        """Say no faster than the other side listens."""
        self._writer.write(message)
        await self._writer.drain()

    async def say_slowly(self, message: bytes) -> None:
        """Every byte in a packet of its own, as far as the kernel lets it."""
        for position in range(len(message)):
            self._writer.write(message[position : position + 1])
            await self._writer.drain()
            await asyncio.sleep(0)

    async def drip(self) -> None:
        """A byte now and then until the other side has had enough."""
        leaving = asyncio.ensure_future(self.gone())
        try:
            while not leaving.done():
                self._writer.write(b".")
                await self._writer.drain()
                await asyncio.wait({leaving}, timeout=DRIP_S)
        finally:
            leaving.cancel()

    async def flush(self) -> None:
        """Wait until the kernel has everything that was said."""
        while self._writer.transport.get_write_buffer_size():  # noqa: ASYNC110 - transports have no event for it
            await asyncio.sleep(0)

    def hang_up(self) -> None:
        """FIN, after what was said."""
        self._writer.close()

    def reset(self) -> None:
        """RST, and what was not yet read is lost."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the other side has closed."""
        try:
            while await self._reader.read(65536):
                pass
        except ConnectionError:
            pass
        self.is_left = True

    def drop(self) -> None:
        self._writer.transport.abort()


Script = Callable[[Talk], Awaitable[None]]


class Peer:
    """A listening script. `talks` holds all connections in the order of their coming."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.talks: list[Talk] = []
        self.url = ""
        self.errors: list[BaseException] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, *, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", port, ssl=tls, limit=64 * 1024 * 1024, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]
        host = "localhost" if tls else "127.0.0.1"
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}/v1"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = Talk(reader, writer)
        self.talks.append(talk)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self.script(talk)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()
        except asyncio.CancelledError:
            writer.transport.abort()
        except Exception as error:
            self.errors.append(error)
            writer.transport.abort()
            raise
        finally:
            self._tasks.discard(task)

    async def die(self) -> None:
        """Stop listening and reset everything, as a killed process does."""
        if self._server is not None:
            self._server.close()
        for talk in self.talks:
            talk.drop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def requests(self) -> list[bytes]:
        return [request for talk in self.talks for request in talk.requests]


@asynccontextmanager
async def peer_with(script: Script, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Peer]:
    """Run a peer, and fail when its script broke."""
    peer = Peer(script)
    await peer.listen(tls=tls)
    try:
        yield peer
    finally:
        await peer.die()
    assert peer.errors == []


def answer(body: bytes = b"{}", status: str = "200 OK", **headers: str) -> bytes:
    """A well-formed answer; header names are given with underscores."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def obliging(talk: Talk) -> None:
    """Answer every request with its own body, for ever."""
    while True:
        request = await talk.request()
        talk.say(answer(request.partition(b"\r\n\r\n")[2], Content_Type="application/json"))


async def until(condition: Callable[[], bool]) -> None:
    """Give the loop turns until something has happened; a hang ends as a failure."""

    async def watch() -> None:
        while not condition():  # noqa: ASYNC110 - what is waited for is on the other side of a socket
            await asyncio.sleep(0)

    await asyncio.wait_for(watch(), LIMIT_S)
