"""HTTP/1.1 as the simulated upstream speaks it: requests out of a byte stream, answers into bytes.

aiohttp's own server costs several times the CPU of a simulated answer, so the few forms clients send are read here.
"""

from __future__ import annotations

import http
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

HEAD_BYTES_MAX: Final = 64 * 1024
BODY_BYTES_MAX: Final = 64 * 1024 * 1024
_CHUNK_LINE_BYTES_MAX: Final = 1024
_HEX_DIGITS: Final = frozenset(b"0123456789abcdefABCDEF")
_REASONS: Final = {status.value: status.phrase.encode() for status in http.HTTPStatus}


class RequestError(Exception):
    """Bytes that are no request that can be served; the connection ends with `status`."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


# Both are made once or more per request: a named tuple costs a third of a frozen dataclass.
class Request(NamedTuple):
    """One whole request; `head` is as sent, from the request line to the last header."""

    method: bytes
    path: bytes
    head: bytes
    body: bytes
    keep_alive: bool


class Answer(NamedTuple):
    """One answer before it becomes bytes; `headers` are beyond type, length and request id."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: Sequence[tuple[bytes, bytes]] = ()


class _Head(NamedTuple):
    method: bytes
    path: bytes
    raw: bytes
    keep_alive: bool
    length: int
    is_chunked: bool
    expects_continue: bool


def header_of(head: bytes, name: bytes) -> bytes | None:
    """Return the value of the header with this lower-case name, None when it was not sent."""
    start = head.lower().find(b"\r\n" + name + b":")
    if start < 0:
        return None
    start += len(name) + 3
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else len(head)].strip()


def head_bytes(answer: Answer, *, request_number: int, length: int | None, keep_alive: bool) -> bytes:
    """Return the status line and headers that announce an answer whose body has `length` bytes, None for chunks."""
    lines = [
        b"HTTP/1.1 %d %b" % (answer.status, _REASONS.get(answer.status, b"Unknown")),
        b"Content-Type: " + answer.content_type,
        b"x-request-id: req_%016x" % request_number,
        b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length,
        *(name + b": " + value for name, value in answer.headers),
        b"Connection: keep-alive" if keep_alive else b"Connection: close",
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def answer_bytes(answer: Answer, *, request_number: int, keep_alive: bool) -> bytes:
    """Return an answer as it goes over the wire."""
    if answer.status == 200 and keep_alive and not answer.headers:
        return (
            b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nx-request-id: req_%016x\r\nContent-Length: %d\r\n"
            b"Connection: keep-alive\r\n\r\n%b" % (answer.content_type, request_number, len(answer.body), answer.body)
        )
    head = head_bytes(answer, request_number=request_number, length=len(answer.body), keep_alive=keep_alive)
    return head + answer.body


def chunk_bytes(piece: bytes) -> bytes:
    """Return a piece of a chunked body as it goes over the wire; the empty one ends the body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


@dataclass(slots=True)
class _Chunks:
    """The part of a chunked body that has been read, and where the next chunk line starts."""

    position: int
    parts: list[bytes]
    size_bytes: int = 0
    is_at_trailer: bool = False


class RequestReader:
    """Cuts a connection's bytes into requests, however they arrive: in one piece, several at once, byte by byte."""

    __slots__ = ("_buffer", "_chunks", "_continue_due", "_head", "_position", "_scanned")

    def __init__(self) -> None:
        self._buffer: bytes | bytearray = b""
        self._position = 0
        self._scanned = 0
        self._head: _Head | None = None
        self._chunks: _Chunks | None = None
        self._continue_due = False

    @property
    def waiting_bytes(self) -> int:
        """How many bytes have arrived that belong to no request yet given out."""
        return len(self._buffer) - self._position

    def feed(self, received: bytes) -> None:
        """Take the bytes that arrived next."""
        if not self._buffer:
            self._buffer = received
            return
        if isinstance(self._buffer, bytes):
            self._buffer = bytearray(self._buffer)
        self._buffer += received

    def take_continue(self) -> bool:
        """Whether the client now waits for `100 Continue`; true once per request."""
        is_due, self._continue_due = self._continue_due, False
        return is_due

    def next_request(self) -> Request | None:
        """Return the next request that has arrived whole, None when its bytes are still to come.

        Raises:
            RequestError: the bytes are no HTTP request, or head or body are too large.
        """
        if self._head is None:
            self._head = self._read_head()
            if self._head is None:
                return None
        head = self._head
        body = self._read_chunked() if head.is_chunked else self._read_body(head.length)
        if body is None:
            # From here on the buffer starts where this request's body does, so a long body is not moved twice.
            self._drop_read()
            return None
        self._head = None
        self._continue_due = False
        if self._position == len(self._buffer):
            self._buffer = b""
            self._position = 0
        self._scanned = self._position
        return Request(head.method, head.path, head.raw, body, head.keep_alive)

    def _drop_read(self) -> None:
        if self._position == 0:
            return
        if self._chunks is not None:
            self._chunks.position -= self._position
        self._buffer = self._buffer[self._position :]
        self._position = 0
        self._scanned = 0

    def _read_head(self) -> _Head | None:
        # A client may send an empty line after a body; RFC 9112 2.2 says to skip it.
        while self._buffer.startswith(b"\r\n", self._position):
            self._position += 2
        end = self._buffer.find(b"\r\n\r\n", max(self._position, self._scanned - 3))
        size_bytes = (end if end >= 0 else len(self._buffer)) - self._position
        if size_bytes > HEAD_BYTES_MAX:
            raise RequestError(f"the request's head is larger than {HEAD_BYTES_MAX} bytes", status=431)
        if end < 0:
            self._drop_read()
            self._scanned = len(self._buffer)
            return None
        head = _parse_head(bytes(self._buffer[self._position : end]))
        self._position = end + 4
        self._continue_due = head.expects_continue
        return head

    def _read_body(self, length: int) -> bytes | None:
        end = self._position + length
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[self._position : end]) if length else b""
        self._position = end
        return body

    def _read_chunked(self) -> bytes | None:
        if self._chunks is None:
            self._chunks = _Chunks(position=self._position, parts=[])
        chunks = self._chunks
        while not chunks.is_at_trailer:
            if not self._read_chunk(chunks):
                return None
        while True:
            end = self._line_end(chunks)
            if end is None:
                return None
            is_last = end == chunks.position
            chunks.position = end + 2
            if is_last:
                self._position = chunks.position
                self._chunks = None
                return b"".join(chunks.parts)

    def _read_chunk(self, chunks: _Chunks) -> bool:
        """Read one chunk; false when some of it is still to come. A chunk of no bytes leads to the trailer."""
        end = self._line_end(chunks)
        if end is None:
            return False
        digits = bytes(self._buffer[chunks.position : end]).split(b";", 1)[0].strip()
        if not digits or len(digits) > 16 or not _HEX_DIGITS.issuperset(digits):
            raise RequestError("a chunk of the body has no size", status=400)
        size_bytes = int(digits, 16)
        if size_bytes == 0:
            chunks.position = end + 2
            chunks.is_at_trailer = True
            return True
        if chunks.size_bytes + size_bytes > BODY_BYTES_MAX:
            raise RequestError(f"the body is larger than {BODY_BYTES_MAX} bytes", status=413)
        start = end + 2
        if len(self._buffer) < start + size_bytes + 2:
            return False
        chunks.parts.append(bytes(memoryview(self._buffer)[start : start + size_bytes]))
        chunks.size_bytes += size_bytes
        chunks.position = start + size_bytes + 2
        return True

    def _line_end(self, chunks: _Chunks) -> int | None:
        end = self._buffer.find(b"\r\n", chunks.position)
        if (end if end >= 0 else len(self._buffer)) - chunks.position > _CHUNK_LINE_BYTES_MAX:
            raise RequestError(f"a chunk line is longer than {_CHUNK_LINE_BYTES_MAX} bytes", status=400)
        return end if end >= 0 else None


