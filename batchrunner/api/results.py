"""Finished lines while the rest runs: `/results` gives them by sequence number.

What was never sent, refused, expired or cancelled lines, stands in the error file only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from batchrunner.api.batches import batch_of
from batchrunner.api.envelope import Refusal
from batchrunner.api.http import Answer, Call, Route
from batchrunner.errors import BlobsUnavailable
from batchrunner.frames import Damage, Record, read_payload
from batchrunner.lifecycle import TERMINAL
from batchrunner.models import Batch, RecordKind
from batchrunner.ports import Blobs, TenantScope
from batchrunner.reading import Reader, registered_numbers

JSON_LINES = "application/jsonl"
LIMIT_MAX = 10_000
_PIECE_BYTES = 256 * 1024
_KINDS = {"succeeded": RecordKind.SUCCEEDED, "failed": RecordKind.FAILED}


class ReadResults(msgspec.Struct, frozen=True):
    """The query of a reading: what is behind `after`, an X-Last-Sequence, at most `limit` lines, of one outcome.

    `merged` reads the batch with all retries of its lines: of each line the last result.
    """

    after: Annotated[str, Meta(pattern=r"^[0-9]{1,18}(\.[0-9]{1,18})*$", max_length=10_000)] = "0"
    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX)] | None = None
    outcome: Literal["succeeded", "failed"] | None = None
    merged: bool = False


class _Shelf:
    """The batches that one reading goes through, oldest first, each up to the number that was its last when the reading
    began. Blocks.
    """

    def __init__(self, blobs: Blobs, scope: TenantScope, batches: list[Batch], wanted: ReadResults) -> None:
        """Look. Raises: Refusal when what is asked for is not kept any more."""
        given = [int(each) for each in wanted.after.split(".")]
        self._blobs = blobs
        self._scope = scope
        self._batches = batches
        self._kind = _KINDS[wanted.outcome] if wanted.outcome is not None else None
        self._after = [*given, *(0 for _ in batches)][: len(batches)]
        self._last = [max(0, batch.next_sequence - 1) for batch in batches]
        self._is_cut = False
        for batch, after, last in zip(batches, self._after, self._last, strict=True):
            if batch.journal_ended_at is not None and after < last:
                raise _gone(batch)

    @property
    def last_sequence(self) -> str:
        """What to read behind the next time."""
        return ".".join(map(str, self._last))

    @property
    def is_incomplete(self) -> bool:
        """Whether lines may come behind those given."""
        return self._is_cut or any(batch.status not in TERMINAL for batch in self._batches)

    def records(self) -> Iterator[Record]:
        """Give the records of that kind, of each line one."""
        return (record for _, _, record in self._walk())

    def first(self, limit: int) -> list[Record]:
        """Give the first records, and end the reading there."""
        found: list[Record] = []
        reached = self._after.copy()
        for place, sequence, record in self._walk():
            if len(found) == limit:
                self._is_cut = True
                self._last[place:] = reached[place:]
                break
            found.append(record)
            reached[place] = sequence
        return found

    def _walk(self) -> Iterator[tuple[int, int, Record]]:
        for place, batch in enumerate(self._batches):
            later = self._batches[place + 1 :]
            # What a later batch has a result of stands for the earlier one.
            superseding = [registered_numbers(self._blobs, self._scope, each.id) for each in later]
            reader = Reader(
                self._blobs,
                self._scope,
                batch.id,
                after=self._after[place],
                on_damage=_break_off if batch.status in TERMINAL else None,
            )
            for sequence, record in reader.fresh():
                if sequence > self._last[place]:
                    break
                if self._kind in (None, record.kind) and not any(record.line_number in each for each in superseding):
                    yield place, sequence, record


def _break_off(damage: Damage) -> None:
    """Before the end damaged lines run again; at the end all was intact, so the journal was deleted just now."""
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


async def read_results(call: Call) -> Answer:
    """Stream the finished lines behind a sequence number, in the order in which they were finished."""
    wanted = call.parameters(ReadResults)
    shelf, records = await call.blocking(_open, call, wanted)
    headers = {
        "x-incomplete": "true" if shelf.is_incomplete else "false",
        "x-last-sequence": shelf.last_sequence,
        "cache-control": "no-store",
    }
    return Answer(content_type=JSON_LINES, headers=headers, chunks=_pieces(call, records))


def _open(call: Call, wanted: ReadResults) -> tuple[_Shelf, Iterator[Record]]:
    batch = batch_of(call)
    batches = call.scope.family(batch.id) if wanted.merged else [batch]
    shelf = _Shelf(call.parts.blobs, call.scope, batches, wanted)
    if wanted.limit is None:
        return shelf, shelf.records()
    return shelf, iter(shelf.first(wanted.limit))


async def _pieces(call: Call, records: Iterator[Record]) -> AsyncIterator[bytes]:
    while piece := await call.blocking(_gather, call.parts.blobs, records):
        yield piece


def _gather(blobs: Blobs, records: Iterator[Record]) -> bytes:
    """Give the next lines, about a quarter of a megabyte; nothing at the end. A longer line comes alone."""
    lines: list[bytes] = []
    size_bytes = 0
    for record in records:
        lines.append(read_payload(blobs, record))
        size_bytes += record.payload_length
        if size_bytes >= _PIECE_BYTES:
            break
    return b"".join(lines)


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
