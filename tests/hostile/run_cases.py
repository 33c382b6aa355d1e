"""Named lines of a run, what the peer does to each of them try by try, and the line that each must become."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass

import orjson

from batchrunner.models import LineCode
from tests.hostile.cases import OK, Then, Words, chunked, spoiled
from tests.hostile.peer import answer

TRIES = 3
REPLY_BYTES_MAX = 12 * 1024 * 1024
ASSET_BYTES_MAX = 20 * 1024 * 1024
GOOD = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"hello"}}]}'
REFUSAL = b'{"error":{"message":"no","type":"invalid_request_error","param":null,"code":null}}'
TEXT = {"Content_Type": "text/html"}


@dataclass(frozen=True, slots=True)
class Answered:
    """A line of the output file (2xx), or of the error file with the upstream's own answer in it."""

    body: bytes = GOOD
    status: int = 200
    request_id: bytes = b"null"

    @property
    def is_output(self) -> bool:
        return 200 <= self.status < 300

    @property
    def rest(self) -> bytes:
        """The line behind its custom_id."""
        return b'"response":{"status_code":%d,"request_id":%b,"body":%b},"error":null}' % (
            self.status,
            self.request_id,
            self.body,
        )


@dataclass(frozen=True, slots=True)
class Failed:
    """A line of the error file without an answer. `after <t>` and `<peer>` stand for what differs from run to run."""

    code: LineCode
    message: str

    is_output = False

    @property
    def rest(self) -> bytes:
        """The line behind its custom_id."""
        return b'"response":null,"error":{"code":%b,"message":%b}}' % (
            orjson.dumps(self.code),
            orjson.dumps(self.message),
        )


@dataclass(frozen=True, slots=True)
class LineCase:
    """One line of a run. The last of `words` is said to every further try; `sends` are the requests that the peer must
    see, None where a connection found dead may add one.
    """

    name: str
    words: tuple[Words, ...]
    expected: Answered | Failed
    sends: int | None
    custom_id: str
    url: str


def line(
    name: str,
    *words: Words | bytes,
    expected: Answered | Failed | None = None,
    sends: int | None = 0,
    custom_id: str = "",
    url: str = "/v1/chat/completions",
) -> LineCase:
    """Give a case; without `sends` the peer is asked once for each of its words."""
    spoken = tuple(Words(each) if isinstance(each, bytes) else each for each in words)
    return LineCase(name, spoken, expected or Answered(), len(spoken) if sends == 0 else sends, custom_id or name, url)


def gave_up(message: str, code: LineCode = LineCode.INVALID_RESPONSE) -> Failed:
    """What a line becomes whose tries were all of one kind."""
    return Failed(code, f"gave up after {TRIES} tries; the last one: {message}")


def ok(body: bytes = GOOD, **headers: str) -> bytes:
    return answer(body, Content_Type="application/json", **headers)


def refused(status: str, body: bytes = REFUSAL, **headers: str) -> bytes:
    return answer(body, status, **headers)


def nested(depth: int) -> bytes:
    return b'{"choices":[],"deep":%b%b}' % (b"[" * depth, b"]" * depth)


NOT_JSON = gave_up("status 200 with a body that is not JSON")
IN_ERROR = gave_up("status 200 with an error object")
TRUNCATED = "the answer ended before its announced length after <t>"
CUT_AFTER = TRUNCATED + " (<peer> closed the connection after {} bytes of an unfinished answer)"
TOO_LARGE = "the answer is larger than the limit after <t>"
NOT_HTTP = "the answer is not valid HTTP after <t>"
LOST = "the connection was lost before the answer came after <t>"
BIG = b'{"choices":[],"pad":"%b"}' % (b"x" * 10_000_000)
HTML = b"<html>\n<b>Bad Gateway</b>\n</html>"

