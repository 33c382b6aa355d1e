"""Reads multipart/form-data bodies as they come in: fields in any order, one file straight to its sink, caps on
everything; or, of a form that is only passed on, what a field of it says.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from batchrunner.api.envelope import Refusal
from batchrunner.api.http import Call

MULTIPART = "multipart/form-data"
FIELD_BYTES_MAX = 64 * 1024
PARTS_MAX = 64
HEADERS_MAX = 8
HEADER_BYTES_MAX = 8 * 1024
FILENAME_CHARS_MAX = 1024
# Boundaries, part headers and fields beside the file itself.
OVERHEAD_BYTES = PARTS_MAX * (FIELD_BYTES_MAX + HEADERS_MAX * HEADER_BYTES_MAX)
# One hop to a thread for each block: a hop costs as much as hashing 20 KiB.
BLOCK_BYTES = 512 * 1024
# What stands for yes in a field; a longer one says something else.
_YES = frozenset({b"true", b"1"})
_YES_BYTES_MAX = 16
# Source: the HTML standard, how browsers and SDKs write these three into a quoted name.
_ESCAPED = (("%22", '"'), ("%0D", "\r"), ("%0A", "\n"))


class Sink(Protocol):
    """Where the file's bytes go."""

    def feed(self, chunk: bytes) -> None:
        """Take bytes."""

    def abort(self) -> None:
        """Leave nothing behind. May be called twice."""


SinkT = TypeVar("SinkT", bound=Sink)
# Called in a thread when the file begins, with the fields so far; may raise Refusal.
OpenSink = Callable[[dict[str, str]], SinkT]


