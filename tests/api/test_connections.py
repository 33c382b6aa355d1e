"""Connections that say nothing, half of something or take nothing: each ends, and none shuts the others out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from batchrunner.api import dispatch
from batchrunner.api.door import Door
from batchrunner.api.http import ApiParts
from batchrunner.api.routes import build_app, make_runner
from tests.api.serving import FORM_HEADERS, LINE, form, serving
from tests.hostile.peer import until

LIMIT_S = 20.0
IDLE_S = 0.3
FEW = 4
OK = b"HTTP/1.1 200 OK"
ASK = b"GET /v1/batches HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
FILE_BYTES = 32 * 1024 * 1024

Talk = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Caller:
    """Opens connections to one port and closes what is left of them at the end."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._talks: list[Talk] = []

    async def open(self, said: bytes = b"") -> Talk:
        """Open a connection and say something."""
        talk = await asyncio.open_connection("127.0.0.1", self.port)
        self._talks.append(talk)
        talk[1].write(said)
        return talk

    async def asked(self, talk: Talk | None = None) -> bytes:
        """Ask on an open connection, or on a new one; gives the status line."""
        reader, writer = talk or await self.open()
        writer.write(ASK)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.partition(b":")[2]))
        return head.partition(b"\r\n")[0]

    async def close(self) -> None:
        """Close them all."""
        for _, writer in self._talks:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def behind_a_door(parts: ApiParts, *, idle_s: float = 60.0) -> AsyncIterator[Caller]:
    """Have the API behind a door for few."""
    runner = make_runner(build_app(parts), shutdown_s=1.0, idle_s=idle_s)
    await runner.setup()
    assert runner.server is not None
    door = Door(runner.server, parts.vitals.busy, connections_max=FEW)
    listening = await asyncio.get_running_loop().create_server(door, "127.0.0.1", 0)
    caller = Caller(listening.sockets[0].getsockname()[1])
    try:
        async with asyncio.timeout(LIMIT_S):
            yield caller
    finally:
        await caller.close()
        listening.close()
        await runner.cleanup()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Read to the end, however it comes."""
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


UPLOAD = (
    "POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"
    f"Content-Type: {FORM_HEADERS['Content-Type']}\r\n\r\n"
).encode() + form(fields={"purpose": "batch"}, content=LINE)[:100]


@pytest.mark.parametrize("said", [b"", b"GET /v1/bat", ASK[:-2], b"POST /v1/files HTTP/1.1\r\nX-Long: " + b"a" * 4000])
async def test_connection_without_a_whole_head_is_ended(tmp_path: Path, said: bytes) -> None:
    async with serving(tmp_path) as served, behind_a_door(served.parts, idle_s=IDLE_S) as caller:
        reader, _ = await caller.open(said)

        assert await ended(reader) == b""


async def test_connection_between_two_requests_is_kept_for_a_while_and_then_ended(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, behind_a_door(served.parts, idle_s=IDLE_S) as caller:
        talk = await caller.open()

        assert [await caller.asked(talk), await caller.asked(talk)] == [OK, OK]
        assert await ended(talk[0]) == b""


async def test_crowd_that_says_nothing_shuts_nobody_out(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, behind_a_door(served.parts) as caller:
        first = await caller.open()
        assert await caller.asked(first) == OK
        crowd = [await caller.open(ASK[:10]) for _ in range(3 * FEW)]

        assert await caller.asked() == OK

        ends = [asyncio.create_task(ended(reader)) for reader, _ in [first, *crowd]]
        # The last ones are still there, all before them were ended.
        assert set(await asyncio.gather(*ends[: -FEW + 1])) == {b""}
        assert not any(end.done() for end in ends[-FEW + 1 :])
        await caller.close()
        await asyncio.gather(*ends)


async def test_connection_is_refused_while_all_others_are_busy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as served, behind_a_door(served.parts) as caller:
        busy = served.parts.vitals.busy
        talks = [await caller.open(UPLOAD) for _ in range(FEW)]
        await until(lambda: len(busy) == FEW)

        async with served.session.get(f"http://127.0.0.1:{caller.port}/v1/batches") as answer:
            refused = orjson.loads(await answer.read())
        talks[0][1].close()
        await until(lambda: len(busy) < FEW)
        again = await caller.asked()

        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert refused["error"]["code"] == "busy"
        assert again == OK
        assert "4 requests are under way, one is refused" in caplog.text


async def test_caller_who_takes_nothing_of_a_download_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "TAKE_IDLE_S", IDLE_S)
    caplog.set_level(logging.DEBUG)
    async with serving(tmp_path) as served, behind_a_door(served.parts) as caller:
        reading, busy = served.parts.reading, served.parts.vitals.busy
        file = (await served.upload(LINE + b" " * FILE_BYTES)).json
        deaf = socket.create_connection(("127.0.0.1", caller.port))
        deaf.sendall(f"GET /v1/files/{file['id']}/content HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        await until(lambda: bool(reading.names()))

        await until(lambda: not reading.names() and not busy)

        assert 0 < await asyncio.to_thread(drained, deaf) < FILE_BYTES
        assert "the caller hung up" in caplog.text
        assert await caller.asked() == OK


def drained(deaf: socket.socket) -> int:
    """Count what still comes."""
    taken = 0
    with deaf, contextlib.suppress(ConnectionError):
        while chunk := deaf.recv(1 << 20):
            taken += len(chunk)
    return taken
