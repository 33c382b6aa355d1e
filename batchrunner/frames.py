"""What stands in a segment: frames, reading them back verified, and finding what earlier claims left unregistered.

Only bytes inside registered extents exist; `salvage` is the one reader that looks beyond them.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from batchrunner.errors import JournalCorrupt, NotFound, ReconciliationError
from batchrunner.models import NO_USAGE, Claim, Extent, RecordKind, Repair, SegmentRef, SessionId, Usage
from batchrunner.ports import Blobs

logger = logging.getLogger(__name__)

# Two of its bytes never occur in UTF-8, so no JSON line holds it and a reader that lost its way finds the next frame.
_MARK = b"\xf5BJ\xfe"
_FIELDS = struct.Struct("<4sIQB3x4I")
_CHECKSUM = struct.Struct("<I")
# A frame's head without the numbers that only its reader as a record wants.
_HEAD = struct.Struct("<4sIQB19xI")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
_U32_MAX = 0xFFFF_FFFF
_KINDS = {int(kind): kind for kind in RecordKind}
_MARK_NUMBER = int(RecordKind.MARK)
BUFFER_BYTES = 1 << 20
# Enough for the heads of many short frames at a time, and little to read of each long one.
_HEADS_BYTES = 64 * 1024

_pack_fields = _FIELDS.pack
_pack_checksum = _CHECKSUM.pack


class Record(NamedTuple):
    """One intact frame. Its payload, fetched by `read_payload`, is the finished JSON line; a mark has none."""

    segment: SegmentRef
    line_number: int
    kind: RecordKind
    usage: Usage
    payload_offset: int
    payload_length: int

    @property
    def start(self) -> int:
        """Where the frame begins."""
        return self.payload_offset - HEADER_BYTES

    @property
    def end(self) -> int:
        """Where the next frame begins."""
        return self.payload_offset + self.payload_length


class Damage(NamedTuple):
    """A byte range inside registered bytes that holds no intact frame: its lines have to run again."""

    segment: SegmentRef
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvaged:
    """What a claimer finds before its first send.

    `registered` holds the lines with a registered record. `records` are durable ones of other lines that are worth
    copying, each line once. `marks` gives the highest reserved line by epoch, `mark` that of the last claim that
    reserved any: one that died before that sent nothing, and may not have counted what those before it sent.
    `repairs` have to be registered before a line of the `damages` runs again.
    """

    registered: frozenset[int]
    records: tuple[Record, ...]
    marks: dict[int, int]
    mark: int
    damages: tuple[Damage, ...]
    repairs: tuple[Repair, ...]


def segment_of(extent: Extent) -> SegmentRef:
    """Name the segment that holds an extent's bytes."""
    return SegmentRef(
        batch_id=extent.batch_id,
        task_id=extent.task_id,
        epoch=extent.epoch,
        session=extent.session,
        number=extent.segment,
    )


def seed(segment: SegmentRef) -> int:
    """Give the checksum's start, so that frames of another batch, shard, epoch or session do not verify.

    The segment's number is not in it: a group that could not be written moves to the next segment as it is.
    """
    return crc32(f"{segment.batch_id}/{segment.task_id}/{segment.epoch}/{segment.session}".encode())


def header(start: int, line_number: int, kind: RecordKind, usage: Usage, payload: bytes) -> bytes:
    """Give what stands before a payload, its checksum started at `start`.

    Raises:
        struct.error: a number does not fit; `clipped` mends usage.
    """
    fields = _pack_fields(
        _MARK,
        len(payload),
        line_number,
        kind,
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        usage.reasoning_tokens,
    )
    return fields + _pack_checksum(crc32(payload, crc32(fields, start)))


def clipped(usage: Usage) -> Usage:
    """Bring what an upstream claims into the 32 bits that a frame has for each number."""
    tokens = (usage.input_tokens, usage.cached_tokens, usage.output_tokens, usage.reasoning_tokens)
    return Usage(*(min(max(each, 0), _U32_MAX) for each in tokens))


