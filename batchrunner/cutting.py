"""Cuts a stream of bytes into blocks of whole lines, split at 0x0A only, with flat memory.

How the bytes are chunked makes no difference to where the cuts lie. What a line means is somebody else's business.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

_BOM = b"\xef\xbb\xbf"
_OPEN, _CLOSE, _RETURN = b"{}\r"


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
        start, count, is_plain = self._line_start, self._line_count, self._is_plain
        if count and len(self._buffer) > max(start, self._bytes_max):
            yield self._cut(start, count, is_plain=is_plain)
            start, count, is_plain = 0, 0, True
        if start < len(self._buffer):
            is_plain = is_plain and _is_plain(self._buffer, start, len(self._buffer))
            count += 1
        if count:
            yield self._cut(len(self._buffer), count, is_plain=is_plain)

    def _skip_mark(self) -> None:
        if not self._has_begun and self._buffer.startswith(_BOM):
            del self._buffer[: len(_BOM)]
            self._byte_start = len(_BOM)
        self._has_begun = True

    def _whole_lines(self) -> Iterator[Block | LongLine]:
        buffer, find = self._buffer, self._buffer.find
        bytes_max, lines_max, line_bytes_max = self._bytes_max, self._lines_max, self._line_bytes_max
        start, count, is_plain = self._line_start, self._line_count, self._is_plain
        opening, closing = _OPEN, _CLOSE
        # Mostly all that is held is too little for any limit, and no line needs to be measured.
        is_tight = len(buffer) > min(bytes_max, line_bytes_max)
        end = find(b"\n", self._searched)
        while end >= 0:
            # The line does not fit into the block, or must stand alone.
            if is_tight and count and (end >= bytes_max or end - start > line_bytes_max):
                yield self._cut(start, count, is_plain=is_plain)
                start, end, count, is_plain = 0, end - start, 0, True
            if is_tight and end - start > line_bytes_max:
                del buffer[: end + 1]
                yield self._long_line(end)
            else:
                if is_plain and (buffer[end - 1] != closing or buffer[start] != opening):
                    is_plain = _is_plain(buffer, start, end)
                start = end + 1
                count += 1
                if count == lines_max:
                    yield self._cut(start, count, is_plain=is_plain)
                    start, count, is_plain = 0, 0, True
            end = find(b"\n", start)
        if len(buffer) - start > line_bytes_max:
            if count:
                yield self._cut(start, count, is_plain=is_plain)
            self._dropped_bytes = len(buffer)
            buffer.clear()
            start, count, is_plain = 0, 0, True
        self._line_start, self._line_count, self._is_plain, self._searched = start, count, is_plain, len(buffer)

    def _cut(self, end: int, count: int, *, is_plain: bool) -> Block:
        """Take whole lines out of the buffer."""
        with memoryview(self._buffer) as view:
            content = bytes(view[:end])
        del self._buffer[:end]
        block = Block(content, self._byte_start, self._first_line, count, is_plain)
        self._byte_start += end
        self._first_line += count
        return block

    def _long_line(self, size: int) -> LongLine:
        line = LongLine(self._first_line, size)
        self._byte_start += size + 1
        self._first_line += 1
        self._dropped_bytes = 0
        return line


def _is_plain(buffer: bytearray, start: int, end: int) -> bool:
    """Tell whether a line begins with `{` and ends with `}`, before a carriage return at most."""
    if end > start and buffer[end - 1] == _RETURN:
        end -= 1
    return end - start > 1 and buffer[start] == _OPEN and buffer[end - 1] == _CLOSE
