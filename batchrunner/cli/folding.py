"""A run and its retries as one result: for each line the last success, else the last failure, still in input order."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from batchrunner.app import Runner
from batchrunner.frames import Damage, read_records, segment_of
from batchrunner.models import Batch, BatchId, FileId, Order, RecordKind, Usage
from batchrunner.ports import TenantScope

_PAGE = 1000


class _Named(msgspec.Struct):
    custom_id: str | None = None


_read_id = msgspec.json.Decoder(_Named).decode


@dataclass(frozen=True, slots=True)
class Folded:
    """One view of a chain of batches: the counts of the whole, and where the plain files lie (None where one would
    be empty).
    """

    batch: Batch
    output: Path | None
    errors: Path | None


@dataclass(frozen=True, slots=True)
class _Layer:
    """Files of a batch, or of the fold so far; `numbers` are the line numbers of the output's lines, in its order."""

    output: Path | None
    errors: Path | None
    numbers: array[int]


def fold(runner: Runner, scope: TenantScope, ids: list[str], folder: Path) -> Folded:
    """Fold a run's batches, oldest first. A run without retries is its own fold. Blocks."""
    batches = [scope.batch(BatchId(each)) for each in ids]
    first = batches[0]
    if len(batches) == 1:
        return Folded(first, *_files(runner, scope, first))
    base = _layer(runner, scope, first)
    for place, child in enumerate(batches[1:]):
        base = _fold_in(base, _layer(runner, scope, child), folder, str(place % 2), order=first.order)
    errors = _count_lines(base.errors)
    whole = replace(
        batches[-1],
        total_count=first.total_count,
        refused_count=first.refused_count,
        succeeded_count=first.total_count - errors,
        failed_count=errors,
        expired_count=0,
        cancelled_count=0,
        usage=sum((batch.usage for batch in batches), Usage()),
        retry_count=sum(batch.retry_count for batch in batches),
        re_executed_count=sum(batch.re_executed_count for batch in batches),
        created_at=first.created_at,
    )
    return Folded(whole, base.output, base.errors)


def _files(runner: Runner, scope: TenantScope, batch: Batch) -> tuple[Path | None, Path | None]:
    def path_of(file_id: FileId | None) -> Path | None:
        return runner.adapters.blobs.path(scope.file(file_id).blob) if file_id is not None else None

    return path_of(batch.output_file_id), path_of(batch.error_file_id)


def _layer(runner: Runner, scope: TenantScope, batch: Batch) -> _Layer:
    output, errors = _files(runner, scope, batch)
    numbers = array("Q", _succeeded(runner, scope, batch.id))
    if batch.order is Order.INPUT:
        numbers = array("Q", sorted(numbers))
    return _Layer(output, errors, numbers)


def _succeeded(runner: Runner, scope: TenantScope, batch_id: BatchId) -> Iterator[int]:
    """Give the line numbers of all successes, in sequence order."""
    blobs, after = runner.adapters.blobs, 0
    while extents := scope.extents(batch_id, after=after, limit=_PAGE):
        for extent in extents:
            after = extent.sequence_from + extent.count - 1
            for record in read_records(blobs, segment_of(extent), extent.byte_start, extent.byte_end):
                if not isinstance(record, Damage) and record.kind is RecordKind.SUCCEEDED:
                    yield record.line_number


def _fold_in(base: _Layer, child: _Layer, folder: Path, suffix: str, *, order: Order) -> _Layer:
    """Write the fold of two layers into the run's folder."""
    output = folder / f"folded-{suffix}.jsonl"
    errors = folder / f"folded-{suffix}.errors.jsonl"
    pairs = [_numbered(base), _numbered(child)]
    merged = (
        heapq.merge(*pairs, key=lambda pair: pair[0])
        if order is Order.INPUT
        else (pair for part in pairs for pair in part)
    )
    numbers = array("Q")
    with output.open("wb") as writing:
        for number, line in merged:
            numbers.append(number)
            writing.write(line)
    healed = {_read_id(line).custom_id for _, line in _numbered(child)}
    again = {_read_id(line).custom_id: line for line in _lines(child.errors)}
    with errors.open("wb") as writing:
        for line in _lines(base.errors):
            custom_id = _read_id(line).custom_id
            if custom_id is None or custom_id not in healed:
                writing.write(again.get(custom_id, line))
    return _Layer(output if output.stat().st_size else None, errors if errors.stat().st_size else None, numbers)


def _numbered(layer: _Layer) -> Iterator[tuple[int, bytes]]:
    return zip(layer.numbers, _lines(layer.output), strict=True)


def _lines(path: Path | None) -> Iterator[bytes]:
    if path is not None:
        with path.open("rb") as stream:
            yield from stream


def _count_lines(path: Path | None) -> int:
    return sum(1 for _ in _lines(path))
