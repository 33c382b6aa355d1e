"""Whole files of a user's own in buckets: the input and output of a run."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

from batchrunner.blobs.s3_address import S3Address
from batchrunner.blobs.s3_client import S3Requests
from batchrunner.blobs.s3_writer import S3Writer
from batchrunner.errors import BlobsUnavailable, InputChanged
from batchrunner.settings import Settings

_SENDING = 2
_READ_BYTES = 8 << 20


class Seen(NamedTuple):
    """What tells, without reading it, that an object is most likely the one that was read or written."""

    size_bytes: int
    modified_ns: int
    tag: int


class S3Files:
    """Objects by address. Blocks; close it, or use it as a context."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._requests: dict[str, S3Requests] = {}
        self._threads = ThreadPoolExecutor(_SENDING, thread_name_prefix="s3")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(self, address: S3Address) -> Seen | None:
        """Look at an object, None if there is none."""
        found = self._of(address).head(address.key)
        if found is None:
            return None
        modified_ns = int(found["LastModified"].timestamp()) * 1_000_000_000
        return Seen(found["ContentLength"], modified_ns, zlib.crc32(found["ETag"].encode()))

    def fetch(self, address: S3Address, target: Path) -> Seen:
        """Copy an object into a file, whole, in ranges that are each tried again; gives how the object looked.

        Raises:
            NotFound: there is no such object.
            InputChanged: it was written anew meanwhile.
        """
        requests = self._of(address)
        before = self.look(address)
        size_bytes = before.size_bytes if before is not None else 0
        with target.open("wb") as stream:
            for start in range(0, size_bytes, _READ_BYTES):
                stream.write(requests.read(address.key, start, min(size_bytes, start + _READ_BYTES)))
        if before is None or before != self.look(address) or target.stat().st_size != before.size_bytes:
            raise InputChanged(f"{address} changed while it was read", hint="Run the same command again.")
        return before

    def store(self, source: Path | None, address: S3Address) -> Seen:
        """Make an object of a file, empty without one, in place of what may be there; it appears whole."""
        requests = self._of(address)
        requests.drop_uploads(address.key)
        writer = S3Writer(
            requests, self._threads, address.key, part_bytes=self._settings.s3_part_bytes, is_replacing=True
        )
        try:
            if source is not None:
                with source.open("rb") as stream:
                    while chunk := stream.read(_READ_BYTES):
                        writer.write(chunk)
            writer.commit()
        except BaseException:
            writer.abort()
            raise
        seen = self.look(address)
        if seen is None:
            raise BlobsUnavailable(f"{address} was written and is gone")
        return seen

    def remove(self, address: S3Address) -> None:
        """Remove an object; a missing one is no error."""
        self._of(address).delete(address.key)

    def close(self) -> None:
        """Let go of threads and connections."""
        self._threads.shutdown()
        for requests in self._requests.values():
            requests.close()

    def _of(self, address: S3Address) -> S3Requests:
        if address.bucket not in self._requests:
            self._requests[address.bucket] = S3Requests(self._settings, address.bucket)
        return self._requests[address.bucket]
