"""Named ways in which a peer answers badly, or well but strangely, and the Attempt that each must become."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from enum import StrEnum

from batchrunner.models import Attempt, AttemptError
from tests.hostile.peer import Talk, answer

REPLY_BYTES_MAX = 256 * 1024
BODY = b'{"choices":[]}'


class Then(StrEnum):
    """What the peer does after its words."""

    WAIT = "wait"
    HANG_UP = "hang up"
    RESET = "reset"
    DRIP = "drip"


@dataclass(frozen=True, slots=True)
class Words:
    """What a peer says to one request, and how it leaves."""

    message: bytes
    then: Then = Then.WAIT
    is_slow: bool = False

    async def speak(self, talk: Talk) -> None:
        await talk.request()
        await self.answer(talk)

    async def answer(self, talk: Talk) -> None:
        """Say it to a request that was already read."""
        if self.is_slow:
            await talk.say_slowly(self.message)
        else:
            talk.say(self.message)
        match self.then:
            case Then.WAIT:
                return
            case Then.HANG_UP:
                talk.hang_up()
            case Then.RESET:
                await talk.flush()
                talk.reset()
            case Then.DRIP:
                await talk.drip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The words of a peer, what `send` must make of them, and whether the connection is kept.

    `expected` has no message: an error's must name the peer or the limit, and never repeat the answer. `stall_bytes`
    says that the peer falls silent: after this many body bytes, or with -1 before the head is complete.
    """

    name: str
    words: Words
    expected: Attempt
    is_reused: bool = False
    stall_bytes: int | None = None


def good(status: int = 200, body: bytes = BODY, **fields: object) -> Attempt:
    return Attempt(status=status, body=body, **fields)  # type: ignore[arg-type]


def bad(error: AttemptError, status: int = 0) -> Attempt:
    return Attempt(status=status, error=error)


def encoded(body: bytes, encoding: str) -> bytes:
    return answer(body, Content_Encoding=encoding)


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n", head: bytes = b"") -> bytes:
    parts = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + head + b"\r\n" + b"".join(parts) + end