class _Reader:
    """Frames of one segment up to `end`, through a bounded buffer."""

    def __init__(self, blobs: Blobs, segment: SegmentRef, end: int, *, buffer_bytes: int) -> None:
        self._blobs = blobs
        self._segment = segment
        self._seed = seed(segment)
        self._end = end
        self._buffer_bytes = buffer_bytes
        self._buffer = b""
        self._base = 0

    def frame(self, at: int) -> Record | None:
        """Give the frame that begins at `at`, None if no intact one does."""
        body = at + HEADER_BYTES
        index = self._load(at, HEADER_BYTES)
        if index is None:
            return None
        mark, length, line_number, number, *tokens = _FIELDS.unpack_from(self._buffer, index)
        kind = _KINDS.get(number)
        if mark != _MARK or kind is None or body + length > self._end:
            return None
        (expected,) = _CHECKSUM.unpack_from(self._buffer, index + _FIELDS.size)
        checksum = crc32(self._buffer[index : index + _FIELDS.size], self._seed)
        for start in range(body, body + length, self._buffer_bytes):
            size = min(self._buffer_bytes, body + length - start)
            index = self._load(start, size)
            if index is None:
                return None
            checksum = crc32(self._buffer[index : index + size], checksum)
        if checksum != expected:
            return None
        return Record(self._segment, line_number, kind, Usage(*tokens), body, length)

    def head(self, at: int) -> tuple[int, RecordKind, int] | None:
        """Give line number, kind and end of the frame that seems to begin at `at`, unverified; None if none does."""
        index = self._load(at, HEADER_BYTES)
        if index is None:
            return None
        mark, length, line_number, number, _ = _HEAD.unpack_from(self._buffer, index)
        kind, end = _KINDS.get(number), at + HEADER_BYTES + length
        return (line_number, kind, end) if mark == _MARK and kind is not None and end <= self._end else None

    def next_frame(self, at: int) -> int:
        """Give the first place from `at` on where an intact frame begins, else the end."""
        while (index := self._load(at, len(_MARK))) is not None:
            found = self._buffer.find(_MARK, index)
            if found < 0:
                # The buffer's last bytes may be the beginning of a mark.
                at = self._base + len(self._buffer) - len(_MARK) + 1
                continue
            at = self._base + found
            if self.frame(at):
                return at
            at += 1
        return self._end

    def _load(self, at: int, size: int) -> int | None:
        """Have bytes [at, at + size) in the buffer and tell where; None if the segment does not hold them."""
        if at + size > self._end:
            return None
        index = at - self._base
        if index < 0 or index + size > len(self._buffer):
            stop = min(self._end, at + max(size, self._buffer_bytes))
            try:
                self._buffer = self._blobs.read(self._segment.blob, at, stop)
            except NotFound:
                self._buffer = b""
            self._base, index = at, 0
        return index if index + size <= len(self._buffer) else None


def read_records(
    blobs: Blobs, segment: SegmentRef, start: int, end: int, *, buffer_bytes: int = BUFFER_BYTES
) -> Iterator[Record | Damage]:
    """Give the results in registered bytes [start, end) in their order, verified, without their payloads.

    What is not intact comes as Damage and is logged as an error. Never holds more than the buffer.
    """
    yield from (each for each in _walk(blobs, segment, start, end, buffer_bytes) if not _is_mark(each))


def find_record(blobs: Blobs, segment: SegmentRef, start: int, end: int, line_number: int) -> Record | None:
    """Give the result of one line in registered bytes [start, end), verified; None if it is not there.

    Of other frames only the heads are read, unless something on the way is not intact.
    """
    reader = _Reader(blobs, segment, end, buffer_bytes=_HEADS_BYTES)
    at = start
    while at < end and (head := reader.head(at)) is not None:
        number, kind, behind = head
        if number == line_number and kind is not RecordKind.MARK:
            found = reader.frame(at)
            if found is not None:
                return found
            break
        at = behind
    else:
        if at == end:
            return None
    records = read_records(blobs, segment, start, end)
    return next((each for each in records if isinstance(each, Record) and each.line_number == line_number), None)


