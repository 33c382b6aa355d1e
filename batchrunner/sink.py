"""One file of results on its way: bytes, hash and number of lines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from batchrunner.ports import Blobs, BlobWriter

_HELD_BYTES = 1 << 20


class Sink:
    """One file on its way: bytes, hash and number of lines. The blob is opened with the first line."""

    def __init__(self, blobs: Blobs, name: str, register: Callable[[str], None]) -> None:
        """`register` makes the name known, so that what a crash leaves of it is found."""
        self.name = name
        self._register = register
        self.line_count = 0
        self.size_bytes = 0
        self._blobs = blobs
        self._writer: BlobWriter | None = None
        self._is_committed = False
        self._sha256 = hashlib.sha256()
        self._held: list[bytes | memoryview] = []
        self._held_bytes = 0

    def add(self, line: bytes) -> None:
        """Write one finished line."""
        self.line_count += 1
        self.write(line)

    def write(self, chunk: bytes | memoryview) -> None:
        """Write a part of a line."""
        self._held.append(chunk)
        self._held_bytes += len(chunk)
        if self._held_bytes >= _HELD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        chunk = b"".join(self._held)
        self._held, self._held_bytes = [], 0
        if self._writer is None:
            self._register(self.name)
            self._writer = self._blobs.writer(self.name)
        self._writer.write(chunk)
        self._sha256.update(chunk)
        self.size_bytes += len(chunk)

    def commit(self) -> None:
        """Make the file durable, if it has any line."""
        self._flush()
        if self._writer is not None:
            self._writer.commit()
            self._is_committed = True

    def abort(self) -> None:
        """Leave nothing behind; a file that was committed is of no use without the other."""
        if self._is_committed:
            self._blobs.delete(self.name)
        elif self._writer is not None:
            self._writer.abort()

    @property
    def sha256(self) -> str:
        """Of all bytes written."""
        return self._sha256.hexdigest()
