"""Which lines of a finished batch run again: failed ones of its error file, all or by code or custom_id, found again in
the input.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import chain

import msgspec
import orjson

from batchrunner.cutting import Cutter, split_lines
from batchrunner.grouping import read_failure
from batchrunner.lines import ProblemCode
from batchrunner.ports import Blobs

_BLOCK_LINES = 1000
_BLOCK_BYTES = 8 << 20
_REFUSALS = frozenset(ProblemCode)


class _Error(msgspec.Struct):
    code: str | None = None


class _Response(msgspec.Struct):
    status_code: int = 0


class ErrorLine(msgspec.Struct):
    """The parts of an error line that tell why it is one."""

    custom_id: str | None = None
    error: _Error | None = None
    response: _Response | None = None

    @property
    def code(self) -> str:
        """The error's code, or the HTTP status where the upstream answered."""
        if self.error is not None and self.error.code:
            return self.error.code
        return str(self.response.status_code) if self.response is not None else "unknown"


class _Named(msgspec.Struct):
    custom_id: str | None = None


read_error_line = msgspec.json.Decoder(ErrorLine).decode
read_id = msgspec.json.Decoder(_Named).decode


def failed_ids(
    error_lines: Iterable[bytes], *, codes: Container[str] | None = None, custom_ids: Container[str] | None = None
) -> set[str]:
    """Give the custom_ids of the lines that can run again, of those codes and ids; None stands for all.

    A code is the line's own, or the one under which failures are grouped, such as `400 context_length_exceeded`.
    Refused lines are not among them: they would be refused again.
    """
    found: set[str] = set()
    for raw in error_lines:
        line = read_error_line(raw)
        if line.custom_id is None or line.code in _REFUSALS:
            continue
        if custom_ids is not None and line.custom_id not in custom_ids:
            continue
        if codes is None or line.code in codes or read_failure(orjson.loads(raw)).code in codes:
            found.add(line.custom_id)
    return found


def custom_id_of(raw: bytes) -> str | None:
    """Read the custom_id of an input or result line, None for a blank or refused one that has none to read."""
    try:
        return read_id(raw).custom_id
    except (msgspec.DecodeError, RecursionError):
        return None


def write_chosen(
    blobs: Blobs,
    name: str,
    source: Iterable[bytes],
    wanted: Container[str],
    *,
    refused: Container[int | None],
    line_bytes_max: int,
    among: Container[int] | None = None,
) -> int:
    """Write the line numbers of the wanted ids, but for refused lines, into a blob and give how many they are.

    `source` is the input in pieces of any size, `among` the only lines that count. Without a line there is no blob.
    Blocks.
    """
    count = 0
    writer = blobs.writer(name)
    try:
        for number, raw in numbered_lines(source, line_bytes_max):
            if number in refused or (among is not None and number not in among):
                continue
            if custom_id_of(raw) in wanted:
                writer.write(number.to_bytes(8, "little"))
                count += 1
        if count:
            writer.commit()
        else:
            writer.abort()
    except BaseException:
        writer.abort()
        raise
    return count


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Give the lines of a file of results, each with its 0x0A."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def numbered_lines(source: Iterable[bytes], line_bytes_max: int) -> Iterator[tuple[int, bytes]]:
    """Give the lines of an input with their numbers, but for those too long; `source` is in pieces of any size."""
    cutter = Cutter(lines_max=_BLOCK_LINES, bytes_max=_BLOCK_BYTES, line_bytes_max=line_bytes_max)
    for run in chain(chain.from_iterable(map(cutter.feed, source)), cutter.finish()):
        if isinstance(run, bytes):
            for block in cutter.blocks(run):
                yield from split_lines(block.content, block.first_line)