PLAIN = [
    line("plain", ok()),
    line("created", answer(GOOD, "201 Created"), expected=Answered(status=201)),
    line("request id", ok(X_Request_Id="req-1"), expected=Answered(request_id=b'"req-1"')),
    line("request id with quotes", ok(X_Request_Id='a"b\\c'), expected=Answered(request_id=b'"a\\"b\\\\c"')),
    line(
        "request id in broken UTF-8",
        OK + b"x-request-id: a\xffb\r\nContent-Length: %d\r\n\r\n" % len(GOOD) + GOOD,
        expected=Answered(request_id=orjson.dumps("a\ufffdb")),
    ),
    line("no content type", answer(GOOD)),
    line("JSON called HTML", answer(GOOD, Content_Type="text/html")),
    line("byte by byte", Words(ok(), is_slow=True)),
    line("closes each time", Words(ok(Connection="close"), then=Then.HANG_UP)),
    line("no length, until the end", Words(OK + b"\r\n" + GOOD, then=Then.HANG_UP)),
    line("HTTP/1.0", Words(b"HTTP/1.0 200 OK\r\n\r\n" + GOOD, then=Then.HANG_UP)),
    line("chunks of one byte", chunked(*(bytes([each]) for each in GOOD))),
    line(
        "chunked with trailers",
        OK + b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%b\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(GOOD), GOOD),
    ),
    line("100 Continue first", b"HTTP/1.1 100 Continue\r\n\r\n" + ok()),
    line("early hints first", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 3 + ok()),
    line("a hundred headers", ok(GOOD, **{f"X_{number}": "a" * 50 for number in range(100)})),
    line("gzip", ok(gzip.compress(GOOD), Content_Encoding="gzip")),
    line("10 MB", ok(BIG), expected=Answered(BIG)),
    line("gzip to 10 MB", ok(gzip.compress(BIG), Content_Encoding="gzip"), expected=Answered(BIG)),
]

CUSTOM_IDS = [
    line("id with quotes", ok(), custom_id='say "hi" \\ back'),
    line("id with line breaks", ok(), custom_id="a\nb\r\tc\u2028d"),
    line("id in many scripts", ok(), custom_id="Zoë 日本 🙂 \u0001"),
    line("id of a failed line", refused("400 Bad"), expected=Answered(REFUSAL, 400), custom_id='bad\n"id"'),
]

BODIES = [
    line("line break at the end", ok(GOOD + b"\n")),
    line(
        "pretty-printed",
        ok(b'{\r\n  "choices": [\n    1.10,\n    12345678901234567890123456789\n  ],\n  "s": "a  b\\n"\n}\n'),
        expected=Answered(b'{"choices":[1.10,12345678901234567890123456789],"s":"a  b\\n"}'),
    ),
    line("duplicate keys", ok(b'{"choices":1,"choices":2}'), expected=Answered(b'{"choices":1,"choices":2}')),
    line("nested 100 deep", ok(nested(100)), expected=Answered(nested(100))),
    line("nested 100,000 deep", ok(nested(100_000)), expected=NOT_JSON, sends=TRIES),
    line("an array", ok(b"[1,2]"), expected=Answered(b"[1,2]")),
    line("null", ok(b"null"), expected=Answered(b"null")),
    line("an unpaired surrogate", ok(b'{"choices":"\\ud800"}'), expected=NOT_JSON, sends=TRIES),
    line("escaped null byte", ok(b'{"choices":"\\u0000"}'), expected=Answered(b'{"choices":"\\u0000"}')),
    line("line separator", ok('{"choices":"\u2028"}'.encode()), expected=Answered('{"choices":"\u2028"}'.encode())),
    line(
        "tokens that are no numbers",
        ok(b'{"choices":[],"usage":{"prompt_tokens":"many"}}'),
        expected=Answered(b'{"choices":[],"usage":{"prompt_tokens":"many"}}'),
    ),
    line(
        "tokens below zero",
        ok(b'{"choices":[],"usage":{"prompt_tokens":-7}}'),
        expected=Answered(b'{"choices":[],"usage":{"prompt_tokens":-7}}'),
    ),
    line("error that is null", ok(b'{"choices":[],"error":null}'), expected=Answered(b'{"choices":[],"error":null}')),
    line("error beside an answer", ok(b'{"choices":[],"error":{}}'), expected=Answered(b'{"choices":[],"error":{}}')),
    line("error object, always", ok(REFUSAL), expected=IN_ERROR, sends=TRIES),
    line("error object, then good", ok(REFUSAL), ok()),
    line("page, always", answer(HTML, **TEXT), expected=NOT_JSON, sends=TRIES),
    line("page, then good", answer(HTML, **TEXT), ok()),
    line("server-sent events", answer(b"data: %b\n\ndata: [DONE]\n\n" % GOOD), expected=NOT_JSON, sends=TRIES),
    line("NaN", ok(b'{"choices":[NaN]}'), expected=NOT_JSON, sends=TRIES),
    line("two objects", ok(GOOD + GOOD), expected=NOT_JSON, sends=TRIES),
    line("half an object, whole length", ok(GOOD[:-1]), expected=NOT_JSON, sends=TRIES),
    line("byte order mark", ok(b"\xef\xbb\xbf" + GOOD), expected=NOT_JSON, sends=TRIES),
    line("broken UTF-8", ok(GOOD.replace(b"hello", b"h\xffllo")), expected=NOT_JSON, sends=TRIES),
    line("raw control character", ok(GOOD.replace(b"hello", b"h\x01llo")), expected=NOT_JSON, sends=TRIES),
    line("empty", ok(b""), expected=NOT_JSON, sends=TRIES),
    line("empty, then good", ok(b""), ok()),
    line(
        "204",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        expected=gave_up("status 204 with a body that is not JSON"),
        sends=TRIES,
    ),
]

