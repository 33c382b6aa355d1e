"""Blobs in a bucket of an S3 service. Nothing here rests on conditional requests, which some services ignore: names are
new because their makers' random ids are in them, and an object that stands in the way is looked for first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

from batchrunner.blobs.names import checked, is_name
from batchrunner.blobs.s3_address import S3Address
from batchrunner.blobs.s3_client import S3Requests
from batchrunner.blobs.s3_writer import S3Writer
from batchrunner.errors import BlobsUnavailable, NameTaken, NotFound
from batchrunner.ports import Clock
from batchrunner.settings import Settings

if TYPE_CHECKING:
    from types_boto3_s3.type_defs import MultipartUploadTypeDef

logger = logging.getLogger(__name__)


# No upload takes longer.
_STALE_AGE = timedelta(days=1)


class S3Blobs:
    """Blobs below an address. Several processes may share it; any thread may call."""

    has_frozen_segments = True

    def __init__(self, address: S3Address, settings: Settings, clock: Clock) -> None:
        self._address = address
        self._requests = S3Requests(settings, address.bucket)
        self._client = self._requests.client
        self._clock = clock
        self._within = f"{address.key}/" if address.key else ""
        self._part_bytes = settings.s3_part_bytes
        self._threads = ThreadPoolExecutor(settings.s3_threads, thread_name_prefix="s3")

    def create_segment(self, name: str) -> S3Appender:
        """See Blobs."""
        key = self._key(name)
        if self._requests.size_bytes(key) is not None:
            raise NameTaken(f"{name} exists already")
        return S3Appender(self._requests, key)

    def writer(self, name: str) -> S3Writer:
        """See Blobs."""
        return S3Writer(self._requests, self._threads, self._key(name), part_bytes=self._part_bytes)

    def read(self, name: str, start: int, end: int) -> bytes:
        """See Blobs."""
        return self._requests.read(self._key(name), start, end)

    def size_bytes(self, name: str) -> int:
        """See Blobs."""
        size_bytes = self._requests.size_bytes(self._key(name))
        if size_bytes is None:
            raise NotFound(f"{name} does not exist")
        return size_bytes

    def exists(self, name: str) -> bool:
        """See Blobs."""
        return self._requests.size_bytes(self._key(name)) is not None

    def list(self, prefix: str) -> Iterator[str]:
        """See Blobs."""
        names = (each.removeprefix(self._within) for each in self._requests.keys(self._within + prefix))
        yield from filter(is_name, names)

    def delete(self, name: str) -> None:
        """See Blobs."""
        self._requests.delete(self._key(name))

    def free_bytes(self) -> int | None:
        """See Blobs."""
        return None

    def keep_reserve(self, size_bytes: int) -> None:
        """See Blobs. A bucket has no space to hold back."""

    def release_reserve(self) -> None:
        """See Blobs."""

    def drop_unfinished(self, *, dead: Collection[str] = ()) -> int:
        """See Blobs."""
        before = self._clock.now() - _STALE_AGE
        return self._drop_uploads(
            lambda upload: upload["Initiated"] <= before or any(word in upload["Key"] for word in dead)
        )

    def drop_begun(self) -> int:
        """See Blobs."""
        return self._drop_uploads(lambda _upload: True)

    def _drop_uploads(self, is_stale: Callable[[MultipartUploadTypeDef], bool]) -> int:
        stale = [each for each in self._requests.uploads(self._within) if is_stale(each)]
        for each in stale:
            logger.info("unfinished upload of %s is dropped", each["Key"], extra={"action": "upload_dropped"})
            self._requests.drop_upload(each["Key"], each["UploadId"])
        return len(stale)

    def download_url(self, name: str, *, expires_s: float, filename: str) -> str | None:
        """See Blobs."""
        plain = "".join(each if each.isascii() and (each.isalnum() or each in "._- ") else "_" for each in filename)
        disposition = f'attachment; filename="{plain}"'
        return self._client.generate_presigned_url(
            "get_object",
            Params={
                "Bucket": self._address.bucket,
                "Key": self._key(name),
                "ResponseContentDisposition": disposition,
            },
            ExpiresIn=int(expires_s),
        )

    def close(self) -> None:
        """Let go of threads and connections."""
        self._threads.shutdown(wait=True)
        self._requests.close()

    def _key(self, name: str) -> str:
        return self._within + checked(name)


class S3Appender:
    """See Appender. One request writes it whole; a `sync` that failed repeats the same bytes under the same name."""

    def __init__(self, requests: S3Requests, key: str) -> None:
        self._requests = requests
        self._key = key
        self._chunks: list[bytes] = []
        self._is_closed = False

    def append(self, chunk: bytes) -> None:
        """See Appender. What comes behind a sync has the next one write all again; a journal does not do that."""
        self._check_open()
        self._chunks.append(chunk)

    def sync(self) -> None:
        """See Appender."""
        self._check_open()
        self._requests.put(self._key, b"".join(self._chunks))

    def close(self) -> None:
        """See Appender."""
        self._is_closed = True
        self._chunks.clear()

    def _check_open(self) -> None:
        if self._is_closed:
            raise BlobsUnavailable(f"{self._key} has ended")
