"""A batch and the retries of its lines as one family, whose failures are known across all of it."""

from __future__ import annotations

from collections.abc import Iterator

from batchrunner.choosing import custom_id_of, lines_of
from batchrunner.errors import NotFound
from batchrunner.lifecycle import TERMINAL
from batchrunner.models import Batch
from batchrunner.pipeline import read_blob, read_numbers
from batchrunner.ports import Blobs, TenantScope
from batchrunner.reading import LineNumbers


def healed_ids(blobs: Blobs, scope: TenantScope, family: list[Batch]) -> set[str]:
    """Give the custom_ids that a retry of the family has brought to a good end. Blocks."""
    healed: set[str] = set()
    for each in family:
        if each.parent_id is None or each.status not in TERMINAL or each.output_file_id is None:
            continue
        try:
            file = scope.file(each.output_file_id)
        except NotFound:
            # Whoever deleted these results wants them again.
            continue
        healed.update(_ids(blobs, file.blob))
    return healed


def _ids(blobs: Blobs, name: str) -> Iterator[str]:
    for raw in lines_of(read_blob(blobs, name)):
        custom_id = custom_id_of(raw)
        if custom_id is not None:
            yield custom_id


def chosen_numbers(blobs: Blobs, name: str) -> LineNumbers:
    """Read the line numbers that a linked batch is limited to. Blocks."""
    return LineNumbers(read_numbers(blobs, name))
