"""Blobs in a bucket with a folder of this disk beside it: for the user's own input, and for copies of what is read from
its first byte to its last.
"""

from __future__ import annotations

from pathlib import Path

from batchrunner.blobs.local import LocalBlobs
from batchrunner.blobs.s3 import S3Blobs
from batchrunner.blobs.s3_address import S3Address
from batchrunner.ports import Clock
from batchrunner.settings import Settings

_READ_BYTES = 8 << 20


class HomedBlobs(S3Blobs):
    """Blobs below an address; what lies in `local` under the same name is read there."""

    def __init__(self, address: S3Address, settings: Settings, clock: Clock, *, local: LocalBlobs) -> None:
        super().__init__(address, settings, clock)
        self._local = local

    def read(self, name: str, start: int, end: int) -> bytes:
        """See Blobs."""
        return self._local.read(name, start, end) if self._local.exists(name) else super().read(name, start, end)

    def size_bytes(self, name: str) -> int:
        """See Blobs."""
        return self._local.size_bytes(name) if self._local.exists(name) else super().size_bytes(name)

    def exists(self, name: str) -> bool:
        """See Blobs."""
        return self._local.exists(name) or super().exists(name)

    def delete(self, name: str) -> None:
        """See Blobs."""
        super().delete(name)
        self._local.delete(name)

    def adopt(self, name: str, path: Path) -> None:
        """See FolderBlobs."""
        self._local.adopt(name, path)

    def path(self, name: str) -> Path:
        """See FolderBlobs."""
        if not self._local.exists(name):
            writer = self._local.writer(name)
            try:
                start = 0
                while chunk := super().read(name, start, start + _READ_BYTES):
                    writer.write(chunk)
                    start += len(chunk)
                writer.commit()
            except BaseException:
                writer.abort()
                raise
        return self._local.path(name)
