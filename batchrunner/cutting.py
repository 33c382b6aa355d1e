"""Cuts a stream of bytes into blocks of whole lines, split at 0x0A only, and tells where shards begin; flat memory.

How the bytes are chunked makes no difference to where shards begin. What a line means is somebody else's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from operator import itemgetter

import msgspec

_BOM = b"\xef\xbb\xbf"
_OPEN, _CLOSE = b"{}"
_first = itemgetter(0)
_last_but_one = itemgetter(-2)


class Block(msgspec.Struct, frozen=True, gc=False):
    """Consecutive physical lines of one shard, as many as arrived together.

    `is_first`: a shard begins with it. `is_plain`: each line begins with `{` and ends with `}` before its line end.
    """

    content: bytes
    byte_start: int
    first_line: int
    line_count: int
    is_plain: bool
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

    Blocks are consecutive and cover the input, but for a byte order mark at its start and lines over `line_bytes_max`.
    Nothing is held but the line that has not ended yet: a block is given while its bytes are still in the cache.
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

    def feed(self, chunk: bytes) -> Iterator[Block | LongLine]:
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

    def finish(self) -> Iterator[Block | LongLine]:
        """Give what is left; the last line needs no 0x0A. Nothing can be fed after it."""
        if not self._has_begun:
            yield from self._split(self._begin())
        if self._dropped_bytes:
            yield self._long_line(self._dropped_bytes)
        elif self._buffer:
            yield from self._cut(bytes(self._buffer))

    def _begin(self) -> bytes:
        """Give the first bytes without their mark."""
        self._has_begun = True
        content = bytes(self._buffer)
        self._buffer.clear()
        if content.startswith(_BOM):
            self._byte_start = len(_BOM)
            return content[len(_BOM) :]
        return content

    def _split(self, chunk: bytes) -> Iterator[Block | LongLine]:
        end = chunk.rfind(b"\n") + 1
        if not end:
            self._buffer += chunk
        else:
            content = b"".join((self._buffer, memoryview(chunk)[:end])) if self._buffer else chunk[:end]
            self._buffer[:] = chunk[end:]
            yield from self._cut(content)
        if len(self._buffer) > self._line_bytes_max:
            self._dropped_bytes = len(self._buffer)
            self._buffer.clear()

    def _cut(self, content: bytes) -> Iterator[Block | LongLine]:
        """Give whole lines as the blocks that they make, and one by one those that are too long."""
        lines = BytesIO(content).readlines()
        start = position = 0
        while start < len(lines):
            if len(lines[start]) - 1 > self._line_bytes_max:
                line_count, size_bytes = 1, len(lines[start])
                yield self._long_line(size_bytes - 1)
            else:
                line_count, size_bytes = self._fit(lines, start, len(content) - position)
                part = lines if line_count == len(lines) else lines[start : start + line_count]
                yield self._block(content[position : position + size_bytes], part)
            start += line_count
            position += size_bytes

    def _fit(self, lines: list[bytes], start: int, size_bytes: int) -> tuple[int, int]:
        """Give how many lines, and bytes, go into one shard: the one begun, or another if not even the first fits."""
        line_bytes = len(lines[start])
        is_full = self._shard_lines == self._lines_max or self._shard_bytes + line_bytes > self._bytes_max
        if self._shard_lines and is_full:
            self._shard_lines = self._shard_bytes = 0
        line_count = min(len(lines) - start, self._lines_max - self._shard_lines)
        room_bytes = self._bytes_max - self._shard_bytes
        if size_bytes <= min(room_bytes, self._line_bytes_max):
            # Mostly all that came is too little for any limit of bytes, and no line needs to be measured.
            is_all = line_count == len(lines) - start
            return line_count, size_bytes if is_all else sum(map(len, lines[start : start + line_count]))
        taken_count, taken_bytes = 1, line_bytes
        for line in lines[start + 1 : start + line_count]:
            if len(line) - 1 > self._line_bytes_max or taken_bytes + len(line) > room_bytes:
                break
            taken_count += 1
            taken_bytes += len(line)
        return taken_count, taken_bytes

    def _block(self, content: bytes, lines: list[bytes]) -> Block:
        is_first = not self._shard_lines
        block = Block(content, self._byte_start, self._first_line, len(lines), _are_plain(lines), is_first)
        self._byte_start += len(content)
        self._first_line += len(lines)
        self._shard_lines += len(lines)
        self._shard_bytes += len(content)
        return block

    def _long_line(self, size: int) -> LongLine:
        line = LongLine(self._first_line, size)
        self._byte_start += size + 1
        self._first_line += 1
        self._dropped_bytes = self._shard_lines = self._shard_bytes = 0
        return line


def _are_plain(lines: list[bytes]) -> bool:
    if set(map(_first, lines)) != {_OPEN}:
        return False
    whole = lines if lines[-1].endswith(b"\n") else lines[:-1]
    # Nearly always it can be told from the byte before each 0x0A; no line is shorter than two bytes here.
    if set(map(_last_but_one, whole)) <= {_CLOSE}:
        return whole is lines or _is_plain(lines[-1])
    return all(map(_is_plain, lines))


def _is_plain(line: bytes) -> bool:
    """Tell whether a line begins with `{` and ends with `}`, before a carriage return at most."""
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    return len(line) > 1 and line[0] == _OPEN and line[-1] == _CLOSE
