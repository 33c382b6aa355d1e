"""Bombs, garbage, lies, slowness and broken connections: refused or let go, with bounded memory and nothing left over.

The server runs in a process of its own, whose peak memory the tests read.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from batchrunner.api.http import BODY_IDLE_S
from tests.api.hosting import MIB, Host, hosting
from tests.api.serving import BOUNDARY, LINE, form

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the server's memory from /proc")

HEAD = (
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{BOUNDARY}\r\n'
    'Content-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
).encode()
TAIL = f"\r\n--{BOUNDARY}--\r\n".encode()
PIECE = 256 * 1024
# What a request may take above what the server has anyhow.
ROOM_BYTES = 60 * MIB


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(tmp_path_factory.mktemp("host")) as host:
        # Every thread of the server opens the database once and keeps it.
        asyncio.run(warm_up(host))
        yield host


async def warm_up(host: Host) -> None:
    await asyncio.gather(*(upload(host, [HEAD + LINE * 5000 + TAIL]) for _ in range(32)))


@pytest.fixture
def host(shared: Host) -> Iterator[Host]:
    """The server, held to its memory, its open files and its folder."""
    shared.forget_peak()
    before_bytes, files = shared.peak_bytes(), shared.open_files()
    yield shared
    assert shared.peak_bytes() - before_bytes < ROOM_BYTES
    assert shared.peak_bytes() < 150 * MIB
    asyncio.run(settled(shared, files))


class Wire:
    """One connection, by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def begin(self, *, length: int | None = None, path: str = "/v1/files") -> None:
        sized = f"Content-Length: {length}" if length is not None else "Transfer-Encoding: chunked"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{sized}\r\n"
        self.writer.write(f"{head}Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n".encode())
        await self.writer.drain()

    async def send(self, piece: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """Read one answer; the server may go on to swallow what is still on its way."""
        async with asyncio.timeout(60):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            assert length is not None
            return int(head.split(b" ")[1]), await self.reader.readexactly(int(length[1]))


@contextlib.asynccontextmanager
async def wire(host: Host) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", host.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def upload(host: Host, pieces: Iterator[bytes] | list[bytes]) -> tuple[int, bytes]:
    """Send a chunked form; an answer may come, and the connection end, before all of it is out."""
    async with wire(host) as line:
        await line.begin()
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                await line.send(piece)
            line.writer.write(b"0\r\n\r\n")
            await line.writer.drain()
        return await line.answer()


def part(name: str, content: bytes) -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + content + b"\r\n"


@pytest.mark.slow
def test_300_mb_without_a_newline_are_refused_in_little_memory(host: Host) -> None:
    garbage = b"x" * PIECE

    status, body = asyncio.run(upload(host, iter([HEAD, *[garbage] * (300 * MIB // PIECE), TAIL])))

    assert status == 400
    assert b"Must be .jsonl" in body


@pytest.mark.slow
def test_300_mb_of_one_json_line_are_refused_in_little_memory(host: Host) -> None:
    """It begins like JSON, and its end never comes."""
    nested = b'{"a":[' + b"[]," * (PIECE // 3)
    more = b"[]," * (PIECE // 3)

    status, body = asyncio.run(upload(host, iter([HEAD, nested, *[more] * (300 * MIB // PIECE), TAIL])))

    assert status == 400
    assert b"Must be .jsonl" in body


@pytest.mark.slow
def test_200_mib_are_taken_in_little_memory(host: Host) -> None:
    content = LINE * (PIECE // len(LINE))
    count = 200 * MIB // len(content)

    status, body = asyncio.run(upload(host, iter([HEAD, *[content] * count, TAIL])))

    assert status == 200
    digest = hashlib.sha256()
    for _ in range(count):
        digest.update(content)
    assert digest.hexdigest().encode() in body


def test_thousands_of_parts_are_refused(host: Host) -> None:
    parts = b"".join(part(f"f{number}", b"x") for number in range(5000))

    status, _ = asyncio.run(upload(host, [parts + HEAD + LINE + TAIL]))

    assert status == 413


def test_a_field_without_an_end_is_refused(host: Host) -> None:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'.encode()

    status, _ = asyncio.run(upload(host, iter([head, *[b"p" * PIECE] * 80])))

    assert status == 413


@pytest.mark.parametrize(
    "header",
    [
        b"X-Long: " + b"h" * (8 * MIB) + b"\r\n\r\n",
        b"h" * (8 * MIB),
        b"".join(b"X-%d: y\r\n" % number for number in range(5000)) + b"\r\n",
        b"Content-Disposition: form-data\r\n\r\nx",
        b"Content-Disposition: attachment; name=file\r\n\r\nx",
        b"\r\nx",
        b"no colon\r\n\r\n",
        b"\x00\xff: \x00\r\n\r\n",
    ],
    ids=["long value", "long name", "many", "nameless", "no form-data", "none", "no colon", "binary"],
)
def test_bad_part_headers_are_refused(host: Host, header: bytes) -> None:
    status, _ = asyncio.run(upload(host, [f"--{BOUNDARY}\r\n".encode() + header + TAIL]))

    assert status == 400


def test_a_file_twice_is_refused(host: Host) -> None:
    raw = form(fields={"purpose": "batch"})

    status, body = asyncio.run(upload(host, [raw.removesuffix(TAIL[2:]) + raw]))

    assert status == 400
    assert b"more than one 'file'" in body


def test_what_follows_the_last_boundary_is_ignored(host: Host) -> None:
    status, _ = asyncio.run(upload(host, iter([HEAD + LINE + TAIL, *[b"--" * PIECE] * 20])))

    assert status == 200


@pytest.mark.parametrize("cut", [b"", HEAD[:30], HEAD, HEAD + LINE, HEAD + LINE + TAIL[:6]])
def test_a_form_that_ends_early_is_refused(host: Host, cut: bytes) -> None:
    status, body = asyncio.run(upload(host, [cut] if cut else []))

    assert status == 400
    assert b"multipart form could not be parsed" in body


def test_a_gigabyte_declared_and_cut_leaves_nothing(host: Host) -> None:
    async def cut() -> None:
        async with wire(host) as line:
            await line.begin(length=1 << 30)
            line.writer.write(HEAD + LINE * 50_000)
            await line.writer.drain()

    before = host.stored_names()
    asyncio.run(cut())
    asyncio.run(settled(host))

    assert host.stored_names() == before


def test_more_declared_than_a_file_may_have_is_refused_at_once(host: Host) -> None:
    async def declare() -> tuple[int, bytes]:
        async with wire(host) as line:
            await line.begin(length=9 << 30)
            return await line.answer()

    status, _ = asyncio.run(declare())

    assert status == 413


def test_uploads_that_are_broken_off_leave_nothing(host: Host) -> None:
    async def break_off(size: int) -> None:
        async with wire(host) as line:
            await line.begin()
            await line.send(HEAD + LINE * size)
            line.writer.transport.abort()

    async def many() -> None:
        await asyncio.gather(*(break_off(100 * number) for number in range(40)))
        await settled(host)

    before = host.stored_names()
    asyncio.run(many())

    assert host.stored_names() == before


_CLEAN_LOOKS = 3


async def begun(host: Host) -> None:
    """Wait until the server writes what it is being sent; each look asks it something, which takes its turn."""
    async with asyncio.timeout(60):
        while not any("~" in each for each in host.stored_names()):
            await upload(host, [HEAD[:40]])


async def settled(host: Host, open_files_max: int | None = None) -> None:
    """Wait until no half-written blob and no connection is left; each look asks the server, which takes its turn."""
    looks = 0
    for _ in range(1000):
        is_closed = open_files_max is None or host.open_files() <= open_files_max
        looks = looks + 1 if is_closed and not any("~" in each for each in host.stored_names()) else 0
        # What was sent last may not have been begun at the first look.
        if looks == _CLEAN_LOOKS:
            return
        await upload(host, [HEAD[:40]])
    raise AssertionError((host.open_files(), open_files_max, host.stored_names()))


def test_slow_clients_hold_up_nobody(host: Host) -> None:
    """Fifty uploads stand still half way; others go on, and the slow ones too when they wake up."""

    async def together() -> list[int]:
        async with contextlib.AsyncExitStack() as stack:
            slow = [await stack.enter_async_context(wire(host)) for _ in range(50)]
            for line in slow:
                await line.begin()
                await line.send(HEAD + LINE[:50])
            quick = await asyncio.wait_for(upload(host, [HEAD + LINE + TAIL]), 5)
            assert quick[0] == 200
            for line in slow:
                await line.send(LINE[50:] + TAIL)
                line.writer.write(b"0\r\n\r\n")
            return [(await line.answer())[0] for line in slow]

    assert asyncio.run(together()) == [200] * 50


def test_a_client_that_sends_nothing_is_let_go_in_a_minute() -> None:
    """The wait itself is a minute; what is held here is that it has an end."""
    assert 0 < BODY_IDLE_S <= 60


def test_bytes_of_the_boundary_inside_the_file_stay_bytes(host: Host) -> None:
    inside = f"\r\n--{BOUNDARY[:-1]}\r\n\r\n--{BOUNDARY}".encode()[: len(BOUNDARY) + 3]
    content = LINE + (inside + b"\r\n-\r\n--\r\n") * 3000

    whole = HEAD + content + TAIL
    for size in (1000, 7919):
        status, body = asyncio.run(upload(host, [whole[at : at + size] for at in range(0, len(whole), size)]))

        assert status == 200
        assert hashlib.sha256(content).hexdigest().encode() in body