def raw_deflate(body: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(body) + deflater.flush()


def spoiled(body: bytes, position: int) -> bytes:
    return body[:position] + bytes([body[position] ^ 0xFF]) + body[position + 1 :]


GZIPPED = gzip.compress(BODY * 100)
LONG = b"x" * (REPLY_BYTES_MAX + 1)
RESET = bad(AttemptError.RESET)
CUT = bad(AttemptError.TRUNCATED, 200)
BROKEN = bad(AttemptError.BAD_PROTOCOL)
BROKEN_200 = bad(AttemptError.BAD_PROTOCOL, 200)
TOO_LARGE = bad(AttemptError.TOO_LARGE, 200)
UNREADABLE = bad(AttemptError.BAD_ENCODING, 200)
NOT_FOUND_PAGE = b"<html>no</html>"
OK = b"HTTP/1.1 200 OK\r\n"


STRANGE_BUT_GOOD = [
    Case(name="plain", words=Words(answer(BODY)), expected=good(), is_reused=True),
    Case(name="byte by byte", words=Words(answer(BODY), is_slow=True), expected=good(), is_reused=True),
    Case(name="chunked", words=Words(chunked(BODY[:5], BODY[5:])), expected=good(), is_reused=True),
    Case(
        name="chunks of one byte",
        words=Words(chunked(*(bytes([each]) for each in BODY))),
        expected=good(),
        is_reused=True,
    ),
    Case(
        name="a hundred thousand chunks of one byte",
        words=Words(chunked(*[b"y"] * 100_000)),
        expected=good(body=b"y" * 100_000),
        is_reused=True,
    ),
    Case(
        name="chunk extension and trailers",
        words=Words(OK + b"Transfer-Encoding: chunked\r\n\r\ne;a=b\r\n" + BODY + b"\r\n0\r\nX-Sum: 1\r\n\r\n"),
        expected=good(),
        is_reused=True,
    ),
    Case(name="exactly at the cap", words=Words(answer(LONG[1:])), expected=good(body=LONG[1:]), is_reused=True),
    Case(name="no length, until the end", words=Words(OK + b"\r\n" + BODY, then=Then.HANG_UP), expected=good()),
    Case(name="HTTP/1.0", words=Words(b"HTTP/1.0 200 OK\r\n\r\n" + BODY, then=Then.HANG_UP), expected=good()),
    Case(
        name="HTTP/1.0 keeping alive",
        words=Words(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 14\r\n\r\n" + BODY),
        expected=good(),
        is_reused=True,
    ),
    Case(name="connection: close", words=Words(answer(BODY, Connection="close")), expected=good()),
    Case(name="empty body", words=Words(answer(b"")), expected=good(body=b""), is_reused=True),
    Case(
        name="204",
        words=Words(b"HTTP/1.1 204 No Content\r\n\r\n"),
        expected=good(204, b""),
        is_reused=True,
    ),
    Case(
        name="204 that claims a body",
        words=Words(answer(BODY, "204 No Content")[: -len(BODY)]),
        expected=good(204, b""),
        is_reused=True,
    ),
    Case(
        name="HTTP/2.0 in words",
        words=Words(answer(BODY).replace(b"/1.1", b"/2.0")),
        expected=good(),
    ),
    Case(
        name="space before the colon",
        words=Words(OK + b"Content-Length : 14\r\n\r\n" + BODY),
        expected=good(),
        is_reused=True,
    ),
    Case(
        name="304",
        words=Words(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
        expected=good(304, b""),
        is_reused=True,
    ),
    Case(
        name="100 Continue first",
        words=Words(b"HTTP/1.1 100 Continue\r\n\r\n" + answer(BODY)),
        expected=good(),
        is_reused=True,
    ),
    Case(
        name="three early hints first",
        words=Words(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 3 + answer(BODY), is_slow=True),
        expected=good(),
        is_reused=True,
    ),
    Case(
        name="redirect is an answer like any other",
        words=Words(answer(BODY, "302 Found", Location="http://127.0.0.1:1/")),
        expected=good(302),
        is_reused=True,
    ),
    Case(
        name="500 with a page",
        words=Words(answer(NOT_FOUND_PAGE, "500 Oops", Content_Type="text/html")),
        expected=good(500, NOT_FOUND_PAGE, content_type="text/html"),
        is_reused=True,
    ),
    Case(name="529", words=Words(answer(BODY, "529 Overloaded")), expected=good(529), is_reused=True),
    Case(name="999 and no reason", words=Words(answer(BODY, "999 ")), expected=good(999), is_reused=True),
    Case(
        name="bare line feeds",
        words=Words(answer(BODY).replace(b"\r\n", b"\n")),
        expected=good(),
        is_reused=True,
    ),
    Case(name="gzip unasked", words=Words(encoded(gzip.compress(BODY), "gzip")), expected=good(), is_reused=True),
    Case(
        name="gzip in two members",
        words=Words(encoded(gzip.compress(BODY[:5]) + gzip.compress(BODY[5:]), "GZip")),
        expected=good(),
        is_reused=True,
    ),
    Case(name="x-gzip", words=Words(encoded(gzip.compress(BODY), "x-gzip")), expected=good(), is_reused=True),
    Case(name="deflate", words=Words(encoded(zlib.compress(BODY), "deflate")), expected=good(), is_reused=True),
    Case(name="raw deflate", words=Words(encoded(raw_deflate(BODY), "deflate")), expected=good(), is_reused=True),
    Case(
        name="gzip exactly at the cap",
        words=Words(encoded(gzip.compress(LONG[1:]), "gzip")),
        expected=good(body=LONG[1:]),
        is_reused=True,
    ),
    Case(name="identity by name", words=Words(encoded(BODY, "identity")), expected=good(), is_reused=True),
    Case(name="empty gzip", words=Words(encoded(b"", "gzip")), expected=good(body=b""), is_reused=True),
    Case(
        name="retry-after in seconds",
        words=Words(answer(BODY, "429 Slow", Retry_After="7")),
        expected=good(429, retry_after_s=7.0),
        is_reused=True,
    ),
    Case(
        name="retry-after-ms goes first",
        words=Words(answer(BODY, "429 Slow", Retry_After="7", Retry_After_Ms="250")),
        expected=good(429, retry_after_s=0.25),
        is_reused=True,
    ),
    Case(
        name="retry-after as a date",
        words=Words(answer(BODY, "503 Later", Retry_After="Tue, 01 Jan 2030 00:01:30 GMT")),
        expected=good(503, retry_after_s=90.0),
        is_reused=True,
    ),
    Case(
        name="retry-after makes no sense",
        words=Words(answer(BODY, "503 Later", Retry_After="in a while")),
        expected=good(503),
        is_reused=True,
    ),
    Case(
        name="request id in broken UTF-8",
        words=Words(OK + b"x-request-id: a\xffb\r\nContent-Length: 14\r\n\r\n" + BODY),
        expected=good(request_id="a\ufffdb"),
        is_reused=True,
    ),
    Case(
        name="request id of 8,000 characters",
        words=Words(answer(BODY, X_Request_Id="r" * 8000)),
        expected=good(request_id="r" * 256),
        is_reused=True,
    ),
    Case(
        name="content type with parameters",
        words=Words(answer(BODY, Content_Type='Application/JSON ; charset="utf-8"')),
        expected=good(content_type="application/json"),
        is_reused=True,
    ),
]

CUT_OFF = [
    Case(name="hangs up", words=Words(b"", then=Then.HANG_UP), expected=RESET),
    Case(name="resets", words=Words(b"", then=Then.RESET), expected=RESET),
    Case(name="hangs up in the status line", words=Words(b"HTTP/1.1 20", then=Then.HANG_UP), expected=RESET),
    Case(name="hangs up in the headers", words=Words(OK + b"Content-Le", then=Then.HANG_UP), expected=RESET),
    Case(
        name="hangs up after 100 Continue",
        words=Words(b"HTTP/1.1 100 Continue\r\n\r\n", then=Then.HANG_UP),
        expected=RESET,
    ),
    Case(
        name="hangs up after the head",
        words=Words(OK + b"Content-Length: 14\r\n\r\n", then=Then.HANG_UP),
        expected=CUT,
    ),
    Case(name="one byte short", words=Words(answer(BODY)[:-1], then=Then.HANG_UP), expected=CUT),
    Case(
        name="space before the colon, cut short",
        words=Words(OK + b"Content-Length : 14\r\n\r\n" + BODY[:-1], then=Then.HANG_UP),
        expected=CUT,
    ),
    Case(name="resets in the body", words=Words(answer(BODY)[:-3], then=Then.RESET), expected=CUT),
    Case(
        name="500 cut short",
        words=Words(answer(BODY, "500 Oops")[:-1], then=Then.HANG_UP),
        expected=bad(AttemptError.TRUNCATED, 500),
    ),
    Case(name="chunk cut short", words=Words(chunked(BODY)[:-12], then=Then.HANG_UP), expected=CUT),
    Case(name="last chunk missing", words=Words(chunked(BODY, end=b""), then=Then.HANG_UP), expected=CUT),
    Case(name="last line missing", words=Words(chunked(BODY, end=b"0\r\n"), then=Then.HANG_UP), expected=CUT),
    Case(name="no length, reset", words=Words(OK + b"\r\n" + BODY, then=Then.RESET), expected=CUT),
    Case(
        name="gzip with its length cut short",
        words=Words(encoded(GZIPPED, "gzip")[:-1], then=Then.HANG_UP),
        expected=CUT,
    ),
]

BROKEN_HTTP = [
    Case(name="SSH", words=Words(b"SSH-2.0-OpenSSH_9.6\r\n"), expected=BROKEN),
    Case(name="TLS alert", words=Words(b"\x15\x03\x01\x00\x02\x02\x46"), expected=BROKEN),
    Case(name="HTTP/2 settings", words=Words(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\0" * 18), expected=BROKEN),
    Case(name="HTTP/0.9", words=Words(NOT_FOUND_PAGE, then=Then.HANG_UP), expected=BROKEN),
    Case(name="only JSON", words=Words(BODY, then=Then.HANG_UP), expected=BROKEN),
    Case(name="a request", words=Words(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), expected=BROKEN),
    Case(name="status in letters", words=Words(answer(BODY, "OK")), expected=BROKEN),
    Case(name="status 0", words=Words(answer(BODY, "000 None")), expected=BROKEN),
    Case(name="status 99", words=Words(answer(BODY, "099 Low")), expected=BROKEN),
    Case(name="status of four digits", words=Words(answer(BODY, "2000 OK")), expected=BROKEN),
    Case(
        name="101 unasked",
        words=Words(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n\x81\x00"),
        expected=BROKEN,
    ),
    Case(name="flood of interim answers", words=Words(b"HTTP/1.1 102 Wait\r\n\r\n" * 10_000), expected=BROKEN),
    Case(
        name="two lengths",
        words=Words(OK + b"Content-Length: 14\r\nContent-Length: 13\r\n\r\n" + BODY),
        expected=BROKEN,
    ),
    Case(
        name="length and chunks",
        words=Words(OK + b"Content-Length: 14\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        expected=BROKEN,
    ),
    Case(name="length below zero", words=Words(OK + b"Content-Length: -1\r\n\r\n"), expected=BROKEN),
    Case(name="length in words", words=Words(OK + b"Content-Length: many\r\n\r\n"), expected=BROKEN),
    Case(name="length over 64 bits", words=Words(OK + b"Content-Length: %b\r\n\r\n" % (b"9" * 30)), expected=BROKEN),
    Case(name="204 with a body", words=Words(answer(BODY, "204 No Content")), expected=BROKEN),
    Case(name="null byte in a header", words=Words(OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n"), expected=BROKEN),
    Case(name="header of 10,000 bytes", words=Words(answer(BODY, X="a" * 10_000)), expected=BROKEN),
    Case(
        name="a thousand headers",
        words=Words(OK + b"".join(b"X-%d: a\r\n" % number for number in range(1000)) + b"\r\n"),
        expected=BROKEN,
    ),
    Case(name="endless status line", words=Words(b"HTTP/1.1 200 " + b"a" * 20_000), expected=BROKEN),
    Case(
        name="chunk size is no number",
        words=Words(chunked(BODY, end=b"zz\r\n"), is_slow=True),
        expected=BROKEN_200,
    ),
    Case(name="chunk size below zero", words=Words(chunked(end=b"-5\r\nhello\r\n")), expected=BROKEN),
    Case(name="chunk size over 64 bits", words=Words(chunked(end=b"f" * 20 + b"\r\nhello")), expected=BROKEN),
    Case(name="chunk longer than it says", words=Words(chunked(end=b"3\r\nhello\r\n0\r\n\r\n")), expected=BROKEN),
    Case(name="bytes after the answer", words=Words(answer(BODY) + b"junk"), expected=BROKEN),
    Case(
        name="bytes after a closing answer",
        words=Words(answer(BODY, Connection="close") + b"junk"),
        expected=BROKEN,
    ),
    Case(name="two answers to one request", words=Words(answer(BODY) + answer(b"other")), expected=BROKEN_200),
]

TOO_MUCH = [
    Case(name="says it is too long", words=Words(OK + b"Content-Length: 999999999\r\n\r\n"), expected=TOO_LARGE),
    Case(name="one byte over the cap", words=Words(answer(LONG)), expected=TOO_LARGE),
    Case(name="chunks without end", words=Words(chunked(*[b"z" * 1000] * 400, end=b"")), expected=TOO_LARGE),
    Case(name="no length and no end", words=Words(OK + b"\r\n" + LONG), expected=TOO_LARGE),
    Case(name="gzip bomb", words=Words(encoded(gzip.compress(b"\0" * 20_000_000), "gzip")), expected=TOO_LARGE),
    Case(name="deflate bomb", words=Words(encoded(zlib.compress(b"\0" * 20_000_000), "deflate")), expected=TOO_LARGE),
    Case(name="gzip one byte over", words=Words(encoded(gzip.compress(LONG), "gzip")), expected=TOO_LARGE),
]

BAD_ENCODING = [
    Case(name="gzip that is none", words=Words(encoded(BODY, "gzip")), expected=UNREADABLE),
    Case(name="gzip spoiled", words=Words(encoded(spoiled(GZIPPED, 20), "gzip")), expected=UNREADABLE),
    Case(name="gzip with a wrong checksum", words=Words(encoded(spoiled(GZIPPED, -8), "gzip")), expected=UNREADABLE),
    Case(name="gzip that ends early", words=Words(encoded(GZIPPED[:-9], "gzip")), expected=UNREADABLE),
    Case(name="gzip with a tail", words=Words(encoded(GZIPPED + b"tail", "gzip")), expected=UNREADABLE),
    Case(
        name="gzip of a thousand members", words=Words(encoded(gzip.compress(b"") * 1000, "gzip")), expected=UNREADABLE
    ),
    Case(name="deflate that is none", words=Words(encoded(b"\xff" + BODY, "deflate")), expected=UNREADABLE),
    Case(name="brotli unasked", words=Words(encoded(BODY, "br")), expected=UNREADABLE),
    Case(name="gzip twice", words=Words(encoded(BODY, "gzip, gzip")), expected=UNREADABLE),
    Case(name="encoding of nonsense", words=Words(encoded(BODY, "\x01")), expected=UNREADABLE),
]

STANDING_STILL = [
    Case(name="never answers", words=Words(b""), expected=bad(AttemptError.TIMEOUT_TOTAL), stall_bytes=-1),
    Case(name="stops in the head", words=Words(OK), expected=bad(AttemptError.TIMEOUT_TOTAL), stall_bytes=-1),
    Case(
        name="stops after the head",
        words=Words(answer(BODY)[: -len(BODY)]),
        expected=bad(AttemptError.TIMEOUT_IDLE, 200),
        stall_bytes=0,
    ),
    Case(
        name="stops in the body",
        words=Words(answer(BODY)[:-4]),
        expected=bad(AttemptError.TIMEOUT_IDLE, 200),
        stall_bytes=10,
    ),
    Case(
        name="stops between chunks",
        words=Words(chunked(BODY, end=b"")),
        expected=bad(AttemptError.TIMEOUT_IDLE, 200),
        stall_bytes=14,
    ),
    Case(
        name="never closes what has no length",
        words=Words(OK + b"\r\n" + BODY),
        expected=bad(AttemptError.TIMEOUT_IDLE, 200),
        stall_bytes=14,
    ),
]

CASES = [*STRANGE_BUT_GOOD, *CUT_OFF, *BROKEN_HTTP, *TOO_MUCH, *BAD_ENCODING, *STANDING_STILL]