def results_within(content: bytes, segment: SegmentRef) -> Iterator[tuple[int, RecordKind, memoryview]]:
    """Give line number, kind and payload of each result in a whole registered range, verified, without copying a byte.

    Raises:
        JournalCorrupt: not every byte of the range belongs to an intact frame.
    """
    view, start, at = memoryview(content), seed(segment), 0
    unpack, fields_bytes, end_of_all = _HEAD.unpack_from, _FIELDS.size, len(content)
    while at < end_of_all:
        body = at + HEADER_BYTES
        if body > end_of_all:
            break
        mark, length, line_number, number, expected = unpack(content, at)
        kind, end = _KINDS.get(number), body + length
        if mark != _MARK or kind is None or end > end_of_all:
            break
        payload = view[body:end]
        if crc32(payload, crc32(view[at : at + fields_bytes], start)) != expected:
            break
        at = end
        if number != _MARK_NUMBER:
            yield line_number, kind, payload
    if at < end_of_all:
        raise JournalCorrupt(f"{segment.blob}: a registered range is damaged from its byte {at} on")


def _walk(blobs: Blobs, segment: SegmentRef, start: int, end: int, buffer_bytes: int) -> Iterator[Record | Damage]:
    reader = _Reader(blobs, segment, end, buffer_bytes=buffer_bytes)
    at = start
    while at < end:
        record = reader.frame(at)
        if record is not None:
            at = record.end
            yield record
        else:
            damage = Damage(segment, at, reader.next_frame(at + 1))
            extra = {"action": "journal_damaged", "batch_id": segment.batch_id, "task_id": segment.task_id}
            logger.error("segment %s is damaged in bytes %d to %d", segment.blob, damage.start, damage.end, extra=extra)
            at = damage.end
            yield damage


def _is_mark(each: Record | Damage) -> bool:
    return isinstance(each, Record) and each.kind is RecordKind.MARK


def scan_tail(blobs: Blobs, segment: SegmentRef, start: int, *, buffer_bytes: int = BUFFER_BYTES) -> Iterator[Record]:
    """Give intact frames, marks too, from `start` to the first that is not: a torn tail is no damage.

    Raises:
        NotFound: no such segment.
    """
    reader = _Reader(blobs, segment, blobs.size_bytes(segment.blob), buffer_bytes=buffer_bytes)
    at = start
    while (record := reader.frame(at)) is not None:
        at = record.end
        yield record


def read_payload(blobs: Blobs, record: Record) -> bytes:
    """Fetch a record's JSON line.

    Raises:
        JournalCorrupt: the bytes are no longer those that were verified.
    """
    raw = blobs.read(record.segment.blob, record.payload_offset - HEADER_BYTES, record.end)
    payload = raw[HEADER_BYTES:]
    if raw[:HEADER_BYTES] != header(seed(record.segment), record.line_number, record.kind, record.usage, payload):
        raise JournalCorrupt(f"the record of line {record.line_number} in {record.segment.blob} has changed")
    return payload


@dataclass(slots=True)
class _Survey:
    """What the registered extents of a shard hold."""

    lines: set[int] = field(default_factory=set)
    marks: dict[int, int] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)

    def note_mark(self, record: Record) -> None:
        """Keep the highest mark of each epoch."""
        epoch = record.segment.epoch
        self.marks[epoch] = max(self.marks.get(epoch, 0), record.line_number)


def _survey(blobs: Blobs, claim: Claim) -> _Survey:
    survey = _Survey()
    for extent in claim.extents:
        found = list(_walk(blobs, segment_of(extent), extent.byte_start, extent.byte_end, BUFFER_BYTES))
        for each in found:
            if isinstance(each, Damage):
                survey.damages.append(each)
            elif each.kind is RecordKind.MARK:
                survey.note_mark(each)
            elif each.line_number in survey.lines:
                raise ReconciliationError(f"line {each.line_number} of batch {claim.batch.id} is registered twice")
            else:
                survey.lines.add(each.line_number)
        if any(isinstance(each, Damage) for each in found):
            survey.repairs.append(_repair(extent, found))
    return survey


def repairs_of(blobs: Blobs, extents: Iterable[Extent]) -> list[Repair]:
    """Look through registered extents for damage; gives the repair of each that has any."""
    repairs = []
    for extent in extents:
        found = list(_walk(blobs, segment_of(extent), extent.byte_start, extent.byte_end, BUFFER_BYTES))
        if any(isinstance(each, Damage) for each in found):
            repairs.append(_repair(extent, found))
    return repairs


