"""One connection to the upstream: write a request, read the whole answer.

Answers are parsed by aiohttp's C parser, below its session; of that semi-public ground only this module and
`upstream_dialer` make use. It knows nothing of lines, retries or pools.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from dataclasses import dataclass
from typing import Protocol

from aiohttp.hdrs import CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE
from aiohttp.http import HttpProcessingError, HttpResponseParser, RawResponseMessage
from aiohttp.streams import StreamReader
from multidict import CIMultiDictProxy

from batchrunner.errors import BlobsUnavailable
from batchrunner.limits import ReadBudget
from batchrunner.models import AttemptError
from batchrunner.ports import AssetOwner
from batchrunner.upstream_media import PIPE_BYTES_MAX, MediaPipe, media_type
from batchrunner.verdict import is_media_type

# As much as asyncio's own transports ask the kernel for in one read.
READ_BYTES = 256 * 1024
# And while memory is short: the first read of an answer comes before anybody knows how long it is.
_SHORT_READ_BYTES = 16 * 1024
# Above this, copying head and body into one piece costs more than a second write.
_JOINED_BYTES_MAX = 64 * 1024
_INTERIM_ANSWERS_MAX = 100
_PRIVATE: dict[str, int] = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an exchange has no complete answer. The message names peer and cause, never what was sent or received."""

    error: AttemptError
    message: str
    status: int = 0


