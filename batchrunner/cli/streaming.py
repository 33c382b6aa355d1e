"""`run -o -`: the finished lines on stdout, in the order in which they became durable, read from the extents alone."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from batchrunner.frames import read_payload
from batchrunner.models import BatchId, RecordKind
from batchrunner.ports import Blobs, TenantScope
from batchrunner.reading import Reader


class LineStream:
    """Prints what was not printed yet of a run's batches, oldest first. Each invocation begins with the first line,
    since a shell's `>` truncates. All but the last batch have to be over.
    """

    def __init__(self, blobs: Blobs, scope: TenantScope, batch_ids: Sequence[str]) -> None:
        self._blobs = blobs
        self._readers = [Reader(blobs, scope, BatchId(each)) for each in batch_ids]
        self.is_abandoned = False

    async def advance(self) -> None:
        """Print the succeeded lines that are new, as long as somebody reads them; a retry brings only lines that had
        failed before.
        """
        if not self.is_abandoned:
            await asyncio.to_thread(self._advance)

    def _advance(self) -> None:
        try:
            for reader in self._readers:
                for _, record in reader.fresh():
                    if record.kind is RecordKind.SUCCEEDED:
                        sys.stdout.buffer.write(read_payload(self._blobs, record))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            self.is_abandoned = True
            # What is left in its buffer would fail once more at the end of the process.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        del self._readers[:-1]
