"""Failed lines counted by cause, a slice at a time; what was counted is kept.

An ended batch is counted once; of one that runs only what came since it was asked for last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import msgspec

from batchrunner.api.envelope import Refusal
from batchrunner.api.job_lines import shown_lines
from batchrunner.batch_object import told_problems
from batchrunner.choosing import lines_of
from batchrunner.errors import NotFound
from batchrunner.frames import read_payload
from batchrunner.grouping import SERVER, Failure, FailureGroups
from batchrunner.lifecycle import TERMINAL, BatchStatus
from batchrunner.models import Batch, BatchId, RecordKind
from batchrunner.pipeline import read_blob
from batchrunner.ports import Blobs, Clock, TenantScope
from batchrunner.reading import Reader
from batchrunner.seal import read_problems

# A thread is held for so long at a time; others have their turn in between.
_SLICE_S = 0.2
_COUNTS_MAX = 32


class ErrorSample(msgspec.Struct, frozen=True):
    """One line of a group; `id` is that of its result line."""

    custom_id: str | None
    id: str | None


class ErrorGroup(msgspec.Struct, frozen=True):
    """Failed lines with the same cause: numbers, ids and quoted words in `message` are replaced."""

    code: str
    message: str
    count: int
    samples: list[ErrorSample]
    hint: str


class BatchFailures(msgspec.Struct, frozen=True, kw_only=True):
    """Why lines of a batch failed, the largest group first. `is_final` tells whether more can come."""

    object: Literal["batch.errors"] = "batch.errors"
    batch_id: str
    is_final: bool
    total: int
    groups: list[ErrorGroup]


class Count:
    """The failures of one batch, as far as they are counted. Blocks; used by one thread at a time.

    `is_final` tells that the batch is over, `is_through` that all it had at the last look is counted.
    """

    def __init__(self, blobs: Blobs, scope: TenantScope, batch: Batch) -> None:
        self.is_final = batch.status in TERMINAL
        self._batch_id = batch.id
        self._groups = FailureGroups(SERVER)
        self._blobs = blobs
        self._scope = scope
        self._has_jobs = batch.has_jobs
        self._reader = Reader(blobs, scope, batch.id, lines=shown_lines(scope, batch))
        self._coming = self._count(batch)
        self.is_through = False

    def fits(self, batch: Batch) -> bool:
        """Tell whether what is counted is still part of what the batch has; damage takes results out of it, and so does
        the retry of a job.
        """
        if self._has_jobs:
            return False
        is_over = batch.status in TERMINAL
        return self.is_final if is_over else not self.is_final and self._groups.total <= batch.failed_count

    def go_on(self, clock: Clock) -> bool:
        """Count for a moment; tell whether there is more.

        Raises:
            Refusal: the file that lists the failures was deleted.
        """
        until_s = clock.monotonic_s() + _SLICE_S
        for _ in self._coming:
            if clock.monotonic_s() >= until_s:
                return True
        self.is_through = True
        return False

    def refresh(self) -> None:
        """Have the next `go_on` take what came since the last one found no more."""
        if self.is_through and not self.is_final:
            self.is_through = False
            self._coming = self._registered()

    def found(self) -> BatchFailures:
        """Give what is counted."""
        return BatchFailures(
            batch_id=self._batch_id,
            is_final=self.is_final,
            total=self._groups.total,
            groups=[
                ErrorGroup(
                    group.code,
                    group.message,
                    group.count,
                    [ErrorSample(each["custom_id"], each["id"]) for each in group.samples],
                    group.hint,
                )
                for group in self._groups.groups()
            ],
        )

    def _count(self, batch: Batch) -> Iterator[None]:
        """Count one failure at a time: of the error file, before the end of what is registered, without any line of
        what validation refused.
        """
        if not self.is_final or self._has_jobs:
            return self._registered()
        if batch.status is BatchStatus.FAILED and batch.problem_count:
            return self._refused(batch)
        return self._sealed(batch)

    def _registered(self) -> Iterator[None]:
        for _, record in self._reader.fresh():
            if record.kind is RecordKind.FAILED:
                self._groups.add(read_payload(self._blobs, record))
            yield

    def _sealed(self, batch: Batch) -> Iterator[None]:
        if batch.error_file_id is None:
            return
        try:
            file = self._scope.file(batch.error_file_id)
            for raw in lines_of(read_blob(self._blobs, file.blob)):
                self._groups.add(raw)
                yield
        except NotFound:
            raise errors_gone(batch) from None

    def _refused(self, batch: Batch) -> Iterator[None]:
        """All problems where the report is there, otherwise those that the batch itself lists."""
        listed = read_problems(self._blobs, batch.problems_blob) if batch.problems_blob else iter(told_problems(batch))
        for problem in listed:
            self._groups.add_failure(Failure(problem.code, None, problem.message), problem.custom_id, None)
            yield


class Counts:
    """The counts of one process, those asked for least recently forgotten. Of one event loop."""

    def __init__(self) -> None:
        self._kept: OrderedDict[BatchId, Count] = OrderedDict()

    def of(self, batch: Batch, blobs: Blobs, scope: TenantScope) -> Count:
        """Give the count of a batch, begun anew where there is none that still fits."""
        count = self._kept.pop(batch.id, None)
        if count is None or not count.fits(batch):
            count = Count(blobs, scope, batch)
        self._kept[batch.id] = count
        while len(self._kept) > _COUNTS_MAX:
            self._kept.popitem(last=False)
        return count

    def forget(self, batch_id: BatchId) -> None:
        """Drop a count that cannot go on."""
        self._kept.pop(batch_id, None)


def errors_gone(batch: Batch) -> Refusal:
    """What is answered when the file that lists the failures was deleted."""
    message = f"The error file {batch.error_file_id} of batch '{batch.id}' was deleted."
    return Refusal(message, status=410, code="results_gone")