def lost_count(repairs: Iterable[Repair]) -> int:
    """Count the results that damage took."""
    return sum(each.damaged.count - sum(part.count for part in each.parts) for each in repairs)


def _repair(extent: Extent, found: list[Record | Damage]) -> Repair:
    """Cut the damaged bytes out of an extent, so that no reader meets them again, whatever they read like later.

    Raises:
        ReconciliationError: there are more intact results than were registered.
    """
    damages = [each for each in found if isinstance(each, Damage)]
    runs: list[list[Record]] = [[]]
    for each in found:
        if isinstance(each, Damage):
            runs.append([])
        else:
            runs[-1].append(each)
    intact = sum(not _is_mark(each) for run in runs for each in run)
    if intact > extent.count:
        raise ReconciliationError(f"{segment_of(extent).blob}: {extent.count} results are registered, {intact} there")
    parts: list[Extent] = []
    sequence_from = extent.sequence_from
    for run, hidden in zip(runs, [*_hidden(damages, extent.count - intact), 0], strict=True):
        part = _part(extent, run, sequence_from)
        parts += [part] if part.count else []
        sequence_from += part.count + hidden
    return Repair(damaged=extent, parts=tuple(parts))


def _hidden(damages: list[Damage], lost: int) -> list[int]:
    """Say how many results each damage took: exact for one; of several, one each as long as that lasts, the larger
    first, and the rest to the largest.
    """
    by_size = sorted(range(len(damages)), key=lambda place: -damages[place].size_bytes)
    hidden = [0] * len(damages)
    for place in by_size[:lost]:
        hidden[place] = 1
    hidden[by_size[0]] += max(0, lost - len(damages))
    return hidden


def _part(extent: Extent, run: list[Record], sequence_from: int) -> Extent:
    results = [each for each in run if not _is_mark(each)]
    succeeded = sum(each.kind is RecordKind.SUCCEEDED for each in results)
    return replace(
        extent,
        sequence_from=sequence_from,
        count=len(results),
        byte_start=run[0].start if run else extent.byte_start,
        byte_end=run[-1].end if run else extent.byte_start,
        succeeded_count=succeeded,
        failed_count=len(results) - succeeded,
        usage=sum((each.usage for each in results), NO_USAGE),
    )


def salvage(
    blobs: Blobs, claim: Claim, *, lines: Container[int] | None = None, keep_failures: bool = False
) -> Salvaged:
    """Find what earlier claims of a shard made durable and did not register; the first record of a line wins.

    Failures are left to run again (one may be the wake-up timeout of a frozen worker), unless `keep_failures`, which is
    for `on_unknown: fail`. `lines` limits it to lines that the shard still has: a holder that was frozen before a split
    may answer one that was cut off.

    Raises:
        ReconciliationError: a line has two registered records.
    """
    survey = _survey(blobs, claim)
    kept: dict[int, Record] = {}
    for epoch, session in claim.earlier:
        for record in _unregistered(blobs, claim, epoch, session):
            number = record.line_number
            if record.kind is RecordKind.MARK:
                survey.note_mark(record)
            elif number in survey.lines or number in kept or (lines is not None and number not in lines):
                continue
            elif record.kind is RecordKind.SUCCEEDED or keep_failures:
                kept[number] = record
    return Salvaged(
        registered=frozenset(survey.lines),
        records=tuple(kept.values()),
        marks=survey.marks,
        mark=survey.marks[max(survey.marks)] if survey.marks else 0,
        damages=tuple(survey.damages),
        repairs=tuple(survey.repairs),
    )


def _unregistered(blobs: Blobs, claim: Claim, epoch: int, session: SessionId) -> Iterator[Record]:
    """Give the frames of one earlier claim behind its last registered byte, through all its later segments."""
    own = [(each.segment, each.byte_end) for each in claim.extents if (each.epoch, each.session) == (epoch, session)]
    number, start = max(own, default=(1, 0))
    while True:
        segment = SegmentRef(
            batch_id=claim.batch.id, task_id=claim.ref.task_id, epoch=epoch, session=session, number=number
        )
        try:
            yield from scan_tail(blobs, segment, start)
        except NotFound:
            return
        number, start = number + 1, 0
