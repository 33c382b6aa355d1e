"""`run -o -`: the finished lines on stdout, in the order in which they became durable, read from the extents alone."""

from __future__ import annotations

import asyncio
import sys

from batchrunner.frames import read_payload
from batchrunner.models import BatchId, RecordKind
from batchrunner.ports import Blobs, TenantScope
from batchrunner.reading import Reader


class LineStream:
    """Prints what was not printed yet. Each invocation begins with the first line, since a shell's `>` truncates."""

    def __init__(self, blobs: Blobs, scope: TenantScope) -> None:
        self._blobs = blobs
        self._scope = scope
        self._reader: Reader | None = None

    async def advance(self, batch_id: BatchId) -> None:
        """Print the succeeded lines of the one batch that are new."""
        await asyncio.to_thread(self._advance, batch_id)

    def _advance(self, batch_id: BatchId) -> None:
        if self._reader is None:
            self._reader = Reader(self._blobs, self._scope, batch_id)
        for _, record in self._reader.fresh():
            if record.kind is RecordKind.SUCCEEDED:
                sys.stdout.buffer.write(read_payload(self._blobs, record))
        sys.stdout.buffer.flush()
