"""An object on its way into a bucket: one request if it is small, else parts that are sent while more bytes come."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

from batchrunner.blobs.names import checked
from batchrunner.blobs.s3_client import S3Requests, digest, is_unknown_outcome
from batchrunner.errors import BatchrunnerError, BlobsUnavailable, NameTaken, NotFound

if TYPE_CHECKING:
    from types_boto3_s3.type_defs import CompletedPartTypeDef, HeadObjectOutputTypeDef

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Parts on their way at a time; a third gathers meanwhile.
_SENDING_MAX = 2
_SMALL_BYTES = 64 * 1024
# Source: Amazon S3, multipart upload limits.
_PARTS_MAX = 10_000


class _Part:
    """One part: its bytes until the service has them, then its tag."""

    __slots__ = ("content", "etag", "number", "sending")

    def __init__(self, number: int, content: bytes) -> None:
        self.number = number
        self.content = content
        self.etag = ""
        self.sending: Future[str] | None = None


class S3Writer:
    """See BlobWriter. Holds three parts at most. One that `is_replacing` takes the place of an object of that key."""

    def __init__(
        self,
        requests: S3Requests,
        threads: ThreadPoolExecutor,
        key: str,
        *,
        part_bytes: int,
        is_replacing: bool = False,
    ) -> None:
        self._requests = requests
        self._client = requests.client
        self._threads = threads
        self._key = key
        self._part_bytes = part_bytes
        self._is_replacing = is_replacing
        self._before: HeadObjectOutputTypeDef | None = None
        self._upload_id: str | None = None
        self._begun_count = 0
        self._held: deque[bytes | bytearray | memoryview] = deque()
        self._held_bytes = 0
        self._size_bytes = 0
        self._parts: list[_Part] = []
        self._is_over = False

    def write(self, chunk: bytes) -> None:
        """See BlobWriter. A part that could not be sent is sent again before more is taken."""
        if self._is_over:
            raise BlobsUnavailable(f"{self._key} has ended")
        while self._held_bytes >= self._part_bytes:
            self._send_part()
        self._hold(chunk)
        self._held_bytes += len(chunk)
        self._size_bytes += len(chunk)

    def _hold(self, chunk: bytes) -> None:
        """Keep a chunk until its part is cut: as it is, or with others where many are small."""
        last = self._held[-1] if self._held else None
        if len(chunk) >= _SMALL_BYTES:
            self._held.append(chunk)
        elif isinstance(last, bytearray) and len(last) < _SMALL_BYTES:
            last += chunk
        else:
            self._held.append(bytearray(chunk))

    def commit(self, last_part: str | None = None) -> None:
        """See BlobWriter."""
        if self._is_over:
            raise BlobsUnavailable(f"{self._key} has ended")
        key = self._key
        if last_part is not None:
            checked(last_part)
            key = f"{key.rpartition('/')[0]}/{last_part}" if "/" in key else last_part
        self._before = self._requests.head(key)
        if self._before is not None and not self._is_replacing:
            raise NameTaken(f"{key} exists already")
        if self._upload_id is None and self._held_bytes <= self._part_bytes:
            self._requests.put(key, b"".join(self._held))
        else:
            self._finish_upload()
            if key != self._key:
                self._requests.move(self._key, key)
        self._verify(key)
        self._drop_strays()
        self._is_over = True
        self._held.clear()

    def abort(self) -> None:
        """See BlobWriter."""
        self._is_over = True
        self._held.clear()
        # A part that lands behind the abort would stay.
        wait([each.sending for each in self._parts if each.sending is not None and not each.sending.cancel()])
        upload_id, self._upload_id = self._upload_id, None
        if upload_id is not None:
            try:
                self._requests.drop_upload(self._key, upload_id)
            except BatchrunnerError as error:
                logger.warning(
                    "the parts of %s are left to the sweep: %s", self._key, error, extra={"action": "parts_left"}
                )
        self._drop_strays()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _send_part(self) -> None:
        """Put a part on its way. When this raises it is not: earlier parts have to get there first."""
        if self._upload_id is None:
            self._upload_id = self._begin_upload()
        unsent = [part for part in self._parts if not part.etag]
        if len(unsent) >= _SENDING_MAX:
            self._await_part(unsent[0])
        if len(self._parts) >= _PARTS_MAX:
            limit = _PARTS_MAX * self._part_bytes
            raise BlobsUnavailable(
                f"{self._key} is larger than {limit:,} bytes", hint="Raise s3_part_bytes, at most to 16 MiB."
            )
        part = _Part(len(self._parts) + 1, self._cut())
        self._parts.append(part)
        part.sending = self._threads.submit(self._upload, part)

    def _cut(self) -> bytes:
        """Take a part's bytes off what is held, copied once; some services want all parts but the last alike."""
        left = min(self._held_bytes, self._part_bytes)
        self._held_bytes -= left
        pieces: list[bytes | bytearray | memoryview] = []
        while left:
            piece = self._held.popleft()
            if len(piece) > left:
                view = memoryview(piece)
                piece = view[:left]
                self._held.appendleft(view[left:])
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _await_part(self, part: _Part) -> None:
        """Return once the service has the part; one that failed before is sent again."""
        if part.etag:
            return
        sending, part.sending = part.sending, None
        part.etag = self._upload(part) if sending is None else sending.result()
        part.content = b""

    def _begin_upload(self) -> str:
        def begin() -> str:
            self._begun_count += 1
            return self._requests.begin_upload(self._key)

        return self._call(begin)

    def _drop_strays(self) -> None:
        """Drop uploads that were begun with an answer that never came."""
        if self._begun_count <= 1:
            return
        try:
            self._requests.drop_uploads(self._key)
        except BatchrunnerError as error:
            logger.warning("parts of %s may stay: %s", self._key, error, extra={"action": "parts_left"})

    def _upload(self, part: _Part) -> str:
        upload_id = self._upload_id
        assert upload_id is not None
        check = digest(part.content)
        answer = self._call(
            lambda: self._client.upload_part(
                Bucket=self._requests.bucket,
                Key=self._key,
                UploadId=upload_id,
                PartNumber=part.number,
                Body=part.content,
                ContentMD5=check,
            ),
        )
        return answer["ETag"]

    def _finish_upload(self) -> None:
        """Send what is left and have the parts joined; an object of the right size counts, whatever the answer was."""
        while self._held_bytes:
            self._send_part()
        for part in self._parts:
            self._await_part(part)
        upload_id = self._upload_id
        assert upload_id is not None
        parts: list[CompletedPartTypeDef] = [{"PartNumber": part.number, "ETag": part.etag} for part in self._parts]
        try:
            self._call(
                lambda: self._client.complete_multipart_upload(
                    Bucket=self._requests.bucket,
                    Key=self._key,
                    UploadId=upload_id,
                    MultipartUpload={"Parts": parts},
                ),
            )
        except BatchrunnerError as error:
            if not is_unknown_outcome(error) or not self._is_there():
                raise
            logger.info("%s is whole although: %s", self._key, error, extra={"action": "upload_was_joined"})
        self._upload_id = None

    def _is_there(self) -> bool:
        """Whether the object is the one that was to be, and not one that it was to replace."""
        found, before = self._requests.head(self._key), self._before
        if found is None or found["ContentLength"] != self._size_bytes:
            return False
        return before is None or (found["ETag"], found["LastModified"]) != (before["ETag"], before["LastModified"])

    def _call(self, function: Callable[[], _T]) -> _T:
        try:
            return self._requests.call(self._key, function)
        except NotFound as error:
            raise BlobsUnavailable(f"the upload of {self._key} is gone") from error.__cause__

    def _verify(self, key: str) -> None:
        found = self._requests.size_bytes(key)
        if found != self._size_bytes:
            raise BlobsUnavailable(f"{key} has {found} bytes in the bucket, {self._size_bytes} were written")
