"""Cuts a stream of bytes into blocks of whole lines, split at 0x0A only, with flat memory.

How the bytes are chunked makes no difference to where the cuts lie. What a line means is somebody else's business.
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
    """Consecutive physical lines. `is_plain`: each begins with `{` and ends with `}` before its line end."""

    content: bytes
    byte_start: int
    first_line: int
    line_count: int
    is_plain: bool

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
    """One pass over one input. A block has at most `lines_max` lines and `bytes_max` bytes, or is a single longer line.

    Blocks are consecutive and cover the input, but for a byte order mark at its start and lines over `line_bytes_max`.
    """

    def __init__(self, *, lines_max: int, bytes_max: int, line_bytes_max: int) -> None:
        self._lines_max = lines_max
        self._bytes_max = bytes_max
        self._line_bytes_max = line_bytes_max
        self._has_begun = False
        self._byte_start = 0
        self._first_line = 1
        # The whole lines of the next block, each with its 0x0A, and the line that has not ended yet.
        self._lines: list[bytes] = []
        self._held_bytes = 0
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
            return
        if self._buffer:
            if self._lines and self._held_bytes + len(self._buffer) > self._bytes_max:
                yield self._cut()
            self._lines.append(bytes(self._buffer))
        if self._lines:
            yield self._cut()

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
        if b"\n" not in chunk:
            self._buffer += chunk
        else:
            lines = BytesIO(chunk).readlines()
            if self._buffer:
                self._buffer += lines[0]
                lines[0] = bytes(self._buffer)
                self._buffer.clear()
            if not chunk.endswith(b"\n"):
                self._buffer += lines.pop()
            yield from self._take(lines)
        if len(self._buffer) > self._line_bytes_max:
            if self._lines:
                yield self._cut()
            self._dropped_bytes = len(self._buffer)
            self._buffer.clear()

    def _take(self, lines: list[bytes]) -> Iterator[Block | LongLine]:
        """Take whole lines, and give the blocks that they fill."""
        size_bytes = self._held_bytes + sum(map(len, lines))
        if size_bytes > min(self._bytes_max, self._line_bytes_max):
            yield from self._take_measured(lines)
            return
        # Mostly all that is held is too little for any limit, and no line needs to be measured.
        start = 0
        while start + self._lines_max <= len(self._lines) + len(lines):
            end = start + self._lines_max - len(self._lines)
            self._lines += lines[start:end]
            start = end
            yield self._cut()
        rest = lines[start:]
        self._lines += rest
        self._held_bytes = size_bytes if start == 0 else sum(map(len, rest))

    def _take_measured(self, lines: list[bytes]) -> Iterator[Block | LongLine]:
        for line in lines:
            size_bytes = len(line) - 1
            is_too_long = size_bytes > self._line_bytes_max
            # The line does not fit into the block, or must stand alone.
            if self._lines and (is_too_long or self._held_bytes + len(line) > self._bytes_max):
                yield self._cut()
            if is_too_long:
                yield self._long_line(size_bytes)
                continue
            self._lines.append(line)
            self._held_bytes += len(line)
            if len(self._lines) == self._lines_max:
                yield self._cut()

    def _cut(self) -> Block:
        """Make a block of the lines held."""
        lines = self._lines
        block = Block(b"".join(lines), self._byte_start, self._first_line, len(lines), _are_plain(lines))
        self._byte_start += len(block.content)
        self._first_line += len(lines)
        self._lines, self._held_bytes = [], 0
        return block

    def _long_line(self, size: int) -> LongLine:
        line = LongLine(self._first_line, size)
        self._byte_start += size + 1
        self._first_line += 1
        self._dropped_bytes = 0
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