class _Parts:
    """The parts of a form, one after the other: who derives from it is told where one begins, what is in it, where it
    ends. `_name` is that of the part whose bytes come.
    """

    def __init__(self, content_type: str) -> None:
        """Begin. Raises: Refusal when the body is no multipart form."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != MULTIPART.encode() or not boundary:
            raise Refusal("Invalid content type: expected multipart/form-data with a boundary.", status=415)
        self._name = ""
        self._options: Mapping[bytes, bytes] = {}
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = ""
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_part_data": self._on_part_bytes,
                    "on_part_end": self._on_part_end,
                    "on_header_begin": self._on_header_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_end": self._on_end,
                },
                max_header_count=HEADERS_MAX,
                max_header_size=HEADER_BYTES_MAX,
            )
        except FormParserError:
            raise _malformed() from None

    def _on_part_begin(self) -> None:
        self._disposition = ""

    def _on_header_begin(self) -> None:
        self._header_name.clear()
        self._header_value.clear()

    def _on_header_field(self, raw: bytes, start: int, end: int) -> None:
        self._header_name += raw[start:end]

    def _on_header_value(self, raw: bytes, start: int, end: int) -> None:
        self._header_value += raw[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            # Names come as raw UTF-8; latin-1 carries the bytes through the parser of options.
            self._disposition = self._header_value.decode("latin-1")

    def _on_headers_finished(self) -> None:
        kind, self._options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in self._options:
            raise _malformed()
        self._name = self._options[b"name"].decode("utf-8", "replace")

    def _on_part_bytes(self, raw: bytes, start: int, end: int) -> None:
        raise NotImplementedError

    def _on_part_end(self) -> None:
        raise NotImplementedError

    def _on_end(self) -> None:
        """Nothing that follows belongs to the form."""


class Form(_Parts, Generic[SinkT]):
    """A form on its way: `feed` and `finish` run in threads, one at a time; `abort` may come at any time.

    `fields` are the text fields, `sink` is None and `filename` empty until the file began. Parts of other names with a
    file count as fields.
    """

    def __init__(self, content_type: str, *, file_field: str, open_sink: OpenSink[SinkT]) -> None:
        """Begin. Raises: Refusal when the body is no multipart form."""
        super().__init__(content_type)
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.sink: SinkT | None = None
        self._file_field = file_field
        self._open_sink = open_sink
        self._lock = threading.Lock()
        self._is_aborted = False
        self._is_ended = False
        self._part_count = 0
        self._is_in_file = False
        self._field = bytearray()

    def feed(self, pieces: Sequence[bytes]) -> None:
        """Take the next bytes of the body; what follows the last boundary is ignored. Raises: Refusal, and as the sink
        does.
        """
        with self._lock:
            for piece in pieces:
                if self._is_ended or self._is_aborted:
                    return
                try:
                    self._parser.write(piece)
                except FormParserError:
                    raise _malformed() from None

    def finish(self) -> None:
        """Make sure that the form came whole. Raises: Refusal."""
        with self._lock:
            if not self._is_ended:
                raise _malformed()

    def abort(self) -> None:
        """Have the sink leave nothing behind, now or when it is through with what it does."""
        with self._lock:
            self._is_aborted = True
            if self.sink is not None:
                self.sink.abort()

    def _on_part_begin(self) -> None:
        super()._on_part_begin()
        self._part_count += 1
        if self._part_count > PARTS_MAX:
            raise Refusal(f"The form has more than {PARTS_MAX} parts.", status=413)
        self._field = bytearray()

    def _on_headers_finished(self) -> None:
        super()._on_headers_finished()
        self._is_in_file = self._name == self._file_field
        if not self._is_in_file:
            return
        if self.sink is not None:
            raise Refusal(f"The form has more than one '{self._file_field}'.", param=self._file_field)
        self.filename = _plain_name(self._options.get(b"filename", b"upload").decode("utf-8", "replace"))
        self.sink = self._open_sink(dict(self.fields))

    def _on_part_bytes(self, raw: bytes, start: int, end: int) -> None:
        if self._is_in_file:
            assert self.sink is not None
            self.sink.feed(raw if end - start == len(raw) else raw[start:end])
            return
        self._field += raw[start:end]
        if len(self._field) > FIELD_BYTES_MAX:
            raise Refusal(f"A form field is larger than {FIELD_BYTES_MAX} bytes.", status=413)

    def _on_part_end(self) -> None:
        if not self._is_in_file:
            self.fields[self._name] = self._field.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._is_ended = True


class FieldWatch(_Parts):
    """Finds out whether a field of a form says yes, in bytes that go on as they are. A form that cannot be read is for
    whoever gets it to judge: from there on nothing is found.
    """

    def __init__(self, content_type: str, *, field: str) -> None:
        """Begin. Raises: Refusal when the body is no multipart form."""
        super().__init__(content_type)
        self.is_yes = False
        self._field = field
        self._value = bytearray()
        self._is_over = False

    def feed(self, piece: bytes) -> None:
        """Take the next bytes; `is_yes` is set as soon as they hold the end of the field."""
        if self._is_over:
            return
        try:
            self._parser.write(piece)
        except (FormParserError, Refusal):
            self._is_over = True

    def _on_part_bytes(self, raw: bytes, start: int, end: int) -> None:
        if self._name == self._field:
            self._value += raw[start : min(end, start + _YES_BYTES_MAX + 1 - len(self._value))]

    def _on_part_end(self) -> None:
        if self._name == self._field and len(self._value) <= _YES_BYTES_MAX:
            self.is_yes = self.is_yes or bytes(self._value).strip().lower() in _YES
        self._value.clear()

    def _on_end(self) -> None:
        self._is_over = True


@asynccontextmanager
async def received(call: Call, open_sink: OpenSink[SinkT], *, size_bytes_max: int) -> AsyncIterator[Form[SinkT]]:
    """Give the form of a request once all of it is there. Unless the block comes to its end, nothing of it stays.

    Raises:
        Refusal: the form is malformed, too large, too slow or broken off; and as the sink does.
    """
    content_type = call.request.headers.get("Content-Type", "")
    form = Form(content_type, file_field=call.route.file_field, open_sink=open_sink)
    try:
        await _receive(call, form, size_bytes_max=size_bytes_max)
        yield form
    except BaseException:
        await call.blocking(form.abort)
        raise


async def _receive(call: Call, form: Form[SinkT], *, size_bytes_max: int) -> None:
    """Feed the whole body to the form, in blocks, while the next block comes in."""
    feeding = None
    try:
        async for block in _blocks(call.incoming(size_bytes_max + OVERHEAD_BYTES)):
            if feeding is not None:
                await feeding
            feeding = call.start(form.feed, block)
    finally:
        if feeding is not None:
            await feeding
    await call.blocking(form.finish)


async def _blocks(pieces: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Gather without joining: a copy of everything would cost the loop more than the pieces cost the thread."""
    gathered: list[bytes] = []
    size_bytes = 0
    async for piece in pieces:
        gathered.append(piece)
        size_bytes += len(piece)
        if size_bytes >= BLOCK_BYTES:
            yield gathered
            gathered, size_bytes = [], 0
    if gathered:
        yield gathered


def _plain_name(name: str) -> str:
    """A file's name is only shown, never used: its folders are dropped, control characters too."""
    for escaped, plain in _ESCAPED:
        name = name.replace(escaped, plain)
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(each for each in last if each.isprintable())[:FILENAME_CHARS_MAX] or "upload"


def _malformed() -> Refusal:
    return Refusal("The multipart form could not be parsed. Is the body whole, and does its boundary match?")
