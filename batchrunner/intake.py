"""The way of a file into Blobs: counted, hashed and looked at while it comes, and validated on request before a batch
is made of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from batchrunner.lines import is_blank
from batchrunner.models import File, LineProblem
from batchrunner.pipeline import ProblemReport, give_up, read_blob
from batchrunner.ports import Blobs
from batchrunner.seal import read_problems
from batchrunner.settings import Settings
from batchrunner.upkeep import Upkeep
from batchrunner.validation import Validation, validator_of

_BOM = b"\xef\xbb\xbf"
_BRACE = ord("{")
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What came in. `is_json_lines` tells whether the first line that is not blank is JSON; without one it is not."""

    size_bytes: int
    sha256: str
    line_count: int
    is_json_lines: bool


class LineCounter:
    """Counts the lines that are not blank, however the bytes are cut.

    Where all lines of a chunk begin with a brace none is blank and nothing has to be cut. They nearly always do.
    """

    __slots__ = ("_count", "_is_inside")

    def __init__(self) -> None:
        self._count = 0
        self._is_inside = False

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        first = chunk.find(b"\n")
        if first < 0:
            self._is_inside = self._is_inside or not is_blank(chunk)
            return
        self._count += self._is_inside or not is_blank(chunk[:first])
        whole_count = _braced_lines(chunk, first)
        if whole_count is not None:
            self._count += whole_count
            self._is_inside = not chunk.endswith(b"\n")
            return
        *whole, rest = chunk[first + 1 :].split(b"\n")
        self._count += sum(not is_blank(each) for each in whole)
        self._is_inside = not is_blank(rest)

    def count(self) -> int:
        """Give the number of lines so far, the one under way included."""
        return self._count + self._is_inside


def _braced_lines(chunk: bytes, newline: int) -> int | None:
    """Count the whole lines behind a newline; None if one of them, or what follows them, begins with no brace."""
    find, last, count = chunk.find, len(chunk) - 1, 0
    while newline < last:
        if chunk[newline + 1] != _BRACE:
            return None
        newline = find(b"\n", newline + 2)
        if newline < 0:
            break
        count += 1
    return count


class Intake:
    """One blob on its way. Used by one thread at a time; exactly one of `finish` and `abort` ends it."""

    def __init__(
        self, blobs: Blobs, name: str, *, line_bytes_max: int, digest: Callable[[bytes], None] | None = None
    ) -> None:
        """Open the blob. `digest` sees the bytes too, for those who want another sum of them."""
        self._writer = blobs.writer(name)
        self._sha256 = hashlib.sha256()
        self._digest = digest
        self._lines = LineCounter()
        self._line_bytes_max = line_bytes_max
        self._head: bytearray | None = bytearray()
        self._is_json_lines = False
        self.size_bytes = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Raises: DiskFull, BlobsUnavailable."""
        self.size_bytes += len(chunk)
        self._sha256.update(chunk)
        if self._digest is not None:
            self._digest(chunk)
        self._lines.feed(chunk)
        if self._head is not None:
            self._look(chunk)
        self._writer.write(chunk)

    def finish(self) -> Taken:
        """Return once the blob is durable. Raises as BlobWriter.commit does; `abort` has to follow then."""
        if self._head is not None:
            self._judge(bytes(self._head))
        self._writer.commit()
        return Taken(
            size_bytes=self.size_bytes,
            sha256=self._sha256.hexdigest(),
            line_count=self._lines.count(),
            is_json_lines=self._is_json_lines,
        )

    def abort(self) -> None:
        """Leave nothing behind; may be called twice."""
        self._writer.abort()

    def _look(self, chunk: bytes) -> None:
        """Gather the first line that is not blank, and judge it when it is whole or longer than a line may be."""
        assert self._head is not None
        self._head += chunk
        while (end := self._head.find(b"\n")) >= 0:
            line = bytes(self._head[:end])
            if not is_blank(line.removeprefix(_BOM)):
                self._judge(line)
                return
            del self._head[: end + 1]
        if len(self._head) > self._line_bytes_max:
            self._head = None

    def _judge(self, line: bytes) -> None:
        self._head = None
        line = line.removeprefix(_BOM)
        try:
            # Raw is skipped over, not built: a line of brackets would otherwise take a hundred times its size.
            line.decode()
            msgspec.json.decode(line, type=msgspec.Raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        self._is_json_lines = not is_blank(line)


def examine(blobs: Blobs, store: Upkeep, file: File, name: str, settings: Settings, *, owner: str) -> Validation:
    """Validate a file as a batch that takes every endpoint would, and keep the report as a blob: one JSON object that
    lists all problems in line order. Its name is pending then. Blocks for as long as it takes to read the file.
    """
    with ProblemReport(blobs, store, f"{name}-problems", owner=owner) as report:
        found, problems_blob = _found(blobs, file, settings, report)
    store.register_blob(name, owner=owner)
    try:
        _write_report(blobs, name, file, found, problems_blob)
    except BaseException:
        give_up(store, name)
        raise
    finally:
        if problems_blob is not None:
            give_up(store, problems_blob)
    if problems_blob is not None:
        blobs.delete(problems_blob)
    return found


def _found(blobs: Blobs, file: File, settings: Settings, report: ProblemReport) -> tuple[Validation, str | None]:
    validator = validator_of(settings, problems_max=settings.problems_max, on_problem=report.add, sha256=file.sha256)
    for chunk in read_blob(blobs, file.blob):
        validator.feed(chunk)
    while looks := validator.candidates():
        for look in looks:
            validator.confirm(look, blobs.read(file.blob, look.byte_start, look.byte_end))
    return validator.finish(), report.finish()


def _write_report(blobs: Blobs, name: str, file: File, found: Validation, problems_blob: str | None) -> None:
    writer = blobs.writer(name)
    try:
        for piece in _report(file, found, read_problems(blobs, problems_blob)):
            writer.write(piece)
        writer.commit()
    except BaseException:
        writer.abort()
        raise


def _report(file: File, found: Validation, problems: Iterator[LineProblem]) -> Iterator[bytes]:
    head = {
        "object": "file.validation",
        "file_id": file.id,
        "is_valid": not found.is_rejected,
        "line_count": found.total_count,
        "problem_count": found.problem_count,
    }
    yield _encode(head)[:-1] + b',"problems":['
    for number, problem in enumerate(problems):
        entry = {
            "code": problem.code,
            "message": problem.message,
            "param": problem.param,
            "line": problem.line_number,
            "custom_id": problem.custom_id,
        }
        yield (b",\n" if number else b"\n") + _encode(entry)
    yield b"\n]}\n" if found.problem_count else b"]}\n"
