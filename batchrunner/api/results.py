"""Finished lines while the rest runs: `/results` gives them by sequence number.

What was never sent, refused, expired or cancelled lines, stands in the error file only.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from batchrunner.api.batches import batch_of
from batchrunner.api.envelope import Refusal
from batchrunner.api.http import Answer, Call, Route
from batchrunner.api.job_lines import shown_lines
from batchrunner.api.sealed import SealedFiles, lines_in, sealed_files
from batchrunner.choosing import custom_id_of
from batchrunner.errors import BlobsUnavailable
from batchrunner.frames import Damage, Record, read_payload
from batchrunner.lifecycle import TERMINAL
from batchrunner.models import Batch, BatchId, RecordKind
from batchrunner.ports import Blobs, Clock, TenantScope
from batchrunner.reading import Numbered, Reader, registered_numbers

JSON_LINES = "application/jsonl"
# What a caller may name lines of JSON; it gets them under the name that it gave.
LINES_TYPES = (JSON_LINES, "application/x-ndjson")
LIMIT_MAX = 10_000
_PIECE_BYTES = 256 * 1024
# A thread is held for so long at a time, however few lines are wanted.
_SLICE_S = 0.2
_KINDS = {"succeeded": RecordKind.SUCCEEDED, "failed": RecordKind.FAILED}


class ReadResults(msgspec.Struct, frozen=True):
    """The query of a reading: what is behind `after`, an X-Last-Sequence, at most `limit` lines, of one outcome.

    `merged` reads the batch with all retries of its lines: of each line the last result.
    """

    after: Annotated[str, Meta(pattern=r"^([0-9]{1,18}(\.[0-9]{1,18})*)?$", max_length=10_000)] = "0"
    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX)] | None = None
    outcome: Literal["succeeded", "failed"] | None = None
    merged: bool = False


class _Shelf:
    """The batches that one reading goes through, oldest first, each up to the number that was its last when the reading
    began. A deleted one keeps its place, so that numbers go on to mean the same, and gives nothing. Blocks.
    """

    def __init__(self, blobs: Blobs, scope: TenantScope, batches: list[Batch], wanted: ReadResults) -> None:
        """Look. Raises: Refusal when what is asked for is not kept any more."""
        given = [int(each) for each in wanted.after.split(".")]
        self._blobs = blobs
        self._scope = scope
        self._batches = batches
        self._kind = _KINDS[wanted.outcome] if wanted.outcome is not None else None
        self._limit = wanted.limit
        self._after = [*given, *(0 for _ in batches)][: len(batches)]
        self._last = [max(0, batch.next_sequence - 1) for batch in batches]
        self._is_cut = False
        self._files: dict[BatchId, SealedFiles] = {}
        for batch, after, last in zip(batches, self._after, self._last, strict=True):
            if batch.journal_ended_at is None or batch.deleted_at is not None or after >= last:
                continue
            if not wanted.merged:
                raise _gone(batch)
            if any(given) or wanted.limit is not None:
                raise _no_numbers(batch)
            self._files[batch.id] = sealed_files(scope, batch)

    @property
    def last_sequence(self) -> str:
        """What to read behind the next time."""
        return ".".join(map(str, self._last))

    @property
    def is_incomplete(self) -> bool:
        """Whether lines may come behind those given."""
        return self._is_cut or any(batch.status not in TERMINAL for batch in self._batches)

    @property
    def blobs(self) -> list[str]:
        """The blobs beside journals that are read."""
        return [file.blob for files in self._files.values() for file in files if file is not None]

    def lines(self) -> Iterator[bytes]:
        """Give the lines of that kind, of each request one; what is left out gives an empty one."""
        if self._files:
            return self._sealed()
        return (read_payload(self._blobs, found[1]) if found is not None else b"" for found in self._walk())

    def first(self) -> Iterator[Record | None]:
        """Give the first records up to the limit, and end the reading there; None for what is left out."""
        reached = self._after.copy()
        count = 0
        for found in self._walk():
            if found is None:
                yield None
                continue
            place, record, sequence = found
            if count == self._limit:
                self._is_cut = True
                self._last[place:] = reached[place:]
                return
            count += 1
            reached[place] = sequence
            yield record

    def _walk(self) -> Iterator[tuple[int, Record, int] | None]:
        for place, batch in enumerate(self._batches):
            if batch.deleted_at is not None:
                continue
            # What a later batch has a result of stands for the earlier one.
            later = [each for each in self._batches[place + 1 :] if each.deleted_at is None]
            superseding = [registered_numbers(self._blobs, self._scope, each.id) for each in later]
            for sequence, record in self._records(place, after=self._after[place]):
                is_wanted = self._kind in (None, record.kind)
                if is_wanted and not any(record.line_number in each for each in superseding):
                    yield place, record, sequence
                else:
                    yield None

    def _records(self, place: int, *, after: int = 0) -> Iterator[Numbered]:
        """Give what a batch had when the reading began.

        Raises:
            BlobsUnavailable: it was deleted in mid reading, its time being over.
        """
        batch, last = self._batches[place], self._last[place]
        on_damage = break_off if batch.status in TERMINAL else None
        lines = shown_lines(self._scope, batch)
        reader = Reader(self._blobs, self._scope, batch.id, after=after, on_damage=on_damage, lines=lines)
        for each in reader.fresh():
            if each.sequence > last:
                return
            yield each
        if reader.after < last and self._scope.batch(batch.id).journal_ended_at is not None:
            raise BlobsUnavailable(f"the results of {batch.id} behind {reader.after} have just been deleted")

    def _sealed(self) -> Iterator[bytes]:
        """Fold by custom_id, from the last batch to the first: files know no sequence and no line numbers."""
        seen: set[str | None] = set()
        for place in range(len(self._batches) - 1, -1, -1):
            own: set[str | None] = set()
            for kind, line in self._results_of(place):
                custom_id = custom_id_of(line)
                if place:
                    own.add(custom_id)
                yield line if custom_id not in seen and self._kind in (None, kind) else b""
            seen |= own

    def _results_of(self, place: int) -> Iterator[tuple[RecordKind, bytes]]:
        batch = self._batches[place]
        if batch.deleted_at is not None:
            return
        files = self._files.get(batch.id)
        if files is not None:
            yield from lines_in(self._blobs, files)
            return
        for _, record in self._records(place):
            yield record.kind, read_payload(self._blobs, record)


def break_off(damage: Damage) -> None:
    """Leave out no damaged line: before the end they run again; at the end all was intact, so that the journal was
    deleted just now.
    """
    raise BlobsUnavailable(f"{damage.segment.blob} can no longer be read from byte {damage.start} on")


def _gone(batch: Batch) -> Refusal:
    """Results are kept by sequence for a day after the end; from then on the files have them."""
    files = " and ".join(each for each in (batch.output_file_id, batch.error_file_id) if each is not None)
    return Refusal(
        f"The results of batch '{batch.id}' are no longer kept by sequence; read its files: {files or 'it has none'}.",
        status=410,
        param="after",
        code="results_gone",
    )


def _no_numbers(batch: Batch) -> Refusal:
    return Refusal(
        f"The results of batch '{batch.id}' are no longer kept by sequence; read all of them at once, with neither "
        "'after' nor 'limit'.",
        status=410,
        param="after",
        code="results_gone",
    )


async def read_results(call: Call) -> Answer:
    """Stream the finished lines behind a sequence number, in the order in which they were finished."""
    wanted = call.parameters(ReadResults)
    shelf = await call.blocking(_open, call, wanted)
    lines = shelf.lines() if wanted.limit is None else await _first(call, shelf)
    headers = {
        "x-incomplete": "true" if shelf.is_incomplete else "false",
        "x-last-sequence": shelf.last_sequence,
        "cache-control": "no-store",
    }
    accepted = call.request.headers.get("Accept", "")
    content_type = next((each for each in LINES_TYPES if each in accepted), JSON_LINES)
    return Answer(content_type=content_type, headers=headers, chunks=_pieces(call, shelf, lines))


def _open(call: Call, wanted: ReadResults) -> _Shelf:
    batch = batch_of(call)
    batches = call.scope.family(batch.id) if wanted.merged else [batch]
    return _Shelf(call.parts.blobs, call.scope, batches, wanted)


async def _first(call: Call, shelf: _Shelf) -> Iterator[bytes]:
    """Find the lines of a page before the head goes out, which tells where the page ends."""
    coming, records = shelf.first(), list[Record]()
    while await call.blocking(_seek, coming, records, call.parts.clock):
        call.require_listener()
    return (read_payload(call.parts.blobs, record) for record in records)


def _seek(coming: Iterator[Record | None], records: list[Record], clock: Clock) -> bool:
    """Look for a moment; tell whether there is more."""
    until_s = clock.monotonic_s() + _SLICE_S
    for record in coming:
        if record is not None:
            records.append(record)
        if clock.monotonic_s() >= until_s:
            return True
    return False


async def _pieces(call: Call, shelf: _Shelf, lines: Iterator[bytes]) -> AsyncIterator[bytes]:
    with contextlib.ExitStack() as stack:
        for blob in shelf.blobs:
            stack.enter_context(call.parts.reading.hold(blob))
        is_more = True
        while is_more:
            piece, is_more = await call.blocking(_gather, lines, call.parts.clock)
            if piece:
                yield piece
            elif is_more and not call.has_listener:
                # Nothing is written that could tell that nobody reads it.
                return


def _gather(lines: Iterator[bytes], clock: Clock) -> tuple[bytes, bool]:
    """Give the next lines, about a quarter of a megabyte or what a moment brings, and whether there are more. A longer
    line comes alone.
    """
    held: list[bytes] = []
    size_bytes = 0
    until_s = clock.monotonic_s() + _SLICE_S
    for line in lines:
        held.append(line)
        size_bytes += len(line)
        if size_bytes >= _PIECE_BYTES or clock.monotonic_s() >= until_s:
            return b"".join(held), True
    return b"".join(held), False


ROUTES = (
    Route(
        method="GET",
        path="/v1/batches/{batch_id}/results",
        handler=read_results,
        summary="Stream the lines finished so far, also while the batch runs",
        query=ReadResults,
        answer_media=JSON_LINES,
    ),
)
