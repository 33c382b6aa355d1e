"""What lies between a connection that reads a media answer and the sink that keeps it: some pieces, never the whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache

from batchrunner.ports import AssetSink

# Beyond this the connection is not read on until the sink has taken what there is.
PIPE_BYTES_MAX = 1024 * 1024
_LABEL_CHARACTERS_MAX = 256


class MediaPipe:
    """Pieces that were read and are not written yet: fed by the connection, drained by the coroutine of its exchange.

    `on_written` hears how many bytes the sink has taken.
    """

    __slots__ = ("_chunks", "_has_ended", "_on_written", "_stirred", "sink", "waiting_bytes")

    def __init__(self, sink: AssetSink, on_written: Callable[[int], None]) -> None:
        self.sink = sink
        self.waiting_bytes = 0
        self._chunks: list[bytes] = []
        self._has_ended = False
        self._on_written = on_written
        self._stirred = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether the connection has to wait."""
        return self.waiting_bytes >= PIPE_BYTES_MAX

    def feed(self, chunk: bytes) -> None:
        """Add what was read."""
        self._chunks.append(chunk)
        self.waiting_bytes += len(chunk)
        self._stirred.set()

    def end(self) -> None:
        """Say that nothing more will come."""
        self._has_ended = True
        self._stirred.set()

    async def drain(self) -> None:
        """Write what comes, until nothing more will."""
        while True:
            if self._chunks:
                chunks, self._chunks = self._chunks, []
                size_bytes = sum(map(len, chunks))
                await self.sink.write(chunks)
                self.waiting_bytes -= size_bytes
                self._on_written(size_bytes)
            elif self._has_ended:
                return
            else:
                self._stirred.clear()
                await self._stirred.wait()


@lru_cache(maxsize=256)
def media_type(content_type: str) -> str:
    """Give a Content-Type without its parameters, safe to store."""
    return label(content_type.partition(";")[0].strip().lower())


def label(value: str) -> str:
    """Make a header's value safe to store and print: no control characters, no lone surrogates, not long."""
    if len(value) <= _LABEL_CHARACTERS_MAX and value.isascii() and value.isprintable():
        return value
    readable = value[:_LABEL_CHARACTERS_MAX].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(each if each.isprintable() else "\ufffd" for each in readable)
