"""One connection to the upstream: write a request, read the whole answer.

Connections are opened by aiohttp's connector and answers are parsed by its C parser, both below aiohttp's session;
every use of that semi-public ground is in this module. It knows nothing of lines, retries or pools.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import aiohttp
from aiohttp.hdrs import CONTENT_LENGTH
from aiohttp.http import HttpProcessingError, HttpResponseParser, RawResponseMessage
from aiohttp.streams import StreamReader
from multidict import CIMultiDictProxy
from yarl import URL

from batchrunner.errors import UsageError
from batchrunner.limits import ReadBudget
from batchrunner.models import AttemptError

# As much as asyncio's own transports ask the kernel for in one read.
_READ_BYTES = 256 * 1024
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
    """A whole answer as it came over the wire; `body` is still in the content encoding that its headers name."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: CIMultiDictProxy[str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


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
        "_charged_bytes",
        "_chunks",
        "_connection",
        "_failure",
        "_handler",
        "_interim_count",
        "_loop",
        "_message",
        "_pages",
        "_parser",
        "_payload",
        "_peer",
        "_read_buffer",
        "_reply_bytes_max",
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
        reply_bytes_max: int,
        budget: ReadBudget,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._handler = handler
        self._transport = transport
        self._peer = peer
        self._read_buffer = read_buffer
        self._reply_bytes_max = reply_bytes_max
        self._budget = budget
        self._charged_bytes = 0
        self.is_paused = False
        # Bodies are decoded later, so the parser never gives more than it was fed: no flow control is needed.
        self._parser = HttpResponseParser(
            self,  # type: ignore[arg-type]
            self._loop,
            _READ_BYTES,
            read_until_eof=True,
            auto_decompress=False,
        )
        self._waiter: asyncio.Future[Reply | Failure] | None = None
        self.is_open = True
        self.idle_since_s = 0.0
        self._begin(0.0)

    def _begin(self, started_at_s: float) -> None:
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

    async def exchange(self, head: bytes, body: bytes, started_at_s: float) -> Reply | Failure:
        """Send a request and wait for the end of its answer. Cancelling it closes the connection.

        `has_heard` then tells whether any byte of an answer came, `is_open` whether the connection may be used again.
        """
        self._begin(started_at_s)
        waiter: asyncio.Future[Reply | Failure] = self._loop.create_future()
        self._waiter = waiter
        if len(body) < _JOINED_BYTES_MAX:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        outcome: Reply | Failure | None = None
        try:
            outcome = await waiter
            return outcome
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._drop_pages()
            if self._charged_bytes:
                self._budget.release(self, self._charged_bytes, is_delivered=isinstance(outcome, Reply))
                self._charged_bytes = 0

    def end(self, error: AttemptError, message: str) -> None:
        """End the exchange that is under way for a reason of our own, and close the connection."""
        self._settle(Failure(error, message, self._message.code if self._message is not None else 0))
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
        if chunk:
            self._keep(chunk)
            self._size_bytes += len(chunk)
        if self._size_bytes > self._reply_bytes_max:
            self._refuse_size()
        elif payload.is_eof():
            self._complete(message, is_reusable=not message.should_close)
        elif _declared_bytes(message) > self._reply_bytes_max:
            self._refuse_size()
        else:
            read_bytes = self._size_bytes - self._charged_bytes
            self._charged_bytes = self._size_bytes
            self._budget.take(self, read_bytes)

    def _keep(self, chunk: bytes) -> None:
        """Gather a body: in pieces while it is small, then in pages of its own, which leave no holes in the heap."""
        if self._pages is None:
            if self._size_bytes + len(chunk) <= _READ_BYTES:
                self._chunks.append(chunk)
                return
            size_bytes = (_declared_bytes(self._message) if self._message else 0) or self._reply_bytes_max
            # Pages that nothing was written to cost nothing.
            self._pages = mmap.mmap(-1, size_bytes + _READ_BYTES, **_PRIVATE)
            self._pages.write(b"".join(self._chunks))
            self._chunks.clear()
        self._pages.write(chunk)

    def _body(self) -> bytes:
        if self._pages is not None:
            return self._pages[: self._size_bytes]
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    @property
    def missing_bytes(self) -> int:
        """See Reader: by the announced length, or one read more."""
        declared = _declared_bytes(self._message) if self._message is not None else 0
        return max(_READ_BYTES, declared - self._size_bytes)

    def pause(self) -> None:
        """See Reader. The peer waits when the kernel's buffers are full."""
        self.is_paused = True
        self._transport.pause_reading()

    def resume(self) -> None:
        """See Reader."""
        self.is_paused = False
        if self.is_open:
            self._transport.resume_reading()

    def _drop_pages(self) -> None:
        if self._pages is not None:
            self._pages.close()
            self._pages = None

    def _refuse_size(self) -> None:
        self.end(AttemptError.TOO_LARGE, f"the answer of {self._peer} is over {self._reply_bytes_max} bytes")

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


