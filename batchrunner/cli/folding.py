"""A run and its retries as one result: for each line the last success, else the last failure, still in input order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from batchrunner.app import Runner
from batchrunner.choosing import custom_id_of, numbered_lines, read_id
from batchrunner.durable import telling_full
from batchrunner.errors import ReconciliationError
from batchrunner.models import Batch, BatchId, FileId, Order, Usage
from batchrunner.pipeline import read_blob
from batchrunner.ports import TenantScope
from batchrunner.seal import refused_numbers


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
    """Files of a batch, or of the fold so far, each line in input order unless the run wants another."""

    output: Path | None
    errors: Path | None


def fold(runner: Runner, scope: TenantScope, ids: list[str], folder: Path) -> Folded:
    """Fold a run's batches, oldest first. A run without retries is its own fold. Blocks.

    Raises:
        ReconciliationError: a file of results holds a line that is not the input's, or not in its place.
    """
    batches = [scope.batch(BatchId(each)) for each in ids]
    first = batches[0]
    if len(batches) == 1:
        return Folded(first, *_files(runner, scope, first))
    base = _Layer(*_files(runner, scope, first))
    for place, child in enumerate(batches[1:]):
        layer = _Layer(*_files(runner, scope, child))
        places = _runnable_ids(runner, first) if first.order is Order.INPUT else None
        base = _fold_in(base, layer, folder, str(place % 2), places=places)
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


def _runnable_ids(runner: Runner, first: Batch) -> Iterator[str]:
    """Give the custom_ids of the input's lines that were not refused, in its order; each is there once."""
    blobs = runner.adapters.blobs
    refused = refused_numbers(blobs, first.problems_blob)
    for number, raw in numbered_lines(read_blob(blobs, first.source), runner.settings.line_bytes_max):
        if number not in refused and (custom_id := custom_id_of(raw)) is not None:
            yield custom_id


def _fold_in(base: _Layer, child: _Layer, folder: Path, suffix: str, *, places: Iterator[str] | None) -> _Layer:
    """Write the fold of two layers into the run's folder, its output by `places`, None for one after the other."""
    output = folder / f"folded-{suffix}.jsonl"
    errors = folder / f"folded-{suffix}.errors.jsonl"
    parts = (_lines(base.output), _lines(child.output))
    with telling_full(output), output.open("wb") as writing:
        writing.writelines(chain(*parts) if places is None else _by_input(places, *parts))
    healed = {read_id(line).custom_id for line in _lines(child.output)}
    again = {read_id(line).custom_id: line for line in _lines(child.errors)}
    with telling_full(errors), errors.open("wb") as writing:
        for line in _lines(base.errors):
            custom_id = read_id(line).custom_id
            if custom_id is None or custom_id not in healed:
                writing.write(again.get(custom_id, line))
    return _Layer(output if output.stat().st_size else None, errors if errors.stat().st_size else None)


def _by_input(places: Iterator[str], *parts: Iterator[bytes]) -> Iterator[bytes]:
    """Merge lines that are each in the input's order. What the files hold decides, and no journal: that may have been
    damaged, or deleted, since they were sealed.
    """
    waiting = [_Waiting(part) for part in parts]
    for custom_id in places:
        for each in waiting:
            if each.custom_id == custom_id:
                yield each.line
                each.advance()
    for each in waiting:
        if each.line:
            raise ReconciliationError(
                f"the results hold a line {each.custom_id!r} that is not in the input, or not at that place",
                hint="Has a file in the state folder been changed? --fresh starts over and keeps the old folder.",
            )


class _Waiting:
    """The next line of a part, empty at its end."""

    __slots__ = ("_lines", "custom_id", "line")

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.advance()

    def advance(self) -> None:
        """Go to the line after it."""
        self.line = next(self._lines, b"")
        self.custom_id = read_id(self.line).custom_id if self.line else None


def _lines(path: Path | None) -> Iterator[bytes]:
    if path is not None:
        with path.open("rb") as stream:
            yield from stream


def _count_lines(path: Path | None) -> int:
    return sum(1 for _ in _lines(path))