STATUSES = [
    line("400 with an error object", refused("400 Bad"), expected=Answered(REFUSAL, 400)),
    line("400 pretty-printed", refused("400 Bad", b'{\n "error": 1\n}'), expected=Answered(b'{"error":1}', 400)),
    line("400 with a page", refused("400 Bad", HTML), expected=Answered(orjson.dumps(HTML.decode()), 400)),
    line("400 in broken UTF-8", refused("400 Bad", b"\xff"), expected=Answered(orjson.dumps("\ufffd"), 400)),
    line("400 and empty", refused("400 Bad", b""), expected=Answered(b'""', 400)),
    line("400 and nested 100,000 deep", refused("400 Bad", b"[" * 100_000),
         expected=Answered(b'"%b"' % (b"[" * 100_000), 400)),
    line("model not found", refused("400 Bad", b'{"error":{"code":"model_not_found"}}'),
         expected=Answered(b'{"error":{"code":"model_not_found"}}', 400)),
    line("301", refused("301 Moved", Location="http://127.0.0.1:1/"), expected=Answered(REFUSAL, 301)),
    line("302", refused("302 Found", Location="/elsewhere"), expected=Answered(REFUSAL, 302)),
    line("304", b"HTTP/1.1 304 Not Modified\r\n\r\n", expected=Answered(b'""', 304)),
    line("307", refused("307 Temporary", Location="/elsewhere"), expected=Answered(REFUSAL, 307)),
    *[line(f"{status}", refused(f"{status} No"), expected=Answered(REFUSAL, status))
      for status in (401, 403, 404, 405, 413, 422, 431, 451)],
    *[line(f"{status}, then good", refused(f"{status} No"), ok())
      for status in (408, 409, 425, 429, 500, 501, 502, 503, 504, 520, 529)],
    *[line(f"{status}, always", refused(f"{status} No", HTML), sends=TRIES,
           expected=Answered(orjson.dumps(HTML.decode()), status)) for status in (408, 409, 425, 500, 504)],
    line("503 and 429 many times", *[refused("503 Full"), refused("429 Slow")] * 4, ok()),
    line("500, 429, 500, then good", refused("500 No"), refused("429 No"), refused("500 No"), ok()),
    line("999", answer(GOOD, "999 What"), expected=gave_up("status 999"), sends=TRIES),
]  # fmt: skip

