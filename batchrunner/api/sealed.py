"""The lines that a batch ran, read from the files in which it ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from batchrunner.api.envelope import Refusal
from batchrunner.choosing import ErrorLine, lines_of, read_error_line
from batchrunner.errors import NotFound
from batchrunner.lines import ProblemCode
from batchrunner.models import Batch, File, FileId, LineCode, RecordKind
from batchrunner.pipeline import read_blob
from batchrunner.ports import Blobs, TenantScope

# Error lines of what was never sent.
_NOT_RUN = frozenset({*ProblemCode, LineCode.BATCH_EXPIRED, LineCode.BATCH_CANCELLED, LineCode.INPUT_LOST})


class SealedFiles(NamedTuple):
    """Output and error file, None for one that would be empty."""

    output: File | None
    errors: File | None


def sealed_files(scope: TenantScope, batch: Batch) -> SealedFiles:
    """Look the files up. Blocks. Raises: Refusal when one was deleted."""

    def file_of(file_id: FileId | None) -> File | None:
        if file_id is None:
            return None
        try:
            return scope.file(file_id)
        except NotFound:
            message = f"The results of batch '{batch.id}' are gone: its file {file_id} was deleted or has expired."
            raise Refusal(message, status=410, code="results_gone") from None

    return SealedFiles(file_of(batch.output_file_id), file_of(batch.error_file_id))


def lines_in(blobs: Blobs, files: SealedFiles) -> Iterator[tuple[RecordKind, bytes]]:
    """Give the lines that were sent, succeeded ones first. Blocks."""
    if files.output is not None:
        for line in lines_of(read_blob(blobs, files.output.blob)):
            yield RecordKind.SUCCEEDED, line
    if files.errors is not None:
        for line in lines_of(read_blob(blobs, files.errors.blob)):
            if not is_not_run(read_error_line(line)):
                yield RecordKind.FAILED, line


def is_not_run(line: ErrorLine) -> bool:
    """Tell whether an error line is of a request that was never sent."""
    return line.response is None and line.code in _NOT_RUN