def _parse_head(raw: bytes) -> _Head:
    lower = raw.lower()
    words = raw[: raw.find(b"\r\n")].split(b" ") if b"\r\n" in raw else raw.split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        raise RequestError("the first line is not an HTTP/1 request line", status=400)
    path = words[1].partition(b"?")[0]
    connection = _lower_header(lower, b"\r\nconnection:")
    keep_alive = connection != b"close" if words[2] != b"HTTP/1.0" else connection == b"keep-alive"
    is_chunked = b"\r\ntransfer-encoding:" in lower and _is_chunked(lower)
    length = 0 if is_chunked else _parse_length(_lower_header(lower, b"\r\ncontent-length:"))
    return _Head(words[0], path, raw, keep_alive, length, is_chunked, b"\r\nexpect: 100-continue" in lower)


def _lower_header(lower: bytes, name: bytes) -> bytes:
    start = lower.find(name)
    if start < 0:
        return b""
    start += len(name)
    end = lower.find(b"\r\n", start)
    return (lower[start:end] if end >= 0 else lower[start:]).strip()


def _is_chunked(lower: bytes) -> bool:
    if _lower_header(lower, b"\r\ntransfer-encoding:") != b"chunked":
        raise RequestError("the only transfer encoding understood is chunked", status=501)
    return True


def _parse_length(value: bytes) -> int:
    if not value:
        return 0
    if not value.isdigit() or len(value) > 16:
        raise RequestError("Content-Length is not a number of bytes", status=400)
    length = int(value)
    if length > BODY_BYTES_MAX:
        raise RequestError(f"the body is larger than {BODY_BYTES_MAX} bytes", status=413)
    return length
