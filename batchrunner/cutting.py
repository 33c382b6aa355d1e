"""Cuts a stream of bytes into blocks of whole lines, split at 0x0A only, with flat memory.

How the bytes are chunked makes no difference to where the cuts lie. What a line means is somebody else's business.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

_BOM = b"\xef\xbb\xbf"
_OPEN, _CLOSE = b"{}"


class Block(msgspec.Struct, frozen=True, gc=False):
    """Consecutive physical lines. `is_plain`: each begins with `{` and ends with `}` directly before its 0x0A."""

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
        self._buffer = bytearray()
        self._has_begun = False
        self._byte_start = 0
        self._first_line = 1
        # In the buffer: where the unfinished line begins, how far it was searched, and the whole lines before it.
        self._line_start = 0
        self._searched = 0
        self._line_count = 0
        self._is_plain = True
        # Bytes of a line that is too long and has not ended yet; they are counted, not kept.
        self._dropped_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[Block | LongLine]:
        """Take the next bytes and give what they complete. The iterator has to be used up before the next call."""
        if self._dropped_bytes:
            end = chunk.find(b"\n")
            if end < 0:
                self._dropped_bytes += len(chunk)
                return
            yield self._long_line(self._dropped_bytes + end)
            chunk = chunk[end + 1 :]
        self._buffer += chunk
        if self._has_begun or len(self._buffer) >= len(_BOM):
            self._skip_mark()
            yield from self._whole_lines()

    def finish(self) -> Iterator[Block | LongLine]:
        """Give what is left; the last line needs no 0x0A. Nothing can be fed after it."""
        if not self._has_begun:
            self._skip_mark()
            yield from self._whole_lines()
        if self._dropped_bytes:
            yield self._long_line(self._dropped_bytes)
            return
        size = len(self._buffer) - self._line_start
        if size:
            if self._line_count and len(self._buffer) > self._bytes_max:
                yield self._cut()
            self._add_line(len(self._buffer))
            self._line_start = len(self._buffer)
        if self._line_count:
            yield self._cut()

    def _skip_mark(self) -> None:
        if not self._has_begun and self._buffer.startswith(_BOM):
            del self._buffer[: len(_BOM)]
            self._byte_start = len(_BOM)
        self._has_begun = True

    def _whole_lines(self) -> Iterator[Block | LongLine]:
        buffer, find = self._buffer, self._buffer.find
        bytes_max, lines_max, line_bytes_max = self._bytes_max, self._lines_max, self._line_bytes_max
        end = find(b"\n", self._searched)
        while end >= 0:
            size = end - self._line_start
            # The line does not fit into the block, or must stand alone.
            if self._line_count and (end >= bytes_max or size > line_bytes_max):
                yield self._cut()
                end = size
            if size > line_bytes_max:
                del buffer[: size + 1]
                yield self._long_line(size)
            else:
                self._add_line(end)
                if self._line_count == lines_max:
                    yield self._cut()
            end = find(b"\n", self._line_start)
        self._searched = len(buffer)
        if len(buffer) - self._line_start > line_bytes_max:
            if self._line_count:
                yield self._cut()
            self._dropped_bytes = len(buffer)
            buffer.clear()
            self._searched = 0

    def _add_line(self, end: int) -> None:
        start, buffer = self._line_start, self._buffer
        if end == start or buffer[start] != _OPEN or buffer[end - 1] != _CLOSE:
            self._is_plain = False
        self._line_start = end + 1
        self._line_count += 1

    def _cut(self) -> Block:
        """Take the whole lines before the unfinished one out of the buffer."""
        end = self._line_start
        with memoryview(self._buffer) as view:
            content = bytes(view[:end])
        del self._buffer[:end]
        block = Block(content, self._byte_start, self._first_line, self._line_count, self._is_plain)
        self._byte_start += end
        self._first_line += self._line_count
        self._line_start, self._line_count, self._is_plain = 0, 0, True
        return block

    def _long_line(self, size: int) -> LongLine:
        line = LongLine(self._first_line, size)
        self._byte_start += size + 1
        self._first_line += 1
        self._dropped_bytes = 0
        return line