class Dialer:
    """Opens connections to one base URL through aiohttp's connector: DNS with a cache, happy eyeballs, TLS.

    Made inside the running loop that it serves. `ca_bundle` is a PEM file that replaces the system's certificate store.

    Raises:
        UsageError: the CA bundle cannot be read.
    """

    def __init__(
        self,
        base: URL,
        *,
        connect_timeout_s: float,
        reply_bytes_max: int,
        ca_bundle: Path | None,
        budget: ReadBudget,
    ) -> None:
        self.peer = f"{base.host_subcomponent}:{base.port}"
        self._reply_bytes_max = reply_bytes_max
        self._connect_timeout_s = connect_timeout_s
        self._budget = budget
        # The fan-out bounds what is in flight, and idle connections are kept by the owner of the wires.
        self._connector = aiohttp.TCPConnector(limit=0, ssl=_trust(ca_bundle) if ca_bundle else True)
        self._request = aiohttp.ClientRequest("POST", base, loop=asyncio.get_running_loop())
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s)
        self._read_buffer = memoryview(bytearray(_READ_BYTES))

    async def open(self) -> Wire | Failure:
        """Open one connection. Nothing was sent when this fails."""
        try:
            connection = await self._connector.connect(self._request, [], self._timeout)
        except (aiohttp.ClientError, OSError) as error:
            return Failure(AttemptError.NOT_CONNECTED, f"cannot connect to {self.peer}: {self._cause(error)}")
        handler, transport = connection.protocol, connection.transport
        if handler is None or transport is None or handler.should_close:
            connection.close()
            cause = "it spoke or closed before it was asked"
            return Failure(AttemptError.NOT_CONNECTED, f"cannot talk to {self.peer}: {cause}")
        wire = Wire(
            connection,
            handler,
            transport,
            peer=self.peer,
            read_buffer=self._read_buffer,
            reply_bytes_max=self._reply_bytes_max,
            budget=self._budget,
        )
        transport.set_protocol(wire)
        return wire

    def _cause(self, error: Exception) -> str:
        match error:
            case TimeoutError():
                return f"no connection within {self._connect_timeout_s:g} s"
            case aiohttp.ClientConnectorDNSError():
                return "the host name is not known"
            case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as refused):
                return f"its TLS certificate is not trusted ({refused.verify_message})"
            case aiohttp.ClientSSLError(os_error=ssl.SSLError() as refused):
                return f"the TLS handshake failed ({refused.reason})"
            case aiohttp.ClientConnectorError(os_error=cause):
                # asyncio words it its own way ("Connect call failed"); people know the system's words.
                return os.strerror(cause.errno) if cause.errno else cause.strerror or type(cause).__name__
            case _:
                return type(error).__name__

    async def close(self) -> None:
        """Close what is still open and stop name lookups."""
        await self._connector.close()


def _trust(ca_bundle: Path) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(ca_bundle))
    except OSError as error:
        raise UsageError(f"cannot read the CA bundle {ca_bundle}: {error.strerror or error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context
