"""One client's connection to the simulated upstream: requests in, answers out in the same order, one at a time.

What an answer is, and when it is due, its `Desk` decides.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol, cast

from batchrunner.simulate.replies import error_answer
from batchrunner.simulate.wire import Answer, Request, RequestError, RequestReader, answer_bytes, head_bytes

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
# A client that pipelines without reading is held back here; until then its going away is noticed at once.
_WAITING_BYTES_MAX: Final = 1024 * 1024
# Linger on, for zero seconds: closing then sends RST instead of FIN.
_LINGER_ZERO: Final = struct.pack("ii", 1, 0)
# Long enough for what was written before to leave the process.
_RESET_DELAY_S: Final = 0.01


class Desk(Protocol):
    """Where a connection takes its requests; called on the event loop."""

    def take(self, connection: Connection, request: Request) -> None:
        """Take a whole request; the connection takes no other until its `answer` or `finish` is called."""

    def opened(self, connection: Connection) -> None:
        """Learn that a client has connected."""

    def lost(self, connection: Connection) -> None:
        """Learn that the client is gone; nothing may be answered any more."""

    def next_request_number(self) -> int:
        """Return a number that no answer has carried."""


class Connection(asyncio.Protocol):
    """A keep-alive connection that survives pipelining, chunked bodies and bytes that come one by one."""

    __slots__ = ("_desk", "_is_advancing", "_is_held", "_on_drain", "_reader", "_request", "_transport", "is_paused")

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._reader = RequestReader()
        self._transport: asyncio.Transport | None = None
        self._request: Request | None = None
        self._on_drain: Callable[[], None] | None = None
        self._is_advancing = False
        self._is_held = False
        self.is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._desk.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio hands it over
        """Give up whatever is under way for this client."""
        self._transport = None
        self._on_drain = None
        self._desk.lost(self)

    def data_received(self, data: bytes) -> None:
        """Read on, unless a request is being answered."""
        self._reader.feed(data)
        if self._request is None:
            self._advance()
        elif self._reader.waiting_bytes > _WAITING_BYTES_MAX and not self._is_held and self._transport is not None:
            self._is_held = True
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """Note that the client reads more slowly than it is answered."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """Go on with the answer that was waiting for the client, or with its next request."""
        self.is_paused = False
        if self._on_drain is not None:
            go_on, self._on_drain = self._on_drain, None
            go_on()
        else:
            self._advance()

    def answer(self, answer: Answer) -> None:
        """Send a whole answer to the current request and go on with the next."""
        self.write(self.pack(answer))
        self.finish()

    def pack(self, answer: Answer) -> bytes:
        """Return the bytes of a whole answer to the current request."""
        request = self._request
        if request is not None and request.method == b"HEAD":
            return self.pack_head(answer, len(answer.body))
        keep_alive = request is not None and request.keep_alive
        return answer_bytes(answer, request_number=self._desk.next_request_number(), keep_alive=keep_alive)

    def pack_head(self, answer: Answer, length: int | None) -> bytes:
        """Return the head alone, for a body of this length (None: in chunks) that is written piece by piece."""
        keep_alive = self._request is not None and self._request.keep_alive
        number = self._desk.next_request_number()
        return head_bytes(answer, request_number=number, length=length, keep_alive=keep_alive)

    def write(self, piece: bytes) -> None:
        """Send some bytes of an answer."""
        if self._transport is not None:
            self._transport.write(piece)

    def when_drained(self, go_on: Callable[[], None]) -> None:
        """Call back once when the client has read enough; only while `is_paused`."""
        self._on_drain = go_on

    def finish(self) -> None:
        """End the current answer; close if the client wants that, else go on with its next request."""
        request, self._request = self._request, None
        if self._transport is None:
            return
        if request is None or not request.keep_alive:
            self._transport.close()
            return
        if self._is_held:
            self._is_held = False
            self._transport.resume_reading()
        self._advance()

    def close(self) -> None:
        """Hang up politely, after what was written has left."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Hang up at once."""
        if self._transport is not None:
            self._transport.abort()

    def reset(self) -> None:
        """Hang up with RST, so that the client sees "connection reset by peer"."""
        if self._transport is None:
            return
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._transport.abort()

    def reset_soon(self) -> None:
        """Hang up with RST after what was written has had time to leave."""
        asyncio.get_running_loop().call_later(_RESET_DELAY_S, self.reset)

    def _advance(self) -> None:
        # Answers may come while a request is being taken; the loop below then goes on, however many are pipelined.
        if self._is_advancing:
            return
        self._is_advancing = True
        try:
            while self._request is None and not self.is_paused and self._take_next():
                pass
        finally:
            self._is_advancing = False

    def _take_next(self) -> bool:
        if self._transport is None or self._transport.is_closing():
            return False
        try:
            request = self._reader.next_request()
        except RequestError as error:
            self.answer(error_answer(error.status, error.message))
            return False
        if request is None:
            if self._reader.take_continue():
                self._transport.write(_CONTINUE)
            return False
        self._request = request
        self._desk.take(self, request)
        return True