class Reply:
    """A whole answer as it came over the wire; `body` is still in the content encoding that its headers name.

    `is_asset`: the answer was kept by its owner, and `body` is the JSON that stands for it.
    """

    __slots__ = ("body", "headers", "is_asset", "status")

    def __init__(self, status: int, headers: CIMultiDictProxy[str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.is_asset = False


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """How much may be read: of one answer, of one with media that its owner keeps, and of all together."""

    reply_bytes_max: int
    asset_bytes_max: int
    budget: ReadBudget


class _Handler(Protocol):
    """What is left to aiohttp's own handler of a connection: to tell its connector when the connection is gone."""

    @property
    def should_close(self) -> bool: ...

    def connection_lost(self, exc: BaseException | None) -> None: ...


class _Connection(Protocol):
    """aiohttp's Connection: what the connector counts as acquired until `close`."""

    def close(self) -> None: ...


class Wire(asyncio.BufferedProtocol):
    """One open connection. One exchange at a time; after anything but a clean answer it closes itself.

    A buffered protocol reads into one buffer that all connections of a loop share: plain asyncio otherwise allocates
    256 KiB per read, which glibc turns into a pair of mmap and munmap.
    """

    __slots__ = (
        "_budget",
        "_bytes_max",
        "_charged_bytes",
        "_chunks",
        "_connection",
        "_ended",
        "_failure",
        "_handler",
        "_interim_count",
        "_is_counted",
        "_is_over_budget",
        "_limits",
        "_loop",
        "_message",
        "_owner",
        "_pages",
        "_parser",
        "_payload",
        "_peer",
        "_pipe",
        "_read_buffer",
        "_size_bytes",
        "_transport",
        "_waiter",
        "has_heard",
        "idle_since_s",
        "is_open",
        "is_paused",
        "progress_at_s",
        "progress_bytes",
        "started_at_s",
    )

    def __init__(
        self,
        connection: _Connection,
        handler: _Handler,
        transport: asyncio.Transport,
        *,
        peer: str,
        read_buffer: memoryview,
        limits: ReadLimits,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._handler = handler
        self._transport = transport
        self._peer = peer
        self._read_buffer = read_buffer
        self._limits = limits
        self._budget = limits.budget
        self._charged_bytes = 0
        self._is_counted = False
        self._is_over_budget = False
        self.is_paused = False
        # Bodies are decoded later, so the parser never gives more than it was fed: no flow control is needed.
        self._parser = HttpResponseParser(
            self,  # type: ignore[arg-type]
            self._loop,
            READ_BYTES,
            read_until_eof=True,
            auto_decompress=False,
        )
        # Its result is None when the answer goes to its owner piece by piece; `_ended` then stands for its end.
        self._waiter: asyncio.Future[Reply | Failure | None] | None = None
        self._ended: asyncio.Future[Reply | Failure | None] | None = None
        self.is_open = True
        self.idle_since_s = 0.0
        self._begin(0.0, None)

    def _begin(self, started_at_s: float, owner: AssetOwner | None) -> None:
        self._owner = owner
        self._pipe: MediaPipe | None = None
        self._bytes_max = self._limits.reply_bytes_max
        self._message: RawResponseMessage | None = None
        self._payload: StreamReader | None = None
        self._chunks: list[bytes] = []
        self._pages: mmap.mmap | None = None
        self._size_bytes = 0
        self._interim_count = 0
        self.has_heard = False
        self.started_at_s = started_at_s
        self.progress_bytes = -1
        self.progress_at_s = started_at_s

    async def exchange(
        self, head: bytes, body: bytes, started_at_s: float, owner: AssetOwner | None = None
    ) -> Reply | Failure:
        """Send a request and wait for the end of its answer. Cancelling it closes the connection.

        An answer with media that is not whole after one read goes to its `owner`, others into memory.
        `has_heard` then tells whether any byte of an answer came, `is_open` whether the connection may be used again.
        """
        self._begin(started_at_s, owner)
        waiter: asyncio.Future[Reply | Failure | None] = self._loop.create_future()
        self._waiter = waiter
        if len(body) < _JOINED_BYTES_MAX:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        outcome: Reply | Failure | None = None
        try:
            outcome = await waiter
            if outcome is None:
                outcome = await self._carry()
            return outcome
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._drop_pages()
            if self._is_counted:
                self._stop_counting(is_delivered=isinstance(outcome, Reply) and not outcome.is_asset)

    def _stop_counting(self, *, is_delivered: bool) -> None:
        self._budget.release(self, self._charged_bytes, is_delivered=is_delivered)
        self._charged_bytes = 0
        self._is_counted = False
        # It may have been paused between the end of its answer and this moment; the next one would never be read.
        self.resume()

    async def _carry(self) -> Reply | Failure:
        """Carry an answer to the sink of its owner while it is read; of one that does not end well nothing is left."""
        pipe, ended = self._pipe, self._ended
        assert pipe is not None
        assert ended is not None
        is_kept = False
        try:
            await pipe.drain()
            outcome = await ended
            assert outcome is not None
            if isinstance(outcome, Reply) and self._size_bytes:
                outcome.body = await pipe.sink.finish()
                outcome.is_asset = is_kept = True
            return outcome
        except BlobsUnavailable as error:
            self.abort()
            return Failure(AttemptError.ABORTED, f"the answer could not be kept: {error}", self._status)
        finally:
            if not is_kept:
                pipe.sink.abort()

    def _note_written(self, size_bytes: int) -> None:
        # The end of an answer is not counted.
        size_bytes = min(size_bytes, self._charged_bytes)
        self._charged_bytes -= size_bytes
        self._go_on()
        self._budget.give_back(size_bytes)

    @property
    def _status(self) -> int:
        return self._message.code if self._message is not None else 0

    def end(self, error: AttemptError, message: str) -> None:
        """End the exchange that is under way for a reason of our own, and close the connection."""
        self._settle(Failure(error, message, self._status))
        self.abort()

    def abort(self) -> None:
        """Close the connection at once."""
        self.is_open = False
        self._transport.abort()

    @property
    def received_bytes(self) -> int:
        """Body bytes of the answer that is being read, -1 before its head is complete."""
        return self._size_bytes if self._message is not None else -1

    def _settle(self, outcome: Reply | Failure) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(outcome)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the loop's signature
        """See asyncio.BufferedProtocol."""
        if self._budget.is_short and not self._budget.is_leader(self):
            return self._read_buffer[:_SHORT_READ_BYTES]
        return self._read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        if self._waiter is None:
            # Nobody asked: the peer is out of step, and its next answer could be taken for another line's.
            self.abort()
            return
        self.has_heard = True
        try:
            messages, _, _ = self._parser.feed_data(bytes(self._read_buffer[:nbytes]))
        except HttpProcessingError as error:
            # The parser's own words quote the answer, which may hold a prompt.
            self.end(AttemptError.BAD_PROTOCOL, f"{self._peer} answered in broken HTTP ({type(error).__name__})")
            return
        for message, payload in messages:
            self._take(message, payload)
        if self._payload is not None and self._waiter is not None:
            self._read_on(self._payload)

    def _take(self, message: RawResponseMessage, payload: StreamReader) -> None:
        """Take the head of an answer; 1xx heads come before it."""
        if self._message is not None:
            self.end(AttemptError.BAD_PROTOCOL, f"{self._peer} sent a second answer to one request")
        elif 100 <= message.code < 200 and message.code != 101 and self._interim_count < _INTERIM_ANSWERS_MAX:
            self._interim_count += 1
        elif message.code < 200:
            self.end(AttemptError.BAD_PROTOCOL, f"{self._peer} answered with status {message.code} to a POST")
        else:
            self._message = message
            self._payload = payload

    def _read_on(self, payload: StreamReader) -> None:
        message = self._message
        assert message is not None
        chunk = payload.read_nowait()
        is_whole = payload.is_eof()
        if self._owner is not None and not is_whole:
            self._choose(message, self._owner)
        if chunk:
            if self._pipe is None:
                self._keep(chunk)
            else:
                self._pipe.feed(chunk)
            self._size_bytes += len(chunk)
        if self._size_bytes > self._bytes_max:
            self._refuse_size()
        elif is_whole:
            self._complete(message, is_reusable=not message.should_close)
        elif _declared_bytes(message) > self._bytes_max:
            self._refuse_size()
        elif chunk:
            self._count(len(chunk))

    def _choose(self, message: RawResponseMessage, owner: AssetOwner) -> None:
        """Decide, once, whether an answer goes to its owner piece by piece."""
        self._owner = None
        headers = message.headers
        content_type = media_type(headers.get(CONTENT_TYPE, ""))
        is_plain = headers.get(CONTENT_ENCODING, "").strip().lower() in {"", "identity"}
        if self._waiter is None or not (200 <= message.code < 300 and is_plain and is_media_type(content_type)):
            return
        self._bytes_max = self._limits.asset_bytes_max
        self._pipe = pipe = MediaPipe(owner.open_asset(content_type), self._note_written)
        waiter, self._waiter = self._waiter, self._loop.create_future()
        self._waiter.add_done_callback(lambda _: pipe.end())
        self._ended = self._waiter
        if not waiter.done():
            waiter.set_result(None)

    def _count(self, size_bytes: int) -> None:
        self._charged_bytes += size_bytes
        self._is_counted = True
        if self._pipe is not None and self._pipe.is_full:
            self._halt()
        self._budget.take(self, size_bytes)

    def _keep(self, chunk: bytes) -> None:
        """Gather a body: in pieces while it is small, then in pages of its own, which leave no holes in the heap."""
        if self._pages is None:
            if self._size_bytes + len(chunk) <= READ_BYTES:
                self._chunks.append(chunk)
                return
            size_bytes = (_declared_bytes(self._message) if self._message else 0) or self._bytes_max
            # Pages that nothing was written to cost nothing.
            self._pages = mmap.mmap(-1, size_bytes + READ_BYTES, **_PRIVATE)
            self._pages.write(b"".join(self._chunks))
            self._chunks.clear()
        self._pages.write(chunk)

    def _body(self) -> bytes:
        if self._pages is not None:
            return self._pages[: self._size_bytes]
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    @property
    def missing_bytes(self) -> int:
        """See Reader: by the announced length, or one read more; of media no more than is held at once."""
        if self._pipe is not None:
            return PIPE_BYTES_MAX
        declared = _declared_bytes(self._message) if self._message is not None else 0
        return max(READ_BYTES, declared - self._size_bytes)

    def pause(self) -> None:
        """See Reader. The peer waits when the kernel's buffers are full."""
        self._is_over_budget = True
        self._halt()

    def resume(self) -> None:
        """See Reader."""
        self._is_over_budget = False
        self._go_on()

    def _halt(self) -> None:
        if not self.is_paused:
            self.is_paused = True
            if self.is_open:
                self._transport.pause_reading()

    def _go_on(self) -> None:
        """Read on, unless the budget or the pipe still stands against it."""
        if not self.is_paused or self._is_over_budget or (self._pipe is not None and self._pipe.is_full):
            return
        self.is_paused = False
        if self.is_open:
            self._transport.resume_reading()

    def _drop_pages(self) -> None:
        if self._pages is not None:
            self._pages.close()
            self._pages = None

    def _refuse_size(self) -> None:
        self.end(AttemptError.TOO_LARGE, f"the answer of {self._peer} is over {self._bytes_max} bytes")

    def _complete(self, message: RawResponseMessage, *, is_reusable: bool) -> None:
        self._settle(Reply(message.code, message.headers, self._body()))
        self._drop_pages()
        # A request that is not wholly written when its answer ends would run into the next one.
        if not is_reusable or self._transport.is_closing() or self._transport.get_write_buffer_size():
            self.abort()

    def eof_received(self) -> None:
        """See asyncio.BufferedProtocol: the transport closes itself, `connection_lost` judges."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BufferedProtocol."""
        self.is_open = False
        self._handler.connection_lost(exc)
        self._connection.close()
        message = self._message
        if self._waiter is None:
            return
        if message is None:
            cause = "before it answered" if not self.has_heard else "in the middle of the answer's head"
            self._settle(Failure(AttemptError.RESET, f"{self._peer} closed the connection {cause}"))
        elif exc is None and self._may_end_here():
            self._complete(message, is_reusable=False)
        else:
            told = f"{self._peer} closed the connection after {self._size_bytes} bytes of an unfinished answer"
            self._settle(Failure(AttemptError.TRUNCATED, told, message.code))

    def _may_end_here(self) -> bool:
        """Ask the parser, which knows the framing: an answer without length and chunks ends with its connection."""
        try:
            self._parser.feed_eof()
        except HttpProcessingError:
            return False
        return True

    def pause_reading(self) -> None:
        """Ignore the stream's wish: it is emptied after every read, so it holds at most one read's bytes."""

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - the parser's signature
        """Nothing was paused."""


def _declared_bytes(message: RawResponseMessage) -> int:
    declared = message.headers.get(CONTENT_LENGTH, "")
    return int(declared) if declared.isdecimal() else 0
