"""`run -o -`: the finished lines on stdout, in the order in which they became durable, read from the extents alone."""

from __future__ import annotations

import asyncio
import sys

from batchrunner.frames import Damage, read_payload, read_records, segment_of
from batchrunner.models import BatchId, Extent, RecordKind
from batchrunner.ports import Blobs, TenantScope

_PAGE = 200


class LineStream:
    """Prints what was not printed yet. Each invocation begins with the first line, since a shell's `>` truncates."""

    def __init__(self, blobs: Blobs, scope: TenantScope) -> None:
        self._blobs = blobs
        self._scope = scope
        self._after = 0

    async def advance(self, batch_id: BatchId) -> None:
        """Print the succeeded lines that are new."""
        await asyncio.to_thread(self._advance, batch_id)

    def _advance(self, batch_id: BatchId) -> None:
        while extents := self._scope.extents(batch_id, after=self._after, limit=_PAGE):
            for extent in extents:
                self._print(extent)
                self._after = extent.sequence_from + extent.count - 1
            sys.stdout.buffer.flush()

    def _print(self, extent: Extent) -> None:
        """Print an extent's lines beyond those that were printed when it was shorter."""
        sequence = extent.sequence_from - 1
        for record in read_records(self._blobs, segment_of(extent), extent.byte_start, extent.byte_end):
            if isinstance(record, Damage):
                continue
            sequence += 1
            if sequence > self._after and record.kind is RecordKind.SUCCEEDED:
                sys.stdout.buffer.write(read_payload(self._blobs, record))
