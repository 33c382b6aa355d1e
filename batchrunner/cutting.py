"""Cuts a stream of bytes into whole lines, split at 0x0A only, and these into shards; flat memory.

How the bytes are chunked makes no difference to where shards begin. What a line means is somebody else's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import SEEK_CUR, BytesIO
from itertools import islice

import msgspec

_BOM = b"\xef\xbb\xbf"


class Block(msgspec.Struct, frozen=True, gc=False):
    """Consecutive physical lines of one shard, as many as arrived together. `is_first`: a shard begins with it."""

    content: bytes
    byte_start: int
    first_line: int
    line_count: int
    is_first: bool

    @property
    def byte_end(self) -> int:
        """Where the next block begins."""
        return self.byte_start + len(self.content)


class LongLine(msgspec.Struct, frozen=True, gc=False):
    """A line longer than allowed, of which only the length is known. It lies in no block."""

    line_number: int
    size_bytes: int


def split_lines(block: bytes, first_line: int) -> Iterator[tuple[int, bytes]]:
    """Give number and bytes of each physical line, blank ones too, without their 0x0A."""
    start, line_number = 0, first_line
    find = block.find
    while (end := find(b"\n", start)) >= 0:
        yield line_number, block[start:end]
        start = end + 1
        line_number += 1
    if start < len(block):
        yield line_number, block[start:]


class Cutter:
    """One pass over one input. A shard has at most `lines_max` lines and `bytes_max` bytes, or is a single longer line.

        for run in cutter.feed(chunk):
            if isinstance(run, bytes):
                for block in cutter.blocks(run):

    A run is the whole lines that came together. It is cut into blocks before the next is taken, or what comes later is
    numbered wrong. Blocks are consecutive and cover the input, but for a byte order mark at its start and lines over
    `line_bytes_max`. Nothing is held but the line that has not ended yet: a run is given while its bytes are still in
    the cache.
    """

    def __init__(self, *, lines_max: int, bytes_max: int, line_bytes_max: int) -> None:
        self._lines_max = lines_max
        self._bytes_max = bytes_max
        self._line_bytes_max = line_bytes_max
        self._has_begun = False
        self._byte_start = 0
        self._first_line = 1
        # Of the shard that the next line may belong to.
        self._shard_lines = 0
        self._shard_bytes = 0
        # The line that has not ended yet.
        self._buffer = bytearray()
        # Bytes of a line that is too long and has not ended yet; they are counted, not kept.
        self._dropped_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[bytes | LongLine]:
        """Take the next bytes and give what they complete. The iterator has to be used up before the next call."""
        if not self._has_begun:
            self._buffer += chunk
            if len(self._buffer) < len(_BOM):
                return
            chunk = self._begin()
        if self._dropped_bytes:
            end = chunk.find(b"\n")
            if end < 0:
                self._dropped_bytes += len(chunk)
                return
            yield self._long_line(self._dropped_bytes + end)
            chunk = chunk[end + 1 :]
        yield from self._split(chunk)

    def finish(self) -> Iterator[bytes | LongLine]:
        """Give what is left; the last line needs no 0x0A. Nothing can be fed after it."""
        if not self._has_begun:
            yield from self._split(self._begin())
        if self._dropped_bytes:
            yield self._long_line(self._dropped_bytes)
        elif self._buffer:
            yield from self._runs(bytes(self._buffer))

    def blocks(self, run: bytes, line_count: int | None = None) -> Iterator[Block]:
        """Cut a run where shards begin. To know its number of lines spares most of the work."""
        lines = BytesIO(run)
        start = 0
        while start < len(run):
            if line_count is not None and self._has_room(line_count, len(run) - start):
                taken_count, end = line_count, len(run)
            else:
                taken_count, end = self._fit(lines, len(run) - start), lines.tell()
            yield self._block(run[start:end], taken_count)
            if line_count is not None:
                line_count -= taken_count
            start = end

    def _begin(self) -> bytes:
        """Give the first bytes without their mark."""
        self._has_begun = True
        content = bytes(self._buffer)
        self._buffer.clear()
        if content.startswith(_BOM):
            self._byte_start = len(_BOM)
            return content[len(_BOM) :]
        return content

    def _split(self, chunk: bytes) -> Iterator[bytes | LongLine]:
        end = chunk.rfind(b"\n") + 1
        if not end:
            self._buffer += chunk
        else:
            content = b"".join((self._buffer, memoryview(chunk)[:end])) if self._buffer else chunk[:end]
            self._buffer[:] = chunk[end:]
            yield from self._runs(content)
        if len(self._buffer) > self._line_bytes_max:
            self._dropped_bytes = len(self._buffer)
            self._buffer.clear()

    def _runs(self, content: bytes) -> Iterator[bytes | LongLine]:
        """Give whole lines together, but one by one those that are too long."""
        if len(content) <= self._line_bytes_max:
            yield content
            return
        start = end = 0
        for line in BytesIO(content):
            if len(line) - 1 > self._line_bytes_max:
                if start < end:
                    yield content[start:end]
                yield self._long_line(len(line) - 1)
                start = end + len(line)
            end += len(line)
        if start < end:
            yield content[start:end]

    def _has_room(self, line_count: int, size_bytes: int) -> bool:
        return self._shard_lines + line_count <= self._lines_max and self._shard_bytes + size_bytes <= self._bytes_max

    def _fit(self, lines: BytesIO, size_bytes: int) -> int:
        """Read the lines that go into one shard: the one begun, or another if not even the first fits. `size_bytes`: of
        all that are left.
        """
        taken_bytes = len(lines.readline())
        if self._shard_lines and not self._has_room(1, taken_bytes):
            self._shard_lines = self._shard_bytes = 0
        room_bytes = self._bytes_max - self._shard_bytes
        others = islice(lines, self._lines_max - self._shard_lines - 1)
        if size_bytes <= room_bytes:
            # Mostly all that is left is too little for the limit of bytes, and no line needs to be measured.
            return 1 + sum(map(bool, others))
        taken_count = 1
        for line in others:
            taken_bytes += len(line)
            if taken_bytes > room_bytes:
                lines.seek(-len(line), SEEK_CUR)
                break
            taken_count += 1
        return taken_count

    def _block(self, content: bytes, line_count: int) -> Block:
        block = Block(content, self._byte_start, self._first_line, line_count, not self._shard_lines)
        self._byte_start += len(content)
        self._first_line += line_count
        self._shard_lines += line_count
        self._shard_bytes += len(content)
        if self._shard_lines == self._lines_max:
            self._shard_lines = self._shard_bytes = 0
        return block

    def _long_line(self, size: int) -> LongLine:
        line = LongLine(self._first_line, size)
        self._byte_start += size + 1
        self._first_line += 1
        self._dropped_bytes = self._shard_lines = self._shard_bytes = 0
        return line