RETRY_AFTER = [
    line(f"429 with {what}", refused("429 Slow", REFUSAL, **headers), ok())
    for what, headers in {
        "seconds": {"Retry_After": "1"},
        "a fraction": {"Retry_After": "0.25"},
        "a date": {"Retry_After": "Tue, 01 Jan 2030 00:01:30 GMT"},
        "a date long past": {"Retry_After": "Thu, 01 Jan 1970 00:00:00 GMT"},
        "a date without zone": {"Retry_After": "Tue, 01 Jan 2030 00:01:30"},
        "milliseconds": {"Retry_After_Ms": "20", "Retry_After": "3600"},
        "a negative number": {"Retry_After": "-5"},
        "a huge number": {"Retry_After": "99999999999"},
        "infinity": {"Retry_After": "inf"},
        "no number": {"Retry_After": "in a while"},
        "nothing in it": {"Retry_After": ""},
        "20,000 digits": {"Retry_After": "9" * 7000},
        "letters as milliseconds": {"Retry_After_Ms": "soon"},
    }.items()
]

TRANSPORT = [
    line("reset before the answer, then good", Words(b"", then=Then.RESET), ok(), sends=None),
    line("hung up before the answer, then good", Words(b"", then=Then.HANG_UP), ok(), sends=None),
    line(
        "reset before the answer, always",
        Words(b"", then=Then.RESET),
        expected=gave_up(f"{LOST} (<peer> closed the connection before it answered)", LineCode.CONNECTION_ERROR),
        sends=None,
    ),
    line("reset in the answer, then good", Words(ok()[:-5], then=Then.RESET), ok()),
    line("cut short, then good", Words(ok()[:-5], then=Then.HANG_UP), ok()),
    line(
        "cut short, always",
        Words(ok()[:-5], then=Then.HANG_UP),
        expected=gave_up(CUT_AFTER.format(len(GOOD) - 5)),
        sends=TRIES,
    ),
    line(
        "last chunk missing, always",
        Words(chunked(GOOD, end=b""), then=Then.HANG_UP),
        expected=gave_up(CUT_AFTER.format(len(GOOD))),
        sends=TRIES,
    ),
    line(
        "500 cut short, always",
        Words(refused("500 No")[:-5], then=Then.HANG_UP),
        expected=gave_up(CUT_AFTER.format(len(REFUSAL) - 5)),
        sends=TRIES,
    ),
    line(
        "length too short, always",
        Words(OK + b"Content-Length: 5\r\n\r\n" + GOOD),
        expected=gave_up(f"{NOT_HTTP} (<peer> answered in broken HTTP (BadStatusLine))"),
        sends=TRIES,
    ),
    line(
        "two lengths, always",
        Words(OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + GOOD),
        expected=gave_up(f"{NOT_HTTP} (<peer> answered in broken HTTP (BadHttpMessage))"),
        sends=TRIES,
    ),
    line(
        "not HTTP, always",
        Words(b"SSH-2.0-OpenSSH_9.6\r\n"),
        expected=gave_up(f"{NOT_HTTP} (<peer> answered in broken HTTP (BadStatusLine))"),
        sends=TRIES,
    ),
    line(
        "flood of headers, always",
        Words(OK + b"".join(b"X-%d: a\r\n" % number for number in range(1000)) + b"\r\n"),
        expected=gave_up(f"{NOT_HTTP} (<peer> answered in broken HTTP (BadHttpMessage))"),
        sends=TRIES,
    ),
    line(
        "101 unasked, always",
        Words(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"),
        expected=gave_up(f"{NOT_HTTP} (<peer> answered with status 101 to a POST)"),
        sends=TRIES,
    ),
    line("two answers, then good", Words(ok() + ok(b'{"choices":["not mine"]}')), ok()),
    line(
        "gzip that is corrupt, always",
        ok(spoiled(gzip.compress(GOOD), 20), Content_Encoding="gzip"),
        expected=gave_up("the answer could not be decompressed after <t> (the answer of <peer> is broken gzip)"),
        sends=TRIES,
    ),
    line(
        "unknown encoding, always",
        ok(Content_Encoding="br"),
        expected=gave_up(
            "the answer could not be decompressed after <t> "
            "(<peer> answered in content encoding 'br', asked for was identity)"
        ),
        sends=TRIES,
    ),
    line(
        "gzip bomb",
        ok(gzip.compress(b"\0" * 40_000_000), Content_Encoding="gzip"),
        expected=Failed(
            LineCode.INVALID_RESPONSE,
            f"{TOO_LARGE} (the answer of <peer> is over {REPLY_BYTES_MAX} bytes when decoded)",
        ),
    ),
    line(
        "huge by its length",
        OK + b"Content-Length: 999999999\r\n\r\n",
        expected=Failed(
            LineCode.INVALID_RESPONSE,
            f"{TOO_LARGE} (the answer of <peer> is over {REPLY_BYTES_MAX} bytes)",
        ),
    ),
    line(
        "huge without length",
        Words(OK + b"\r\n" + b"x" * (REPLY_BYTES_MAX + 1)),
        expected=Failed(
            LineCode.INVALID_RESPONSE,
            f"{TOO_LARGE} (the answer of <peer> is over {REPLY_BYTES_MAX} bytes)",
        ),
    ),
]

CASES = [*PLAIN, *CUSTOM_IDS, *BODIES, *STATUSES, *RETRY_AFTER, *TRANSPORT]

# A run of its own, with deadlines that are soon over.
TOTAL_S, IDLE_S = 2.4, 0.3
TOO_LATE = gave_up(f"no whole answer within {TOTAL_S:g} s", LineCode.REQUEST_TIMEOUT)
UNFINISHED = OK + b"Content-Length: 100000\r\n\r\n"


def stood_still(after_bytes: int) -> Failed:
    return gave_up(f"the answer stood still for {IDLE_S:g} s after {after_bytes} bytes", LineCode.REQUEST_TIMEOUT)


STALLS = [
    line("prompt", ok()),
    line("never answers, always", b"", expected=TOO_LATE, sends=TRIES),
    line("never answers, then good", b"", ok()),
    line("silent in the head, always", b"HTTP/1.1 200", expected=TOO_LATE, sends=TRIES),
    line("silent after 100 Continue, always", b"HTTP/1.1 100 Continue\r\n\r\n", expected=TOO_LATE, sends=TRIES),
    line("silent before the body, always", UNFINISHED, expected=stood_still(0), sends=TRIES),
    line("silent in the body, always", UNFINISHED + b"12345", expected=stood_still(5), sends=TRIES),
    line("silent in the body, then good", UNFINISHED + b"12345", ok()),
    line("silent in a chunk, always", chunked(GOOD, end=b"5\r\n12"), expected=stood_still(len(GOOD) + 2), sends=TRIES),
    line("silent in a refusal, always", refused("500 No")[:-5], expected=stood_still(len(REFUSAL) - 5), sends=TRIES),
    line("drips, always", Words(UNFINISHED, then=Then.DRIP), expected=TOO_LATE, sends=TRIES),
    line("drips, then good", Words(UNFINISHED, then=Then.DRIP), ok()),
]

# A run whose lines may be sent only once.
IN_DOUBT = "the request may have been processed and may be sent only once"
NOT_REPEATED = "not repeated, because the line may be sent only once"


def unknown(message: str) -> Failed:
    return Failed(LineCode.OUTCOME_UNKNOWN, f"{message}; {IN_DOUBT}")


def unusable(message: str) -> Failed:
    return Failed(LineCode.INVALID_RESPONSE, f"{message}; {NOT_REPEATED}")


ONCE = [
    line("good", ok()),
    line("429, then good", refused("429 Slow"), ok()),
    line("empty 503, then good", refused("503 Full", b""), ok()),
    line("503 that says something", refused("503 Full"), expected=unknown("status 503")),
    line("500", refused("500 No"), expected=unknown("status 500")),
    line("502", refused("502 No", HTML), expected=unknown("status 502")),
    line("504", refused("504 Late"), expected=unknown("status 504")),
    line("529", refused("529 Full"), expected=unknown("status 529")),
    line("400", refused("400 Bad"), expected=Answered(REFUSAL, 400)),
    line("408", refused("408 Late"), expected=Answered(REFUSAL, 408)),
    line("409", refused("409 Busy"), expected=Answered(REFUSAL, 409)),
    line("302", refused("302 Found"), expected=Answered(REFUSAL, 302)),
    line("page", ok(HTML), expected=unusable("status 200 with a body that is not JSON")),
    line("error object", ok(REFUSAL), expected=unusable("status 200 with an error object")),
    line(
        "cut short",
        Words(ok()[:-5], then=Then.HANG_UP),
        expected=unknown(CUT_AFTER.format(len(GOOD) - 5)),
    ),
    line(
        "reset",
        Words(b"", then=Then.RESET),
        expected=unknown(f"{LOST} (<peer> closed the connection before it answered)"),
    ),
    line("not HTTP", b"SSH-2.0\r\n", expected=unknown(f"{NOT_HTTP} (<peer> answered in broken HTTP (BadStatusLine))")),
    line(
        "huge",
        OK + b"Content-Length: 999999999\r\n\r\n",
        expected=unusable(f"{TOO_LARGE} (the answer of <peer> is over {REPLY_BYTES_MAX} bytes)"),
    ),
]

# A run of answers that are files.
SPEECH = "/v1/audio/speech"
SOUND = b"ID3\x04" + bytes(range(256)) * 40 + b"\n\xff"


def asset(name: str, line_number: int, content_type: str, suffix: str, *, content: bytes = SOUND) -> LineCase:
    """A line whose answer is kept beside the output."""
    sha256 = hashlib.sha256(content).hexdigest()
    asset_id = f"asset_{line_number}_{sha256[:24]}"
    kept = {
        "object": "asset",
        "id": asset_id,
        "content_type": content_type,
        "bytes": len(content),
        "sha256": sha256,
        "url": f"assets/{asset_id}{suffix}",
    }
    told = answer(content, Content_Type=content_type)
    return line(name, told, expected=Answered(orjson.dumps(kept)), url=SPEECH)


def chunked_sound(content: bytes) -> bytes:
    return chunked(content).replace(b"\r\n", b"\r\nContent-Type: audio/mpeg\r\n", 1)


SOUND_TOO_LARGE = Failed(
    LineCode.INVALID_RESPONSE, f"{TOO_LARGE} (the answer of <peer> is over {ASSET_BYTES_MAX} bytes)"
)
MEDIA = [
    asset("mp3", 1, "audio/mpeg", ".mp3"),
    asset("the same bytes again", 2, "audio/mpeg", ".mp3"),
    asset("picture", 3, "image/png", ".png"),
    asset("film", 4, "video/mp4", ".mp4"),
    asset("bytes", 5, "application/octet-stream", ".bin"),
    asset("unknown sound", 6, "audio/x-new", ".bin"),
    asset("JSON that is called a sound", 7, "audio/mpeg", ".mp3", content=GOOD),
    asset("8 MB", 8, "audio/wav", ".wav", content=b"\x00\n" * 4_000_000),
    asset("larger than JSON may be", 9, "audio/wav", ".wav", content=b"\x00\n" * 8_000_000),
    line("JSON after all", ok(), url=SPEECH),
    line("empty sound, then a good answer", answer(b"", Content_Type="audio/mpeg"), ok(), url=SPEECH),
    line(
        "sound over the cap",
        answer(bytes(ASSET_BYTES_MAX + 1), Content_Type="audio/mpeg"),
        expected=SOUND_TOO_LARGE,
        url=SPEECH,
    ),
    line(
        "sound over the cap, in chunks", chunked_sound(bytes(ASSET_BYTES_MAX + 1)), expected=SOUND_TOO_LARGE, url=SPEECH
    ),
    line(
        "sound that is reset, then whole",
        Words(answer(SOUND * 100, Content_Type="audio/mpeg")[:-1], then=Then.RESET),
        ok(),
        url=SPEECH,
    ),
    line("sound that says no type", answer(SOUND), expected=NOT_JSON, sends=TRIES, url=SPEECH),
    line(
        "refusal called a sound",
        refused("400 Bad", Content_Type="audio/mpeg"),
        expected=Answered(REFUSAL, 400),
        url=SPEECH,
    ),
]
